"""Fit the linear compensation of each block on the calibration images."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.compensate import compensate
    from qwt_mmdet.steps.inputs import Inputs

    compensate(
        Inputs.of(snakemake, job, "calibration"),
        warmup=snakemake.input.warmup,
        settings=snakemake.params.settings,
        output=snakemake.output.compensation,
        blocks=snakemake.output.blocks,
        activation_cache=snakemake.config["activation_cache"],
    )
