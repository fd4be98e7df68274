import copy
import dataclasses
import math

import pytest
import tiny
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from qwt_mmdet.compensation import block_fit, heads
from qwt_mmdet.compensation.blocks import find_blocks
from qwt_mmdet.compensation.fit import count_folds, fit_compensation
from qwt_mmdet.compensation.modules import block_input, by_position, hooked
from qwt_mmdet.compensation.state import (
    apply_compensation,
    load_compensation,
    save_compensation,
)
from qwt_mmdet.config import CompensationSettings, QuantizationSettings
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.record import record_of
from qwt_mmdet.replay.forwards import replaced_forwards

pytestmark = pytest.mark.usefixtures("device")

PAPER = CompensationSettings(ridge=0, bits=32, gate="none", target="block", holdout_fraction=0)


def pair(kind, images=8, batch=1, size=(64, 64), bits=4):
    data = tiny.batches(images, size, batch)
    full = tiny.detector(kind)
    settings = QuantizationSettings(
        bits, bits, weight_range="minmax", activation_range="minmax", refit="none"
    )
    return full, tiny.calibrated(kind, settings, images, size), data


@torch.no_grad()
def captured(model, name, batches):
    """Input and output rows of a block, over all batches."""
    rows_in, rows_out = [], []

    def keep(name, block, arguments, output):
        rows_in.append(block_input(arguments).clone())
        rows_out.append(output.clone())

    with hooked(model, [name], keep):
        for batch in batches:
            forward_scope(model, batch, "backbone")
    return rows_in, rows_out


@torch.no_grad()
def run_block(model, name, x, extra):
    block = model.get_submodule(name)
    return block(x.clone(), *extra)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_block_matches_a_fit_made_the_slow_way(kind):
    """Whole passes from the image, compensating block by block, and lstsq on the stored rows."""
    full, model, data = pair(kind)
    fitted = fit_compensation(model, full, data, PAPER)
    slow = copy.deepcopy(model)
    for block in fitted.blocks:
        inputs, outputs = captured(slow, block.name, data)
        extra = ()
        if kind == "swin":
            shapes = []
            hook = slow.get_submodule(block.name).register_forward_pre_hook(
                lambda _, args, shapes=shapes: shapes.append(args[1:])
            )
            with hook, torch.no_grad():
                forward_scope(slow, data[0], "backbone")
            extra = shapes[0]
        rows_x, rows_y = [], []
        for x, output in zip(inputs, outputs, strict=True):
            error = run_block(full, block.name, x, extra) - output
            axis = -1 if x.dim() == 3 else 1
            stride = 1 if x.dim() == 3 else x.shape[-1] // output.shape[-1]
            x = x if x.dim() == 3 else x[:, :, ::stride, ::stride]
            rows_x.append(by_position(x, axis).double())
            rows_y.append(by_position(error, axis).double())
        x, y = torch.cat(rows_x), torch.cat(rows_y)
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype, device=x.device)], 1)
        expected = design @ torch.linalg.lstsq(design, y, driver="gelsd", rcond=1e-6).solution
        actual = x @ block.kind.weight.to(x) + block.kind.bias.to(x)
        # Least squares has one projection: equal residuals mean equal predictions.
        assert (y - actual).norm() <= (y - expected).norm() + 1e-4 * y.norm()
        apply_compensation(slow, dataclasses.replace(fitted, blocks=(block,)))


