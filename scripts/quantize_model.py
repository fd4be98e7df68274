"""Calibrate a detector's quantizers, or take the warmup file that the config supplies."""

from qwt_mmdet.runtime import step, workers

with step(snakemake) as device:
    from qwt_mmdet.steps.quantize import quantize

    quantize(
        config=snakemake.params.config,
        config_options=snakemake.params.config_options,
        checkpoint=snakemake.input.checkpoint,
        annotations=snakemake.input.annotations,
        settings=snakemake.params.settings,
        supplied=snakemake.input.supplied or None,
        output=snakemake.output.warmup,
        device=device,
        batch_size=snakemake.config["calibration"]["batch_size"],
        workers=workers(snakemake, "calibration"),
        seed=snakemake.params.seed,
    )
