"""Generate a part of a dataset, fetch its annotations, or check the local folder that holds it."""

import os

from qwt_mmdet.runtime import step

with step(snakemake):
    from qwt_mmdet.config import of_repeat
    from qwt_mmdet.steps.prepare import prepare_dataset

    prepare_dataset(
        *of_repeat(
            snakemake.config["datasets"][snakemake.wildcards.dataset], snakemake.wildcards.part
        ),
        folder=os.path.dirname(snakemake.output.source),
        output=snakemake.output.source,
        most_bytes=int(snakemake.config["max_download_gb"] * 10**9),
    )
