"""Calibrate a detector's quantizers, or take the warmup file that the config supplies."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.inputs import Inputs
    from qwt_mmdet.steps.quantize import quantize, read_recipe

    recipe = snakemake.input.recipe
    quantize(
        Inputs.of(snakemake, job, "calibration"),
        settings=read_recipe(recipe) if recipe else snakemake.params.settings,
        supplied=snakemake.params.supplied["path"],
        output=snakemake.output.warmup,
        activation_cache=snakemake.config["activation_cache"],
    )
