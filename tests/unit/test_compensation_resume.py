"""A fit that was interrupted goes on after its last finished block."""

import dataclasses
from typing import ClassVar

import pytest
import tiny
from qwt_mmdet.compensation import fit as fit_module
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.state import save_compensation
from qwt_mmdet.config import CompensationSettings, MaxCost, QuantizationSettings

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = CompensationSettings(holdout_fraction=0.34)


@pytest.fixture(
    params=[
        "resnet",
        *(
            pytest.param(kind, marks=pytest.mark.slow_if_pretended)
            for kind in ("swin", "cspdarknet")
        ),
    ]
)
def models(request):
    full = tiny.detector(request.param)
    quantization = QuantizationSettings(weight_bits=4, activation_bits=4, activation_range="minmax")
    return tiny.calibrated(request.param, quantization, 3), full


@pytest.fixture
def counted(monkeypatch):
    """Names of the blocks that are fitted; fitting the block at ``stop`` is interrupted."""

    class Count:
        names: ClassVar = []
        stop = None

    original = fit_module.fit_block

    def fit_block(fit, name, *args):
        if len(Count.names) == Count.stop:
            raise KeyboardInterrupt
        Count.names.append(name)
        return original(fit, name, *args)

    Count.names = []
    monkeypatch.setattr(fit_module, "fit_block", fit_block)
    return Count


def interrupted_and_whole(models, settings, folder, counted, stop):
    """Bytes of the compensation of an interrupted and of an undisturbed fit; blocks fitted twice."""
    model, full = models
    images = tiny.batches(3)
    whole = fit_compensation(model, full, images, settings)
    names, counted.names, counted.stop = counted.names, [], stop
    with pytest.raises(KeyboardInterrupt):
        fit_compensation(model, full, images, settings, resume=folder / "state")
    counted.stop = None
    assert (folder / "state").exists()
    again = fit_compensation(model, full, images, settings, resume=folder / "state")
    assert counted.names == names
    save_compensation(model, whole, folder / "whole")
    save_compensation(model, again, folder / "again")
    return (folder / "whole").read_bytes(), (folder / "again").read_bytes()


@pytest.mark.parametrize("target", ["block", "reference"])
def test_a_fit_stopped_in_block_3_ends_as_if_it_had_not(models, target, counted, tmp_path):
    settings = dataclasses.replace(SETTINGS, target=target)
    whole, again = interrupted_and_whole(models, settings, tmp_path, counted, 2)
    assert whole == again


def test_a_fit_under_a_budget_goes_on_in_its_second_pass(counted, tmp_path):
    full = tiny.detector("resnet")
    quantization = QuantizationSettings(weight_bits=4, activation_bits=4)
    model = tiny.calibrated("resnet", quantization, 3)
    # A number for ridge: a block that is left with its bias alone costs no multiply-adds.
    settings = dataclasses.replace(
        SETTINGS, ridge=0.01, gate="none", max_cost=MaxCost(multiply_adds=1.5)
    )
    whole, again = interrupted_and_whole((model, full), settings, tmp_path, counted, 6)
    assert whole == again
    assert len(counted.names) == 8


@pytest.mark.parametrize("change", ["settings", "images", "model", "file"])
def test_other_inputs_start_anew(change, counted, tmp_path):
    full = tiny.detector("resnet")
    quantization = QuantizationSettings(weight_bits=4, activation_bits=4)
    model = tiny.calibrated("resnet", quantization, 3)
    images, settings, state = tiny.batches(3), SETTINGS, tmp_path / "state"
    fit_compensation(model, full, images, settings, resume=state)
    counted.names = []
    fit_compensation(model, full, images, settings, resume=state)
    assert counted.names == []
    if change == "settings":
        settings = dataclasses.replace(settings, ridge=0.25)
    elif change == "images":
        images[1]["inputs"][0] = images[1]["inputs"][0] + 1
    elif change == "model":
        next(iter(model.backbone.modules())).conv1.weight_codes[0, 0, 0, 0] += 1
    else:
        state.write_bytes(state.read_bytes()[:100])
    fit_compensation(model, full, images, settings, resume=state)
    assert len(counted.names) == 4
