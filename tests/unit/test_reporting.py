"""Tables and report: the numbers that people read are those that were computed."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from qwt_mmdet.archives import COMPENSATION_FORMAT, WARMUP_FORMAT
from qwt_mmdet.config import resolve
from qwt_mmdet.errors import QwtError
from qwt_mmdet.evaluation.coco import coco_metrics
from qwt_mmdet.evaluation.estimates import Comparison, Difference, Estimate
from qwt_mmdet.files import write_json
from qwt_mmdet.plan import Failure, Plan, ResultRow, Stopped
from qwt_mmdet.plan.rows import KINDS
from qwt_mmdet.reporting import html, sentences, tables, terminal, view
from qwt_mmdet.reporting.summary import ClassResult, Row, read_summary, with_dominance
from random_detections import compressed, hexagon

CLASSES = ("cat", "dog <b>", "bird")  # the second must be escaped
IMAGES = 12


def scene(rng: np.random.Generator) -> dict:
    """Twelve images with three objects each."""
    annotations = []
    for image in range(1, IMAGES + 1):
        Image.fromarray(rng.integers(0, 255, (100, 100, 3), np.uint8)).save(f"{image}.png")
        for category in range(1, 4):
            x, y = map(int, rng.integers(0, 60, 2))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [x, y, 30, 30],
                    "segmentation": hexagon(x, y, 30, 30),
                    "area": 675,
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"image_root": ".", "split": "val", "exif": "apply"},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 100, "height": 100}
            for i in range(1, IMAGES + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }


def detections(content: dict, rng: np.random.Generator, error: float, masks: bool) -> list[dict]:
    """The objects of a scene, displaced by about ``error`` pixels."""
    found = []
    for annotation in content["annotations"]:
        x, y = np.clip(annotation["bbox"][:2] + rng.normal(0, error, 2), 0, 69).tolist()
        shape = {"segmentation": compressed(hexagon(x, y, 30, 30), 100, 100)} if masks else {}
        names = {key: annotation[key] for key in ("image_id", "category_id")}
        score = float(rng.uniform(0.5, 1))
        found.append({**names, "bbox": [x, y, 30.0, 30.0], "score": score, **shape})
    return found


BLOCKS = """name,kept,ridge,solver,parameters,multiply_adds,fit_error_before,fit_error_after,fit_r2,\
holdout_error_before,holdout_error_after,holdout_r2
backbone.stage1,True,inf,bias,10,1e6,0.5,0.25,0.5,0.5,0.3,0.4
backbone.stage2,False,0.0,cholesky,20,2e6,0.5,0.25,0.5,,,
"""

SQNR = [
    {"name": "backbone.good", "weight_bits": 4, "activation_bits": 8, "sqnr_db": 31.5},
    {"name": "backbone.bad", "weight_bits": 4, "activation_bits": 8, "sqnr_db": -2.5},
    {"name": "backbone.first", "weight_bits": 8, "activation_bits": 8, "sqnr_db": 40.0},
    {"name": "backbone.attn (key)", "weight_bits": None, "activation_bits": 4, "sqnr_db": 9.0},
    {"name": "backbone.zero", "weight_bits": 4, "activation_bits": 4, "sqnr_db": None},
]


def make_results(
    *, masks: bool, compensated: bool, skipped: str | None = None, **warmup
) -> list[ResultRow]:
    """Result files, in the working directory, of a model that loses a lot and regains most of it."""
    rng = np.random.default_rng(0)
    content = scene(rng)
    Path("evaluation.json").write_text(json.dumps(content))
    calibration = {"info": {"split": "train"}, "images": [{"file_name": "of_train.png"}]}
    Path("calibration.json").write_text(json.dumps(calibration))
    folders = {"results/m/baseline": 1, "results/m/w4/quantized": 9, "results/m/w4/qwt": 3}
    for folder, error in folders.items():
        Path(folder).mkdir(parents=True)
        found = detections(content, rng, error, masks)
        metrics = coco_metrics("evaluation.json", found, masks=masks)
        metrics["provenance"] = {
            "seed": 0,
            "versions": {"torch": "2"},
            "device": "<cpu>",
            "settings": {"config": "m.py", "warmup": "cafe"},
            "seconds": 45.6,
            "hardware": "an old machine",
            "command": "snakemake --cores <4>",
        }
        Path(folder, "predictions.json").write_text(json.dumps(found))
        Path(folder, "metrics.json").write_text(json.dumps(metrics))
    summary = {
        "baseline_weight_bytes": 4_000_000,
        "weight_bytes": 1_000_000,
        "layers": 7,
        "not_quantized": [
            {
                "name": "neck.conv",
                "type": "Conv2d",
                "reason": "out of scope",
                "multiply_adds_percent": 12.34,
            }
        ],
        **warmup,
    }
    archive = {
        "format": WARMUP_FORMAT,
        "summary": summary,
        "provenance": {"seconds": 123.4},
    }
    write_json("results/m/w4/warmup.json", archive)
    summary = {
        "blocks": 2,
        "kept": 1,
        "parameters": 10,
        "bytes": 20_000,
        "multiply_adds": 5e6,
        "multiply_adds_percent": 1.25,
    }
    archive = {"format": COMPENSATION_FORMAT, "summary": summary}
    write_json("results/m/w4/qwt/compensation.json", archive)
    Path("results/m/w4/qwt/blocks.csv").write_text(BLOCKS)
    quantization = {"weight_bits": 4, "activation_bits": 8, "scope": "backbone"}
    config = {
        "datasets": {"d": {"type": "shapes"}},
        "models": {"m": {"config": "m.py", "checkpoint": "m.pth", "dataset": "d"}},
        "quantization": {"w4": quantization},
        "compensation": {"qwt": {"kind": "linear"}} if compensated else {},
        "skip": [f"evaluate_{skipped}"] if skipped else [],
    }
    Path("m.py").touch()
    (row,) = Plan(resolve(config)).rows
    return [replace(row, annotations="evaluation.json")]


def summarize(rows: list[ResultRow], resamples: int = 100) -> None:
    tables.summarize(rows, "summary.csv", "summary.json", resamples=resamples)


def without(row: ResultRow, *kinds: str) -> ResultRow:
    """The row as it is where some variants were not evaluated."""
    return replace(row, repeats={**row.repeats, **{kind: [] for kind in kinds}})


def with_second_model(rows: list[ResultRow]) -> list[ResultRow]:
    """The rows again, under the name of another model."""
    Path("results/n").symlink_to(Path("results/m").resolve())
    again = json.loads(json.dumps(list(map(asdict, rows))).replace("results/m/", "results/n/"))
    return [*rows, *(ResultRow(**{**row, "model": "n"}) for row in again)]


@pytest.fixture
def results(tmp_path, monkeypatch) -> list[ResultRow]:
    monkeypatch.chdir(tmp_path)
    return make_results(masks=False, compensated=True)


CASES = {
    "boxes": {"masks": False, "compensated": True},
    "masks": {"masks": True, "compensated": True},
    "no compensation": {"masks": False, "compensated": False},
    "no baseline": {"masks": False, "compensated": True, "skipped": "baseline"},
    "no quantized": {"masks": False, "compensated": True, "skipped": "quantized"},
}


class Run(NamedTuple):
    """A folder with the results, the summary and the report of one of ``CASES``."""

    case: str
    folder: Path
    rows: list[ResultRow]


def make_run(case: str, folder: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = make_results(**CASES[case], layer_sqnr=SQNR)
        summarize(rows)
        html.render(rows, "summary.json", "report.html")
    return Run(case, folder, rows)


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory) -> Run:
    """Each kind of run; tests only read it."""
    return make_run(request.param, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> Run:
    """A run with boxes and a compensation; tests only read it."""
    return make_run("boxes", tmp_path_factory.mktemp("boxes"))


@pytest.fixture
def summary(boxes, monkeypatch) -> dict[str, str]:
    """The row of summary.csv; the working directory is the run's."""
    monkeypatch.chdir(boxes.folder)
    with open("summary.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    return row


def test_the_summary_has_the_recorded_ap_and_an_interval_around_it(summary):
    metrics = json.loads(Path("results/m/w4/qwt/metrics.json").read_text())
    for metric in ("AP", "AP50", "AP75", "APs"):
        value = float(summary[f"{metric}_compensated"])
        assert value == pytest.approx(metrics["bbox"][metric], abs=1e-9)
        low, high = (float(summary[f"{metric}_compensated_{end}"]) for end in ("low", "high"))
        assert low <= value <= high
        assert low < high or value == 1


def test_differences_and_the_recovered_part_follow_from_the_three_values(summary):
    baseline, quantized, compensated = (float(summary[f"AP_{variant}"]) for variant in KINDS)
    assert baseline > compensated > quantized
    assert float(summary["AP_quantized_minus_baseline"]) == pytest.approx(quantized - baseline)
    recovered = (compensated - quantized) / (baseline - quantized)
    assert float(summary["AP_recovered"]) == pytest.approx(recovered)
    assert summary["AP_quantized_minus_baseline_significant"] == "True"


def test_sizes_and_counts_are_those_of_the_files_and_what_is_undefined_is_empty(summary):
    expected = {
        "quantized_bytes": "1000000", "compensation_bytes": "20000", "blocks": "2",
        "blocks_kept": "1", "not_quantized": "1",
        "APl_baseline": "", "APl_recovered": "",  # there are no large objects
    }  # fmt: skip
    assert {column: summary[column] for column in expected} == expected


def test_every_column_is_documented(summary):
    documented = tables.__doc__.replace("{M}", "AP")
    for column in summary:
        stem = re.sub(r"_(low|high|significant)$", "", column)
        stem = re.sub(r"^AP(50|75|s|m|l)_", "AP_", stem)
        assert f"``{stem}``" in documented, column


def test_predictions_of_another_run_are_noticed(results):
    worse = json.loads(Path("results/m/w4/quantized/predictions.json").read_text())
    Path("results/m/baseline/predictions.json").write_text(json.dumps(worse))
    with pytest.raises(QwtError, match=r"results/m/baseline: metrics\.json says bbox AP"):
        summarize(results)
    assert not Path("summary.csv").exists()
    assert not Path("summary.json").exists()


def test_a_file_of_another_kind_is_not_taken_for_a_warmup(results):
    write_json("results/m/w4/warmup.json", {"format": "something else"})
    with pytest.raises(QwtError, match=r"warmup\.json is not a warmup file"):
        summarize(results)


def test_the_document_has_the_rows_of_the_table(summary):
    (row,) = json.loads(Path("summary.json").read_text())["rows"]
    flat = {}
    for key, value in row.items():
        if key == "ap":
            for metric, comparison in value.items():
                for name, entry in comparison.items():
                    # the spread has columns where there are repeats
                    plain = {"value", "spread"}
                    ends = {f"_{end}": found for end, found in entry.items() if end not in plain}
                    for end, found in {"": entry["value"], **ends}.items():
                        flat[f"{metric}_{name}{end}"] = found
        elif key not in ("seconds", "asked", "limit", "classes", "lost_most", "regained_most"):
            flat[key] = value
    assert list(flat) == list(summary)
    for column, value in flat.items():
        assert ("" if value is None else str(value)) == summary[column]


def test_the_document_is_read_as_it_was_written(boxes, tmp_path):
    found = read_summary(boxes.folder / "summary.json")
    found.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (boxes.folder / "summary.json").read_bytes()
    assert found.rows[0].seconds == {
        "evaluate_baseline": 45.6,
        "evaluate_quantized": 45.6,
        "evaluate_compensated": 45.6,
        "quantize_model": 123.4,
    }


def test_a_document_of_another_version_is_told(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"confidence": 0.95, "seed": 0, "failed": [], "quantizations": []})
    with pytest.raises(QwtError, match=r"no summary of this version \(rows\); delete it"):
        read_summary(path)


