"""Rank a quantized detector's layers by the harm that each does alone."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.inputs import Inputs
    from qwt_mmdet.steps.rank import rank

    rank(
        Inputs.of(snakemake, job, "calibration"),
        warmup=snakemake.input.warmup,
        images=snakemake.params.settings["images"],
        table=snakemake.output.table,
    )
