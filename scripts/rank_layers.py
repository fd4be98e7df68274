"""Rank a quantized detector's layers by the harm that each does alone, and suggest mixed bits."""

from qwt_mmdet.runtime import step, workers

with step(snakemake) as device:
    from qwt_mmdet.steps.rank import rank

    rank(
        config=snakemake.params.config,
        config_options=snakemake.params.config_options,
        checkpoint=snakemake.input.checkpoint,
        annotations=snakemake.input.annotations,
        warmup=snakemake.input.warmup,
        name=snakemake.wildcards.quantization,
        images=snakemake.params.settings["images"],
        average_bits=snakemake.params.settings.get("average_bits"),
        table=snakemake.output.table,
        suggestion=snakemake.output.suggestion,
        device=device,
        workers=workers(snakemake, "calibration"),
    )