def test_classes_have_their_ap_with_an_interval_and_the_number_of_objects(summary):
    metrics = json.loads(Path("results/m/w4/qwt/metrics.json").read_text())["per_class"]
    (row,) = read_summary("summary.json").rows
    assert [entry.name for entry in row.classes] == list(CLASSES)
    for entry in row.classes:
        assert entry.annotations == entry.images == IMAGES
        expected, ap = metrics[entry.name]["bbox"], entry.ap
        assert ap.compensated.value == pytest.approx(expected, abs=1e-9)
        assert ap.compensated.low <= expected <= ap.compensated.high
        loss = ap.quantized.value - ap.baseline.value
        assert ap.quantized_minus_baseline.value == pytest.approx(loss)


def test_a_class_on_few_images_has_no_interval(results):
    content = json.loads(Path("evaluation.json").read_text())
    content["annotations"] = [
        a for a in content["annotations"] if a["category_id"] != 3 or a["image_id"] == 1
    ]
    Path("evaluation.json").write_text(json.dumps(content))
    for folder in map(Path, results[0].evaluated().values()):
        found = json.loads((folder / "predictions.json").read_text())
        metrics = coco_metrics("evaluation.json", found, masks=False)
        (folder / "metrics.json").write_text(json.dumps(metrics))
    summarize(results)
    cat, _, bird = read_summary("summary.json").rows[0].classes
    assert (bird.annotations, bird.images) == (1, 1)
    assert bird.ap.baseline.value is not None
    assert bird.ap.baseline.low is bird.ap.quantized_minus_baseline.high is None
    assert not bird.ap.quantized_minus_baseline.significant
    assert cat.ap.baseline.low is not None


