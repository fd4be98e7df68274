"""Time an exported detector beside the same model's file in full precision."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.benchmark import benchmark_exported

    benchmark_exported(
        job,
        quantized=snakemake.input.graph,
        full_precision=snakemake.input.full_precision,
        runtime=snakemake.wildcards.runtime,
        output=snakemake.output.benchmark,
    )
