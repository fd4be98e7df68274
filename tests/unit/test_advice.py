"""What to deploy: the first sentences of terminal and report, from rows of every kind."""

import dataclasses

import pytest
from qwt_mmdet.evaluation.estimates import Comparison, Difference, Estimate
from qwt_mmdet.reporting.advice import advice
from qwt_mmdet.reporting.summary import ExportedRow, Row, Summary
from qwt_mmdet.reporting.terminal import advice_by_model

BASELINE = 0.6


def difference(value, half=0.002):
    return None if value is None else Difference(value, value - half, value + half)


def row(name, size, change, *, compensation=None, compensated=None, half=0.002, **changes) -> Row:
    """A row whose quantization changes AP by ``change``, and with its compensation by ``compensated``."""
    estimates = {
        "quantized": None if change is None else Estimate(BASELINE + change),
        "quantized_minus_baseline": difference(change, half),
    }
    if compensated is not None:
        estimates |= {
            "compensated": Estimate(BASELINE + compensated),
            "compensated_minus_baseline": difference(compensated, half),
            "compensated_minus_quantized": difference(compensated - change, half),
        }
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(Row))
    known = {
        "model": "m", "quantization": name, "compensation": compensation, "metrics": "bbox", "images": 300,
        "baseline_bytes": 12_450_000, "quantized_bytes": size, "weight_bits": int(name[1]),
        "compensation_bytes": compensation and 100_000,
    }  # fmt: skip
    ap = {"AP": Comparison(Estimate(BASELINE), **estimates)}
    return Row(**{**unknown, **known, "ap": ap, **changes})


def exported(name, ratio, runtime="onnxruntime", title="ONNX Runtime", **changes) -> ExportedRow:
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(ExportedRow))
    known = {
        "model": "m", "quantization": name, "metrics": "bbox", "runtime": runtime, "title": title,
        "file_bytes": 3_500_000, "full_precision_file_bytes": 14_000_000, "latency_ratio": ratio,
    }  # fmt: skip
    return ExportedRow(**{**unknown, **known, **changes})


LADDER = [
    row("w8a8", 3_250_000, 0.0),
    row("w6a6", 2_600_000, -0.006),
    row("w4a4", 1_650_000, -0.03, compensation="auto", compensated=-0.017),
]


def test_the_answer_goes_from_what_loses_nothing_to_what_is_smallest():
    assert advice(LADDER, [exported("w8a8", 0.7), exported("w8a8", 1.5, "openvino", "OpenVINO")]) == [
        "Take w8a8: a file of 3.50 in the place of 14.00 MB (25 %), 1.4 times as fast as full precision in ONNX Runtime, no "
        "loss that 300 images can show (change of box AP -0.002 to +0.002). Deploy results/m/w8a8/model.*.",
        "Smaller, with an estimated loss below 0.01 AP: w6a6: weights of 2.60 in the place of 12.45 MB, loses 0.006 AP "
        "(0.004 to 0.008).",
        "If it must be smaller still: w4a4: weights of 1.65 in the place of 12.45 MB, loses 0.030 AP (0.028 to 0.032); no "
        "file of it was made.",
        "Compensation helps: auto brings w4a4 from 0.570 to 0.583 box AP (+0.011 to +0.015), for 0.10 MB more.",
        "On 300 images, losses below about 0.002 cannot be told from luck.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (1.02, "as fast as full precision in ONNX Runtime"),
        (1.5, "slower than full precision in ONNX Runtime (1.5 times its time)"),
        (None, "a file of 3.50 in the place of 14.00 MB (25 %), no loss"),
    ],
)
def test_the_speed_is_that_of_the_file(ratio, said):
    assert said in advice(LADDER[:1], [exported("w8a8", ratio)])[0]
    with_another = [exported("w6a6", 0.5), exported("w8a8", 0.5, compensation="auto")]
    assert "file" not in advice(LADDER[:1], with_another)[0], "of that variant alone"


def test_a_file_stores_no_less_than_four_bits_for_a_weight():
    told = advice([*LADDER[:1], row("w2a8", 900_000, -0.03)], [exported("w8a8", 0.7)])
    assert told[1].endswith("no file of it was made (files store 2 bits in 4).")
    assert not any("no file" in sentence for sentence in advice(LADDER)), "nobody asked for files"


