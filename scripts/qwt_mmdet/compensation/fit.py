"""Fit the compensation of all blocks of a quantized detector, one block after the other.

Activation replay (:mod:`..replay.walk`) runs the detector from block to block. The full-precision block and the
quantized block each run once per image.
"""

import hashlib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import CompensationSettings, as_plain
from ..data.batches import single_images
from ..detectors.forward import check_precision, head_tensors
from ..devices import peak_gigabytes
from ..errors import QwtError
from ..progress import progress
from ..quantization.sqnr import HeadError, sqnr_db
from ..record import record_of
from ..replay.cache import RELEASE_INTERVAL, ActivationCache, release_free_memory
from ..replay.forwards import detached
from ..replay.walk import Uses, Walk
from .blocks import block_positions, find_blocks, replay_scope
from .cost import backbone_bytes, backbone_multiply_adds, within_budget
from .kinds import BITS, rounded_input
from .modules import (
    aligned_input,
    block_output,
    by_position,
    channel_axis,
    compensated,
    compensating,
)
from .result import BlockError, BlockFit, Compensation, Option
from .resume import Resume
from .solve import SOLVERS, FittedForm, fit_forms
from .state import quantized_fingerprint
from .statistics import BlockStatistics, ChannelStatistics, RegressionStatistics, merged

logger = logging.getLogger(__name__)


def count_folds(images: int, fraction: float) -> int:
    """Number of folds of ``images`` calibration images; 1 where none is held out.

    Raises:
        QwtError: there are fewer images than folds.
    """
    folds = round(1 / fraction) if fraction else 1
    if images < folds:
        raise QwtError(
            f"{images} calibration images cannot be split with holdout_fraction {fraction}; use more "
            "calibration images."
        )
    return folds


@dataclass(frozen=True)
class _Fit:
    """Everything that the fits of all blocks share.

    Attributes:
        positions: number of positions of each block's output, for the first image, in running order.
        uses: when each output is read in a forward pass.
        images: number of calibration images in the cache, under ("image", number).
        folds: number of folds; image i belongs to fold i modulo this.
    """

    settings: CompensationSettings
    positions: Mapping[str, int]
    uses: Uses
    cache: ActivationCache
    images: int
    folds: int
    backbone_bytes: float
    backbone_multiply_adds: int


def _statistics(needs: tuple[str, ...], inputs: int, outputs: int, device: Any) -> BlockStatistics:
    return BlockStatistics(
        RegressionStatistics.zeros(inputs, outputs, device) if "inputs" in needs else None,
        ChannelStatistics.zeros(outputs, outputs, device) if "outputs" in needs else None,
    )


def _is_kept(
    settings: CompensationSettings, form: FittedForm, fit: BlockError, held_out: BlockError
) -> bool:
    if form.solution.kind is None:
        return False
    if settings.gate == "holdout":
        after, before = held_out.error_after, held_out.error_before
        return after is not None and before is not None and after < before
    return settings.gate == "none" or (fit.r2 or 0) > 0


def _error(after: float | None, sums: BlockStatistics) -> BlockError:
    """The error of a block before and after compensation, from the sum of squares ``after`` it."""
    if after is None:
        return BlockError()
    variation = sums.any.variation
    r2 = 1 - after / variation if variation > 0 else 0.0
    return BlockError(sums.any.error_before() / sums.elements, after / sums.elements, r2)


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the device"
    return f"{peak_gigabytes():.2f} GB"


