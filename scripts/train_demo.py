"""Train the demo's detector on ``shapes``: `snakemake train_demo`, or by hand with the options below.

The images are drawn first, where they are not there already. The checkpoint holds weights and
plain values only, so torch loads it without executing anything.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from qwt_mmdet.files import sha256_file, write_atomically, write_json
from qwt_mmdet.shapes import generate_shapes

CONFIG = (
    Path(__file__).resolve().parents[1] / "workflow/demo/mask-rcnn_swin-xxs-p4-w8_fpn_shapes.py"
)
VALIDATION_IMAGES = 300

logger = logging.getLogger("train_demo")
_LIBRARIES: list[Any] = []


def _declare_torchvision_operators() -> None:
    """Let ``import torchvision``, which mmengine does to log its version, pass beside a CPU torch.

    PyPI's torchvision is built for CUDA; its operators are missing there, and it only describes them.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in {
        "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    }.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + schema)
    _LIBRARIES.append(library)  # the operators live as long as the library object


def train(
    *,
    config: Path,
    output: Path,
    work_dir: Path,
    images: int,
    epochs: int | None,
    seed: int,
    use_gpu: bool,
) -> None:
    """Draw the images, train, evaluate on the val split, and write checkpoint and metrics.

    Args:
        output: the checkpoint; the metrics are written beside it with the suffix ``.json``.
        work_dir: drawn images and the training's own log.
        images: number of training images.
        epochs: instead of the number in the configuration; the first half at half the image size.
        seed: of images, weights and order.
    """
    data_root = work_dir / "data"
    generate_shapes(data_root, seed=seed, images={"train": images, "val": VALIDATION_IMAGES})
    if not use_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # mmengine takes any GPU that it sees

    import torch

    if not torch.cuda.is_available():
        _declare_torchvision_operators()
    from mmengine.config import Config
    from mmengine.runner import Runner

    settings = Config.fromfile(config)
    settings.work_dir = str(work_dir)
    settings.randomness = {"seed": seed}
    for loader in (settings.train_dataloader, settings.test_dataloader):
        loader.dataset.data_root = str(data_root)
    settings.test_evaluator.ann_file = str(data_root / "annotations" / "instances_val.json")
    if epochs is not None:
        settings.train_cfg.max_epochs = epochs
        settings.param_scheduler[1].update(end=epochs, T_max=epochs - 1)
        settings.custom_hooks[0].switch_epoch = epochs // 2

    start = time.monotonic()
    runner = Runner.from_cfg(settings)
    model = runner.train()
    minutes = (time.monotonic() - start) / 60
    metrics: dict[str, Any] = {name: float(value) for name, value in runner.test().items()}
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    classes = list(settings.classes)
    meta = {"dataset_meta": {"classes": classes}, "seed": seed, "images": images}
    with write_atomically(output) as partial:
        torch.save({"meta": meta, "state_dict": weights}, partial)
    digest = sha256_file(output)
    write_json(
        output.with_suffix(".json"),
        {**metrics, "training_minutes": minutes, "sha256": digest},
        indent=2,
    )
    logger.info("Trained for %.0f minutes; sha256 of %s: %s", minutes, output, digest)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="mmdet configuration")
    parser.add_argument("--images", type=int, default=6000, help="training images to draw")
    parser.add_argument("--epochs", type=int, help="instead of the configuration's; at least 2")
    parser.add_argument("--work-dir", type=Path, default=Path("results/train_demo/work"))
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--output", type=Path, default=Path("results/train_demo/demo.pth"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.epochs is not None and options.epochs < 2:
        parser.error("--epochs must be at least 2: one at half the image size, one at the whole.")
    return options


def main() -> None:
    if "snakemake" in globals():
        job = globals()["snakemake"]
        logging.basicConfig(filename=job.log[0], level=logging.INFO)
        train(
            config=Path(job.input.config),
            output=Path(job.output.checkpoint),
            work_dir=Path(job.params.work_dir),
            images=job.params.images,
            epochs=None,
            seed=job.params.seed,
            use_gpu=job.resources.get("gpu", 0) > 0,
        )
        return
    logging.basicConfig(level=logging.INFO)
    options = _parse(sys.argv[1:])
    train(
        config=options.config,
        output=options.output,
        work_dir=options.work_dir,
        images=options.images,
        epochs=options.epochs,
        seed=options.seed,
        use_gpu=options.device == "auto",
    )


if __name__ == "__main__":
    main()
