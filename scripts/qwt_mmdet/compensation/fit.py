"""Fit the compensation of all blocks of a quantized detector, one block after the other.

The model's own code runs between the blocks (see :mod:`.replay`). At each block the full-precision
block and the quantized block run once for each image, and nothing of the network runs again.
"""

import hashlib
import logging
import os
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import CompensationSettings, as_plain
from ..data.batches import single_images
from ..errors import QwtError
from ..progress import progress
from ..record import record_of
from ..replay.cache import RELEASE_INTERVAL, ActivationCache, release_free_memory
from ..replay.forwards import detached
from .blocks import find_blocks
from .cost import backbone_bytes, backbone_multiply_adds, too_expensive
from .modules import aligned_input, as_rows, block_output, channel_axis
from .replay import Stream
from .result import BYTES_PER_PARAMETER, BlockFit, Compensation
from .resume import Resume
from .solve import SOLVERS, Solution, solve_again
from .state import quantized_fingerprint
from .statistics import BlockStatistics, ChannelStatistics, RegressionStatistics
from .trace import Plan, replay_scope, trace_blocks

logger = logging.getLogger(__name__)

HOLDOUT_GROUPS = 8
"""Groups of held-out images between which ``kind: auto`` measures how much errors scatter."""


def split_holdout(images: int, fraction: float) -> list[bool]:
    """Tell for each of ``images`` calibration images whether it is held out of the fit.

    Held-out images are spread evenly.

    Raises:
        QwtError: no image would be left on one of the two sides.
    """
    held = [int((i + 1) * fraction) > int(i * fraction) for i in range(images)]
    if all(held) or (fraction > 0 and not any(held)):
        raise QwtError(
            f"{images} calibration images cannot be split with holdout_fraction {fraction}; use more "
            "calibration images."
        )
    return held


@dataclass(frozen=True)
class _Fit:
    """Everything that the fits of all blocks share.

    Attributes:
        images: how many calibration images lie in the cache, under ("image", number).
        image_once: whether an image is needed once only, since its preprocessor's output is cached.
        groups: for each image its group of held-out images, or None where it is fitted to.
    """

    settings: CompensationSettings
    plan: Plan
    cache: ActivationCache
    images: int
    image_once: bool
    groups: list[int | None]
    backbone_bytes: float
    backbone_multiply_adds: int


def _statistics(needs: tuple[str, ...], inputs: int, outputs: int, device: Any) -> BlockStatistics:
    return BlockStatistics(
        RegressionStatistics.zeros(inputs, outputs, device) if "inputs" in needs else None,
        ChannelStatistics.zeros(outputs, outputs, device) if "outputs" in needs else None,
    )


def _is_kept(settings: CompensationSettings, solution: Solution, errors: Mapping[str, Any]) -> bool:
    if solution.kind is None:
        return False
    if settings.gate == "holdout":
        return errors["holdout_error_after"] < errors["holdout_error_before"]
    return settings.gate == "none" or errors["fit_r2"] > 0


