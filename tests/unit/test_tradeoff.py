"""AP against bytes and milliseconds: lines of every variant and file, what was asked for, and the Pareto front."""

import dataclasses

from qwt_mmdet.evaluation.estimates import Comparison, Difference, Estimate
from qwt_mmdet.reporting.figures import SEARCHED, ap_by_size
from qwt_mmdet.reporting.summary import ExportedRow, Limit, Row
from qwt_mmdet.reporting.tradeoff import columns, lines, pareto_front
from qwt_mmdet.reporting.variants import least_ap, points, variant_lines


def row(name, size, ap, *, compensated=None, asked=None, limit=None) -> Row:
    """A row of a detector with AP 0.6 and 4 MB."""
    estimates = {"quantized": Estimate(ap, ap - 0.01, ap + 0.01)}
    estimates["quantized_minus_baseline"] = Difference(ap - 0.6)
    if compensated is not None:
        estimates["compensated"] = Estimate(compensated)
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(Row))
    known = {
        "model": "m", "quantization": name, "compensation": compensated and "auto", "metrics": "bbox",
        "baseline_bytes": 4_000_000, "quantized_bytes": size, "compensation_bytes": 100_000, "seconds": {},
        "asked": asked or {}, "limit": limit, "weight_bits": 4, "activation_bits": 8,
    }  # fmt: skip
    return Row(**{**unknown, **known, "ap": {"AP": Comparison(Estimate(0.6), **estimates)}})


def file(name, ratio, size=1_200_000, ap=0.59) -> ExportedRow:
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(ExportedRow))
    known = {
        "model": "m", "quantization": name, "metrics": "bbox", "runtime": "onnxruntime", "title": "ONNX Runtime",
        "ap": Estimate(ap), "file_bytes": size, "full_precision_file_bytes": 4_200_000,
        "full_precision_milliseconds": 20.0, "latency_ratio": ratio,
    }  # fmt: skip
    return ExportedRow(**{**unknown, **known})


ASKED = {"max_drop": 0.01, "metric": "bbox", "confidence": 0.9}
ROWS = [
    row("w8a8", 1_000_000, 0.599),
    row("w6a6", 1_100_000, 0.58),
    row("w4a8", 500_000, 0.55, compensated=0.57),
    row(
        "small", 700_000, 0.595, asked=ASKED, limit=Limit(0.01, 0.005, 0.009, 0.001, 300),
    ),
]  # fmt: skip


def test_each_variant_has_a_line_with_what_was_asked_for_and_its_place():
    table = {line["variant"]: line for line in columns(lines(ROWS, []))}
    assert [*table] == ["full precision", "w8a8", "w6a6", "w4a8", "w4a8 + auto", "small"]
    assert [table[name]["bytes"] for name in ("full precision", "w4a8 + auto")] == [4e6, 6e5]
    assert table["small"]["asked"] == "loses at most 0.01"
    assert {line["asked"] for name, line in table.items() if name != "small"} == {None}
    front = [name for name, line in table.items() if line["pareto_bytes"]]
    assert front == ["full precision", "w8a8", "w4a8", "w4a8 + auto", "small"]  # not w6a6
    assert table["w8a8"]["pareto_milliseconds"] is None
    assert (table["w8a8"]["ap"], table["w8a8"]["ap_low"]) == (0.599, 0.589)


def test_files_have_milliseconds_and_a_front_of_their_own():
    found = columns(lines(ROWS, [file("w8a8", 0.5), file("small", 0.75, 900_000, 0.58)]))
    timed = {line["variant"]: line for line in found if line["runtime"] == "ONNX Runtime"}
    assert {name: line["milliseconds"] for name, line in timed.items()} == {
        "full precision": 20, "w8a8": 10, "small": 15,
    }  # fmt: skip
    assert [line["pareto_milliseconds"] for line in timed.values()] == [True, True, False]
    assert [line["pareto_bytes"] for line in timed.values()] == [True, True, True]
    assert timed["small"]["asked"] == "loses at most 0.01"


def test_a_file_without_a_latency_is_only_on_the_front_of_bytes():
    last = columns(lines(ROWS[:1], [file("w8a8", None)]))[-1]
    assert last["pareto_bytes"]
    assert last["pareto_milliseconds"] is None


def test_equal_points_share_a_place_on_the_front():
    front = pareto_front(
        [(1, 0.5), (2, 0.5), (2, 0.7), (3, 0.6)], *(lambda p, i=i: p[i] for i in (0, 1))
    )
    assert front == [(1, 0.5), (2, 0.7)]


def test_a_variants_line_has_the_size_and_the_time_of_its_first_file():
    slower = dataclasses.replace(file("w8a8", 1.5), runtime="openvino", title="OpenVINO")
    found = {line["variant"]: line for line in variant_lines(ROWS, [file("w8a8", 0.5), slower])}
    files = {name: (line["file_bytes"], line["file_time"]) for name, line in found.items()}
    assert files["full precision"] == (4_200_000, None)
    assert files["w8a8"] == (1_200_000, 0.5)
    assert files["w4a8"] == files["+ auto"] == (None, None)


def test_the_figure_shows_searched_bits_and_the_least_ap_that_was_asked_for():
    assert least_ap(ROWS) == {"loses at most 0.01": 0.59}
    found = points(variant_lines(ROWS))
    assert [p.quantization for p in found if p.series == SEARCHED] == ["small"]
    drawn = ap_by_size(found, "box", "m", asked=least_ap(ROWS))
    assert "asked: loses at most 0.01" in drawn
    assert SEARCHED in drawn
    assert "asked" not in ap_by_size(found, "box", "m")
