"""What to deploy: the first sentences of the terminal's output and of the report.

Imports nothing heavy: Snakemake's own process prints them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config.search import stored_bits
from ..evaluation.estimates import Difference, value_of
from ..plan.files import Variant
from ..plan.run import unique
from . import text
from .summary import ExportedRow, Row

POINT = 0.01
"""One point of AP."""
SMALL = 0.002
"""A loss of AP that hardly anyone would mind."""
USEFUL = 0.5
"""Least part of full precision's AP that a variant must keep to be advised."""


@dataclass(frozen=True)
class Candidate:
    """A quantized detector, with or without compensation.

    Args:
        weight_bits: of the quantization.
        changes: of its AP to full precision's, by type of AP.
        files: its exported files, the fastest first. folder: where they are.
    """

    title: str
    weight_bits: int | float
    folder: str
    bytes: int
    changes: Mapping[str, Difference]
    files: tuple[ExportedRow, ...]

    @property
    def loses(self) -> bool:
        """Whether the images show a loss of any type of AP, or cannot tell how certain one is."""
        lost = [d for d in self.changes.values() if (d.value or 0) < 0]
        return any(d.significant or d.low is None for d in lost)

    @property
    def change(self) -> float:
        """The largest loss of all types of AP, below 0."""
        return min(d.value or 0.0 for d in self.changes.values())


def advice(rows: Sequence[Row], exports: Sequence[ExportedRow] = ()) -> list[str]:
    """What to do with one model, in order: what loses nothing, what is smaller, what compensation and images would change.

    Args:
        rows: of the model. exports: its exported files.

    Returns:
        Sentences; none where full precision or all variants were not evaluated.
    """
    found = candidates(rows, exports)
    if not found:
        collapsed = unique(row.quantization for row in rows if row.collapsed_quantized)
        if not collapsed:
            return []
        return [
            f"Nothing here can be deployed: {', '.join(collapsed)} collapsed and found no object. Raise the bits, or give "
            "the layers with the lowest SQNR 8 bits (overrides)."
        ]
    images = next((row.images for row in rows if row.images), None)
    full = next((row.baseline_bytes for row in rows if row.baseline_bytes), None)
    free = [one for one in found if not one.loses]
    if free:
        chosen = min(free, key=lambda one: (one.bytes, one.title))
        sentences = [f"Take {_described(chosen, full, images)}.{_place(chosen)}"]
    else:
        chosen = max(found, key=lambda one: (one.change, -one.bytes))
        sentences = [
            f"Everything here loses AP. {_described(chosen, full, images)}, the least of all."
        ]
    smaller = [one for one in found if one.bytes < chosen.bytes and one.change > -POINT]
    if smaller:
        chosen_smaller = min(smaller, key=lambda one: (one.bytes, one.title))
        sentences.append(
            f"Smaller, with an estimated loss below {POINT:g} AP: {_described(chosen_smaller, full, images)}."
            f"{_place(chosen_smaller)}"
        )
    limit = min(one.bytes for one in (chosen, *smaller))
    smallest = min(found, key=lambda one: (one.bytes, one.title))
    if smallest.bytes < limit:
        unmade = "" if smallest.files or not exports else _unmade(smallest)
        sentences.append(
            f"If it must be smaller still: {_described(smallest, full, images)}{unmade}.{_place(smallest)}"
        )
    return [*sentences, *_compensation(rows), *_images(chosen, images)]


def candidates(rows: Sequence[Row], exports: Sequence[ExportedRow]) -> list[Candidate]:
    """The variants of one model that were compared with full precision and keep a useful part of its AP."""
    changes: dict[tuple[str, str | None], dict[str, Difference]] = {}
    sizes: dict[tuple[str, str | None], int | None] = {}
    bits = {row.quantization: row.weight_bits for row in rows}
    baselines = {row.metrics: value_of(row.ap["AP"].baseline) for row in rows}
    for row in rows:
        ap = row.ap["AP"]
        for compensation, change, size in (
            (None, ap.quantized_minus_baseline, row.quantized_bytes),
            (row.compensation, ap.compensated_minus_baseline, row.compensated_bytes),
        ):
            name = row.quantization, compensation
            if change is not None and change.value is not None and size is not None:
                changes.setdefault(name, {})[row.metrics] = change
                sizes[name] = size
    found = []
    for name, by_type in changes.items():
        kept = [1 + (d.value or 0) / full for m, d in by_type.items() if (full := baselines[m])]
        files = [row for row in exports if (row.quantization, row.compensation) == name]
        files = [row for row in files if row.metrics == "bbox" and row.file_bytes]
        files.sort(key=lambda row: (row.latency_ratio is None, row.latency_ratio))
        size = sizes[name]
        if size is not None and kept and min(kept) >= USEFUL:
            title = " + ".join(filter(None, name))
            folder = Variant(rows[0].model, *name).exported
            found.append(Candidate(title, bits[name[0]], folder, size, by_type, tuple(files)))
    return found