def _errors(solution: Solution, statistics: BlockStatistics, prefix: str) -> dict[str, Any]:
    keys = [f"{prefix}_{key}" for key in ("error_before", "error_after", "r2")]
    if statistics.count == 0:
        return dict.fromkeys(keys)
    before, after = statistics.any.error_before(), solution.squared_error(statistics)
    variation = statistics.any.variation
    r2 = 1 - after / variation if variation > 0 else 0.0
    elements = statistics.elements
    return dict(zip(keys, (before / elements, after / elements, r2), strict=True))


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the device"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"


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
        loader: calibration batches as mmdet's test step takes them; their size changes nothing.
        settings: form, target, ridge and gate.
        device_gb, memory_gb: activations beyond this wait elsewhere, with the same result (see
            :class:`..replay.cache.ActivationCache`).
        resume: file that keeps the finished blocks. If it is there and belongs to the same model,
            settings and images, the fit goes on after them. Remove it when the result is saved.
        resume_inputs: further plain values that must be the same for that.

    Raises:
        QwtError: no images, no registered blocks, a block that cannot be compensated, or values of
            the full-precision detector that are not finite. Where the quantized one's are not, a
            block stays without compensation.
    """
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
        held = split_holdout(images, settings.holdout_fraction)
        quantization = record_of(model).quantization
        names = find_blocks(
            reference,
            first,
            settings.blocks,
            scope=quantization.settings.scope if quantization else "backbone",
            downsampling=settings.downsampling,
        )
        plan = trace_blocks(reference, names, first, replay_scope(names))
        fit = _Fit(
            settings,
            plan,
            cache,
            images,
            "data_preprocessor" in plan.modules,
            _holdout_groups(held, HOLDOUT_GROUPS if settings.kind == "auto" else 1),
            backbone_bytes(model),
            backbone_multiply_adds(reference, first),
        )
        record = Resume(resume, inputs)
        blocks = _fit_pass(fit, model, reference, record, "all", frozenset())
        if settings.max_cost is not None:
            dropped = too_expensive(blocks, settings.max_cost)
            if dropped:
                logger.info("max_cost leaves out %d blocks; fitting the others anew", len(dropped))
                blocks = _fit_pass(fit, model, reference, record, "max_cost", frozenset(dropped))
    return Compensation(settings, tuple(blocks), fit.backbone_multiply_adds)


def _holdout_groups(held: list[bool], groups: int) -> list[int | None]:
    """Deal the held-out images out to groups in turn; None for images of the fit."""
    numbers = iter(range(len(held)))
    return [next(numbers) % groups if is_held else None for is_held in held]


def _fit_pass(
    fit: _Fit,
    model: nn.Module,
    reference: nn.Module,
    record: Resume,
    name: str,
    dropped: frozenset[str],
) -> list[BlockFit]:
    """Fit all blocks in order; those in ``dropped`` stay without compensation."""
    fits = record.finished(name)
    if fits:
        logger.info("Going on after %d finished blocks", len(fits))
    quantized = Stream(f"{name} quantized", model, fit.plan, fit.cache, lingers=1)
    full = Stream(f"{name} full", reference, fit.plan, fit.cache, lingers=0)
    quantized.kinds = {block.name: block.kind if block.kept else None for block in fits}
    first = len(fits)
    for index in progress(range(first, len(fit.plan.blocks)), "Fitting", unit="block"):
        block = _fit_block(fit, index, quantized, full, dropped, is_first=index == first)
        quantized.kinds[block.name] = block.kind if block.kept else None
        fits.append(block)
        record.add(name, block)
    return fits


def _image(fit: _Fit, image: int, is_first: bool) -> dict[str, Any] | None:
    """An image for a replay; None where its preprocessor's output is cached already."""
    if not fit.image_once:
        return fit.cache["image", image]
    if not is_first:
        return None
    # A second pass over the blocks, which max_cost may bring, needs the images again.
    return fit.cache["image", image] if fit.settings.max_cost else fit.cache.pop(("image", image))


