"""What the report says of a model in sentences."""

from collections.abc import Sequence

from ..evaluation.estimates import Estimate, value_of
from ..plan.files import QUANTIZED
from ..plan.run import unique
from . import text
from .summary import Row
from .variants import featured, variant_lines


def answers(rows: Sequence[Row]) -> list[str]:
    """Sentences about one model: the recommendation, then each quantization and type of AP, the featured one first."""
    first = featured(rows).quantization
    names = sorted(unique(row.quantization for row in rows), key=lambda name: name != first)
    found = [
        answer(chosen)
        for name in names
        for ap_type in text.AP_TYPES
        if (chosen := [row for row in rows if (row.quantization, row.metrics) == (name, ap_type)])
    ]
    limits = dict.fromkeys(map(text.limit_sentence, rows))
    return [*filter(None, [*limits, recommendation(rows)]), *found]


def answer(rows: Sequence[Row]) -> str:
    """A sentence about the loss of one quantization (in one type of AP) and the gain of each compensation."""
    row = rows[0]
    ap_type, loss = text.AP_TYPES[row.metrics], row.ap["AP"].quantized_minus_baseline
    quantized, baseline = value_of(row.ap["AP"].quantized), value_of(row.ap["AP"].baseline)
    if row.collapsed_quantized:
        start = f"{row.quantization} collapsed: it finds no object ({ap_type} AP)"
        if row.worst_layers:
            start += f"; layers with the lowest SQNR: {row.worst_layers}"
    elif quantized is None and row.failed:
        start = f"{row.quantization} has no {ap_type} AP"
    elif quantized is None:
        start = f"{row.quantization} was not evaluated without compensation ({ap_type} AP)"
    elif baseline:
        start = (
            f"{row.quantization} keeps {text.percent(quantized / baseline)} of full precision's {ap_type} AP "
            f"({text.number(quantized)} of {text.number(baseline)})"
        )
    else:
        start = f"{row.quantization} has {ap_type} AP {text.number(quantized)}"
    if loss is not None and not loss.significant:
        start += ", a difference that is not significant"
    effects = [
        f"{' + '.join(filter(None, (r.quantization, r.compensation)))} is not complete "
        f"({r.failed.rstrip('.')})"
        if r.failed
        else effect_sentence(r)
        for r in rows
        if r.compensation is not None or r.failed
    ]
    return "; ".join([start, *effects]) + "."


def _share_of_baseline(row: Row, estimate: Estimate | None) -> str:
    """``95 % (0.589)``, or only the number without a baseline."""
    value, baseline = value_of(estimate), value_of(row.ap["AP"].baseline)
    if value is None or not baseline:
        return text.number(value)
    return f"{text.percent(value / baseline)} ({text.number(value)})"


def effect_sentence(row: Row) -> str:
    """A sentence about the effect of one compensation."""
    name, ap = row.compensation, row.ap["AP"]
    gain = ap.compensated_minus_quantized
    if row.collapsed_compensated:
        return f"with {name} it finds no object"
    if gain is None or gain.value is None:
        return f"with {name} it is {_share_of_baseline(row, ap.compensated)}"
    change, ends = text.signed(gain.value), text.interval(gain)
    if not gain.significant:
        sentence = f"{name} changes it by {change}, which is not significant"
        return f"{sentence} ({ends})" if ends else sentence
    verb = "brings" if gain.value > 0 else "lowers"
    assert row.compensation_share is not None, "a compensation has a size"
    return (
        f"{name} {verb} it to {_share_of_baseline(row, ap.compensated)}, a change of {change} "
        f"(interval {ends}), for {100 * row.compensation_share:.1f} % of the full-precision weights"
    )


def recommendation(rows: Sequence[Row]) -> str | None:
    """A sentence about a model's Pareto front of box AP against size; None where nothing has both."""
    lines = [
        line
        for line in variant_lines([row for row in rows if row.metrics == "bbox"])
        if "title" in line and line["bytes"] is not None and value_of(line["ap"]) is not None
    ]
    front = sorted((li for li in lines if not li["dominated_by"]), key=lambda line: -line["bytes"])
    if not front:
        return None
    best = [
        f"{line['title']} ({text.megabytes(line['bytes'])}, {text.number(line['ap'].value)})"
        for line in front
    ]
    sentence = f"Best box AP for the size: {', '.join(best)}"
    dominated = [
        f"{line['dominated_by']} is no larger than {line['title']} and no worse"
        for line in lines
        if line["dominated_by"] and line["series"] != QUANTIZED
    ]
    return "; ".join([sentence, *dominated]) + "."
