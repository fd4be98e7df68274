"""The demo's configuration and checkpoint are what their model card says."""

import re
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones.swin import SwinBlock
from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from qwt_mmdet.demo.shapes import CLASSES, IMAGE_SIZE, generate_shapes
from qwt_mmdet.files import sha256_file

DEMO = Path(__file__).resolve().parents[2] / "workflow" / "demo"
NAME = "mask-rcnn_swin-xxs-p4-w8_fpn_shapes"
CHECKPOINT = DEMO / f"{NAME}.pth"
TOLERANCE = 0.005
SEED = 1  # of the images, in the default configuration and on the card


@pytest.fixture(scope="module")
def config():
    register_all_modules()
    return Config.fromfile(DEMO / f"{NAME}.py")


@pytest.fixture(scope="module")
def detector(config):
    model = MODELS.build(config.model)
    checkpoint = torch.load(CHECKPOINT, weights_only=True)  # runs no code from the file
    model.load_state_dict(checkpoint["state_dict"])
    assert checkpoint["meta"]["dataset_meta"]["classes"] == list(CLASSES)
    return model.eval()


def card_table() -> dict[int, dict[str, float]]:
    """AP by number of images: rows ``| first 60 | 0.123 | 0.123 |`` of the model card."""
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| first (\d+) \| ([\d.]+) \| ([\d.]+) \|", card, flags=re.MULTILINE)
    return {int(n): {"bbox": float(bbox), "segm": float(segm)} for n, bbox, segm in rows}


def test_configuration_and_checkpoint_are_those_of_the_card(config, detector):
    assert tuple(config.metainfo.classes) == CLASSES
    assert config.test_dataloader.dataset.metainfo.classes == CLASSES
    assert config.image_scale == (IMAGE_SIZE, IMAGE_SIZE)
    blocks = [module for module in detector.backbone.modules() if isinstance(module, SwinBlock)]
    assert any(block.attn.shift_size > 0 for block in blocks)
    assert CHECKPOINT.stat().st_size <= 20e6
    assert sha256_file(CHECKPOINT) in (DEMO / "README.md").read_text(encoding="utf-8")
    assert all(torch.isfinite(value).all() for value in detector.state_dict().values())


@pytest.mark.slow
def test_detector_reaches_the_ap_of_its_card(config, detector, tmp_path):
    images = min(card_table())
    generate_shapes(tmp_path, seed=SEED, images={"val": images})
    settings = config.copy()
    settings.test_dataloader.dataset.data_root = str(tmp_path)
    settings.test_evaluator.ann_file = str(tmp_path / "annotations" / "instances_val.json")
    dataset = DATASETS.build(settings.test_dataloader.dataset)
    metric = METRICS.build(settings.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    with torch.no_grad():
        for index in range(images):
            found = detector.test_step(pseudo_collate([dataset[index]]))
            metric.process({}, [sample.to_dict() for sample in found])
    measured = metric.evaluate(images)
    for kind, ap in card_table()[images].items():
        assert measured[f"coco/{kind}_mAP"] == pytest.approx(ap, abs=TOLERANCE)
