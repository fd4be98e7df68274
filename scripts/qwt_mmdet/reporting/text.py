"""Formatting of numbers, and sentences about results.

Imports nothing heavy: Snakemake's own process prints them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..archives import overfitted_ranges
from ..evaluation.estimates import Estimate, value_of
from .summary import ExportedRow, Row, Summary
from .tradeoff import milliseconds

AP_TYPES = {"bbox": "box", "segm": "mask"}
NOTHING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """``0.269``; a dash for None."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """``+0.185``; ``0.000`` without a sign for what rounds to it; a dash for None."""
    if value is None:
        return NOTHING
    return f"{value:+.{digits}f}" if round(value, digits) else number(0, digits)


def percent(value: float | None) -> str:
    """``72 %``; a dash for None."""
    return NOTHING if value is None else f"{100 * value:.0f} %"


def megabytes(value: float | None) -> str:
    """Bytes as ``3.21 MB``; a dash for None."""
    return NOTHING if value is None else f"{value / 1e6:.2f} MB"


def significant_digits(value: float | None) -> str:
    """``0.0123``, ``1.2e-05``; a dash for None."""
    return NOTHING if value is None else f"{value:.3g}"


def multiply_adds(value: float | None) -> str:
    """``77.5 M``, ``4.50 G``; a dash for None."""
    if value is None:
        return NOTHING
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"


def duration(seconds: float | None) -> str:
    """``38 s``, ``2.0 min``, ``1.4 h``; a dash for None."""
    if seconds is None:
        return NOTHING
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def interval(estimate: Estimate | None, form: Callable[[float | None], str] = signed) -> str:
    """``+0.170 to +0.200``; empty without an interval."""
    if estimate is None or estimate.low is None:
        return ""
    return f"{form(estimate.low)} to {form(estimate.high)}"


def collapses(rows: Iterable[Row]) -> list[str]:
    """A sentence about each collapsed quantization, with the layers of the lowest SQNR."""
    collapsed: dict[tuple[str, str, str | None], list[str]] = {}
    for row in rows:
        names = collapsed.setdefault((row.model, row.quantization, row.worst_layers), [])
        names += [row.quantization] * bool(row.collapsed_quantized)
        names += [row.compensated_name] * bool(row.collapsed_compensated)
    return [
        f"{model}: {', '.join(dict.fromkeys(names))} collapsed (no object is found). "
        + (f"Layers with the lowest SQNR: {worst}. " if worst else "")
        + "Give such layers 8 bits with overrides, or raise the bits."
        for (model, _, worst), names in collapsed.items()
        if names
    ]


def overfitted_ranges_of(quantizations: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence about each quantization whose ranges overfit the calibration images."""
    return [
        f"{entry['model']}, {entry['quantization']}: {sentence[0].lower()}{sentence[1:]}"
        for entry in quantizations
        if (sentence := overfitted_ranges(entry.get("range_check")))
    ]


def loss(row: Row) -> str | None:
    """What a quantization loses: ``loses 0.006 (interval -0.001 to +0.014) of 0.269 box AP``; None if that is unknown."""
    change = row.ap["AP"].quantized_minus_baseline
    if change is None or change.value is None:
        return None
    gains, ends = round(change.value, 3) > 0, ""
    if change.low is not None and change.high is not None:
        low, high = (change.low, change.high) if gains else (-change.high, -change.low)
        ends = f" (interval {signed(low)} to {signed(high)})"
    return (
        f"{'gains' if gains else 'loses'} {number(abs(change.value))}{ends} {'on' if gains else 'of'} "
        f"{number(value_of(row.ap['AP'].baseline))} {AP_TYPES[row.metrics]} AP"
    )


def predicted_loss(loss: Mapping[str, Any]) -> str:
    """What a search says of its recipe's loss: the ``loss`` of its recipe.json."""
    sentence = (
        f"From {loss['images']} calibration images, a loss of {number(loss['value'])} AP was predicted "
        f"({number(loss['low'])} to {number(loss['high'])})"
    )
    if loss["images_to_tell"]:
        sentence += (
            f"; about {loss['images_to_tell']} annotated images would show whether the limit is met"
        )
    return f"{sentence}."


