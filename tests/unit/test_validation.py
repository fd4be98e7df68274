"""Ranges that too few images have made are noticed, and noticing changes nothing."""

import logging

import pytest
import tiny
import torch
from qwt_mmdet.archives import overfitted_ranges
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import activation_quantizers, quantize_model
from qwt_mmdet.quantization.ranges import RangeObserver
from qwt_mmdet.quantization.state import load_warmup, save_warmup
from qwt_mmdet.quantization.validation import FoldedObserver
from qwt_mmdet.record import quantization_of

pytestmark = pytest.mark.usefixtures("device")


def calibrated(batches, kind="resnet", **settings):
    model = quantize_model(tiny.detector(kind), QuantizationSettings(8, 8, **settings))
    return calibrate(model, batches)


def brighter(batches, factor):
    """Every second image with larger values."""
    return [
        {"inputs": [image * factor if number % 2 else image for image in batch["inputs"]]}
        for number, batch in enumerate(batches)
    ]


@pytest.mark.parametrize("refit", ["none", "sequential"])
def test_ranges_that_hold_on_their_own_images_alone_are_told(refit, caplog):
    batches = tiny.batches(4, size=(32, 32))
    with caplog.at_level(logging.WARNING):
        stable = quantization_of(calibrated(batches, refit=refit)).range_check
        assert not caplog.records
        overfitted = quantization_of(calibrated(brighter(batches, 4), refit=refit)).range_check
    assert stable.images == overfitted.images == 4
    assert stable.unseen_db > 23, "half a percent of the outputs' power"
    # images four times as bright are clipped: what is cut off is a good part of the signal
    assert overfitted.seen_db > 25
    assert overfitted.unseen_db < 10
    (message,) = {record.message for record in caplog.records}
    assert f"{overfitted.seen_db:.1f} dB on images that made them" in message
    assert f"{overfitted.unseen_db:.1f} dB on others" in message


def test_ranges_of_a_single_image_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        calibrated(tiny.batches(1, size=(32, 32)))
    assert "a single image" in caplog.text


def test_folds_see_together_what_one_observer_sees():
    folds, whole = FoldedObserver("x", channel_axis=1), RangeObserver("x", channel_axis=1)
    for number, scale in enumerate((1, 30, 0.1)):
        x = scale * torch.randn(1, 3, 4, 4, device=tiny.device)
        folds.update(number, x)
        whole.update(x)
    merged = folds.merged()
    for key in ("counts", "exponent", "low", "high"):
        assert torch.equal(getattr(merged, key), getattr(whole, key)), key
    assert int(folds.folds[0].counts.sum()) == 2 * 48, "merging leaves the folds as they were"


@pytest.mark.parametrize("kind", ["swin", pytest.param("csp", marks=pytest.mark.slow_if_pretended)])
def test_the_check_leaves_each_quantizer_the_grid_of_all_images(kind):
    model = calibrated(brighter(tiny.batches(2, size=(32, 32)), 4), kind)
    alone = calibrated(brighter(tiny.batches(2, size=(32, 32)), 4)[1:], kind)
    grids, brightest = (
        {n: q.grid[0] for n, q in activation_quantizers(m).items()} for m in (model, alone)
    )
    first = next(iter(grids))
    assert torch.allclose(grids[first], brightest[first], rtol=0.05), "not that of the darker image"


def test_a_warmup_file_keeps_the_check(tmp_path):
    model = calibrated(tiny.batches(2, size=(32, 32)))
    save_warmup(model, tmp_path / "warmup.pth")
    again = load_warmup(tiny.detector("resnet"), tmp_path / "warmup.pth")
    assert quantization_of(again).range_check == quantization_of(model).range_check


@pytest.mark.parametrize(
    ("seen", "unseen", "told"),
    [
        (30.0, 20.0, True),
        (33.1, 28.7, False),  # little noise all the same
        (9.0, 8.0, False),  # few bits, but nothing that more images would mend
        (None, None, False),
    ],
)
def test_a_sentence_is_made_of_a_check(seen, unseen, told):
    check = {"images": 4, "seen_db": seen, "unseen_db": unseen}
    assert bool(overfitted_ranges(check)) is told
    assert overfitted_ranges(None) is None, "a warmup file of an earlier version has no check"