@pytest.mark.parametrize("target", ["block", "reference"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_compensation_brings_the_backbone_closer_on_images_of_the_fit(kind, target):
    full, model, data = pair(kind)
    settings = CompensationSettings(target=target)
    fitted = fit_compensation(model, full, data, settings)
    compensated = apply_compensation(copy.deepcopy(model), fitted)
    with torch.no_grad():
        distances = [
            sum(
                (a - e).square().sum()
                for batch in data
                for a, e in zip(
                    forward_scope(m, batch, "backbone"),
                    forward_scope(full, batch, "backbone"),
                    strict=True,
                )
            )
            for m in (compensated, model)
        ]
    assert distances[0] < distances[1]


@pytest.mark.parametrize(
    "kind",
    [
        "linear",
        *(
            pytest.param(kind, marks=pytest.mark.slow_if_pretended)
            for kind in ("lowrank", "affine", "bias")
        ),
    ],
)
def test_folds_judge_and_the_fit_is_to_all_images(kind):
    full, model, data = pair("cspdarknet")
    # one block: what later ones see differs by rounding, which quantizers enlarge
    first = find_blocks(full, data[0])[0]
    plain = dataclasses.replace(PAPER, kind=kind, target="reference", rank=3, blocks=(first,))
    (folded,), (on_all,) = (
        fit_compensation(model, full, data, dataclasses.replace(plain, holdout_fraction=f)).blocks
        for f in (0.25, 0)
    )
    assert folded.holdout.error_before == pytest.approx(on_all.fit.error_before, rel=1e-6)
    assert folded.holdout.error_after > folded.fit.error_after
    assert on_all.holdout.error_after is None
    for name, tensor in folded.kind.tensors().items():
        if name not in ("left", "right"):  # these may change their signs together
            torch.testing.assert_close(tensor, on_all.kind.tensors()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, pytest.param(32, marks=pytest.mark.slow_if_pretended)])
@pytest.mark.parametrize("target", ["block", "reference"])
def test_the_error_of_the_fit_is_what_the_compensated_model_has(target, bits):
    """The numbers in the file against the compensated model itself, at the last block."""
    full, model, data = pair("swin", images=5)
    settings = CompensationSettings(target=target, gate="none", bits=bits)
    fitted = fit_compensation(model, full, data, settings)
    last = fitted.blocks[-1]
    compensated = apply_compensation(copy.deepcopy(model), fitted)
    _, outputs = captured(compensated, last.name, data)
    inputs, wanted = captured(full, last.name, data)
    if target == "block":
        inputs, _ = captured(compensated, last.name, data)
        size = (8, 8)
        wanted = [run_block(full, last.name, x, (size,)) for x in inputs]
    # The forward hook that captures runs after the one that compensates.
    error = torch.stack([(o - w).square().mean() for o, w in zip(outputs, wanted, strict=True)])
    assert error.mean().item() == pytest.approx(last.fit.error_after, rel=1e-3)


@pytest.mark.parametrize(
    ("noise", "kept"),
    [([4, 5, 5, 5, 3], 4), ([4, 3, 3.5, 5, 6], 2), ([4, 4, 5, 5, 6], 0), ([4, math.nan] * 3, 0)],
)
def test_blocks_are_left_out_until_the_heads_have_less_noise_than_without(
    noise, kept, monkeypatch, caplog
):
    """``noise``: at the heads with the first 0, 1, 2, … blocks compensated."""
    full, model, data = pair("resnet", images=4)
    blocks = [m for m in model.modules() if type(m).__name__ == "BasicBlock"]

    def head_tensors(detector, image):
        if detector is full:
            return [torch.ones(1)]
        count = sum(len(block._forward_hooks) for block in blocks)
        return [torch.full((1,), 1 + math.sqrt(noise[count]))]

    monkeypatch.setattr(heads, "head_tensors", head_tensors)
    monkeypatch.setattr(block_fit, "_is_kept", lambda *_: True)
    settings = CompensationSettings(ridge=0.01, holdout_fraction=0.5)
    with caplog.at_level("INFO", logger="qwt_mmdet"):
        fitted = fit_compensation(model, full, data, settings)
    assert [block.decision for block in fitted.blocks] == ["kept"] * kept + ["heads"] * (4 - kept)
    assert fitted.heads["images"] == 2
    assert fitted.heads["before"] == pytest.approx(4)
    assert fitted.heads["after"] == pytest.approx(noise[kept])
    left_out = [block.name for block in fitted.blocks[kept:]]
    assert list(fitted.summary()["left_out"]) == left_out
    assert all(name in caplog.messages[-1] for name in left_out)


class Preprocessed(torch.nn.Module):
    """A detector with mmdet's own preprocessor, which pads the images of a batch to one size."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        record_of(self).fingerprint = {"model": type(backbone).__name__, "weights": "0" * 64}
        self.data_preprocessor = DetDataPreprocessor(mean=[1] * 3, std=[2] * 3, pad_size_divisor=8)
        self.data_preprocessor.to(tiny.device)  # as mmdet's detectors do where they are moved


@pytest.mark.parametrize(
    "target", ["block", pytest.param("reference", marks=pytest.mark.slow_if_pretended)]
)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_odd_images_of_different_sizes_give_the_same_in_every_batch(kind, target):
    """Swin's windows need padding here; images in one batch would be padded to the largest."""
    full = Preprocessed(tiny.backbone(kind)).eval().to(tiny.device)
    generator = torch.Generator().manual_seed(3)
    sizes = [(52, 76), (37, 45), (64, 64), (41, 90)]
    images = [torch.rand(3, *size, generator=generator).to(tiny.device) * 255 for size in sizes]
    batches = [{"inputs": [image], "data_samples": [DetDataSample()]} for image in images]
    joint = [
        {"inputs": images[:3], "data_samples": [DetDataSample() for _ in range(3)]},
        batches[3],
    ]
    settings = QuantizationSettings(weight_bits=4, activation_bits=4, activation_range="minmax")
    model = calibrate(quantize_model(copy.deepcopy(full), settings), batches)
    settings = dataclasses.replace(PAPER, target=target)
    one, three = (fit_compensation(model, full, data, settings) for data in (batches, joint))
    for a, b in zip(one.blocks, three.blocks, strict=True):
        assert torch.equal(a.kind.weight, b.kind.weight)
        assert a.row() == b.row()


class AddsInPlace(torch.nn.Module):
    """Convolutions whose outputs the code between them changes in place, as DetectoRS' neck does."""

    def __init__(self):
        super().__init__()
        sizes = zip((3, 4, 4, 4), (4, 4, 4, 4), strict=True)
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(*s, 3, padding=1) for s in sizes)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x += 1
        return (x,)


