"""Run a detector on a shard of the evaluation images; the evaluation gathers what all shards found."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.evaluate import evaluate_shard
    from qwt_mmdet.steps.inputs import Inputs

    evaluate_shard(
        Inputs.of(snakemake, job, "evaluation"),
        warmup=snakemake.input.get("warmup"),
        compensation=snakemake.input.get("compensation"),
        shard=(int(snakemake.wildcards.shard), int(snakemake.wildcards.shards)),
        output=snakemake.output.predictions,
    )
