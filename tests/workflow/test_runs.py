"""Whole runs, from the checkpoint to the report."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from qwt_mmdet.cli import app
from running import REAL_COCO, ROOT, Workflow
from typer.testing import CliRunner

pytestmark = pytest.mark.slow


def real(test):
    """Mark a test that needs real images."""
    missing = pytest.mark.skipif(
        not REAL_COCO.is_dir(), reason=f"no real COCO sample in {REAL_COCO}"
    )
    return pytest.mark.real(missing(test))


CONFIGS = ROOT / "tests" / "configs"
RULES_PER_MODEL = {
    "fetch_checkpoint": "yolox_nano",
    "prepare_dataset": "coco_real/calibration",
    "select_images": "coco_real/evaluation",
    "evaluate_baseline": "yolox_nano",
    "quantize_model": "yolox_nano/w4a8",
    "evaluate_quantized": "yolox_nano/w4a8",
    "fit_compensation": "yolox_nano/w4a8/qwt",
    "evaluate_compensated": "yolox_nano/w4a8/qwt",
    "export_model": "yolox_nano/w4a8/qwt",
    "evaluate_exported": "yolox_nano/w4a8/qwt/onnxruntime",
    "benchmark_exported": "yolox_nano/w4a8/qwt/onnxruntime",
}


def test_the_demo_goes_from_its_checkpoint_to_the_report(workflow: Workflow):
    """Without data from elsewhere; masks, attention, folding and error feedback included.

    A target that fails costs no other one, and once it is mended, nothing is left of it.
    """
    config = str(CONFIGS / "demo_tiny.yaml")
    results = workflow.folder / "results"
    broken = yaml.safe_load(Path(config).read_text())
    wrong = {"weight_bits": 8, "activation_bits": 8, "overrides": [{"pattern": "no", "skip": True}]}
    broken["quantization"]["wrong"] = wrong
    workflow.configure(broken)
    done = workflow.run("--cores", "2", "--keep-going")
    assert done.returncode != 0
    said = "quantize_model demo wrong: The override pattern 'no' matches no layer"
    assert said in done.stdout
    with open(results / "summary.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["failed"][: len(said)] for row in rows] == ["", "", said, said]
    assert [row["AP_compensated"] != "" for row in rows] == [True, True, False, False]
    page = (results / "report.html").read_text()
    assert "This run is not complete" in page
    assert "matches no layer" in page

    done = workflow.run("--cores", "2", "--configfile", config)
    assert done.returncode == 0, done.stdout
    assert "rule quantize_model" not in done.stdout, "what is finished is not computed again"
    assert "not complete" not in (results / "report.html").read_text()
    assert not (results / "unfinished.json").exists()
    with open(workflow.folder / "results" / "summary.csv", newline="") as stream:
        box, mask = csv.DictReader(stream)
    assert (box["metrics"], mask["metrics"]) == ("bbox", "segm")
    for row in (box, mask):
        assert float(row["AP_baseline"]) > 0.3
        assert float(row["AP_quantized"]) != float(row["AP_baseline"])
    assert "demo" in (workflow.folder / "results" / "report.html").read_text()
    assert workflow.jobs("--configfile", config) == {}

    shards = yaml.safe_load(Path(config).read_text()) | {"evaluation": {"shards": 4}}
    workflow.configure(shards)
    assert workflow.jobs() == {}, "what is done stays"
    predictions = results / "demo" / "w4a4" / "quantized" / "predictions.json"
    before = predictions.read_bytes()
    shutil.rmtree(predictions.parent)
    target = str(predictions.relative_to(workflow.folder))
    done = workflow.run("--cores", "2", target)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("rule evaluate_shard") == 4
    assert predictions.read_bytes() == before
    assert workflow.jobs(target, "--configfile", config) == {}, "one job would give the same"

    jobs = workflow.jobs("sensitivity", "--configfile", config)
    assert jobs == {"rank_layers": 1, "sensitivity": 1}
    done = workflow.run("sensitivity", "--cores", "2", "--configfile", config)
    assert done.returncode == 0, done.stdout
    folder = workflow.folder / "results" / "demo" / "w4a4"
    with open(folder / "sensitivity.csv", newline="") as stream:
        ranked = list(csv.DictReader(stream))
    assert all(row["layer"].startswith("backbone.") for row in ranked)
    assert float(ranked[0]["sqnr_db"]) < float(ranked[-1]["sqnr_db"])


def test_a_search_quantizes_to_its_recipe(workflow: Workflow):
    config = yaml.safe_load((CONFIGS / "demo_tiny.yaml").read_text())
    wanted = {"best": {"average_weight_bits": 6}, "like": "w4a4", "candidates": [4, 8], "images": 1}
    config["quantization"]["mixed"] = wanted
    config |= {"targets": [{"quantization": ["mixed"]}], "compensation": {}}
    workflow.configure(config)
    done = workflow.run("--cores", "2")
    assert done.returncode == 0, done.stdout
    folder = workflow.folder / "results" / "demo" / "mixed"
    chosen = json.loads((folder / "recipe.json").read_text())
    quantized = json.loads((folder / "warmup.json").read_text())["summary"]
    bits = {layer["name"]: layer["weight_bits"] for layer in quantized["layer_sqnr"]}
    searched = {
        layer["name"]: layer["weight_bits"] for layer in chosen["layers"] if layer["weights"]
    }
    assert searched.items() <= bits.items()
    assert set(searched.values()) == {4, 8}
    assert chosen["weight_bytes"] == quantized["weight_bytes"]
    assert workflow.jobs() == {}


@real
def test_one_command_goes_from_checkpoint_to_report(workflow: Workflow):
    config = str(CONFIGS / "yolox_coco_real_tiny.yaml")
    done = workflow.run("--cores", "2", "--resources", "gpu=0", "--configfile", config)
    assert done.returncode == 0, done.stdout

    with open(workflow.folder / "results" / "summary.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["AP_baseline"]) > 0.2
    assert float(row["AP_quantized"]) > 0.2
    assert row["AP_quantized"] != row["AP_baseline"]  # of six images, luck decides which is larger
    table = done.stdout[done.stdout.rindex("gain (interval)") :]
    assert f"{float(row['AP_compensated']):.3f}" in table
    assert "Report: results/report.html" in table
    assert "yolox_nano" in (workflow.folder / "results" / "report.html").read_text()

    with open(workflow.folder / "results" / "exports.csv", newline="") as stream:
        (exported,) = csv.DictReader(stream)
    # Of six images, one detection that a tie decides otherwise counts much.
    assert float(exported["ap"]) == pytest.approx(float(exported["simulated"]), abs=0.02)
    assert exported["simulated"] == row["AP_compensated"]
    assert float(exported["file_bytes"]) < float(exported["full_precision_file_bytes"])
    assert float(exported["latency_ratio"]) > 0
    assert exported["failed"] == ""

    folder = workflow.folder / "results" / "yolox_nano" / "w4a8"
    written = folder / "qwt" / "model.onnx"
    entry = yaml.safe_load(Path(config).read_text())["models"]["yolox_nano"]
    options = [
        "--config",
        entry["config"],
        "--checkpoint",
        REAL_COCO / Path(entry["checkpoint"]).name,
    ]
    options += ["--warmup", folder / "warmup.pth"]
    options += ["--compensation", folder / "qwt" / "compensation.pth"]
    chosen = workflow.folder / "results" / "datasets" / "coco_real" / "calibration.json"
    for images in (
        ["--calibration", chosen],
        ["--coco-root", REAL_COCO, "--calibration-samples", "4"],
    ):
        ours = workflow.folder / "ours.onnx"
        arguments = ["export", *options, *images, "--output", ours]
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        assert ours.read_bytes() == written.read_bytes()
        mine, its = (json.loads(path.with_suffix(".json").read_text()) for path in (ours, written))
        assert its.keys() - mine.keys() == {"provenance", "ap"}
        assert mine.items() <= its.items()

    for rule, wildcards in RULES_PER_MODEL.items():
        assert (workflow.folder / "logs" / rule / f"{wildcards}.log").is_file()
        assert (workflow.folder / "benchmarks" / rule / f"{wildcards}.tsv").is_file()
    assert (
        "no GPU was found, or --resources gpu=0"
        in (workflow.folder / "logs" / "evaluate_baseline" / "yolox_nano.log").read_text()
    )
    hidden = [p for p in (workflow.folder / "results").rglob(".*") if p.is_file()]
    assert hidden == [], "partial files are left"

    assert workflow.jobs("--configfile", config) == {}
    more = yaml.safe_load((CONFIGS / "yolox_coco_real_tiny.yaml").read_text())
    more["evaluation"] = {"workers": 0}
    more["calibration"] = {"batch_size": 2}
    more["quantization"]["w8a8"] = {"weight_bits": 8, "activation_bits": 8}
    workflow.configure(more)
    assert workflow.jobs() == {
        "quantize_model": 1,
        "evaluate_quantized": 1,
        "fit_compensation": 1,
        "evaluate_compensated": 1,
        "summarize_results": 1,
        "render_report": 1,
    }


@real
def test_the_real_detector_reaches_its_known_ap_and_8_bits_keep_it(workflow: Workflow):
    """AP 0.269 and AP50 0.426 on these 160 images are the numbers of an independent evaluation."""
    variants = ["baseline", "w8a8-detector/quantized"]
    done = workflow.run(
        *(f"results/yolox_nano/{variant}/metrics.json" for variant in variants),
        *("--cores", "2", "--configfile", str(CONFIGS / "yolox_coco_real.yaml")),
    )
    assert done.returncode == 0, done.stdout
    baseline, detector8 = (
        json.loads((workflow.folder / f"results/yolox_nano/{v}/metrics.json").read_text())["bbox"]
        for v in variants
    )
    assert baseline["AP"] == pytest.approx(0.269, abs=0.002)
    assert baseline["AP50"] == pytest.approx(0.426, abs=0.003)
    assert detector8["AP"] >= baseline["AP"] - 0.008
