"""Train the demo's detector on generated images."""

from pathlib import Path

from qwt_mmdet.runtime import step

with step(snakemake) as device:
    from qwt_mmdet.demo.training import train

    train(
        config=Path(snakemake.input.config),
        output=Path(snakemake.output.checkpoint),
        work_dir=Path(snakemake.params.work_dir),
        images=snakemake.params.images,
        labelling_epochs=snakemake.params.labelling_epochs,
        seed=snakemake.params.seed,
        use_gpu=device != "cpu",
    )
