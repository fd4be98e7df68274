"""Time an exported detector beside the same model's file in full precision."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.export.benchmark import benchmark
    from qwt_mmdet.files import write_json

    measured = benchmark(
        snakemake.input.graph, snakemake.input.full_precision, snakemake.wildcards.runtime
    )
    write_json(snakemake.output.benchmark, measured | job.account(), indent=1)
