"""Evaluate a detector: in full precision, quantized, or quantized and compensated."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.plan import Variant
    from qwt_mmdet.plan.run import shards_note
    from qwt_mmdet.steps.evaluate import evaluate
    from qwt_mmdet.steps.inputs import Inputs

    evaluate(
        Inputs.of(snakemake, job, "evaluation"),
        warmup=snakemake.input.get("warmup"),
        compensation=snakemake.input.get("compensation"),
        metrics=snakemake.output.metrics,
        predictions=snakemake.output.predictions,
        shards=snakemake.input.shards,
        note=shards_note(snakemake.config, Variant(**snakemake.wildcards)),
    )