def test_code_between_blocks_may_work_in_place():
    torch.manual_seed(0)
    full = Preprocessed(AddsInPlace()).eval().to(tiny.device)
    images = torch.rand(4, 3, 24, 32, generator=torch.Generator().manual_seed(1)) * 255
    data = [{"inputs": [image], "data_samples": [DetDataSample()]} for image in images]
    settings = QuantizationSettings(weight_bits=4, activation_bits=4)
    model = calibrate(quantize_model(copy.deepcopy(full), settings), data)
    fitted = fit_compensation(
        model, full, data, dataclasses.replace(PAPER, blocks=("backbone.layers.*",))
    )
    assert len(fitted.blocks) == 4
    assert all(block.fit.error_after < block.fit.error_before for block in fitted.blocks)


@pytest.mark.parametrize("target", ["block", "reference"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_activations_on_disk_give_identical_results(kind, target, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    full, model, data = pair(kind, images=5)
    settings = CompensationSettings(target=target)
    memory = fit_compensation(model, full, data, settings)
    assert list(tmp_path.glob("qwt-mmdet-*")) == []
    disk = fit_compensation(model, full, data, settings, memory_gb=0)
    assert list(tmp_path.glob("qwt-mmdet-*")) == []
    for name, fitted in (("memory", memory), ("disk", disk)):
        save_compensation(model, fitted, tmp_path / name)
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()
    assert [b.row() for b in memory.blocks] == [b.row() for b in disk.blocks]


def test_models_are_unchanged_by_a_fit():
    full, model, data = pair("resnet")
    before = copy.deepcopy((full.state_dict(), model.state_dict()))
    fit_compensation(model, full, data, CompensationSettings())
    for state, module in zip(before, (full, model), strict=True):
        assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())
    assert all("forward" not in vars(m) for m in (*full.modules(), *model.modules()))


def test_forwards_come_back_after_an_exception():
    module = torch.nn.Linear(1, 1)
    with pytest.raises(KeyError), replaced_forwards({module: lambda x: x}):
        raise KeyError
    assert "forward" not in vars(module)


def test_blocks_are_fitted_in_running_order_whatever_the_order_of_their_names():
    class Skip(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.a, self.b = (torch.nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x):
            first = self.a(x)
            second = torch.relu_(self.b(first))
            return self.c(second + first)

    skip = tiny.TinyDetector(Skip()).to(tiny.device)
    patterns = ("backbone.a", "backbone.b", "backbone.c")
    settings = dataclasses.replace(PAPER, blocks=patterns[::-1])
    model = calibrate(
        quantize_model(copy.deepcopy(skip), QuantizationSettings(weight_bits=3, activation_bits=3)),
        tiny.batches(4),
    )
    fitted = fit_compensation(model, skip, tiny.batches(4), settings)
    assert [block.name for block in fitted.blocks] == list(patterns)


def test_gate_rejects_what_does_not_help_on_held_out_images():
    full, _, data = pair("swin")
    same = copy.deepcopy(full)
    fitted = fit_compensation(same, full, data, CompensationSettings())
    # Without quantization there is no error to lower.
    assert not any(block.kept for block in fitted.blocks)


def test_compensation_of_another_quantization_is_refused(tmp_path):
    full, model, data = pair("resnet")
    path = tmp_path / "compensation.pth"
    save_compensation(model, fit_compensation(model, full, data, PAPER), path)
    _, other, _ = pair("resnet", bits=5)
    with pytest.raises(QwtError, match="quantization differ"):
        load_compensation(other, path)


def test_compensated_model_can_be_copied_and_its_state_saved():
    full, model, data = pair("swin")
    compensated = apply_compensation(model, fit_compensation(model, full, data, PAPER))
    twin = copy.deepcopy(compensated)
    with torch.no_grad():
        expected = forward_scope(compensated, data[0], "backbone")
        actual = forward_scope(twin, data[0], "backbone")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    keys = [key for key in compensated.state_dict() if key.endswith("compensation_weight")]
    assert len(keys) == len(find_blocks(compensated, data[0]))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (("backbone.nothing*",), "matches no module"),
        (("backbone.layer1", "backbone.layer1.0"), "nested"),
    ],
)
def test_bad_block_patterns_are_named(blocks, message):
    with pytest.raises(QwtError, match=message):
        find_blocks(tiny.detector("resnet"), tiny.batches(1)[0], blocks)


def test_backbone_without_anything_to_compensate_is_refused():
    detector = tiny.TinyDetector(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 2))).to(tiny.device)
    with pytest.raises(QwtError, match=r"backbone, of class Sequential, .* 'blocks'"):
        find_blocks(detector, tiny.batches(1)[0])


