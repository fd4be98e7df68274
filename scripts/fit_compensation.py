"""Fit the linear compensation of each block on the calibration images."""

from qwt_mmdet.runtime import step, workers

with step(snakemake) as device:
    from qwt_mmdet.steps.compensate import compensate

    compensate(
        config=snakemake.params.config,
        config_options=snakemake.params.config_options,
        checkpoint=snakemake.input.checkpoint,
        warmup=snakemake.input.warmup,
        annotations=snakemake.input.annotations,
        settings=snakemake.params.settings,
        output=snakemake.output.compensation,
        blocks=snakemake.output.blocks,
        device=device,
        batch_size=snakemake.config["calibration"]["batch_size"],
        workers=workers(snakemake, "calibration"),
        seed=snakemake.params.seed,
        activation_cache=snakemake.config["activation_cache"],
    )
