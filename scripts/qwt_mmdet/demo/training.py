"""The training of the demo's detector on ``shapes``.

First, missing images are drawn. Then backbone and neck are pre-trained to label the pixels of small images. This
takes minutes and replaces a slow start from random features. Then the detector is trained by its mmdet
configuration. The checkpoint holds only weights and plain values, so torch loads it without executing code.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from ..files import sha256_file, write_atomically, write_json
from ..progress import progress
from .shapes import generate_shapes

VALIDATION_IMAGES = 300
LABELLING_BATCH_SIZE = 8
LABELLING_RATE = 1e-3
LABELLING_STRIDE = 4  # between labelled pixels: the stride of the neck's finest level

logger = logging.getLogger(__name__)


def _read_settings(config: Path, *, data_root: Path, work_dir: Path, seed: int) -> Any:
    """The mmdet configuration with this run's folders and seed."""
    from mmengine.config import Config

    settings = Config.fromfile(config)
    settings.work_dir = str(work_dir)
    settings.randomness = {"seed": seed}
    for loader in (settings.train_dataloader, settings.test_dataloader):
        loader.dataset.data_root = str(data_root)
    settings.test_evaluator.ann_file = str(data_root / "annotations" / "instances_val.json")
    return settings


def _progress_hook() -> Any:
    """Hook that tells the terminal how far the training is; mmengine's own lines go to the log."""
    from mmengine.hooks import Hook

    class ProgressHook(Hook):
        def after_train_iter(self, runner: Any, batch_idx: int, *_: Any, **__: Any) -> None:
            if not self.every_n_train_iters(runner, 100):
                return
            loss = runner.message_hub.get_scalar("train/loss").mean(100)
            logger.info(
                "Training: epoch %d of %d, %d of %d batches, loss %.3f",
                runner.epoch + 1, runner.max_epochs, batch_idx + 1,
                len(runner.train_dataloader), loss,
            )  # fmt: skip

    return ProgressHook()


def _pixel_classes(sample: Any, shape: tuple[int, int]) -> Any:
    """Class of every fourth pixel, 0 where there is no object: int64, shape (height/4, width/4)."""
    import torch

    classes = torch.zeros(shape, dtype=torch.int64)
    masks = torch.from_numpy(sample.gt_instances.masks.masks).bool()
    for mask, label in zip(masks, sample.gt_instances.labels, strict=True):
        classes[: mask.shape[0], : mask.shape[1]][mask] = label + 1
    offset = LABELLING_STRIDE // 2
    return classes[offset::LABELLING_STRIDE, offset::LABELLING_STRIDE]


def _learn_to_label_pixels(settings: Any, *, epochs: int, seed: int, output: Path) -> None:
    """Train backbone and neck on a dense task; write their weights with the detector's names.

    Each level of the neck has its own loss (deep supervision: Lee et al., arXiv 1409.5185). Without it, the fine
    levels solve the task alone, and the deep stages decay to constants.
    """
    import torch
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.device import get_device
    from mmengine.runner import Runner, set_random_seed
    from torch.nn import functional

    register_all_modules()
    set_random_seed(seed)
    device = get_device()
    detector = MODELS.build(settings.model)
    detector.init_weights()
    classifiers = torch.nn.ModuleList(
        torch.nn.Conv2d(settings.model.neck.out_channels, len(settings.classes) + 1, 1)
        for _ in range(settings.model.neck.num_outs)
    )
    model: Any = torch.nn.ModuleDict(
        {"backbone": detector.backbone, "neck": detector.neck, "classifiers": classifiers}
    ).to(device)
    detector.data_preprocessor.to(device)
    model.train()
    loader_settings = {**settings.train_dataloader, "batch_size": LABELLING_BATCH_SIZE}
    loader = Runner.build_dataloader(loader_settings, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LABELLING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LABELLING_RATE, total_steps=epochs * len(loader), pct_start=0.1
    )
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        losses = []
        for batch in progress(
            loader, f"Labelling pixels, epoch {epoch + 1} of {epochs}", unit="batch"
        ):
            batch = detector.data_preprocessor(batch, training=True)
            shape = batch["inputs"].shape[-2:]
            target = torch.stack([_pixel_classes(s, shape) for s in batch["data_samples"]])
            target = target.to(device)
            levels = model["neck"](model["backbone"](batch["inputs"]))
            scores = [
                functional.interpolate(classify(level), target.shape[-2:], mode="bilinear")
                for classify, level in zip(model["classifiers"], levels, strict=True)
            ]
            total = (functional.cross_entropy(score, target) for score in scores)
            loss = sum(total, torch.zeros((), device=device)) / len(scores)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % 100 == 0:
                logger.info("Labelling pixels: mean loss %.3f", sum(losses[-100:]) / 100)
    learnt = {k: v.cpu() for k, v in model.state_dict().items() if not k.startswith("classifiers.")}
    with write_atomically(output) as partial:
        torch.save({"state_dict": learnt}, partial)


def train(
    *,
    config: Path,
    output: Path,
    work_dir: Path,
    images: int,
    labelling_epochs: int,
    seed: int,
    use_gpu: bool,
) -> None:
    """Draw the images, train, evaluate on the val split, and write checkpoint and metrics.

    Args:
        output: the checkpoint; the metrics are written beside it with the suffix ``.json``.
        work_dir: drawn images and the training's own log.
        config: mmdet configuration.
        images: number of training images.
        labelling_epochs: epochs of pixel labelling before the training of the detector.
        seed: of images, weights and order.
    """
    data_root = work_dir / "data"
    generate_shapes(data_root, seed=seed, images={"train": images, "val": VALIDATION_IMAGES})
    if not use_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # mmengine takes any GPU that it sees

    import torch

    from ..imports import importable_torchvision

    settings = _read_settings(config, data_root=data_root, work_dir=work_dir, seed=seed)
    start = time.monotonic()
    settings.load_from = str(work_dir / "labelling.pth")
    _learn_to_label_pixels(
        settings, epochs=labelling_epochs, seed=seed, output=Path(settings.load_from)
    )
    with importable_torchvision():  # mmengine logs its version
        from mmengine.runner import Runner

        runner = Runner.from_cfg(settings)
    runner.register_hook(_progress_hook())
    model = runner.train()
    minutes = (time.monotonic() - start) / 60
    metrics = {name: float(value) for name, value in runner.test().items()}
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    meta = {
        "dataset_meta": {"classes": list(settings.classes)},
        "seed": seed,
        "training_images": images,
    }
    with write_atomically(output) as partial:
        torch.save({"meta": meta, "state_dict": weights}, partial)
    digest = sha256_file(output)
    write_json(
        output.with_suffix(".json"),
        {**metrics, "training_minutes": minutes, "sha256": digest},
        indent=2,
    )
    logger.info("Trained for %.0f minutes; sha256 of %s: %s", minutes, output, digest)
