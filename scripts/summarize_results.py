"""Put all results into one table, with intervals from the paired bootstrap."""

from qwt_mmdet.runtime import step

with step(snakemake):
    from qwt_mmdet.plan import ExportRow, Failure, ResultRow
    from qwt_mmdet.reporting.tables import summarize

    summarize(
        [ResultRow(**row) for row in snakemake.params.rows],
        snakemake.output.table,
        snakemake.output.document,
        resamples=snakemake.params.resamples,
        seed=snakemake.params.seed,
        processes=snakemake.threads,
        failed=[Failure(**failure) for failure in snakemake.params.failed],
        exports=[ExportRow(**row) for row in snakemake.params.exports],
        exports_table=snakemake.output.get("exports"),
        tradeoffs=snakemake.params.tradeoffs,
    )
