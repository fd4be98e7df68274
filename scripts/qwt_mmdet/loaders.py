"""Images as the model's own test pipeline prepares them."""

import os
from pathlib import Path
from typing import Any

from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS  # noqa: F401  (its import registers mmdet's transforms)
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader, Dataset

from .errors import QwtError
from .files import read_json


def inference_pipeline(config: Config) -> list[dict[str, Any]]:
    """The config's test pipeline without the steps that load ground truth."""
    dataset = config.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    pipeline = dataset.get("pipeline") or config.get("test_pipeline")
    if not pipeline:
        raise QwtError(
            "The model config has no test pipeline; add test_dataloader.dataset.pipeline."
        )
    return [step for step in pipeline if not str(step["type"]).endswith("LoadAnnotations")]


class ImageDataset(Dataset):
    """The images of a COCO annotation file, through a test pipeline.

    Args:
        config: mmdet config with the test pipeline.
        annotations: annotation file whose ``info.image_root`` is the image folder.
    """

    def __init__(self, config: Config, annotations: str | os.PathLike[str]) -> None:
        content = read_json(annotations, what="annotation file")
        self.images = content["images"]
        self.root = Path(content["info"]["image_root"])
        with DefaultScope.overwrite_default_scope("mmdet"):
            self.pipeline = Compose(inference_pipeline(config))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        return self.pipeline(
            {
                "img_path": str(self.root / image["file_name"]),
                "img_id": image["id"],
                "height": image["height"],
                "width": image["width"],
            }
        )


def make_loader(
    config: Config,
    annotations: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    workers: int = 0,
) -> DataLoader:
    """Loader over all images of an annotation file, in its order.

    Yields:
        Batches as mmdet's test step takes them: {"inputs": [image tensors],
        "data_samples": [DetDataSample]}.

    Raises:
        QwtError: the annotation file is unreadable or the config has no test pipeline.
    """
    return DataLoader(
        ImageDataset(config, annotations),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=pseudo_collate,
    )
