"""What model.json tells of pixels, boxes and scores is what mmdet computes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmdet.models.dense_heads import FCOSHead, RetinaHead, RPNHead
from mmengine.config import Config, ConfigDict
from PIL import Image
from qwt_mmdet.data.loaders import make_loader
from qwt_mmdet.errors import QwtError
from qwt_mmdet.export import onnx_file, processing
from qwt_mmdet.files import write_json

SIZE = (64, 96)
STRIDES = (8, 16)
CLASSES = 3


def outputs(head: torch.nn.Module) -> list[list[torch.Tensor]]:
    """What a head returns for random maps."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(1, 8, SIZE[0] // stride, SIZE[1] // stride, generator=generator)
        for stride in STRIDES
    ]
    with torch.no_grad():
        return list(head.eval()(maps))


def candidates(head: torch.nn.Module, found: list[list[torch.Tensor]]) -> np.ndarray:
    """Boxes and scores, [n, 5], of each class of all candidates, by mmdet."""
    keep_all = ConfigDict(score_thr=-1.0, nms_pre=10_000, min_bbox_size=-1)
    meta = {"img_shape": SIZE, "scale_factor": (1.0, 1.0)}
    (result,) = head.predict_by_feat(
        *found, batch_img_metas=[meta], cfg=keep_all, rescale=False, with_nms=False
    )
    return np.column_stack([result.bboxes, result.scores])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def clipped(boxes: np.ndarray) -> np.ndarray:
    height, width = SIZE
    return np.clip(boxes, 0, [width, height, width, height])


def ordered(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows[:, 4])]


def test_anchors_and_deltas_give_the_boxes_of_a_retinanet():
    torch.manual_seed(0)
    head = RetinaHead(
        CLASSES, 8, feat_channels=8, stacked_convs=1, anchor_generator={
            "type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 1,
            "ratios": [0.5, 1.0], "strides": STRIDES,
        },
        bbox_coder={
            "type": "DeltaXYWHBBoxCoder", "target_means": [0.1, 0, 0, 0],
            "target_stds": [0.5, 1.0, 2.0, 1.0],
        },
    )  # fmt: skip
    found = outputs(head)
    rule = processing._anchors(head)
    rows = []
    for stride, anchors, scores, deltas in zip(STRIDES, rule["anchors"], *found, strict=True):
        y, x = np.mgrid[: scores.shape[2], : scores.shape[3]] * stride
        for number, (x1, y1, x2, y2) in enumerate(anchors):
            d = deltas[0, 4 * number : 4 * number + 4].numpy()
            d = d * np.reshape(rule["stds"], (4, 1, 1)) + np.reshape(rule["means"], (4, 1, 1))
            width, height = x2 - x1, y2 - y1
            cx, cy = x + (x1 + x2) / 2 + d[0] * width, y + (y1 + y2) / 2 + d[1] * height
            w, h = width * np.exp(d[2]), height * np.exp(d[3])
            box = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1).reshape(-1, 4)
            for label in range(CLASSES):
                score = sigmoid(scores[0, number * CLASSES + label].numpy()).reshape(-1, 1)
                rows.append(np.hstack([clipped(box), score]))
    assert rule["clipped"]
    expected = candidates(head, found)
    np.testing.assert_allclose(ordered(np.vstack(rows)), ordered(expected), atol=1e-3)


def test_points_and_distances_give_the_boxes_of_an_fcos():
    torch.manual_seed(0)
    head = FCOSHead(CLASSES, 8, feat_channels=8, stacked_convs=1, strides=STRIDES, norm_cfg=None)
    found = outputs(head)
    rule = processing._anchors(head)
    rows = []
    for stride, scores, distances, factors in zip(STRIDES, *found, strict=True):
        y, x = (np.mgrid[: scores.shape[2], : scores.shape[3]] + rule["offset"]) * stride
        b = distances[0].numpy()
        box = np.stack([x - b[0], y - b[1], x + b[2], y + b[3]], -1).reshape(-1, 4)
        for label in range(CLASSES):
            score = sigmoid(scores[0, label].numpy()) * sigmoid(factors[0, 0].numpy())
            rows.append(np.hstack([clipped(box), score.reshape(-1, 1)]))
    expected = candidates(head, found)
    np.testing.assert_allclose(ordered(np.vstack(rows)), ordered(expected), atol=1e-3)


