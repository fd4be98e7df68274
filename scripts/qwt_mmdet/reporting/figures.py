"""Figures of the report: SVG for light and dark pages of any width.

Text and axes take the page's colours. The colours of the data are Okabe and Ito's, which can be told apart with
any colour vision, on white and on black. Each series also has its own marker.
"""

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from ..errors import QwtError
from ..plan.files import QUANTIZED
from .tradeoff import FULL_PRECISION, pareto_front

WIDTH = 5.6  # inches of 72 units; text of 11 units is readable on a phone that is 390 pixels wide

INK, LINE = "#010203", "#010204"
PAGE_COLOURS = {INK: "var(--ink)", LINE: "var(--line)"}

VERMILLION = "#D55E00"
SEARCHED = "searched bits"
COMPENSATION_STYLES = (
    ("#0072B2", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "v"),
    ("#E69F00", "P"),
    ("#56B4E9", "X"),
)

RISES, BELOW = (4, 15, 26, 37), -13
"""Of names above and below error bars, in points."""
BAR = 4
"""Half of what an error bar or a marker takes, in pixels."""
STYLE: Any = {
    "font.size": 11,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a dollar sign
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


class Point(NamedTuple):
    """AP of one variant: its series (full precision, quantized, searched bits, or the name of a compensation or runtime) and its costs.

    ``cost`` is a size in MB or a latency in ms.
    """

    quantization: str
    bits: tuple[int, int]
    series: str
    value: float
    low: float | None
    high: float | None
    cost: float

    def ends(self) -> tuple[float, float]:
        """Of the error bar; the value itself where there is none."""
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        return low, high


def series_styles(series: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each series."""
    known = {FULL_PRECISION: (INK, "D"), QUANTIZED: (VERMILLION, "o"), SEARCHED: ("#882255", "*")}
    others = dict.fromkeys(name for name in series if name not in known)
    return known | dict(zip(others, itertools.cycle(COMPENSATION_STYLES), strict=False))


def _svg(figure: Figure, name: str) -> Markup:
    """Draw a figure as an SVG element that scales; ``name`` makes its ids unique."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (?:width|height)="[^"]*"', "", svg, count=2)  # of the whole figure
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


def _new_figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _error(point: Point) -> list[list[float]] | None:
    """Lengths of the error bar on both sides; at least 0, since an interval may not contain its value."""
    if point.low is None or point.high is None:
        return None
    return [[max(point.value - point.low, 0)], [max(point.high - point.value, 0)]]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _drawable(points: Sequence[Point]) -> list[Point]:
    """Points with finite numbers; intervals that are not finite are left out."""
    drawable = [
        point if _finite(point.low) and _finite(point.high) else point._replace(low=None, high=None)
        for point in points
        if _finite(point.value) and _finite(point.cost)
    ]
    if not drawable:
        raise QwtError("No variant has an AP and a cost to draw.")
    return drawable


def ap_by_bits(points: Sequence[Point], ap_type: str, name: str) -> Markup:
    """AP of each quantization and its compensations, most bits on top, with full precision's.

    Args:
        ap_type: ``box`` or ``mask``. name: of the figure, for the ids within it.

    Raises:
        QwtError: no point has finite numbers.
    """
    points = _drawable(points)
    styles = series_styles(point.series for point in points)
    variants = [point for point in points if point.series != FULL_PRECISION]
    shown = list(dict.fromkeys(point.series for point in variants))
    lines = sorted({(point.bits, point.quantization) for point in variants})
    height = 1.5 + 0.3 * len(lines) * max(len(shown), 1.5)
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(height)
        for point in points:
            colour, marker = styles[point.series]
            if point.series == FULL_PRECISION:
                axes.axvline(point.value, color=colour, linestyle="--", label=FULL_PRECISION)
                if point.low is not None and point.high is not None:
                    axes.axvspan(point.low, point.high, color=colour, alpha=0.1, linewidth=0)
                continue
            middle = (len(shown) - 1) / 2 - shown.index(point.series)
            position = lines.index((point.bits, point.quantization)) + 0.7 * middle / len(shown)
            axes.errorbar(
                point.value, position, xerr=_error(point), color=colour, marker=marker,
                linestyle="none", capsize=3, label=point.series,
            )  # fmt: skip
        labels = [f"{quantization}\nW{bits[0]} A{bits[1]}" for bits, quantization in lines]
        axes.set_yticks(range(len(lines)), labels)
        axes.set_ylim(-0.6, len(lines) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{ap_type} AP (0 to 1)")
        axes.set_title("bits of weights (W), activations (A)", loc="left", fontsize="medium")
        _legend(figure, axes)
        return _svg(figure, name)


def _legend(figure: Figure, axes: Axes) -> None:
    """One entry for each series, below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower center", ncols=min(len(unique), 3)
    )


def _bar(axes: Axes, point: Point) -> Bbox:
    """Where a point and its error bar are drawn, in pixels."""
    low, high = point.ends()
    (x, bottom), (_, top) = axes.transData.transform([(point.cost, low), (point.cost, high)])
    return Bbox.from_extents(x - BAR, bottom - BAR, x + BAR, top + BAR)


def _label_points(axes: Axes, labelled: Sequence[Point], points: Sequence[Point]) -> None:
    """Write a quantization's name above each error bar; higher or below, where it overlaps a name or another one's bar."""
    placed: list[Bbox] = []
    for point in labelled:
        low, high = point.ends()
        taken = placed + [_bar(axes, other) for other in points if other is not point]
        label = axes.annotate(
            point.quantization, (point.cost, high), textcoords="offset points", ha="center", fontsize=10,
        )  # fmt: skip
        spots = [*((high, rise) for rise in RISES), (low, BELOW)]
        for end, rise in (*spots, spots[0]):  # the first one again where none is free
            label.xy = (point.cost, end)
            label.set_position((0, rise))
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        placed.append(box)


def ap_by_size(
    points: Sequence[Point], ap_type: str, name: str, *, asked: Mapping[str, float] | None = None
) -> Markup:
    """AP against the size of weights and compensation, with the Pareto front; see :func:`ap_by_bits`.

    Args:
        asked: the least AP that a search was asked for, by the words for it.
    """
    labelled = [point for point in points if point.series in (QUANTIZED, SEARCHED)]
    cost = "size of weights and compensation (MB)"
    return _ap_by_cost(points, labelled, ap_type, name, cost, asked or {})


def ap_by_latency(
    points: Sequence[Point], ap_type: str, name: str, *, asked: Mapping[str, float] | None = None
) -> Markup:
    """AP of exported files against their latency, with the Pareto front; a series for each runtime; see :func:`ap_by_size`."""
    return _ap_by_cost(points, points, ap_type, name, "latency for an image (ms)", asked or {})


def _ap_by_cost(
    points: Sequence[Point],
    labelled: Sequence[Point],
    ap_type: str,
    name: str,
    cost: str,
    asked: Mapping[str, float],
) -> Markup:
    points = _drawable(points)
    styles = series_styles(point.series for point in points)
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(4.2)
        front = pareto_front(points, lambda p: p.cost, lambda p: p.value)
        axes.step(
            [point.cost for point in front], [point.value for point in front],
            where="post", color=INK, linewidth=1, linestyle=":", label="Pareto front",
        )  # fmt: skip
        for words, least in asked.items():
            axes.axhline(least, color=INK, linewidth=1, linestyle="--", label=f"asked: {words}")
        costs = [point.cost for point in points]
        beside = 0.008 * (max(costs) - min(costs))  # shift between points of the same cost
        for number, point in enumerate(points):
            colour, marker = styles[point.series]
            shift = beside * costs[:number].count(point.cost)
            axes.errorbar(
                point.cost + shift, point.value, yerr=_error(point), color=colour, marker=marker,
                linestyle="none", capsize=3, label=point.series,
            )  # fmt: skip
        axes.margins(x=0.18, y=0.12)
        axes.set_xlabel(cost)
        axes.set_ylabel(f"{ap_type} AP (0 to 1)")
        _legend(figure, axes)
        figure.draw_without_rendering()
        _label_points(axes, [point for point in points if point in labelled], points)
        return _svg(figure, name)


def has_errors(block: Mapping[str, Any], images: str) -> bool:
    """Whether a logarithmic axis can show the errors of a block, a row of blocks.csv."""
    errors = [block[f"{images}_error_{when}"] for when in ("before", "after")]
    return all(_finite(error) and error > 0 for error in errors)


def block_errors(blocks: Sequence[Mapping[str, Any]], images: str, name: str) -> Markup:
    """Error of each block before and after its compensation, on a logarithmic axis.

    Args:
        blocks: rows of blocks.csv; those without :func:`has_errors` are left out.
        images: ``holdout`` or ``fit``: the images that errors are measured on.

    Raises:
        QwtError: there is no block to draw.
    """
    blocks = [block for block in blocks if has_errors(block, images)]
    if not blocks:
        raise QwtError("No block has an error above 0 to draw.")
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(1.5 + 0.24 * len(blocks))
        for position, block in enumerate(blocks):
            before, after = (block[f"{images}_error_{when}"] for when in ("before", "after"))
            colour, marker = COMPENSATION_STYLES[0]
            axes.plot([before, after], [position, position], color=LINE, linewidth=2, zorder=1)
            axes.plot(before, position, "o", color=VERMILLION, label="quantized")
            axes.plot(
                after, position, marker, color=colour, linestyle="none",
                markerfacecolor=colour if block["kept"] else "none",
                label="compensated" if block["kept"] else "compensated (not kept)",
            )  # fmt: skip
        names = [block["name"].removeprefix("backbone.") for block in blocks]
        axes.set_yticks(range(len(names)), names, fontsize=10)
        axes.invert_yaxis()
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        steps = (1, 2, 5) if high < 100 * low else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("mean squared error (logarithmic)")
        axes.set_ylabel("block")
        _legend(figure, axes)
        return _svg(figure, name)
