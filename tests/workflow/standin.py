"""A small YOLOX with random weights in the place of the examples' detector, and images that it knows."""

import json
from pathlib import Path

import torch
from qwt_mmdet import load_detector, make_loader
from qwt_mmdet.demo.shapes import generate_shapes
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.evaluation.predict import predict

CONFIG = """
_base_ = "mmdet::yolox/yolox_nano_8xb8-300e_coco.py"
model = dict(
    backbone=dict(deepen_factor=0.1, widen_factor=0.125, use_depthwise=False),
    neck=dict(in_channels=[32, 64, 128], out_channels=16, use_depthwise=False),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, use_depthwise=False),
)
test_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(128, 128), keep_ratio=True),
            dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
            ),
        ]
    )
)
"""
SPLITS = {"calibration": ("train2017", 14), "val": ("val2017", 4)}
OBJECTS = 8
"""Of each image: what the detector is surest of."""


def write_detector(config: Path, checkpoint: Path) -> None:
    """Weights that make the outputs vary from place to place, and some of them sure."""
    config.write_text(CONFIG)
    torch.manual_seed(0)
    model = random_detector(str(config))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1
    with torch.no_grad():
        model.train()
        model.bbox_head(model.extract_feat(255 * torch.rand(4, 3, 128, 128)))
        for kind, std, bias in (("cls", 0.3, -2), ("obj", 0.3, -2), ("reg", 0.05, 1)):
            for convolution in getattr(model.bbox_head, f"multi_level_conv_{kind}"):
                torch.nn.init.normal_(convolution.weight, std=std)
                torch.nn.init.constant_(convolution.bias, bias)
    torch.save({"state_dict": model.state_dict()}, checkpoint)


def inside(record: dict, image: dict) -> bool:
    """Whether a box of at least a pixel lies in its image."""
    x, y, width, height = record["bbox"]
    outside = min(x, y) < 0 or x + width > image["width"] or y + height > image["height"]
    return not outside and min(width, height) >= 1


def write_images(root: Path, config: Path, checkpoint: Path) -> None:
    """Generated images in COCO's layout; their objects are what the detector finds."""
    generate_shapes(root, seed=3, images={split: count for split, (_, count) in SPLITS.items()})
    model = load_detector(str(config), checkpoint)
    names = model.dataset_meta["classes"]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    for split, (name, _) in SPLITS.items():
        (root / split).rename(root / name)
        drawn = root / "annotations" / f"instances_{split}.json"
        images = json.loads(drawn.read_text())["images"]
        drawn.unlink()
        content = {"images": images, "categories": categories, "annotations": []}
        path = root / "annotations" / f"instances_{name}.json"
        path.write_text(json.dumps({**content, "info": {"image_root": str(root / name)}}))
        found = predict(model, make_loader(model.cfg, path), path).records
        for image in images:
            own = [one for one in found if one["image_id"] == image["id"] and inside(one, image)]
            content["annotations"] += sorted(own, key=lambda one: -one["score"])[:OBJECTS]
        for number, entry in enumerate(content["annotations"], start=1):
            width, height = entry["bbox"][2:]
            entry.update(id=number, area=width * height, iscrowd=0)
        path.write_text(json.dumps(content))
