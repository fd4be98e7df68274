"""Rank a quantized detector's layers by the harm that each does alone, and suggest mixed bits."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.inputs import Inputs
    from qwt_mmdet.steps.rank import rank

    rank(
        Inputs.of(snakemake, job, "calibration"),
        warmup=snakemake.input.warmup,
        name=snakemake.wildcards.quantization,
        images=snakemake.params.settings["images"],
        average_bits=snakemake.params.settings.get("average_bits"),
        table=snakemake.output.table,
        suggestion=snakemake.output.suggestion,
    )