@torch.no_grad()
def fit_compensation(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[dict[str, Any]],
    settings: CompensationSettings,
    *,
    device_gb: float = 4.0,
    memory_gb: float = 4.0,
    resume: str | os.PathLike[str] | None = None,
    resume_inputs: Mapping[str, Any] | None = None,
) -> Compensation:
    """Fit the compensation of a quantized detector's blocks on calibration images.

    Args:
        model: quantized and calibrated; it is not changed.
        reference: the same detector in full precision.
        loader: calibration batches as mmdet's test step takes them, of any size.
        settings: kind, target, ridge, gate and more.
        device_gb, memory_gb: limits of cached activations, which do not change the result (see
            :class:`..replay.cache.ActivationCache`).
        resume: file that keeps the finished blocks. If it has the same model, settings and images, the fit
            goes on after these blocks. Remove it when the result is saved.
        resume_inputs: further plain values that must be the same to go on.

    Raises:
        QwtError: there are no images or no blocks, a block cannot be compensated, or values of the
            full-precision detector are not finite. A block whose quantized values are not finite stays
            without compensation.
    """
    for detector in (model, reference):
        check_precision(detector)
    with ActivationCache(device_gb, memory_gb) as cache:
        digest = hashlib.sha256()
        images = 0
        for images, image in enumerate(single_images(loader), start=1):
            if images == 1:
                first = image
            if resume is not None:
                for tensor in image["inputs"]:
                    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                    digest.update(tensor.cpu().contiguous().numpy().data)
            cache["image", images - 1] = image
        if images == 0:
            raise QwtError("There are no calibration images; choose at least one.")
        inputs = {
            **quantized_fingerprint(model),
            "settings": as_plain(settings),
            "images": digest.hexdigest(),
            **(resume_inputs or {}),
        }
        folds = count_folds(images, settings.holdout_fraction)
        quantization = record_of(model).quantization
        names = find_blocks(
            reference,
            first,
            settings.blocks,
            scope=quantization.settings.scope if quantization else "backbone",
            downsampling=settings.downsampling,
        )
        recorder = Walk(reference, names, cache, replay_scope(names))
        with recorder.active():
            forward = partial(recorder.record, replay_scope(names))
            positions = block_positions(reference, names, forward)
        fit = _Fit(
            settings,
            positions,
            recorder.uses,
            cache,
            images,
            folds,
            backbone_bytes(model),
            backbone_multiply_adds(reference, first),
        )
        record = Resume(resume, inputs)
        blocks = _fit_pass(fit, model, reference, record, "all")
        if settings.budget is not None:
            chosen = within_budget(blocks, settings.budget)
            if chosen != {block.name: block.option for block in blocks if block.kept}:
                logger.info(
                    "%d of %d blocks fit the budget; fitting these again",
                    len(chosen),
                    len(blocks),
                )
                blocks = _fit_pass(fit, model, reference, record, "max_cost", chosen)
        heads = None
        if settings.gate == "holdout" and any(block.kept for block in blocks):
            blocks, heads = _check_at_heads(fit, model, reference, blocks)
    return Compensation(settings, tuple(blocks), fit.backbone_multiply_adds, heads)


def _check_at_heads(
    fit: _Fit, model: nn.Module, reference: nn.Module, blocks: list[BlockFit]
) -> tuple[list[BlockFit], dict[str, float]]:
    """Leave out compensations, from the last block on, until the relative error at the heads is below that of none.

    The error is measured on the images of the first fold, with compensations that were fitted to the others.

    Returns:
        The blocks, and the compensation's ``heads``.
    """
    images = range(0, fit.images, fit.folds)
    for image in images:
        fit.cache["heads", image] = head_tensors(reference, fit.cache["image", image])

    def error_with(kept: Sequence[BlockFit]) -> float:
        error = HeadError()
        kinds = {block.name: block.trial for block in kept if block.trial}
        with compensating(model, kinds):
            for image in images:
                found = head_tensors(model, fit.cache["image", image])
                error.update(fit.cache["heads", image], found)
        return error.relative()

    kept = [block for block in blocks if block.kept]
    before, after = error_with([]), error_with(kept)
    while kept and not after < before:  # NaN is no improvement
        kept.pop()
        after = error_with(kept) if kept else before
    names = [block.name for block in kept]
    dropped = [block.name for block in blocks if block.kept and block.name not in names]
    logger.info(
        "At the heads, on %d held-out images: %s dB without compensation, %s dB with it; %s",
        len(images), *(f"{sqnr_db(error) or math.inf:.1f}" for error in (before, after)),
        f"left out, so that the error falls: {', '.join(dropped)}" if dropped else "all blocks stay",
    )  # fmt: skip
    blocks = [
        replace(block, kept=False, decision="heads") if block.name in dropped else block
        for block in blocks
    ]
    return blocks, {"images": len(images), "before": before, "after": after}