def test_no_images_and_too_few_images_are_errors():
    full, model, _ = pair("resnet", images=1)
    with pytest.raises(QwtError, match="no calibration images"):
        fit_compensation(model, full, [], PAPER)
    with pytest.raises(QwtError, match="cannot be split"):
        fit_compensation(model, full, tiny.batches(1), CompensationSettings())


def test_a_fraction_of_held_out_images_gives_folds():
    folds = {0: 1, 0.2: 5, 0.25: 4, 0.34: 3, 0.5: 2}
    assert {f: count_folds(100, f) for f in folds} == folds


def test_each_block_is_logged_with_what_it_cost(caplog):
    full, model, data = pair("resnet", images=4)
    with caplog.at_level("INFO", logger="qwt_mmdet"):
        fitted = fit_compensation(model, full, data, PAPER)
    for block in fitted.blocks:
        (line,) = [m for m in caplog.messages if m.startswith(f"{block.name}: ")]
        for part in ("channels", "tokens", "linear", "held-out", "r2", "kept", " s", "peak memory"):
            assert part in line


@pytest.mark.parametrize("target", ["block", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_quantized_detector_that_diverges_keeps_no_compensation_after_that(
    tmp_path, caplog, target, value
):
    full, model, data = pair("resnet", images=4)
    settings = CompensationSettings(target=target, gate="none", holdout_fraction=0.25)
    sound = fit_compensation(model, full, data, settings)
    second = sound.blocks[1].name
    model.get_submodule(second).bn2.bias.data.fill_(value)
    fitted = fit_compensation(model, full, data, settings)
    assert fitted.blocks[0].kept
    lost = [block for block in fitted.blocks if not block.kept]
    # quantizers clip an infinity, so that the detector may recover from it
    assert lost == list(fitted.blocks[1:]) if math.isnan(value) else second in str(lost)
    for block in lost:
        assert (block.kept, block.decision, block.kind) == (False, "not_finite", None)
        assert block.row()["fit"]["error_before"] is None
    assert (
        f"{second}: values of the quantized detector are NaN or infinite on 4 of 4" in caplog.text
    )
    save_compensation(model, fitted, tmp_path / "compensation.pth")
    load_compensation(model, tmp_path / "compensation.pth")


def test_a_full_precision_detector_that_diverges_is_an_error():
    full, model, data = pair("resnet", images=4)
    full.backbone.layer1[1].bn1.bias.data.fill_(float("nan"))
    with pytest.raises(QwtError, match=r"output of block backbone.* NaN .* in full precision"):
        fit_compensation(model, full, data, CompensationSettings(holdout_fraction=0.25))
