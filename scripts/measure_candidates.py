"""Measure the error of each layer of a detector at the heads, at each number of bits."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.config import Search
    from qwt_mmdet.steps.inputs import Inputs
    from qwt_mmdet.steps.search import measure

    smallest = Search(
        **snakemake.config["quantization"][snakemake.wildcards.quantization.partition("@")[0]]
    ).smallest
    measure(
        Inputs.of(snakemake, job, "calibration"),
        settings=snakemake.params.settings,
        output=snakemake.output.candidates,
        metric=smallest and smallest.metric,
        activation_cache=snakemake.config["activation_cache"],
        **snakemake.params.candidates,
    )
