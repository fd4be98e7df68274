"""Evaluate an exported detector, whose graph a runtime computes."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.exported import evaluate_exported
    from qwt_mmdet.steps.inputs import Inputs

    evaluate_exported(
        Inputs.of(snakemake, job, "evaluation"),
        graph=snakemake.input.graph,
        runtime=snakemake.wildcards.runtime,
        metrics=snakemake.output.metrics,
        predictions=snakemake.output.predictions,
    )
