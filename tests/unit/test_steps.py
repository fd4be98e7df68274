"""The steps of a run, from files to files, on each device."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import tiny
import torch
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.files import write_json
from qwt_mmdet.quantization.state import load_warmup
from qwt_mmdet.runtime import Job
from qwt_mmdet.steps import search as steps_search
from qwt_mmdet.steps.compensate import compensate
from qwt_mmdet.steps.evaluate import evaluate
from qwt_mmdet.steps.inputs import Inputs
from qwt_mmdet.steps.quantize import quantize
from qwt_mmdet.steps.rank import rank

pytestmark = pytest.mark.usefixtures("device")

DEMO = tiny.DEMO
PLAIN = {
    "weight_bits": 8, "activation_bits": 8, "weight_range": "minmax", "activation_range": "minmax",
    "rounding": "nearest",
}  # fmt: skip
SMALL = {
    **tiny.SMALL_MASK_RCNN,
    "model.test_cfg.rpn.max_per_img": 20,
    "model.test_cfg.rcnn.max_per_img": 3,
    "test_dataloader.dataset.pipeline.1.scale": (64, 64),
}


@pytest.fixture
def inputs(tmp_path):
    """A Mask R-CNN with random weights, and ten images whose objects are what it finds there."""
    torch.manual_seed(0)
    torch.save({"state_dict": random_detector(DEMO, SMALL).state_dict()}, tmp_path / "weights.pth")
    generator = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 64} for i in range(10)]
    for image in images:
        pixels = cv2.resize(generator.integers(0, 256, (8, 8, 3), np.uint8), (64, 64))
        cv2.imwrite(str(tmp_path / image["file_name"]), pixels)
    classes = random_detector(DEMO, SMALL).dataset_meta["classes"]
    content = {
        "info": {"image_root": str(tmp_path)},
        "images": images,
        "annotations": [
            {"id": 1 + i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81,
             "iscrowd": 0, "segmentation": [[1, 1, 10, 1, 10, 10]]}
            for i in range(10)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
    }  # fmt: skip
    write_json(tmp_path / "annotations.json", content)
    place = "cpu" if tiny.device.type == "cpu" else "cuda:0"
    found = Inputs(
        str(DEMO), SMALL, tmp_path / "weights.pth", tmp_path / "annotations.json", Job(place, 0.0),
        seed=0, batch_size=2, workers=0,
    )  # fmt: skip
    evaluate(found, metrics=tmp_path / "m.json", predictions=tmp_path / "predictions.json")
    content["annotations"] = [
        {
            **{key: one[key] for key in ("image_id", "category_id", "bbox", "segmentation")},
            "id": number, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0,
        }
        for number, one in enumerate(json.loads((tmp_path / "predictions.json").read_text()), 1)
    ]  # fmt: skip
    write_json(tmp_path / "annotations.json", content)
    return found


def evaluated(inputs, tmp_path, **files):
    evaluate(inputs, metrics=tmp_path / "m.json", predictions=tmp_path / "p.json", **files)
    return json.loads((tmp_path / "m.json").read_text())


def test_a_detector_is_quantized_compensated_ranked_and_evaluated(inputs, tmp_path):
    for metric in ("bbox", "segm"):
        assert evaluated(inputs, tmp_path)[metric]["AP"] == pytest.approx(1)
    warmup, compensation = tmp_path / "warmup.pth", tmp_path / "compensation.pth"
    quantize(inputs, settings=PLAIN, output=warmup)
    compensate(
        inputs, warmup=warmup, settings={"kind": "linear", "gate": "none"}, output=compensation,
        blocks=tmp_path / "blocks.csv",
    )  # fmt: skip
    metrics = evaluated(inputs, tmp_path, warmup=warmup, compensation=compensation)
    assert 0 < metrics["bbox"]["AP"] <= 1
    rank(inputs, warmup=warmup, images=1, table=tmp_path / "t.csv")
    header, first, *_ = (tmp_path / "t.csv").read_text().splitlines()
    assert header == "layer,sqnr_db,weights,weight_bits,activation_bits"
    assert first.startswith("backbone.")
    assert first.endswith(",8,8")
    on_the_cpu = dataclasses.replace(inputs, job=Job("cpu", 0.0)).load()
    assert not next(load_warmup(on_the_cpu, warmup).parameters()).is_cuda


@pytest.mark.parametrize(
    "question",
    [{"best": {"average_weight_bits": 5}}, {"smallest": {"max_drop": 0.5}, "rounds": 1}],
)
def test_a_search_measures_layers_and_chooses_a_recipe(inputs, tmp_path, question):
    """Which is scored on the images where full precision finds all."""
    files = {name: tmp_path / name for name in ("candidates", "recipe", "summary")}
    steps_search.measure(
        inputs, settings=PLAIN, weight_bits=(4, 8), activation_bits=(8,), images=1,
        output=files["candidates"], metrics={"bbox"},
    )  # fmt: skip
    steps_search.choose(
        inputs, name="mixed", search={"candidates": (4, 8), **question}, settings=PLAIN, **files
    )
    about = json.loads(files["summary"].read_text())
    assert 4 <= about["average_weight_bits"] <= 8
    assert len(about["rounds"]) == question.get("rounds", 0)
