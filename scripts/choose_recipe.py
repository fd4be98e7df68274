"""Choose the bits of each layer of a detector, from a mixed-precision search."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.inputs import Inputs
    from qwt_mmdet.steps.search import choose

    choose(
        Inputs.of(snakemake, job, "calibration"),
        name=snakemake.wildcards.quantization.replace("@", "-"),
        search=snakemake.params.search,
        settings=snakemake.params.settings,
        candidates=snakemake.input.candidates,
        recipe=snakemake.output.recipe,
        summary=snakemake.output.summary,
        activation_cache=snakemake.config["activation_cache"],
    )
