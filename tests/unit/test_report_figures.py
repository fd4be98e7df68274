"""Figures: nothing hidden, colours of the page, a front that nothing beats."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from qwt_mmdet.errors import QwtError
from qwt_mmdet.reporting.figures import (
    FULL_PRECISION,
    QUANTIZED,
    Point,
    ap_by_bits,
    ap_by_latency,
    ap_by_size,
    block_errors,
    series_styles,
)
from qwt_mmdet.reporting.tradeoff import pareto_front

SVG = "{http://www.w3.org/2000/svg}"


def point(name: str, bits: int, series: str, value: float, cost: float) -> Point:
    return Point(name, (bits, 8), series, value, value - 0.02, value + 0.03, cost)


POINTS = [
    Point("", (32, 32), FULL_PRECISION, 0.40, 0.37, 0.45, 40.0),
    point("w8", 8, QUANTIZED, 0.39, 10.0),
    point("w8", 8, "qwt", 0.395, 10.5),
    point("w4", 4, QUANTIZED, 0.10, 5.0),
    point("w4", 4, "qwt", 0.30, 5.5),
    point("w4", 4, "paper", 0.20, 5.5),
]

TIMED = [
    point("full precision", 32, "ONNX Runtime", 0.40, 20.0),
    point("w8", 8, "ONNX Runtime", 0.39, 30.0),
    point("full precision", 32, "OpenVINO", 0.40, 18.0),
    point("w8", 8, "OpenVINO", 0.39, 9.0),
]

BLOCKS = [
    {"name": "backbone.a", "kept": True, "holdout_error_before": 0.5, "holdout_error_after": 0.2},
    {"name": "backbone.b", "kept": False, "holdout_error_before": 0.1, "holdout_error_after": 0.2},
]


DRAWN = {
    "bits": lambda: ap_by_bits(POINTS, "mask", "fig"),
    "size": lambda: ap_by_size(POINTS, "mask", "fig"),
    "latency": lambda: ap_by_latency(TIMED, "box", "fig"),
    "blocks": lambda: block_errors(BLOCKS, "holdout", "fig"),
}


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bits", {"mask AP (0 to 1)", "bits of weights (W), activations (A)"}),
        ("size", {"size of weights and compensation (MB)", "w4", "w8", "Pareto front", "full precision",
                  "quantized", "qwt", "paper"}),
        ("latency", {"latency for an image (ms)", "full precision", "w8", "ONNX Runtime", "OpenVINO", "Pareto front"}),
        ("blocks", {"a", "b", "compensated", "compensated (not kept)"}),
    ],
)  # fmt: skip
def test_a_figure_fits_page_and_phone_and_names_what_it_shows(name, said):
    svg = DRAWN[name]()
    root = ElementTree.fromstring(svg)
    assert "width" not in root.attrib
    assert "var(--ink)" in svg
    assert not any(word in svg for word in ("#000000", "#ffffff", "<script"))
    for identifier in re.findall(r'\bid="([^"]+)"', svg) + re.findall(r"url\(#([^)]+)\)", svg):
        assert identifier.startswith("fig-")
    on_phone = 366 / float(root.attrib["viewBox"].split()[2])  # 390 pixels less the margins
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    assert min(sizes) * on_phone >= 8.5
    assert said <= set(texts(svg))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("draw", [ap_by_bits, ap_by_size])
def test_numbers_that_no_axis_holds_are_left_out(draw):
    spoiled = [
        POINTS[0]._replace(low=NAN, high=INF),
        POINTS[1]._replace(value=NAN),
        POINTS[2]._replace(cost=INF),
        POINTS[3]._replace(low=0.1, high=0.1, value=0.0),
    ]
    shown = texts(draw(spoiled, "box", "a"))
    assert {"full precision", "quantized"} <= set(shown)
    assert "qwt" not in shown
    for nothing in ([], [POINTS[1]._replace(value=NAN)]):
        with pytest.raises(QwtError, match="No variant has an AP and a cost to draw"):
            draw(nothing, "box", "a")


@pytest.mark.parametrize("draw", [ap_by_bits, ap_by_size])
def test_odd_variants_can_be_drawn(draw):
    for odd in (
        [
            p._replace(low=None, high=None)
            for p in POINTS
            if p.series in (FULL_PRECISION, QUANTIZED)
        ],
        [p._replace(value=0.0, low=0.0, high=0.0, cost=0.0) for p in POINTS],
        [POINTS[1]._replace(quantization="$w_4")],
    ):
        assert "quantized" in texts(draw(odd, "box", "a"))


def test_blocks_whose_error_no_logarithm_has_are_left_out():
    spoiled = [
        {"name": str(error), "kept": True, "fit_error_before": 1.0, "fit_error_after": error}
        for error in (0.0, -1.0, NAN, INF, None)
    ]
    good = {"name": "good", "kept": True, "fit_error_before": 1.0, "fit_error_after": 1.0}
    shown = texts(block_errors([*spoiled, good], "fit", "a"))
    assert "good" in shown
    assert not {"0.0", "nan", "inf", "None"} & set(shown)
    for nothing in ([], spoiled):
        with pytest.raises(QwtError, match="No block has an error above 0"):
            block_errors(nothing, "fit", "a")


def test_nothing_beats_the_front_in_both_size_and_ap():
    front = pareto_front(POINTS, lambda p: p.cost, lambda p: p.value)
    assert [p.value for p in front] == [0.10, 0.30, 0.39, 0.395, 0.40]
    for p in POINTS:
        beaten = any(o.value >= p.value and o.cost <= p.cost and o != p for o in POINTS)
        assert (p not in front) == beaten


def test_series_differ_in_colour_and_in_marker():
    styles = series_styles([FULL_PRECISION, QUANTIZED, "a", "b", "c", "d", "e"])
    colours, markers = zip(*styles.values(), strict=True)
    assert len(set(colours)) == len(set(markers)) == 8, "searched bits too"


def test_a_name_goes_below_its_bar_where_another_bar_is_above():
    """The higher the place, the smaller is y of an SVG."""
    full, w8 = POINTS[:2]
    low = Point("w4", (4, 8), QUANTIZED, 0.20, 0.18, 0.22, 5.0)
    beside = Point("w4", (4, 8), "qwt", 0.30, 0.19, 0.40, 5.2)

    def height(points):
        found = ElementTree.fromstring(ap_by_size(points, "box", "fig")).iter(f"{SVG}text")
        (label,) = (element for element in found if element.text == "w4")
        return float(
            re.search(r"translate\(\S+ (\S+)\)|$", label.get("transform", ""))[1] or label.get("y")
        )

    assert height([full, w8, low, beside]) > height([full, w8, low]) + 20
