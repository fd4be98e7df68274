import copy
import dataclasses
import itertools

import pytest
import tiny
from qwt_mmdet.compensation.cost import backbone_multiply_adds, within_budget
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.result import BlockError, BlockFit, Option
from qwt_mmdet.config import CompensationSettings, MaxCost, QuantizationSettings
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from torch import nn

pytestmark = pytest.mark.usefixtures("device")

EVERYTHING = CompensationSettings(gate="none", ridge=0, bits=32, holdout_fraction=0)


def small_backbone():
    """3 -> 4 channels by 3×3 with stride 2, then 4 -> 4 by 1×1."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 1))
    return tiny.TinyDetector(layers).eval().to(tiny.device)


def fitted(settings, backbone="resnet"):
    full = tiny.detector(backbone)
    quantization = QuantizationSettings(weight_bits=4, activation_bits=4)
    model = calibrate(quantize_model(copy.deepcopy(full), quantization), tiny.batches(4))
    return fit_compensation(model, full, tiny.batches(4), settings)


def test_multiply_adds_of_a_backbone_counted_by_hand():
    # An image of 64×64 has 32×32 positions after the stride.
    expected = 32 * 32 * (4 * 3 * 9 + 4 * 4)
    assert backbone_multiply_adds(small_backbone(), tiny.batches(1)[0]) == expected


def test_cost_of_a_block_counted_by_hand():
    full = small_backbone()
    quantization = QuantizationSettings(weight_bits=4, activation_bits=8)
    model = calibrate(quantize_model(copy.deepcopy(full), quantization), tiny.batches(2))
    settings = dataclasses.replace(EVERYTHING, blocks=("backbone.0",))
    compensation = fit_compensation(model, full, tiny.batches(2), settings)
    block = compensation.blocks[0]
    assert (block.parameters, block.bytes) == (3 * 4 + 4, 64)
    assert (block.positions, block.multiply_adds) == (1024, 1024 * 12)
    assert block.multiply_adds_percent == pytest.approx(100 * 12 / 124)
    assert block.bytes_percent == pytest.approx(100 * 64 / 78)
    assert compensation.summary() == {
        "blocks": 1, "kept": 1, "parameters": 16, "bytes": 64, "multiply_adds": 1024 * 12,
        "bytes_percent": block.bytes_percent, "multiply_adds_percent": block.multiply_adds_percent,
        "backbone_multiply_adds": 1024 * 124, "heads": None, "left_out": {},
    }  # fmt: skip


def block(name, *options, kept=True, power=1.0):
    """A block whose error is 1 without compensation; options are pairs of error removed and cost."""
    forms = tuple(Option(1 - removed, cost, cost) for removed, cost in options)
    error = BlockError(1.0, 0.0, 0.0)
    return BlockFit(
        name=name, options=forms, kept=kept, decision="kept", target_power=power, fit=error
    )


def test_a_budget_goes_to_the_largest_error_reduction_per_cost():
    blocks = [
        block("good", (0.4, 1.0)),
        block("better", (0.9, 2.0)),
        block("dear", (0.5, 4.0)),
        block("harmful", (-0.5, 0.5)),
        block("rejected", (0.9, 0.1), kept=False),
        block("loud", (0.9, 1.0), power=100.0),
    ]
    assert within_budget(blocks, MaxCost(multiply_adds=3)).keys() == {"good", "better"}
    everything = {"good", "better", "dear", "loud"}
    assert within_budget(blocks, MaxCost(multiply_adds=100)).keys() == everything
    assert within_budget(blocks, MaxCost(bytes=0)) == {}
    assert within_budget(blocks, MaxCost(multiply_adds=100, bytes=2.5)).keys() == {"better"}


def test_a_budget_chooses_ranks_and_blocks_together():
    """Against the best of all combinations, on options with falling returns."""
    forms = [(0.0, 0.0), (0.3, 1.0), (0.5, 2.0), (0.6, 4.0)]
    blocks = [block(str(n), *((gain * n, cost) for gain, cost in forms)) for n in (1, 2, 4)]
    for budget in (0, 1, 2, 3, 4, 6, 8, 12):
        chosen = within_budget(blocks, MaxCost(bytes=budget))
        taken = [forms[chosen.get(str(n), 0)] for n in (1, 2, 4)]
        assert sum(cost for _, cost in taken) <= budget
        best = max(
            sum(gain * n for (gain, _), n in zip(choice, (1, 2, 4), strict=True))
            for choice in itertools.product(forms, repeat=3)
            if sum(cost for _, cost in choice) <= budget
        )
        assert sum(g * n for (g, _), n in zip(taken, (1, 2, 4), strict=True)) >= 0.9 * best


@pytest.mark.parametrize("key", ["multiply_adds", "bytes"])
def test_a_fit_stays_within_its_budget_and_its_later_blocks_know(key):
    free = fitted(EVERYTHING)
    most = 0.7 * free.summary()[f"{key}_percent"]
    limited = fitted(dataclasses.replace(EVERYTHING, max_cost=MaxCost(**{key: most})))
    assert 0 < limited.summary()[f"{key}_percent"] <= most
    changed = [
        (a.name, b.decision)
        for a, b in zip(free.blocks, limited.blocks, strict=True)
        if a.fit.error_before != b.fit.error_before
    ]
    dropped = [index for index, b in enumerate(limited.blocks) if b.decision == "max_cost"]
    # Blocks after the first dropped one start from another input than without the budget.
    assert [name for name, _ in changed] == [b.name for b in free.blocks[dropped[0] + 1 :]]


@pytest.mark.slow_if_pretended
def test_auto_stays_within_its_own_budget():
    settings = CompensationSettings(kind="auto", holdout_fraction=0.5, gate="none")
    fit = fitted(settings, "cspdarknet")
    summary = fit.summary()
    assert 0 < summary["bytes_percent"] <= 5
    assert summary["multiply_adds_percent"] <= 3