def test_where_all_lose_the_least_loss_comes_first():
    first, second, *_ = advice([row("w4a8", 2_000_000, -0.05), row("w8a8", 3_000_000, -0.02)])
    assert first == (
        "Everything here loses AP. w8a8: weights of 3.00 in the place of 12.45 MB, loses 0.020 AP (0.018 to 0.022), the least of all."
    )
    assert second.startswith(
        "If it must be smaller still: w4a8: weights of 2.00 in the place of 12.45 MB, loses 0.050 AP ("
    )


def test_where_nothing_is_found_nothing_is_advised():
    collapsed = row("w2a2", 900_000, -BASELINE, half=0.0, collapsed_quantized=True)
    assert advice([collapsed]) == [
        "Nothing here can be deployed: w2a2 collapsed and found no object. Raise the bits, or give the layers with the "
        "lowest SQNR 8 bits (overrides)."
    ]
    told = advice([*LADDER, collapsed])
    assert not any("w2a2" in sentence for sentence in told)
    half_gone = row("w3a3", 1_000_000, -0.35)
    assert not any("w3a3" in sentence for sentence in advice([*LADDER, half_gone]))


def test_an_interval_around_no_change_is_no_loss_and_says_what_would_tell():
    wide = advice(
        [row("w8a8", 3_000_000, -0.004, half=0.01), row("w4a4", 2_000_000, -0.008, half=0.01)]
    )
    assert wide[0].startswith(
        "Take w4a4: weights of 2.00 in the place of 12.45 MB, no loss that 300 images can show (change of box AP -0.018 to +0.002)"
    )
    assert wide[1] == (
        "On 300 images, losses below about 0.010 cannot be told from luck; about 7,500 images would show 0.002."
    )
    narrow = advice([row("w8a8", 3_000_000, 0.0, half=0.0023)])
    assert narrow[-1] == "On 300 images, losses below about 0.002 cannot be told from luck."
    assert len(advice([row("w8a8", 3_000_000, 0.0, half=0.0)])) == 1


def test_a_loss_of_masks_alone_is_a_loss():
    masks = dataclasses.replace(row("w8a8", 3_250_000, -0.02), metrics="segm")
    first, _ = advice([row("w8a8", 3_250_000, 0.0), masks])
    assert first == (
        "Everything here loses AP. w8a8: weights of 3.25 in the place of 12.45 MB, loses 0.000 box AP (-0.002 to 0.002, not "
        "significant) and loses 0.020 mask AP (0.018 to 0.022), the least of all."
    )
    equal = dataclasses.replace(row("w8a8", 3_250_000, 0.001), metrics="segm")
    first, _ = advice([row("w8a8", 3_250_000, 0.0), equal])
    assert (
        "no loss that 300 images can show (change of box AP -0.002 to +0.002, of mask AP -0.001 to +0.003)"
        in first
    )


def test_compensation_that_gains_nothing_is_said_to():
    told = advice([row("w8a8", 3_250_000, 0.0, compensation="qwt", compensated=0.001)])
    assert told[0].startswith("Take w8a8: "), "the smaller one of two that lose nothing"
    assert told[-2] == "Compensation gains nothing that these images can show."
    told = advice([row("w4a4", 1_650_000, -0.03, compensation="auto", compensated=0.0)])
    assert told[0].startswith("Take w4a4 + auto: weights of 1.75 in the place of 12.45 MB, no loss")


def test_without_full_precision_or_intervals_nothing_is_claimed():
    assert advice([row("w8a8", 3_250_000, None)]) == []
    single = row("w8a8", 3_250_000, None)
    ap = Comparison(Estimate(0.6), Estimate(0.59), quantized_minus_baseline=Difference(-0.01))
    assert advice([dataclasses.replace(single, ap={"AP": ap})]) == [
        "Everything here loses AP. w8a8: weights of 3.25 in the place of 12.45 MB, loses 0.010 AP (without an interval), the least of all."
    ]


def test_each_model_has_an_answer_of_its_own():
    others = [dataclasses.replace(one, model="n") for one in LADDER]
    summary = Summary(
        0.95, 0, [], [*LADDER, *others], [], [dataclasses.replace(exported("w8a8", 0.5), model="n")]
    )
    first, second = advice_by_model(summary)
    assert first.startswith("m:\n- Take w8a8: weights of 3.25 in the place of 12.45 MB, no loss")
    assert second.startswith("n:\n- Take w8a8: a file of 3.50 in the place of 14.00 MB (25 %)")