def _fit_pass(
    fit: _Fit,
    model: nn.Module,
    reference: nn.Module,
    record: Resume,
    name: str,
    chosen: Mapping[str, int] | None = None,
) -> list[BlockFit]:
    """Fit all blocks in order.

    Args:
        name: of the pass.
        chosen: index of the form of each block; others stay without compensation. None: each block takes the
            form with the smallest error.
    """
    fits = record.finished(name)
    if fits:
        logger.info("Going on after %d finished blocks", len(fits))
    with ExitStack() as stack:
        quantized = stack.enter_context(_walking(fit, model, f"{name} quantized"))
        full = None
        if fit.settings.target == "reference":
            full = stack.enter_context(_walking(fit, reference, f"{name} full"))
            full.pending.clear()
        for block in fits:
            _finish(quantized, model, block)
        for block_name in progress(list(fit.positions)[len(fits) :], "Fitting", unit="block"):
            block = _fit_block(fit, block_name, quantized, full, reference, chosen)
            _finish(quantized, model, block)
            fits.append(block)
            record.add(name, block)
    return fits


@contextmanager
def _walking(fit: _Fit, model: nn.Module, tag: str) -> Iterator[Walk]:
    """Inside: an active walk over the blocks."""
    scope = replay_scope(fit.positions)
    walk = Walk(model, fit.positions, fit.cache, scope, tag=tag, uses=fit.uses)
    with walk.active():
        yield walk


def _finish(walk: Walk, model: nn.Module, block: BlockFit) -> None:
    """Let the walk run a fitted block with its compensation from now on."""
    walk.pending.discard(block.name)
    if block.kept and block.kind is not None:
        module, kind = model.get_submodule(block.name), block.kind
        walk.completions[block.name] = partial(compensated, module, kind)


def _fit_block(
    fit: _Fit,
    name: str,
    quantized: Walk,
    full: Walk | None,
    reference: nn.Module,
    chosen: Mapping[str, int] | None,
) -> BlockFit:
    """Fit one block on all images; both walks advance to its output."""
    start = time.monotonic()
    settings = fit.settings
    solver = SOLVERS[settings.kind]
    groups: list[BlockStatistics] = []
    power = 0.0
    diverged = 0
    for image in range(fit.images):
        if image % RELEASE_INTERVAL == 0:
            release_free_memory()
        x, output, expected = _run_block(settings, name, quantized, full, reference, image)
        if not groups:
            channels = x.shape[1], output.shape[1]
            groups = [_statistics(solver.needs, *channels, output.device) for _ in range(fit.folds)]
        if settings.target == "reference" and not _is_finite(expected):
            raise QwtError(
                f"The output of block {name} holds NaN or infinite values in full precision; check "
                "that the checkpoint is sound and that the full-precision model evaluates."
            )
        if all(map(_is_finite, (x, output, expected))):
            groups[image % fit.folds].update(x, output, expected - output)
            power += float(torch.linalg.vector_norm(expected)) ** 2 / expected.numel() / fit.images
        else:
            diverged += 1
        del x, output, expected  # before the next image needs the memory
    if diverged:
        logger.warning(
            "%s: values of the quantized detector are NaN or infinite on %d of %d images, so the block "
            "stays without compensation; raise the bits of the blocks before it.",
            name, diverged, fit.images,
        )  # fmt: skip
        return _left_alone(name, "not_finite")
    sums = merged(groups)
    forms = fit_forms(sums, groups, settings)
    options = tuple(_option(fit, name, form, sums) for form in forms)
    number = min(range(len(options)), key=lambda n: options[n].error)
    if chosen is not None:
        number = chosen.get(name, number)
    form = forms[number]
    fit_error = _error(form.solution.squared_error(sums), sums)
    holdout_error = _error(form.held_out, sums)
    passes_gate = _is_kept(settings, form, fit_error, holdout_error)
    kind, trial = (
        None
        if solution is None or solution.kind is None
        else solution.kind.to("cpu", torch.float32)
        for solution in (form.solution, form.trial)
    )
    if kind and not all(torch.isfinite(tensor).all() for tensor in kind.tensors().values()):
        logger.warning("The compensation of block %s is not finite; set a larger ridge.", name)
        return _left_alone(name, "not_finite")
    is_paid = chosen is None or name in chosen
    positions = sums.count / fit.images
    result = BlockFit(
        name=name,
        kind=kind,
        trial=trial,
        options=options,
        option=number,
        kept=passes_gate and is_paid,
        decision="gate" if not passes_gate else "kept" if is_paid else "max_cost",
        ridge=form.solution.ridge,
        solver=form.solution.solver,
        positions=positions,
        parameters=kind.parameters if kind else 0,
        bytes=kind.bytes if kind else 0,
        bytes_percent=options[number].bytes_percent,
        multiply_adds=positions * kind.multiply_adds if kind else 0,
        multiply_adds_percent=options[number].multiply_adds_percent,
        target_power=power,
        fit=fit_error,
        holdout=holdout_error,
    )
    _log(result, channels, sums.count, time.monotonic() - start, sums.any.mean_y.device)
    return result


