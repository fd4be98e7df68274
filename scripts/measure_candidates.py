"""Measure the error of each layer of a detector at the heads, at each number of bits."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.plan import Plan
    from qwt_mmdet.steps.inputs import Inputs
    from qwt_mmdet.steps.search import measure

    plan = Plan(snakemake.config)
    names = snakemake.wildcards.model, snakemake.wildcards.measurement
    measure(
        Inputs.of(snakemake, job, "calibration"),
        output=snakemake.output.candidates,
        metrics=plan.scored(*names),
        asked=plan.asked_sizes(*names),
        activation_cache=snakemake.config["activation_cache"],
        **snakemake.params.candidates,
    )