def _fit_block(
    fit: _Fit,
    index: int,
    quantized: Stream,
    full: Stream,
    dropped: frozenset[str],
    *,
    is_first: bool,
) -> BlockFit:
    """Fit one block on all images; both streams go on to its outputs."""
    start = time.monotonic()
    settings, name = fit.settings, fit.plan.blocks[index]
    solver = SOLVERS[settings.kind]
    statistics: list[BlockStatistics] = []
    power = 0.0
    diverged = 0
    for image, group in enumerate(fit.groups):
        if image % RELEASE_INTERVAL == 0:
            release_free_memory()
        batch = _image(fit, image, is_first)
        x, output, expected = _run_block(settings, index, quantized, full, image, batch)
        if not statistics:
            channels = x.shape[1], output.shape[1]
            statistics = [
                _statistics(solver.needs, *channels, output.device)
                for _ in range(2 + len(set(fit.groups) - {None}))
            ]
            sums, holdout, *held = statistics
        if settings.target == "reference" and not _is_finite(expected):
            raise QwtError(
                f"The output of block {name} holds NaN or infinite values in full precision; check "
                "that the checkpoint is sound and that the full-precision model evaluates."
            )
        if all(map(_is_finite, (x, output, expected))):
            (sums if group is None else held[group]).update(x, output, expected - output)
            power += float(torch.linalg.vector_norm(expected)) ** 2 / expected.numel() / fit.images
        else:
            diverged += 1
        del x, output, expected  # before the next image needs the memory
    if diverged:
        logger.warning(
            "%s: the quantized detector's values are NaN or infinite on %d of %d images, so the block "
            "stays without compensation; raise the bits of the blocks before it.",
            name, diverged, fit.images,
        )  # fmt: skip
        return _left_alone(name, "not_finite")
    solution = solver.solve(sums, held, settings)
    for part in held:
        holdout.merge(part)
    tokens = sums.count + holdout.count
    errors = {
        **_errors(solution, sums, "fit"),
        **_errors(solution, holdout, "holdout"),
    }
    passes_gate = _is_kept(settings, solution, errors)
    if settings.refit and held and passes_gate:
        sums.merge(holdout)
        solution = solve_again(solution, sums, settings)
    kind = None if solution.kind is None else solution.kind.to("cpu", torch.float32)
    if kind and not all(torch.isfinite(tensor).all() for tensor in kind.tensors().values()):
        logger.warning("The compensation of block %s is not finite; set a larger ridge.", name)
        return _left_alone(name, "not_finite")
    positions = tokens / fit.images
    parameters, multiply_adds = (kind.parameters, kind.multiply_adds) if kind else (0, 0)
    first_image = multiply_adds * fit.plan.positions[index]
    result = BlockFit(
        name=name,
        kind=kind,
        kept=passes_gate and name not in dropped,
        decision="max_cost" if name in dropped else "kept" if passes_gate else "gate",
        ridge=solution.ridge,
        solver=solution.solver,
        positions=positions,
        parameters=parameters,
        bytes=parameters * BYTES_PER_PARAMETER,
        bytes_percent=100 * parameters * BYTES_PER_PARAMETER / fit.backbone_bytes,
        multiply_adds=positions * multiply_adds,
        multiply_adds_percent=100 * first_image / fit.backbone_multiply_adds,
        target_power=power,
        **errors,
    )
    _log(result, channels, tokens, time.monotonic() - start, sums.any.mean_y.device)
    return result


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes are NaN where any value is, and found in one pass.
    return all(map(torch.isfinite, torch.aminmax(tensor)))


def _left_alone(name: str, decision: str) -> BlockFit:
    """A block without compensation, about which nothing could be measured."""
    counts = ("parameters", "bytes", "bytes_percent", "multiply_adds", "multiply_adds_percent")
    unknown: dict[str, Any] = {
        f"{part}_{key}": None
        for part in ("fit", "holdout")
        for key in ("error_before", "error_after", "r2")
    }
    return BlockFit(
        name=name, kind=None, kept=False, decision=decision, ridge=0.0, solver="none",
        positions=0.0, target_power=0.0, **dict.fromkeys(counts, 0), **unknown,
    )  # fmt: skip


def _run_block(
    settings: CompensationSettings,
    index: int,
    quantized: Stream,
    full: Stream,
    image: int,
    batch: dict[str, Any] | None,
) -> list[torch.Tensor]:
    """Run one block on one image on both streams.

    Returns:
        The block's input, its quantized output and what that should be: [positions, channels] each.
    """
    name = quantized.plan.blocks[index]
    arguments = quantized.arguments_at(index, image, batch)
    output = block_output(name, quantized.run(index, image, arguments, keep=True))
    if settings.target == "reference":
        full_arguments = full.arguments_at(index, image, batch)
        expected = full.run(index, image, full_arguments, keep=False)
    else:
        args, kwargs = detached(arguments)
        expected = full.model.get_submodule(name)(*args, **kwargs)
    expected = block_output(name, expected)
    axis = channel_axis(quantized.model.get_submodule(name), output)
    return [as_rows(t, axis) for t in (aligned_input(arguments, output, axis), output, expected)]


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
        block.fit_error_before, block.fit_error_after,
        "no error" if block.holdout_error_before is None
        else f"{block.holdout_error_before:.3g} -> {block.holdout_error_after:.3g}",
        block.fit_r2, "none" if block.holdout_r2 is None else f"{block.holdout_r2:.3f}",
        block.ridge, block.solver,
        "kept" if block.kept else f"not kept ({block.decision})", seconds,
        _peak_memory(device),
    )  # fmt: skip
