"""Copy or download a model's weights, verify them, and keep the weights alone."""

from qwt_mmdet.runtime import step

with step(snakemake):
    from qwt_mmdet.steps.fetch import fetch_checkpoint

    fetch_checkpoint(
        snakemake.params.source,
        snakemake.output.checkpoint,
        sha256=snakemake.params.sha256,
        most_bytes=int(snakemake.config["max_download_gb"] * 10**9),
    )
