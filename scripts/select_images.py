"""Choose a part's images, of which the other part has none, and fetch them if remote."""

import os

from qwt_mmdet.runtime import step

with step(snakemake):
    from qwt_mmdet.config import of_repeat
    from qwt_mmdet.steps.select import select_images

    select_images(
        *of_repeat(
            snakemake.config["datasets"][snakemake.wildcards.dataset], snakemake.wildcards.part
        ),
        name=snakemake.wildcards.dataset,
        source=snakemake.input.source,
        folder=os.path.dirname(snakemake.input.source),
        annotations=snakemake.output.annotations,
        files=snakemake.params.files,
        seen=snakemake.params.images,
        most_bytes=int(snakemake.config["max_download_gb"] * 10**9),
    )
