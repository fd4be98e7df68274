"""Render the report that people read: one HTML file without external parts."""

from qwt_mmdet.runtime import step

with step(snakemake):
    from qwt_mmdet.reporting.html import render

    render(snakemake.params.rows, snakemake.input.document, snakemake.output.report)
