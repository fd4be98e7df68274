"""Test pipelines on a generated image: what is refused before anything runs, and what is not."""

import copy
import random

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from qwt_mmdet.data.loaders import inference_pipeline
from qwt_mmdet.data.trial import try_pipeline
from qwt_mmdet.errors import QwtError

LOAD = {"type": "LoadImageFromFile"}
RESIZE = {"type": "Resize", "scale": (128, 128), "keep_ratio": True}
PACK = {"type": "PackDetInputs"}


def config(*steps):
    return Config({"test_dataloader": {"dataset": {"pipeline": copy.deepcopy(list(steps))}}})


def flip(prob, **more):
    return {"type": "RandomFlip", "prob": prob, **more}


@TRANSFORMS.register_module()
class OwnNoise(BaseTransform):
    """Draws from a generator that nobody seeds."""

    def transform(self, results):
        results["img"] = results["img"] + np.random.default_rng().integers(0, 9, dtype=np.uint8)
        return results


@TRANSFORMS.register_module()
class OwnReader(BaseTransform):
    """Needs files that the generated image has not."""

    def transform(self, results):
        raise FileNotFoundError(results["img_path"] + ".depth")


RESIZED = {"type": "RandomResize", "scale": (128, 128)}
BY_CHANCE = "changes images by chance"
MOVES = "moves what is in an image"


@pytest.mark.parametrize(
    ("what", "step"),
    [
        (BY_CHANCE, flip(0.5)),
        (BY_CHANCE, flip(0.001)),
        (BY_CHANCE, flip([0.2, 0.001], direction=["horizontal", "vertical"])),
        (BY_CHANCE, {"type": "RandomChoice", "transforms": [[flip(1.0)], []]}),
        (BY_CHANCE, {"type": "RandomApply", "prob": 0.001, "transforms": [flip(1.0)]}),
        (BY_CHANCE, {"type": "RandomApply", "prob": 1.0, "transforms": [flip(0.001)]}),
        (BY_CHANCE, {**RESIZED, "ratio_range": (0.5, 2.0)}),
        (BY_CHANCE, {"type": "RandomChoiceResize", "scales": [(128, 128), (96, 96)]}),
        (BY_CHANCE, {"type": "RandomCrop", "crop_size": (64, 64)}),
        (BY_CHANCE, {"type": "RandomErasing", "n_patches": (1, 3), "ratio": 0.2}),
        (BY_CHANCE, {"type": "PhotoMetricDistortion"}),
        (BY_CHANCE, {"type": "YOLOXHSVRandomAug"}),
        (BY_CHANCE, {"type": "OwnNoise"}),
        (MOVES, flip(1.0)),
        (MOVES, flip(1.0, direction="vertical")),
        (MOVES, {"type": "CenterCrop", "crop_size": 64}),
        (MOVES, {**RESIZE, "scale": (96, 96)}),
    ],
    ids=str,
)
def test_a_transform_that_works_by_chance_or_leaves_the_boxes_behind_is_named(what, step):
    message = rf"dataset\.pipeline\.2 .*\({step['type']}\) {what}.*remove it"
    with pytest.raises(QwtError, match=message):
        try_pipeline(config(LOAD, RESIZE, step, PACK))


@pytest.mark.parametrize(
    "step",
    [
        flip(0.0),
        {**RESIZED, "ratio_range": (1.0, 1.0)},
        {"type": "RandomChoiceResize", "scales": [(128, 128)]},
        {"type": "RandomApply", "prob": 0.0, "transforms": [flip(1.0)]},
        {"type": "RandomCrop", "crop_size": (999, 999)},
        {"type": "RandomGrayscale", "prob": 1.0},
        {"type": "AutoContrast", "prob": 1.0},
        {"type": "Pad", "size_divisor": 32},
        {"type": "Normalize", "mean": [1.0, 2.0, 3.0], "std": [9.0, 9.0, 9.0]},
    ],
    ids=str,
)
def test_a_transform_that_does_nothing_by_chance_stays(step):
    steps = [step] if "Resize" in step["type"] else [RESIZE, step]
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    try_pipeline(config(LOAD, *steps, PACK))
    after = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


FAILS = "fails on an image"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [LOAD, {**RESIZE, "type": "Resise"}, PACK],
            r"pipeline\.1 .*'Resise'.* did you mean Resize",
        ),
        (
            [LOAD, {**RESIZE, "scales": 3}, PACK],
            r"pipeline\.1 .*\(Resize\) cannot be built.*scales",
        ),
        ([LOAD, {**RESIZE, "scale": "a"}, PACK], rf"pipeline\.1 .*\(Resize\) {FAILS}"),
        ([LOAD, {"type": "LoadAnnotations"}, flip("a"), PACK], r"pipeline\.2 .*\(RandomFlip\) can"),
        ([RESIZE, PACK], rf"pipeline\.0 .*\(Resize\) {FAILS}"),
        ([{"type": "LoadImageFromNDArray"}, RESIZE, PACK], rf"pipeline\.0 .*{FAILS}"),
        ([LOAD, RESIZE], "ends with Resize, .*let it end with dict"),
        ([LOAD, PACK], "no scale_factor, .*add a Resize to test_dataloader.dataset.pipeline"),
        (
            [LOAD, RESIZE, {**PACK, "meta_keys": ("img_id",)}],
            "no ori_shape, .*name it in meta_keys",
        ),
        ([LOAD, RESIZE, {**PACK, "meta_keys": ("ori_shape",)}], "no img_id, .*in meta_keys"),
    ],
)
def test_what_cannot_feed_a_detector_is_named_with_its_key(steps, message):
    with pytest.raises(QwtError, match=message):
        try_pipeline(config(*steps))


def test_a_step_of_ones_own_may_need_real_images(caplog):
    try_pipeline(config(LOAD, RESIZE, {"type": "OwnReader"}, PACK))
    assert "cannot be checked on a generated image: test_dataloader" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("backend_args", {"backend": "petrel", "path_mapping": {"data/": "s3://data/"}}, "petrel"),
        ("backend_args", {"backend": "lmdb", "db_path": "train.lmdb"}, "lmdb"),
        ("backend_args", {"backend": "memcached", "server_list_cfg": "a"}, "memcached"),
        ("backend_args", {"backend": "oss"}, "oss"),
        ("file_client_args", {"backend": "petrel"}, "petrel"),
        ("file_client_args", {"prefix": "s3"}, "s3"),
        ("backend_args", {"backend": "local"}, None),
        ("file_client_args", {"backend": "disk"}, None),
    ],
)
def test_local_images_are_read_whatever_backend_the_config_names(caplog, key, value, told):
    settings = config({**LOAD, key: value}, RESIZE, PACK)
    try_pipeline(settings)
    assert ("reads from" in caplog.text) == (told is not None)
    assert told is None or f"pipeline.0.{key} of the model config reads from {told}" in caplog.text
    assert inference_pipeline(settings)[0][key] == (value if told is None else None)
