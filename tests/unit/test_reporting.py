"""Tables and report: the numbers that people read are those that were computed."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from qwt_mmdet.errors import QwtError
from qwt_mmdet.evaluation.coco import coco_metrics
from qwt_mmdet.reporting import html, tables, text

CLASSES = ("cat", "dog <b>", "bird")  # the second must be escaped
IMAGES = 12


def scene(rng: np.random.Generator) -> dict:
    """Twelve images with three boxes each."""
    annotations = []
    for image in range(1, IMAGES + 1):
        for category in range(1, 4):
            x, y = rng.integers(0, 60, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [int(x), int(y), 30, 30],
                    "area": 900,
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"image_root": "."},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 100, "height": 100}
            for i in range(1, IMAGES + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }


def detections(content: dict, rng: np.random.Generator, error: float) -> list[dict]:
    """The boxes of a scene, displaced by about ``error`` pixels."""
    return [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": (annotation["bbox"] + np.append(rng.normal(0, error, 2), [0, 0])).tolist(),
            "score": float(rng.uniform(0.5, 1)),
        }
        for annotation in content["annotations"]
    ]


BLOCKS = """name,kept,ridge,solver,parameters,fit_error_before,fit_error_after,fit_r2,\
holdout_error_before,holdout_error_after,holdout_r2
backbone.stage1,True,inf,bias,10,0.5,0.25,0.5,0.5,0.3,0.4
backbone.stage2,False,0.0,cholesky,20,0.5,0.25,0.5,,,
"""


@pytest.fixture
def results(tmp_path, monkeypatch) -> list[dict]:
    """Result files of a model that loses a lot and regains most of it, as the workflow lays them out."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    content = scene(rng)
    Path("evaluation.json").write_text(json.dumps(content))
    folders = {"results/m/baseline": 1, "results/m/w4/quantized": 9, "results/m/w4/qwt": 3}
    for folder, error in folders.items():
        Path(folder).mkdir(parents=True)
        found = detections(content, rng, error)
        metrics = coco_metrics("evaluation.json", found, masks=False)
        metrics["provenance"] = {"seed": 0, "versions": {"torch": "2"}, "device": "<cpu>"}
        Path(folder, "predictions.json").write_text(json.dumps(found))
        Path(folder, "metrics.json").write_text(json.dumps(metrics))
    summary = {
        "baseline_weight_bytes": 4_000_000,
        "weight_bytes": 1_000_000,
        "layers": 7,
        "not_quantized": [{"name": "neck.conv", "type": "Conv2d", "reason": "out of scope"}],
    }
    torch.save({"summary": summary}, "results/m/w4/warmup.pth")
    summary = {"blocks": 2, "kept": 1, "parameters": 10, "bytes": 20_000, "multiply_adds": 5.0}
    torch.save({"summary": summary}, "results/m/w4/qwt/compensation.pth")
    Path("results/m/w4/qwt/blocks.csv").write_text(BLOCKS)
    return [
        {
            "model": "m",
            "quantization": "w4",
            "compensation": "qwt",
            "settings": {"weight_bits": 4, "activation_bits": 8, "scope": "backbone"},
            "compensation_settings": {"kind": "linear"},
            "annotations": "evaluation.json",
            "baseline": "results/m/baseline",
            "quantized": "results/m/w4/quantized",
            "compensated": "results/m/w4/qwt",
            "warmup": "results/m/w4/warmup.pth",
        }
    ]