def _option(fit: _Fit, name: str, form: FittedForm, sums: BlockStatistics) -> Option:
    """The remaining error of a form of a block's compensation, and its cost."""
    error = form.solution.squared_error(sums) if form.held_out is None else form.held_out
    kind = form.solution.kind
    size, multiply_adds = (kind.bytes, kind.multiply_adds) if kind else (0, 0)
    return Option(
        error / sums.elements,
        100 * size / fit.backbone_bytes,
        100 * multiply_adds * fit.positions[name] / fit.backbone_multiply_adds,
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    # One pass: the extremes are NaN if any value is.
    return all(map(torch.isfinite, torch.aminmax(tensor)))


def _left_alone(name: str, decision: str) -> BlockFit:
    """A block without compensation and without measured errors."""
    counts = ("parameters", "bytes", "bytes_percent", "multiply_adds", "multiply_adds_percent")
    return BlockFit(
        name=name, kind=None, trial=None, options=(), option=0, kept=False, decision=decision,
        ridge=0.0, solver="none",
        positions=0.0, target_power=0.0, fit=BlockError(), holdout=BlockError(),
        **dict.fromkeys(counts, 0),
    )  # fmt: skip


def _run_block(
    settings: CompensationSettings,
    name: str,
    quantized: Walk,
    full: Walk | None,
    reference: nn.Module,
    image: int,
) -> list[torch.Tensor]:
    """Run one block on one image, in both walks.

    Args:
        full: None: the target is the full-precision block's output for the quantized input.

    Returns:
        The block's input, its quantized output and its target: [positions, channels] each.
    """
    arguments, quantized_output = quantized.reach(image, name)
    output = block_output(name, quantized_output)
    if full is not None:
        _, expected = full.reach(image, name)
    else:
        args, kwargs = detached(arguments)
        expected = reference.get_submodule(name)(*args, **kwargs)
    expected = block_output(name, expected)
    axis = channel_axis(reference.get_submodule(name), output)
    x = aligned_input(arguments, output, axis)
    if settings.bits == BITS:
        x = rounded_input(x)  # as the input of W will be
    return [by_position(t, axis) for t in (x, output, expected)]


def _log(
    block: BlockFit,
    channels: tuple[int, int],
    tokens: int,
    seconds: float,
    device: torch.device,
) -> None:
    logger.info(
        "%s: %d -> %d channels, %d tokens, %s, error %.3g -> %.3g on fitted and %s on held-out "
        "images, r2 %.3f and %s, ridge %.1g (%s), %s, %.1f s, peak memory %s",
        block.name, *channels, tokens,
        block.kind.name if block.kind else "none",
        block.fit.error_before, block.fit.error_after,
        "no error" if block.holdout.error_before is None
        else f"{block.holdout.error_before:.3g} -> {block.holdout.error_after:.3g}",
        block.fit.r2, "none" if block.holdout.r2 is None else f"{block.holdout.r2:.3f}",
        block.ridge, block.solver,
        "kept" if block.kept else f"not kept ({block.decision})", seconds,
        _peak_memory(device),
    )  # fmt: skip
