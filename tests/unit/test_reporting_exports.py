"""What table and report say of exported detectors."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from qwt_mmdet.evaluation.estimates import Estimate
from qwt_mmdet.plan import ExportRow
from qwt_mmdet.reporting import html, tables, terminal, text
from qwt_mmdet.reporting.summary import read_summary
from qwt_mmdet.reporting.variants import timed_points
from test_reporting import make_results

BENCHMARK = {
    "file_bytes": 500_000,
    "full_precision_file_bytes": 2_000_000,
    "milliseconds": 12.34,
    "full_precision_milliseconds": 10.0,
    "latency_ratio": 1.2,
    "processor_ratio": 1.1,
    "bfloat16_latency_ratio": 2.4,
    "integer_share": 0.75,
    "version": "1.2.3",
    "rounds": 30,
    "threads": 1,
    "hardware": "an old machine",
    "title": "ONNX Runtime",
}


def export(runtime: str, compensation: str | None, detections_of: str) -> ExportRow:
    """Files of an exported detector in a runtime, which finds the same as a simulated one."""
    simulated = f"results/m/w4/{compensation or 'quantized'}"
    folder = Path("results/m/w4", compensation or "", runtime)
    folder.mkdir(parents=True)
    for name in ("metrics.json", "predictions.json"):
        shutil.copy(f"results/m/w4/{detections_of}/{name}", folder)
    (folder / "benchmark.json").write_text(json.dumps(BENCHMARK))
    benchmark = str(folder / "benchmark.json")
    return ExportRow("m", "w4", compensation, runtime, str(folder), benchmark, simulated)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run in which one file equals the simulation, one does not, and one could not be made."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = make_results(masks=False, compensated=True)
        exports = [
            export("onnxruntime", "qwt", "qwt"),
            export("onnxruntime", None, "qwt"),
            replace(
                export("openvino", "qwt", "qwt"),
                exported=None,
                benchmark=None,
                failed=["export_model m w4/qwt: no operator."],
            ),
        ]
        tables.summarize(
            rows, "summary.csv", "summary.json", resamples=100, exports=exports,
            exports_table="exports.csv", tradeoffs={"m": "tradeoff.csv"},
        )  # fmt: skip
        html.render(rows, "summary.json", "report.html")
    return folder


@pytest.fixture
def rows(folder) -> list[dict[str, str]]:
    with open(folder / "exports.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_file_with_the_detections_of_the_simulation_equals_it(rows):
    equal, other, _ = rows
    assert equal["ap"] == equal["simulated"]
    assert float(equal["exported_minus_simulated"]) == 0
    assert equal["exported_minus_simulated_significant"] == "False"
    assert float(other["exported_minus_simulated"]) > 0.1
    assert other["exported_minus_simulated_significant"] == "True"
    assert other["compensation"] == ""


def test_the_table_of_costs_has_simulated_variants_and_files(folder):
    with open(folder / "tradeoff.csv", newline="") as stream:
        found = [(row["variant"], row["runtime"]) for row in csv.DictReader(stream)]
    assert found[:3] == [("full precision", ""), ("w4", ""), ("w4 + qwt", "")]
    assert found[3:] == [(name, "ONNX Runtime") for name in ("full precision", "w4 + qwt", "w4")]


def test_sizes_are_those_of_the_files_and_of_what_was_computed(rows):
    assert [row["computed_bytes"] for row in rows] == ["1020000", "1000000", "1020000"]
    assert [row["file_bytes"] for row in rows] == ["500000", "500000", ""]
    assert rows[0]["latency_ratio"] == "1.2"
    assert rows[0]["integer_share"] == "0.75"
    assert "title" not in rows[0]
    # that was not made
    assert rows[2]["failed"] == "export_model m w4/qwt: no operator."
    assert rows[2]["ap"] == rows[2]["exported_minus_simulated"] == ""


def test_the_table_of_the_terminal_has_a_line_for_each(folder):
    summary = read_summary(folder / "summary.json")
    table = terminal.summary_table(summary).split("\n\n")[2]
    equal, _, missing = table.splitlines()[2:]
    assert "w4 + qwt" in equal
    assert "0.50 (25 %)" in equal
    assert "12.0 (120 % / 240 %)  75 %" in equal
    assert missing.split()[-4:] == ["(–)", "–", "(–)", "–"]
    usual = [replace(row, bfloat16_latency_ratio=None) for row in summary.exports]
    assert max(map(len, terminal.exports_table(usual).splitlines())) <= 80
    said = terminal.summary_table(summary)
    assert "m w4 in ONNX Runtime: box AP of the file differs significantly" in said
    assert "No file's AP differs" not in said
    (slow,) = text.slow_files(summary.exports)
    assert slow.startswith(
        "m: ONNX Runtime computes w4 + qwt (110 % of its time, 75 % in integers), w4 (110 % of its time, 75 % in "
        "integers) more slowly than full precision. activation_bits: 32"
    )
    assert slow in terminal.summary_table(summary)
    (told,) = text.file_sentences(summary)
    assert told.startswith(
        "w4: 0.50 MB (25 % of full precision), 12.0 ms for an image in ONNX Runtime (120 % of full precision), loses 0."
    )
    assert re.search(
        r"loses 0\.\d{3} \(interval \+0\.\d{3} to \+0\.\d{3}\) of 0\.\d{3} box AP\.$", told
    )
    assert text.slow_files(replace(row, processor_ratio=1.04) for row in summary.exports) == []
    only_wall = [replace(row, processor_ratio=None) for row in summary.exports]
    assert "(120 % of its time" in text.slow_files(only_wall)[0]


def test_what_a_search_predicted_is_said_with_what_would_tell_more():
    loss = {"value": 0.0071, "low": 0.0046, "high": 0.0096, "images": 100, "images_to_tell": None}
    told = "From 100 calibration images, a loss of 0.007 AP was predicted (0.005 to 0.010)"
    assert text.predicted_loss(loss) == f"{told}."
    loss["images_to_tell"] = 430
    assert text.predicted_loss(loss).startswith(f"{told}; about 430 annotated images would show")


def test_latencies_of_a_figure_are_ratios_to_one_full_precision(folder):
    rows = read_summary(folder / "summary.json").exports
    slower = replace(
        rows[1], full_precision_milliseconds=30.0, milliseconds=24.0, latency_ratio=0.8
    )
    full, first, second = timed_points(Estimate(0.5), [rows[0], slower])
    assert (full.quantization, full.value, full.cost) == ("full precision", 0.5, 20.0)
    assert (first.quantization, first.cost) == ("w4 + qwt", pytest.approx(24.0))
    assert (second.quantization, second.cost) == ("w4", pytest.approx(16.0))
    assert timed_points(None, [replace(rows[0], latency_ratio=None)]) == []


def test_the_report_has_a_section_of_them(folder):
    page = (folder / "report.html").read_text()
    section = page[page.index("<h2>Exported files</h2>") : page.index("<h2>Error of each block")]
    assert "ONNX Runtime <small>1.2.3</small>" in section
    assert "processor 110 %" in section
    assert "bf16 240 %" in section
    assert "<span>openvino</span>" in section  # was not timed, which tells the title
    assert "no operator" in section
    assert "more slowly than full precision" in section
    assert "no significant difference" in section
    assert "Latency with 1 thread, 30 rounds, on an old machine." in section
    assert "The report cannot show" not in page
    assert 'aria-label="m: box AP against latency"' in page
