"""The fit of one block's compensation, on all calibration images."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import CompensationSettings
from ..devices import peak_gigabytes
from ..errors import QwtError
from ..replay.cache import RELEASE_INTERVAL, ActivationCache, release_free_memory
from ..replay.forwards import detached
from ..replay.walk import Uses, Walk
from .kinds import BITS, rounded_input
from .modules import aligned_input, block_output, by_position, channel_axis
from .result import BlockError, BlockFit, Option
from .solve import SOLVERS, FittedForm, fit_forms
from .statistics import BlockStatistics, ChannelStatistics, RegressionStatistics, merged

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
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


def fit_block(
    fit: Fit,
    name: str,
    quantized: Walk,
    full: Walk | None,
    reference: nn.Module,
    chosen: Mapping[str, int] | None,
) -> BlockFit:
    """Fit one block on all images; both walks advance to its output.

    Without ``full``, the target is the full-precision block's output for the quantized input.
    """
    start, settings = time.monotonic(), fit.settings
    needs = SOLVERS[settings.kind].needs
    groups: list[BlockStatistics] = []
    power = 0.0
    diverged = 0
    for image in range(fit.images):
        if image % RELEASE_INTERVAL == 0:
            release_free_memory()
        x, output, expected = _run_block(settings, name, quantized, full, reference, image)
        if not groups:
            channels = x.shape[1], output.shape[1]
            groups = [_statistics(needs, *channels, output.device) for _ in range(fit.folds)]
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
        return BlockFit(name=name, decision="not_finite")
    sums = merged(groups)
    forms = fit_forms(sums, groups, settings)
    options = tuple(_option(fit, name, form, sums) for form in forms)
    best = min(range(len(options)), key=lambda n: options[n].error)
    number = (chosen or {}).get(name, best)
    form = forms[number]
    fit_error = _error(form.solution.squared_error(sums), sums)
    holdout_error = _error(form.held_out, sums)
    passes_gate = _is_kept(settings, form, fit_error, holdout_error)
    kind, trial = (
        solution.kind.to("cpu", torch.float32) if solution and solution.kind else None
        for solution in (form.solution, form.trial)
    )
    if kind and not all(torch.isfinite(tensor).all() for tensor in kind.tensors().values()):
        logger.warning("The compensation of block %s is not finite; set a larger ridge.", name)
        return BlockFit(name=name, decision="not_finite")
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


def _run_block(
    settings: CompensationSettings,
    name: str,
    quantized: Walk,
    full: Walk | None,
    reference: nn.Module,
    image: int,
) -> list[torch.Tensor]:
    """Run one block on one image: its input, its quantized output and its target, [positions, channels] each."""
    arguments, quantized_output = quantized.reach(image, name)
    output = block_output(name, quantized_output)
    block = reference.get_submodule(name)
    if full is not None:
        _, expected = full.reach(image, name)
    else:
        args, kwargs = detached(arguments)
        expected = block(*args, **kwargs)
    expected = block_output(name, expected)
    axis = channel_axis(block, output)
    x = aligned_input(arguments, output, axis)
    if settings.bits == BITS:
        x = rounded_input(x)  # as the input of W will be
    return [by_position(t, axis) for t in (x, output, expected)]


def _statistics(needs: tuple[str, ...], inputs: int, outputs: int, device: Any) -> BlockStatistics:
    return BlockStatistics(
        RegressionStatistics.zeros(inputs, outputs, device) if "inputs" in needs else None,
        ChannelStatistics.zeros(outputs, outputs, device) if "outputs" in needs else None,
    )


def _option(fit: Fit, name: str, form: FittedForm, sums: BlockStatistics) -> Option:
    """The remaining error of a form of a block's compensation, and its cost."""
    error = form.solution.squared_error(sums) if form.held_out is None else form.held_out
    kind = form.solution.kind
    size, multiply_adds = (kind.bytes, kind.multiply_adds) if kind else (0, 0)
    return Option(
        error / sums.elements,
        100 * size / fit.backbone_bytes,
        100 * multiply_adds * fit.positions[name] / fit.backbone_multiply_adds,
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


def _is_finite(tensor: torch.Tensor) -> bool:
    # One pass: the extremes are NaN if any value is.
    return all(map(torch.isfinite, torch.aminmax(tensor)))


def _log(
    block: BlockFit, channels: tuple[int, int], tokens: int, seconds: float, device: torch.device
) -> None:
    peak = f"{peak_gigabytes():.2f} GB"
    if device.type == "cuda":
        peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the device"
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
        "kept" if block.kept else f"not kept ({block.decision})", seconds, peak,
    )  # fmt: skip