def file_sentences(summary: Summary) -> list[str]:
    """A sentence about each exported quantization in a runtime: the file's size, its latency, and its detector's loss.

    ``w8a8: 1.07 MB (29 % of full precision), 9.1 ms for an image in OpenVINO (70 % of full precision), loses …``
    """
    losses = {(row.model, row.quantization, row.metrics): loss(row) for row in summary.rows}
    sentences = []
    for row in summary.exports:
        lost = losses.get((row.model, row.quantization, row.metrics))
        if row.compensation is None and lost and row.file_bytes is not None:
            timed = milliseconds(row, [one for one in summary.exports if one.model == row.model])
            latency = "" if timed is None else (
                f", {timed:.1f} ms for an image in {row.title or row.runtime} "
                f"({percent(row.latency_ratio)} of full precision)"
            )  # fmt: skip
            size = f"{megabytes(row.file_bytes)} ({percent(row.file_share)} of full precision)"
            sentences.append(f"{row.quantization}: {size}{latency}, {lost}.")
    return sentences


def limit_sentence(row: Row) -> str | None:
    """A sentence about the loss of a searched quantization, and whether its limit is met; None without a limit.

    ``mixed (4.6 bits on average, 0.64 MB) loses 0.006 (interval -0.001 to +0.014) of 0.269 box AP; …``
    """
    limit, lost = row.limit, loss(row)
    if limit is None or lost is None:
        return None
    sentence = (
        f"{row.quantization} ({row.weight_bits:.1f} bits on average, "
        f"{megabytes(row.quantized_bytes)}) {lost}"
    )
    if limit.worst_drop is not None:
        sentence += (
            f"; the largest drop that 95 % of resamples stay under is {number(limit.worst_drop)}"
        )
    if limit.met is not None:
        return (
            f"{sentence}: it {'meets' if limit.met else 'misses'} the limit of {limit.max_drop:g}."
        )
    sentence += f". Whether it meets the limit of {limit.max_drop:g} cannot be told with {limit.images} images"
    if limit.images_to_tell is not None:
        sentence += f"; about {max(limit.images_to_tell, limit.images + 1)} would tell"
    return f"{sentence}."


def plus_minus(estimate: Estimate | None) -> str:
    """``± 0.004``, the standard deviation between repeats; empty without repeats."""
    return "" if estimate is None or estimate.spread is None else f"± {estimate.spread:.3f}"


def equality(row: ExportedRow) -> str:
    """Whether a file's AP differs from the simulation's, in words; empty where that is unknown."""
    difference = row.exported_minus_simulated
    if difference is None or difference.low is None:
        return ""
    return "differs" if difference.significant else "no significant difference"


def latency_share(row: ExportedRow) -> str:
    """A file's latency as a share of full precision's, and of full precision's in bfloat16 where that was timed."""
    shares = (row.latency_ratio, row.bfloat16_latency_ratio)
    return " / ".join(percent(share) for share in shares if share is not None) or NOTHING


SLOWER = 1.05
"""Times of full precision from which a file counts as slower."""


def slow_files(rows: Iterable[ExportedRow]) -> list[str]:
    """A sentence about the files of each model that a runtime computes more slowly than full precision."""
    slow: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        ratio = row.latency_ratio if row.processor_ratio is None else row.processor_ratio
        if ratio is not None and ratio > SLOWER:
            about = f"{row.variant} ({percent(ratio)} of its time, {percent(row.integer_share)} in integers)"
            slow.setdefault((row.model, row.title or row.runtime), {})[row.variant] = about
    return [
        f"{model}: {title} computes {', '.join(files.values())} more slowly than full precision. "
        "activation_bits: 32 keeps the size and takes full precision's time; docs/export.md tells what each runtime "
        "computes in integers."
        for (model, title), files in slow.items()
    ]
