"""Five real detectors on a few real images: quantized, compensated, exported, and computed by both runtimes."""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import yaml
from qwt_mmdet import (
    CompensationSettings,
    QuantizationSettings,
    apply_compensation,
    calibrate,
    evaluate_detector,
    export_onnx,
    fit_compensation,
    load_detector,
    load_exported,
    make_loader,
    quantize_model,
)
from qwt_mmdet.steps.prepare import prepare_dataset
from qwt_mmdet.steps.select import select_images
from running import REAL_COCO, REAL_DETECTORS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(
        not (REAL_COCO.is_dir() and REAL_DETECTORS.is_dir()),
        reason=f"no real detectors in {REAL_DETECTORS}, or no real COCO sample in {REAL_COCO}",
    ),
]
CALIBRATION_IMAGES = 24
NOISE = 0.04
"""Of an AP on so few images: a loss of 0.010 on 100 images was 0.041 on 12 of them, and 0.007 on 24."""
RUNTIMES = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
DETECTORS = {
    "yolox_nano": 24,
    "rtmdet_nano_person": 24,
    "ssd_mobilenetv2_person": 24,
    "ssd_mobilenetv2_traffic": 24,
    "atss_mobilenetv2_traffic": 12,  # large images take long
}
"""Evaluation images, by detector."""


@pytest.fixture(scope="module")
def described() -> dict:
    """The configuration that lies beside the detectors."""
    return yaml.safe_load((REAL_DETECTORS / "config.yaml").read_text())


def place(path: str) -> str:
    """Where a file of that configuration is here; what MMDetection ships keeps its name."""
    for folder in (REAL_COCO, REAL_DETECTORS):
        if f"/{folder.name}" in path:
            return str(folder) + path.partition(f"/{folder.name}")[2]
    return path


@pytest.fixture
def images(request, described, tmp_path) -> dict[str, Path]:
    """Annotation files of a few images of each part."""
    name = described["models"][request.getfixturevalue("name")]["dataset"]
    settings = described["datasets"][name]
    settings = {**settings, "root": place(settings["root"])}
    counts = {
        "calibration": CALIBRATION_IMAGES,
        "evaluation": DETECTORS[request.getfixturevalue("name")],
    }
    for part, count in counts.items():
        settings[part] = {**settings[part], "images": count}
    chosen = {}
    for part in counts:
        source, chosen[part] = tmp_path / f"{part}_source.json", tmp_path / f"{part}.json"
        prepare_dataset(settings, part, folder=tmp_path, output=source)
        select_images(
            settings, part, name=name, source=source, folder=tmp_path,
            annotations=chosen[part], files=tmp_path / f"{part}_files.json",
        )  # fmt: skip
    return chosen


def test_the_configuration_names_these_detectors(described):
    assert described["models"].keys() == DETECTORS.keys()


@pytest.mark.parametrize("name", DETECTORS)
def test_eight_bits_lose_little_and_the_file_finds_the_same(
    name, images, described, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(REAL_DETECTORS)
    entry = described["models"][name]
    files = place(entry["config"]), place(entry["checkpoint"])
    model, reference = (load_detector(*files) for _ in range(2))

    def ap(detector) -> float:
        return evaluate_detector(detector, images["evaluation"])[0]["bbox"]["AP"]

    full = ap(model)
    assert full > 0.1, "the detector is what it should be"
    export_onnx(model, tmp_path / "full.onnx")
    loader = make_loader(model.cfg, images["calibration"])
    quantize_model(model, QuantizationSettings(8, 8, scope="detector", grids="integer"))
    calibrate(model, loader)
    compensation = fit_compensation(model, reference, loader, CompensationSettings(kind="affine"))
    apply_compensation(model, compensation)
    simulated = ap(model)
    assert simulated > full - NOISE
    export_onnx(model, tmp_path / "model.onnx", calibration=islice(loader, 8))
    for runtime in RUNTIMES:
        exported = ap(load_exported(tmp_path / "model.onnx", runtime).model)
        assert exported == pytest.approx(simulated, abs=NOISE), runtime
    before, after = ((tmp_path / f"{kind}.onnx").stat().st_size for kind in ("full", "model"))
    assert after < 0.4 * before