def test_rankings_name_the_classes_that_changed_most_first(summary):
    (row,) = read_summary("summary.json").rows
    losses = {e.name: e.ap.quantized_minus_baseline.value for e in row.classes}
    assert row.lost_most == [name for name in sorted(losses, key=losses.get) if losses[name] < 0]
    gains = {e.name: -e.ap.compensated_minus_quantized.value for e in row.classes}
    assert row.regained_most == [name for name in sorted(gains, key=gains.get) if gains[name] < 0]


def test_only_ten_classes_are_ranked():
    classes = [
        ClassResult(f"class {n}", 9, 9, Comparison(quantized_minus_baseline=Difference(-n / 100)))
        for n in range(15)
    ]
    lost = tables._most_changed(classes, "quantized_minus_baseline", -1)
    assert lost == [f"class {number}" for number in range(14, 4, -1)]
    assert tables._most_changed(classes, "compensated_minus_quantized", 1) == []


def test_the_terminal_table_shows_each_number_once(summary):
    shown = terminal.summary_table(read_summary("summary.json"))
    line = next(line for line in shown.splitlines() if line.startswith("w4 + qwt "))
    for variant in KINDS:
        assert f"{float(summary[f'AP_{variant}']):.3f}" in line
    assert "* (+" in line
    assert "12 images" in shown
    assert max(map(len, shown.split("\n\n")[0].splitlines())) <= 80