@pytest.fixture
def summary(results) -> dict[str, str]:
    tables.summarize(results, "summary.csv", resamples=200)
    with open("summary.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    return row


def test_the_summary_has_the_recorded_ap_and_an_interval_around_it(summary):
    metrics = json.loads(Path("results/m/w4/qwt/metrics.json").read_text())
    for metric in ("AP", "AP50", "AP75", "APs"):
        value = float(summary[f"{metric}_compensated"])
        assert value == pytest.approx(metrics["bbox"][metric], abs=1e-9)
        assert float(summary[f"{metric}_compensated_low"]) < value
        assert value < float(summary[f"{metric}_compensated_high"])


def test_differences_and_the_recovered_part_follow_from_the_three_values(summary):
    baseline, quantized, compensated = (
        float(summary[f"AP_{variant}"]) for variant in tables.VARIANTS
    )
    assert baseline > compensated > quantized
    assert float(summary["AP_quantized_minus_baseline"]) == pytest.approx(quantized - baseline)
    recovered = (compensated - quantized) / (baseline - quantized)
    assert float(summary["AP_recovered"]) == pytest.approx(recovered)
    assert summary["AP_quantized_minus_baseline_significant"] == "True"


def test_what_is_undefined_is_an_empty_cell(summary):
    assert summary["APl_baseline"] == ""  # there are no large objects
    assert summary["APl_recovered"] == ""


def test_sizes_and_counts_are_those_of_the_files(summary):
    assert summary["quantized_bytes"] == "1000000"
    assert summary["compensation_bytes"] == "20000"
    assert (summary["blocks"], summary["blocks_kept"]) == ("2", "1")
    assert summary["not_quantized"] == "1"


def test_every_column_is_documented(summary):
    documented = tables.__doc__.replace("{M}", "AP")
    for column in summary:
        stem = re.sub(r"_(low|high|significant)$", "", column)
        stem = re.sub(r"^AP(50|75|s|m|l)_", "AP_", stem)
        assert f"``{stem}``" in documented, column


def test_equal_names_of_different_models_do_not_mix(results, tmp_path):
    Path("results/n").symlink_to(tmp_path / "results" / "m")
    second = {
        key: value.replace("results/m", "results/n") if isinstance(value, str) else value
        for key, value in results[0].items()
    }
    tables.summarize([*results, {**second, "model": "n"}], "summary.csv", resamples=100)
    with open("summary.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["model"] for row in rows] == ["m", "n"]
    assert rows[0]["AP_baseline"] == rows[1]["AP_baseline"]


def test_predictions_of_another_run_are_noticed(results):
    worse = json.loads(Path("results/m/w4/quantized/predictions.json").read_text())
    Path("results/m/baseline/predictions.json").write_text(json.dumps(worse))
    with pytest.raises(QwtError, match=r"results/m/baseline: metrics\.json says bbox AP"):
        tables.summarize(results, "summary.csv", resamples=100)
    assert not Path("summary.csv").exists()


def test_the_terminal_table_shows_each_number_once(summary):
    shown = text.summary_table("summary.csv")
    line = next(line for line in shown.splitlines() if line.startswith("m "))
    for variant in tables.VARIANTS:
        assert f"{float(summary[f'AP_{variant}']):.3f}" in line
    assert "* (+" in line
    assert "12 images" in shown


def test_a_name_that_looks_like_a_number_stays_a_name(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text("model,quantization,AP_baseline\n8,4e1,0.5\n")
    assert text.read_table(path) == [{"model": "8", "quantization": "4e1", "AP_baseline": 0.5}]


class Outline(HTMLParser):
    """Text, links and unbalanced tags of a page."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.external: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.external += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += " " + data


@pytest.fixture
def page(results, summary) -> Outline:
    html.render(results, "summary.csv", "report.html")
    outline = Outline()
    outline.feed(Path("report.html").read_text(encoding="utf-8"))
    outline.text = " ".join(outline.text.split())
    return outline


def test_the_report_is_one_well_formed_file(page):
    assert page.open == []
    assert page.external == []
    source = Path("report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "url(" not in source


def test_names_from_outside_are_escaped(page):
    source = Path("report.html").read_text(encoding="utf-8")
    assert "dog &lt;b&gt;" in source
    assert "&lt;cpu&gt;" in source


def test_the_report_answers_first(page, summary):
    kept = float(summary["AP_quantized"]) / float(summary["AP_baseline"])
    assert f"w4 keeps {100 * kept:.0f} % of the baseline box AP" in page.text
    assert f"qwt raises it to {float(summary['AP_compensated']):.3f}" in page.text
    assert page.text.index("w4 keeps") < page.text.index("Results")


def test_the_report_shows_blocks_exceptions_classes_and_provenance(page):
    assert "1 of 2 blocks kept" in page.text
    assert "inf" in page.text
    assert "neck.conv Conv2d out of scope" in page.text
    assert re.search(r"bird 12 0\.\d{3} 0\.\d{3} 0\.\d{3}", page.text)
    assert "torch: 2" in page.text


def row(**changes) -> dict:
    gain, loss = "AP_compensated_minus_quantized", "AP_quantized_minus_baseline"
    return {
        "model": "m", "quantization": "w8a8", "compensation": "qwt", "metrics": "segm",
        "AP_baseline": 0.4, "AP_quantized": 0.399, "AP_compensated": 0.401,
        gain: 0.002, f"{gain}_low": -0.001, f"{gain}_high": 0.005, f"{gain}_significant": False,
        loss: -0.001, f"{loss}_low": -0.004, f"{loss}_high": 0.002, f"{loss}_significant": False,
        "compensation_bytes": 10.0, "quantized_bytes": 1000.0,
        **changes,
    }  # fmt: skip


def test_what_is_not_significant_is_said_to_be_so():
    sentence = html.answer([row()])
    assert sentence == (
        "w8a8 keeps 100 % of the baseline mask AP (0.399 of 0.400), a difference that is not "
        "significant; qwt changes it by +0.002, which is not significant (-0.001 to +0.005)."
    )


def test_harm_is_not_called_a_gain():
    gain = "AP_compensated_minus_quantized"
    harmful = {
        "AP_compensated": 0.3, gain: -0.099, f"{gain}_low": -0.12, f"{gain}_high": -0.08,
        f"{gain}_significant": True,
    }  # fmt: skip
    sentence = html.answer([row(**harmful)])
    assert (
        "qwt lowers it to 0.300, 75 % of the baseline (-0.099, interval -0.120 to -0.080)"
        in sentence
    )


def test_a_baseline_that_finds_nothing_does_not_divide_by_zero():
    assert "w8a8 has mask AP 0.399" in html.answer([row(AP_baseline=0.0)])
