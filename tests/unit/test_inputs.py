"""What config, checkpoint and annotations decide together is told before anything is computed."""

import json
from types import SimpleNamespace

import pytest
import torch
from qwt_mmdet.config import resolve
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.errors import QwtError
from qwt_mmdet.runtime import Job
from qwt_mmdet.steps import quantize as steps_quantize
from qwt_mmdet.steps import search as steps_search
from qwt_mmdet.steps.inputs import Inputs

NANO = "yolox/yolox_nano_8xb8-300e_coco.py"
SETTINGS = {"weight_bits": 8, "activation_bits": 8}
OPTIONS = {
    "model.bbox_head.num_classes": 2,
    "test_dataloader.dataset.metainfo.classes": ["cat", "dog"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save({"state_dict": random_detector(NANO, OPTIONS).state_dict()}, path)
    return path


@pytest.fixture
def inputs(checkpoint, tmp_path):
    """Inputs of a calibration, by the classes of both annotation files."""

    def annotations(split, classes):
        images = [{"id": n, "file_name": f"{n}.jpg", "width": 64, "height": 48} for n in range(20)]
        box = {"category_id": 1, "bbox": [1, 1, 9, 9], "area": 81}
        content = {
            "info": {"image_root": str(tmp_path)},
            "images": images,
            "annotations": [{"id": 1 + n, "image_id": n, **box} for n in range(20)],
            "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
        }
        path = tmp_path / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    def make(evaluation, calibration=("cat", "dog")):
        annotations("val2017", evaluation)
        config = {
            "datasets": {"own": {"type": "coco", "root": str(tmp_path)}},
            "models": {"nano": {"config": NANO, "checkpoint": str(checkpoint), "dataset": "own"}},
            "quantization": {"w8a8": SETTINGS},
            "compensation": {},
        }
        snakemake = SimpleNamespace(
            config=resolve(config),
            params=SimpleNamespace(config=NANO, config_options=OPTIONS, get=lambda *_: 0),
            input=SimpleNamespace(
                checkpoint=checkpoint, annotations=annotations("train2017", calibration)
            ),
            wildcards=SimpleNamespace(model="nano"),
            threads=1,
        )
        return Inputs.of(snakemake, Job("cpu", 0.0), "calibration")

    return make


class Calibrated(Exception):
    pass


@pytest.fixture(autouse=True)
def nothing_computed(monkeypatch):
    def calibrate(*arguments, **options):
        raise Calibrated

    monkeypatch.setattr(steps_quantize, "calibrate", calibrate)
    monkeypatch.setattr(steps_search, "measure_candidates", calibrate)
    monkeypatch.setattr(steps_search, "islice", lambda *_: [])


def quantize(inputs, tmp_path):
    steps_quantize.quantize(inputs, settings=SETTINGS, output=tmp_path / "warmup.pth")


def search(inputs, tmp_path, metrics=()):
    bits = {"weight_bits": [4], "activation_bits": [8], "images": 1}
    steps_search.measure(
        inputs, settings=SETTINGS, **bits, output=tmp_path / "candidates.json", metrics=metrics
    )


@pytest.mark.parametrize("step", [quantize, search])
def test_classes_that_do_not_fit_are_told_before_a_calibration(inputs, tmp_path, step):
    with pytest.raises(QwtError, match="classes of the model and of the annotations differ"):
        step(inputs(("cat", "dogs")), tmp_path)
    with pytest.raises(Calibrated):  # which reads images alone
        step(inputs(("cat", "dog", "cow"), calibration=("tree",)), tmp_path)


@pytest.mark.parametrize(
    ("calibration", "metric", "message"),
    [(("cat", "dog"), "segm", "has no masks"), (("cow",), "bbox", "annotations differ")],
)
def test_what_a_search_cannot_score_is_told_before_it_measures(
    inputs, tmp_path, calibration, metric, message
):
    with pytest.raises(QwtError, match=message):
        search(inputs(("cat", "dog"), calibration), tmp_path, {metric})
    with pytest.raises(Calibrated):
        search(inputs(("cat", "dog")), tmp_path, {"bbox"})
