"""Evaluate the quantized detector."""

from qwt_mmdet.runtime import step, workers

with step(snakemake) as device:
    from qwt_mmdet.steps.evaluate import evaluate

    evaluate(
        config=snakemake.params.config,
        config_options=snakemake.params.config_options,
        checkpoint=snakemake.input.checkpoint,
        warmup=snakemake.input.warmup,
        annotations=snakemake.input.annotations,
        metrics=snakemake.output.metrics,
        predictions=snakemake.output.predictions,
        device=device,
        batch_size=snakemake.params.loading["batch_size"],
        workers=workers(snakemake, "evaluation"),
        seed=snakemake.params.seed,
    )