def test_a_name_that_looks_like_a_number_stays_a_name(tmp_path):
    path = tmp_path / "blocks.csv"
    path.write_text("name,kept,ridge,fit_r2,holdout_r2\n4e1,True,4e1,0.5,\n")
    assert view.read_blocks(path) == [
        {"name": "4e1", "kept": True, "ridge": 40.0, "fit_r2": 0.5, "holdout_r2": None}
    ]


class Outline(HTMLParser):
    """Text, addresses, ids and unbalanced tags of a page."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href") and value:
                self.addresses.append(value)
            if key == "id":
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += " " + data


def render(rows: list[ResultRow]) -> Outline:
    html.render(rows, "summary.json", "report.html")
    return Outline("report.html")


@pytest.fixture
def page(boxes) -> Outline:
    return Outline(boxes.folder / "report.html")


@pytest.fixture
def case(run) -> tuple[str, Outline]:
    """Kind of a run and its report."""
    return run.case, Outline(run.folder / "report.html")


def test_the_report_is_one_well_formed_file(case):
    _, page = case
    assert page.open == []
    for address in page.addresses:
        assert address.startswith(("data:", "#"))
        assert address[0] != "#" or address[1:] in page.ids
    assert "script" not in page.tags
    assert "url(" not in page.source.replace("url(#", "")
    assert len(set(page.ids)) == len(page.ids)
    assert len(page.source) < 5e6


SECTIONS = [
    "What quantization cost", "Results", "Accuracy against bits, size and latency", "Error of each block",
    "Error of each layer", "Pictures", "AP by class", "Provenance",
]  # fmt: skip


def test_sections_come_in_their_order_and_disappear_where_there_is_nothing(case):
    name, page = case
    headings = re.findall(r"<h[12]>(.*?)</h[12]>", page.source)
    expected = [s for s in SECTIONS if name != "no compensation" or s != "Error of each block"]
    assert [h[: len(s)] for h, s in zip(headings, expected, strict=True)] == expected
    kinds = 2 if name == "masks" else 1
    blocks = 0 if name == "no compensation" else 1
    assert page.tags.count("svg") == 2 * kinds + blocks
    assert ("mask AP" in page.text) == (name == "masks")
    compared = name not in ("no compensation", "no quantized")
    assert ("regained most" in page.text.lower()) == compared
    assert ("of full precision's box AP" in page.text) == (
        name not in ("no baseline", "no quantized")
    )


@pytest.mark.parametrize("skipped", ["baseline", "quantized", "compensated"])
def test_what_was_not_evaluated_is_empty_and_the_rest_as_ever(results, skipped):
    rows = []
    for row in (results[0], without(results[0], skipped)):
        summarize([row])
        rows.append(next(csv.DictReader(Path("summary.csv").read_text().splitlines())))
    complete, row = rows
    for column, value in row.items():
        missing = column.startswith("AP") and (skipped in column or "recovered" in column)
        missing |= skipped == "compensated" and column.startswith(("compensation_", "blocks"))
        if column not in (
            f"collapsed_{skipped}",
            f"not_finite_{skipped}",
            "compensated_dominated_by",
        ):
            assert value == ("" if missing else complete[column]), column
    assert "–" in terminal.summary_table(read_summary("summary.json"))


def test_two_models_share_table_and_report(results):
    rows = with_second_model(results)
    summarize(rows, resamples=20)
    first, second = read_summary("summary.json").rows
    assert (first.model, second.model) == ("m", "n")
    assert first.ap["AP"].baseline.value == second.ap["AP"].baseline.value
    page = render(rows)
    assert page.open == []
    assert page.tags.count("svg") == 6
    assert len(set(page.ids)) == len(page.ids)
    for section in ("Pictures", "AP by class", "Provenance"):
        start = page.source.index(f"<h2>{section}</h2>")
        assert page.source.index("<h3>m</h3>", start) < page.source.index("<h3>n</h3>", start)


def test_the_report_answers_first(page, summary):
    kept = float(summary["AP_quantized"]) / float(summary["AP_baseline"])
    reached = float(summary["AP_compensated"]) / float(summary["AP_baseline"])
    assert f"w4 keeps {100 * kept:.0f} % of full precision's box AP" in page.text
    assert f"qwt brings it to {100 * reached:.0f} %" in page.text
    assert page.text.index("w4 keeps") < page.text.index("Results")


def test_the_report_shows_sizes_times_blocks_exceptions_classes_and_provenance(page):
    for said in (
        "nominal 95 % intervals", "4.00 MB", "1.02 MB", "5.0 M 1.2 % of backbone",
        "1 of 2 blocks kept", "neck.conv Conv2d out of scope 12.3 %", "torch: 2", "warmup: cafe",
        "of_train.png",
    ):  # fmt: skip
        assert said in page.text, said
    assert page.text.count("2.1 min") == 1  # of the calibration
    # of the evaluations; this machine may be another one
    assert page.text.count("an old machine") == page.text.count("snakemake --cores <4>") == 1
    assert "logical cores" not in page.text
    assert re.search(r"bird 12 0\.\d{3} 0\.\d{3} to 0\.\d{3}", page.text)
    assert "dog &lt;b&gt;" in page.source
    assert "&lt;cpu&gt;" in page.source


def test_the_layers_that_hurt_are_on_top_with_the_entry_that_spares_them(case):
    _, page = case
    names = [page.text.index(f"backbone.{layer}") for layer in ("bad", "attn", "good", "first")]
    assert names == sorted(names)
    assert "-2.5 dB" in page.text
    hint = "- {pattern: backbone.bad, weight_bits: 8, activation_bits: 8}"
    assert hint in page.text
    assert "- {pattern: backbone.attn, activation_bits: 8}" in page.text  # has no weights
    assert "pattern: backbone.first" not in page.text  # is at 8 bits
    assert "backbone.zero" not in page.text  # has no error


def test_the_section_of_layers_disappears_where_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = make_results(masks=False, compensated=True, not_quantized=[])
    summarize(rows, resamples=20)
    assert "Error of each layer" not in render(rows).text


def test_pictures_show_truth_and_variants_side_by_side(case):
    name, page = case
    images, panels = page.source.count('class="picture"'), page.tags.count("img")
    assert images >= (2 if name == "no quantized" else 5)
    assert panels == images * (3 if name.startswith("no ") else 4)
    assert page.source.count("data:image/webp;base64,") == panels
    assert ("Largest loss" in page.text) == (name not in ("no baseline", "no quantized"))
    assert "Drawn at random" in page.text


def edit_summary(**changes) -> None:
    path = Path("summary.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_row(**changes) -> None:
    (row,) = json.loads(Path("summary.json").read_text())["rows"]
    edit_summary(rows=[{**row, **changes}])


BLOCKS_CSV = Path("results/m/w4/qwt/blocks.csv")
SPOILED = [
    {
        "cannot show the picture of 1.png. 1.png cannot be read": lambda: [
            path.write_bytes(b"no picture") for path in Path().glob("*.png")
        ],
        "cannot show the blocks of w4 + qwt. results/m/w4/qwt/blocks.csv has no blocks": (
            lambda: BLOCKS_CSV.write_text("")
        ),
        "cannot show the provenance of m. The file": (
            lambda: Path("results/m/w4/qwt/metrics.json").write_text("{")
        ),
        "cannot show the classes of m. Unexpected KeyError": lambda: edit_row(classes=[]),
    },
    {
        "cannot show the pictures of m. The file of predictions": (
            lambda: Path("results/m/w4/qwt/predictions.json").unlink()
        ),
        "cannot show the blocks of w4 + qwt. Unexpected": (
            lambda: BLOCKS_CSV.write_text("name,kept\nbackbone.stage1,True\n")
        ),
        "cannot show its section layers. Unexpected KeyError": (
            lambda: edit_summary(quantizations=[{"model": "m", "quantization": "w4"}])
        ),
        "No class has objects in the evaluation images.": (
            lambda: edit_row(classes=[], lost_most=[], regained_most=[])
        ),
    },
    {
        "Not drawn, since the error is 0 or not known: backbone.stage2.": (
            lambda: BLOCKS_CSV.write_text(BLOCKS.replace("0.5,0.25,0.5,,,", "0,0,0,,,"))
        ),
    },
]  # fmt: skip
"""What the report says of each spoiled file; some at a time, to save time."""


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_cannot_be_shown_costs_no_more_than_itself(boxes, tmp_path, monkeypatch, spoiled):
    shutil.copytree(boxes.folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr(html, "PICTURED_IMAGES", IMAGES if "1.png" in str(spoiled) else 1)
    for spoil in spoiled.values():
        spoil()
    page = render(boxes.rows)
    assert page.open == []
    for sentence in spoiled:
        assert sentence in page.text
    lost = sum("cannot show" in sentence for sentence in spoiled)
    assert page.text.count("cannot show") == lost or "1.png" in str(spoiled)
    headings = [h[: len(s)] for h in re.findall(r"<h[12]>(.*?)</h", page.source) for s in SECTIONS]
    assert set(SECTIONS) - set(headings) <= {"Error of each layer"}
    assert page.tags.count("svg") == 2 + ("the blocks of" not in str(spoiled))


def test_a_collapsed_variant_is_a_result_with_layers_to_blame(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(html, "PICTURED_IMAGES", 1)
    (row,) = make_results(masks=True, compensated=True, layer_sqnr=SQNR)
    _, quantized, compensated = row.evaluated().values()
    for folder, collapsed, lost in ((quantized, True, 0), (compensated, False, 5)):
        path = Path(folder, "metrics.json")
        metrics = json.loads(path.read_text())
        if collapsed:
            Path(folder, "predictions.json").write_text("[]")
            metrics |= coco_metrics("evaluation.json", [], masks=False)  # that it has masks is lost
            del metrics["segm"]
        path.write_text(json.dumps({**metrics, "collapsed": collapsed, "not_finite": lost}))
    summarize([row], resamples=50)
    with open("summary.csv", newline="") as stream:
        box, mask = csv.DictReader(stream)
    worst = "backbone.bad (-2.5 dB), backbone.attn (key) (9.0 dB), backbone.good (31.5 dB)"
    for line in (box, mask):
        assert (line["collapsed_quantized"], line["collapsed_compensated"]) == ("True", "False")
        assert (line["not_finite_quantized"], line["not_finite_compensated"]) == ("0", "5")
        assert [line[f"AP_quantized{end}"] for end in ("", "_low", "_high")] == ["0.0"] * 3
        assert line["AP_quantized_minus_baseline_significant"] == "True"
        recovered = float(line["AP_compensated"]) / float(line["AP_baseline"])
        assert float(line["AP_recovered"]) == pytest.approx(recovered)
        assert line["worst_layers"] == worst
    shown = terminal.summary_table(read_summary("summary.json"))
    assert "0.000 collapsed" in shown
    assert f"m: w4 collapsed (no object is found). Layers with the lowest SQNR: {worst}." in shown
    page = render([row])
    assert "w4 collapsed: it finds no object (box AP); layers with the lowest SQNR" in page.text
    assert "W4 A8, backbone collapsed: finds no object" in page.text
    assert "5 detections are NaN or infinite and are ignored" in page.text
    assert worst in page.text
    assert "cannot show" not in page.text


def test_a_run_that_failed_shows_what_is_finished_and_why_the_rest_is_missing(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(html, "PICTURED_IMAGES", 1)
    (row,) = make_results(masks=False, compensated=True)
    cause = "quantize_model m w2: No layer <i> matches."
    lost = replace(without(row, "quantized", "compensated"), warmup=None, failed=[cause])
    nothing = {"annotations": None, "failed": ["fetch_checkpoint n: Gone."]}
    rows = [
        replace(lost, quantization="w2"),
        row,
        replace(without(lost, "baseline"), **nothing, model="n"),
    ]
    failed = [
        Failure("quantize_model m w2", {}, "logs/a.log", "No layer <i> matches."),
        Failure("fetch_checkpoint n", {}, "logs/b.log", "Gone."),
    ]
    tables.summarize(rows, "summary.csv", "summary.json", resamples=20, failed=failed)
    with open("summary.csv", newline="") as stream:
        lost, whole, nothing = csv.DictReader(stream)
    assert lost["failed"] == cause
    assert lost["AP_quantized"] == lost["quantized_bytes"] == lost["blocks"] == ""
    assert lost["AP_baseline"] == whole["AP_baseline"] != ""
    assert whole["failed"] == ""
    assert whole["AP_recovered"] != ""
    assert nothing["model"] == "n"
    assert not any(value for key, value in nothing.items() if key.startswith(("AP", "images")))

    page = render(rows)
    assert page.open == []
    for entry in failed:
        assert f"{entry.step} : {entry.sentence} {entry.log}" in page.text
    assert "w2 has no box AP; w2 + qwt is not complete (quantize_model m w2: No layer" in page.text
    assert "w4 keeps" in page.text
    assert page.text.count("4.00 MB") == 2  # the size of the baseline, in the advice and in its row
    assert "<i>" not in page.source.replace('<i style="border', "")
    lost = re.findall(r"cannot show (.+?)\. (.+?)\.", page.text)
    assert {about for _, about in lost} == {
        "None of its variants was evaluated", "No variant has an AP and a cost to draw"
    }  # fmt: skip
    assert page.tags.count("svg") == 3

    Stopped(failed).write("results/unfinished.json")
    shown = terminal.run_summary()
    assert "Failed steps: 2\nquantize_model m w2: No layer <i> matches. (logs/a.log)" in shown


def test_a_summary_that_is_cut_off_is_told_when_the_run_ends(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/summary.json").write_text("{")
    assert "results/summary.json is not valid JSON" in terminal.run_summary(tmp_path)


def test_the_sentence_of_a_failed_step_is_the_last_one_in_its_log(tmp_path):
    log = tmp_path / "a.log"
    stamp = "2025-01-01 10:00:00,000"
    log.write_text(
        f"{stamp} ERROR qwt_mmdet.runtime: An old one.\n"
        f"{stamp} ERROR qwt_mmdet.runtime: It has\n  two lines.\n"
        f"{stamp} INFO traceback: \nTraceback (most recent call last):\n"
    )
    now = log.stat().st_mtime
    assert terminal.last_error(log, since=now) == "It has two lines."
    for path, since in ((log, now + 10), (tmp_path / "none.log", 0)):  # of another run; none at all
        assert "ended without a message" in terminal.last_error(
            path, since=since, folders=[tmp_path]
        )
        said = terminal.last_error(path, since=since, folders=[tmp_path, "/sys"])
        assert "/sys cannot be used" in said


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

# Looks at the report in frames of different widths: what is broken, cut or empty.
FRAMES = """<!DOCTYPE html><meta charset="utf-8">
<iframe src="report.html" width="1280" height="900"></iframe>
<iframe src="report.html" width="390" height="900"></iframe>
<pre></pre><script>
function look(frame) {
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach(details => details.open = true);
  const size = element => element.getBoundingClientRect();
  const shown = [...page.querySelectorAll("svg, img")];
  const texts = [...page.querySelectorAll("td, th, p, figure, li, dd")];
  const cut = element => !element.closest(".scroll") && size(element).right > frame.width + 1;
  return {
    svg: page.querySelectorAll("figure svg").length,
    img: page.querySelectorAll("img").length,
    empty: shown.filter(element => size(element).width < 80 || size(element).height < 40).length,
    broken: [...page.querySelectorAll("img")].filter(image => !image.naturalWidth).length,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    cut: texts.filter(cut).length,
    smallest: Math.min(...[...page.querySelectorAll("svg text")].map(text => size(text).height)),
  };
}
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(look);
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_everything_without_an_error(run, case, tmp_path):
    frames = run.folder / "frames.html"
    frames.write_text(FRAMES, encoding="utf-8")
    shown = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--allow-file-access-from-files", "--enable-logging=stderr", "--window-size=1400,1000",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
            frames.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    _, page = case
    by_width = json.loads(re.search(r"<pre>(.+?)</pre>", shown.stdout).group(1))
    assert len(by_width) == 2
    for found in by_width:
        assert found["svg"] == page.tags.count("svg") > 0
        assert found["img"] == page.tags.count("img") > 0
        assert found["smallest"] >= 9  # pixels, height of a line
        for fault in ("empty", "broken", "overflow", "cut"):
            assert found[fault] == 0, fault


