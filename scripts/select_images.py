"""Choose calibration and evaluation images, which never overlap, and fetch them if remote."""

import os

from qwt_mmdet.runtime import step

with step(snakemake):
    from qwt_mmdet.datasets import select_images

    select_images(
        snakemake.params.settings,
        name=snakemake.wildcards.dataset,
        source=snakemake.input.source,
        folder=os.path.dirname(snakemake.input.source),
        calibration=snakemake.output.calibration,
        evaluation=snakemake.output.evaluation,
    )
