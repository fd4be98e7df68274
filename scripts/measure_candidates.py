"""Measure what each layer of a detector does to the heads at each number of bits."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.inputs import Inputs
    from qwt_mmdet.steps.search import measure

    measure(
        Inputs.of(snakemake, job, "calibration"),
        settings=snakemake.params.settings,
        output=snakemake.output.candidates,
        **snakemake.params.candidates,
    )