def row(**changes) -> Row:
    """A row in which a compensation changes nothing; ``changes`` are those of its AP."""
    ap = {
        "baseline": Estimate(0.4),
        "quantized": Estimate(0.399),
        "compensated": Estimate(0.401),
        "compensated_minus_quantized": Difference(0.002, -0.001, 0.005),
        "quantized_minus_baseline": Difference(-0.001, -0.004, 0.002),
        **changes,
    }
    names = {"model": "m", "quantization": "w8a8", "compensation": "qwt", "metrics": "segm"}
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(Row))
    sizes = {"compensation_bytes": 10, "quantized_bytes": 1000, "baseline_bytes": 4000}
    return Row(**{**unknown, **names, **sizes, "ap": {"AP": Comparison(**ap)}})


HARM = {
    "compensated": Estimate(0.3),
    "compensated_minus_quantized": Difference(-0.099, -0.12, -0.08),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "w8a8 keeps 100 % of full precision's mask AP (0.399 of 0.400), a difference that is not significant; "
             "qwt changes it by +0.002, which is not significant (-0.001 to +0.005)."),
        (HARM, "qwt lowers it to 75 % (0.300), a change of -0.099 (interval -0.120 to -0.080), for 0.2 % of the "
               "full-precision weights"),
        ({"baseline": Estimate(0.0)}, "w8a8 has mask AP 0.399"),
    ],
)  # fmt: skip
def test_the_answer_is_neither_more_certain_nor_better_than_the_numbers(changes, said):
    assert said in sentences.answer([row(**changes)])


def test_a_variant_that_another_beats_in_size_and_ap_is_not_recommended():
    def variant(name: str, size: int, quantized: float, compensated: float) -> Row:
        about = row(quantized=Estimate(quantized), compensated=Estimate(compensated))
        names = {"quantization": name, "metrics": "bbox", "quantized_bytes": size}
        return dataclasses.replace(about, **names, compensation_bytes=400_000, seconds={})

    rows = with_dominance(
        [variant("w8a8", 8_000_000, 0.40, 0.40), variant("w6a6", 6_000_000, 0.39, 0.38),
         variant("w4a4", 5_700_000, 0.20, 0.30)],
    )  # fmt: skip
    found = [(found.quantized_dominated_by, found.compensated_dominated_by) for found in rows]
    assert found == [(None, "w8a8"), (None, "w6a6"), (None, "w6a6")]
    assert sentences.recommendation(rows) == (
        "Best box AP for the size: w8a8 (8.00 MB, 0.400), w6a6 (6.00 MB, 0.390), w4a4 (5.70 MB, 0.200); "
        "w8a8 is no larger than w8a8 + qwt and no worse; w6a6 is no larger than w6a6 + qwt and no worse; w6a6 is no larger than w4a4 + qwt and no worse."
    )
