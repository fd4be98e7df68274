"""Render the report that people read: one HTML file without external parts."""

from qwt_mmdet.runtime import step

with step(snakemake):
    from qwt_mmdet.plan import ResultRow
    from qwt_mmdet.reporting.html import render

    rows = [ResultRow(**row) for row in snakemake.params.rows]
    render(rows, snakemake.input.document, snakemake.output.report)