@pytest.mark.parametrize("changed", ["add_ctr_clamp", None])
def test_a_head_that_decodes_in_another_way_has_no_rule(changed):
    head = FCOSHead(CLASSES, 8, feat_channels=8, stacked_convs=1, strides=STRIDES, norm_cfg=None)
    if changed:
        setattr(head.bbox_coder, changed, True)
    assert processing._decodes_as_mmdet_does(head) == (changed is None)


def detector(*steps: dict[str, Any], **preprocessor: Any) -> Any:
    """What is asked of a detector: a test pipeline with these steps in the middle, and a data preprocessor."""
    load = [] if steps and steps[0]["type"].startswith("Load") else [{"type": "LoadImageFromFile"}]
    pack = {"type": "PackDetInputs", "meta_keys": ()}
    dataset = {"pipeline": [*load, *steps, pack]}
    return SimpleNamespace(
        cfg=Config({"test_dataloader": {"dataset": dataset}}),
        data_preprocessor=DetDataPreprocessor(**preprocessor),
    )


def target_size(sides: tuple[int, int], pad: dict[str, Any]) -> list[int]:
    """Height and width that the description of a padding asks for."""
    if pad["size"]:
        return pad["size"]
    sides = [max(sides)] * 2 if pad["square"] else sides
    divisor = pad["divisor"] or 1
    sides = [-(-side // divisor) * divisor for side in sides]
    return [(side | pad.get("or", 0)) + pad.get("plus", 0) for side in sides]


def as_described(photo: Path, rule: dict[str, Any]) -> np.ndarray:
    """The graph's input by what the description says: load, resize, pad, colours, mean and std, pad."""
    image = cv2.imread(str(photo))
    image = image.astype(np.float32) if rule["load"]["to_float32"] else image
    if resize := rule["resize"]:
        size = [resize["width"], resize["height"]]
        if resize["keep_ratio"]:
            height, width = image.shape[:2]
            long, short = max(size), min(size)
            scale = min(long / max(height, width), short / min(height, width))
            size = [int(side * scale + 0.5) for side in (width, height)]
        if resize["library"] == "pillow":
            image = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        else:
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    if pad := rule["pad"]:
        height, width = target_size(image.shape[:2], pad)
        padded = np.full((height, width, 3), pad["value"], np.float32)
        top = left = 0
        if pad["where"].startswith("around"):
            top, left = height // 2 - image.shape[0] // 2, width // 2 - image.shape[1] // 2
            image = image[: 2 * (height // 2), : 2 * (width // 2)]
        padded[top : top + image.shape[0], left : left + image.shape[1]] = image
        image = padded
    image = image[:, :, ::-1] if rule["colors"] == "RGB" else image
    image = (image.astype(np.float32) - rule["mean"]) / rule["std"]
    height, width = (-(-s // rule["size_divisor"]) * rule["size_divisor"] for s in image.shape[:2])
    padded = np.full((height, width, 3), rule["pad_value"], np.float32)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded.transpose(2, 0, 1)


MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
NORMALIZE = {"type": "Normalize", "mean": MEAN, "std": STD, "to_rgb": True}
RESIZE = {"type": "Resize", "scale": (60, 40), "keep_ratio": True}
DIVISIBLE = {"type": "Pad", "size_divisor": 32}
CENTRE = {
    "type": "RandomCenterCropPad", "ratios": None, "border": None, "mean": MEAN, "std": STD,
    "to_rgb": True, "test_mode": True,
}  # fmt: skip
IN_FLOATS = {"type": "LoadImageFromFile", "to_float32": True, "imdecode_backend": "pillow"}


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (detector(RESIZE, NORMALIZE, DIVISIBLE), (64, 64)),  # as configs of mmdet 2.x
        (detector(RESIZE, DIVISIBLE, NORMALIZE, {"type": "RandomFlip", "prob": 0.0}), (64, 64)),
        (
            detector(
                {"type": "mmcv.Resize", "scale": 48},
                NORMALIZE,
                {"type": "Pad", "size": (64, 56), "pad_val": 1},
                mean=[0.1, 0.2, 0.3], std=[2.0, 3.0, 4.0], bgr_to_rgb=True,
            ),
            (56, 64),
        ),
        (
            detector(
                IN_FLOATS, {**RESIZE, "backend": "cv2"},
                {"type": "Pad", "pad_to_square": True, "pad_val": {"img": (114.0, 113.0, 112.0)}},
                mean=MEAN, std=STD, pad_size_divisor=32, pad_value=7,
            ),
            (64, 64),
        ),
        (detector({**RESIZE, "backend": "pillow"}, bgr_to_rgb=True), None),
        (detector(IN_FLOATS, {**CENTRE, "test_pad_add_pix": 1, "test_pad_mode": ["logical_or", 31]}), None),
        (detector(IN_FLOATS, {**CENTRE, "test_pad_mode": ["size_divisor", 7]}, mean=[1.0], std=[3.0]), None),
        (detector(IN_FLOATS, NORMALIZE, {**CENTRE, "mean": [1.0, 0.0, -1.0]}), None),
    ],
)  # fmt: skip
def test_the_description_makes_the_pixels_that_the_test_pipeline_makes(model, size, tmp_path):
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.random.default_rng(0).integers(0, 256, (63, 90, 3), np.uint8))
    image = {"id": 1, "file_name": photo.name, "height": 63, "width": 90}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "object"}]}
    write_json(tmp_path / "a.json", {"info": {"image_root": str(tmp_path)}, **content})
    (batch,) = make_loader(model.cfg, tmp_path / "a.json")
    expected = model.data_preprocessor(batch, False)["inputs"][0].numpy()
    rule = processing.preprocessing(model)
    np.testing.assert_allclose(as_described(photo, rule), expected, atol=1e-4)
    if size is not None:
        assert onnx_file.image_size(rule)[0] == expected.shape[1:] == size


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([RESIZE, {"type": "RandomFlip", "prob": 0.5}], "has RandomFlip with the probability 0.5"),
        ([RESIZE, {"type": "RandomCrop", "crop_size": (8, 8)}], "has RandomCrop,"),
        ([{"type": "FixShapeResize", "width": 8, "height": 8}], "has FixShapeResize,"),
        ([RESIZE, RESIZE], "has Resize behind another Resize"),
        ([NORMALIZE, RESIZE], "has Resize behind another Resize, a padding or a normalisation"),
        ([DIVISIBLE, DIVISIBLE], "has Pad behind another padding"),
        ([{"type": "Resize", "scale_factor": 0.5}], "has Resize without a scale in pixels"),
        ([{**DIVISIBLE, "padding_mode": "edge"}], "has Pad with padding_mode edge"),
        ([{"type": "DefaultFormatBundle"}], "transform DefaultFormatBundle .* cannot be built"),
    ],
)
def test_a_transform_that_the_description_has_no_words_for_is_refused(steps, message):
    with pytest.raises(QwtError, match=message):
        processing.preprocessing(detector(*steps))


def test_a_data_preprocessor_of_another_kind_is_refused():
    class Gamma(DetDataPreprocessor):
        def forward(self, data: dict, training: bool = False) -> dict:
            return super().forward(data, training)

    model = detector(RESIZE)
    model.data_preprocessor = Gamma()
    with pytest.raises(QwtError, match="The data preprocessor is a Gamma"):
        processing.preprocessing(model)


@pytest.mark.parametrize(
    ("agnostic", "proposals", "expected"),
    [
        (False, False, {"class_by_class": True}),
        (True, False, {"class_by_class": False}),
        (False, True, {"class_by_class": False, "level_by_level": True}),
    ],
)
def test_boxes_suppress_each_other_in_one_way(agnostic, proposals, expected):
    nms = {"type": "nms", "iou_threshold": 0.5, **({"class_agnostic": True} if agnostic else {})}
    head = RPNHead(8, 1, feat_channels=8) if proposals else FCOSHead(CLASSES, 8, norm_cfg=None)
    head.test_cfg = ConfigDict(nms=nms)
    found = processing._suppression(head, dict(head.test_cfg.nms))
    assert found == {"type": "nms", "iou_threshold": 0.5, **expected}