def _described(one: Candidate, full: int | None, images: int | None) -> str:
    """Name, size, speed and loss of a variant."""
    about = _file(one.files[0]) if one.files else f"weights of {_sizes(one.bytes, full)}"
    return f"{one.title}: {about}, {_loss(one, images)}"


def _sizes(size: int | None, full: int | None) -> str:
    """``4.24 in the place of 13.32 MB``, or the size alone."""
    own = text.megabytes(size)
    return f"{own.removesuffix(' MB')} in the place of {text.megabytes(full)}" if full else own


def _file(file: ExportedRow) -> str:
    """Size and speed of a file."""
    size = f"a file of {_sizes(file.file_bytes, file.full_precision_file_bytes)}"
    if file.file_share is not None:
        size += f" ({text.percent(file.file_share)})"
    ratio = file.latency_ratio
    if ratio is None:
        return size
    title = file.title or file.runtime
    if 1 / text.SLOWER <= ratio <= text.SLOWER:
        return f"{size}, as fast as full precision in {title}"
    if ratio < 1:
        return f"{size}, {1 / ratio:.1f} times as fast as full precision in {title}"
    return f"{size}, slower than full precision in {title} ({ratio:.1f} times its time)"


def _loss(one: Candidate, images: int | None) -> str:
    """What a variant loses, in all types of AP."""
    several = len(one.changes) > 1
    if not one.loses:
        ends = {key: text.interval(change) for key, change in one.changes.items()}
        shown = ", of ".join(f"{text.AP_TYPES[key]} AP {end}" for key, end in ends.items() if end)
        shown = f"change of {shown}" if shown else "without an interval"
        return f"no loss that {images or 'these'} images can show ({shown})"
    lost = []
    for key, change in one.changes.items():
        gains = (change.value or 0) > 0
        known = change.low is not None and change.high is not None
        sides = (change.low or 0.0, change.high or 0.0)
        low, high = sides if gains else (0.0 - sides[1], 0.0 - sides[0])
        interval = f"{low:.3f} to {high:.3f}" if known else "without an interval"
        interval += ", not significant" * (known and not change.significant)
        unit = f"{text.AP_TYPES[key]} AP" if several else "AP"
        verb = "gains" if gains else "loses"
        lost.append(f"{verb} {abs(change.value or 0):.3f} {unit} ({interval})")
    return " and ".join(lost)


def _place(one: Candidate) -> str:
    """A sentence about where the files of a variant are; empty without a file."""
    return f" Deploy {one.folder}/model.*." if one.files else ""


def _unmade(one: Candidate) -> str:
    """That there is no file of a variant, and what a file would store."""
    stored = stored_bits(math.ceil(one.weight_bits), "onnx")
    if stored <= one.weight_bits:
        return "; no file of it was made"
    return f"; no file of it was made (files store {one.weight_bits:g} bits in {stored})"


def _compensation(rows: Sequence[Row]) -> list[str]:
    """What compensation changes at most."""
    boxes = [row for row in rows if row.metrics == "bbox"]
    known = [row for row in boxes if value_of(row.ap["AP"].compensated_minus_quantized) is not None]
    if not known:
        return []
    best = max(known, key=lambda row: value_of(row.ap["AP"].compensated_minus_quantized) or 0.0)
    ap, gain = best.ap["AP"], best.ap["AP"].compensated_minus_quantized
    if gain is None or not gain.significant or (gain.value or 0) <= 0:
        return ["Compensation gains nothing that these images can show."]
    return [
        f"Compensation helps: {best.compensation} brings {best.quantization} from {text.number(value_of(ap.quantized))} "
        f"to {text.number(value_of(ap.compensated))} box AP ({text.interval(gain)}), for "
        f"{text.megabytes(best.compensation_bytes)} more."
    ]


def _images(chosen: Candidate, images: int | None) -> list[str]:
    """Which losses luck hides, and how many images would show a small one."""
    change = next(iter(chosen.changes.values()))
    if images is None or change.low is None or change.high is None:
        return []
    half = (change.high - change.low) / 2
    shown = round(half, 3)
    if not shown:
        return []
    told = f"On {images} images, losses below about {shown:.3f} cannot be told from luck"
    if shown > SMALL:
        wanted = images * (half / SMALL) ** 2
        told += f"; about {float(f'{wanted:.2g}'):,.0f} images would show {SMALL:g}"
    return [f"{told}."]
