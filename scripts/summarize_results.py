"""Put all results into one table, with intervals from the paired bootstrap."""

from qwt_mmdet.runtime import step

with step(snakemake):
    from qwt_mmdet.reporting.tables import summarize

    summarize(
        snakemake.params.rows,
        snakemake.output.table,
        snakemake.output.document,
        resamples=snakemake.params.resamples,
        seed=snakemake.params.seed,
        processes=snakemake.threads,
        failed=snakemake.params.failed,
        exports=snakemake.params.exports,
        exports_table=snakemake.output.get("exports"),
    )
