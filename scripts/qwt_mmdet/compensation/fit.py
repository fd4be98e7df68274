"""Fit the compensation of all blocks of a quantized detector, one block after the other.

Activation replay (:mod:`..replay.walk`) runs the detector from block to block. The full-precision block and the
quantized block each run once per image.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..archives import Finished
from ..config import CompensationSettings, as_plain
from ..data.batches import single_images
from ..detectors.forward import check_precision
from ..errors import QwtError
from ..fingerprint import weights_fingerprint
from ..progress import progress
from ..quantization.size import weight_bytes
from ..record import record_of
from ..replay.cache import ActivationCache
from ..replay.walk import Walk
from .block_fit import Fit, fit_block
from .blocks import block_positions, find_blocks, replay_scope
from .cost import backbone_multiply_adds, within_budget
from .heads import check_at_heads
from .modules import compensated
from .result import BlockFit, Compensation
from .state import quantized_fingerprint

logger = logging.getLogger(__name__)


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
        hashes = _keep_images(cache, loader)
        folds = count_folds(len(hashes), settings.holdout_fraction)
        quantization = record_of(model).quantization
        names = find_blocks(
            reference,
            cache["image", 0],
            settings.blocks,
            scope=quantization.settings.scope if quantization else "backbone",
            downsampling=settings.downsampling,
        )
        recorder = Walk(reference, names, cache, replay_scope(names))
        with recorder.active():
            forward = partial(recorder.record, replay_scope(names))
            positions = block_positions(reference, names, forward)
        fit = Fit(
            settings,
            positions,
            recorder.uses,
            cache,
            len(hashes),
            folds,
            weight_bytes(model.get_submodule("backbone")),
            backbone_multiply_adds(reference, cache["image", 0]),
        )
        inputs = {
            **quantized_fingerprint(model),
            "settings": as_plain(settings),
            "images": hashes,
            **(resume_inputs or {}),
        }
        finished = Finished(resume, inputs)
        blocks = _fit_pass(fit, model, reference, finished, "all")
        if settings.budget is not None:
            chosen = within_budget(blocks, settings.budget)
            if chosen != {block.name: block.option for block in blocks if block.kept}:
                counts = len(chosen), len(blocks)
                logger.info("%d of %d blocks fit the budget; fitting these again", *counts)
                blocks = _fit_pass(fit, model, reference, finished, "max_cost", chosen)
        heads = None
        if settings.gate == "holdout" and any(block.kept for block in blocks):
            blocks, heads = check_at_heads(fit, model, reference, blocks)
    return Compensation(settings, tuple(blocks), fit.backbone_multiply_adds, heads)


def _keep_images(cache: ActivationCache, loader: Iterable[dict[str, Any]]) -> list[str]:
    """Put the images into the cache, under ("image", number); return a hash of each.

    Raises:
        QwtError: there are none.
    """
    hashes: list[str] = []
    for image in single_images(loader):
        cache["image", len(hashes)] = image
        hashes.append(weights_fingerprint({"image": image["inputs"][0]}))
    if not hashes:
        raise QwtError("There are no calibration images; choose at least one.")
    return hashes


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


def _fit_pass(
    fit: Fit,
    model: nn.Module,
    reference: nn.Module,
    finished: Finished,
    name: str,
    chosen: Mapping[str, int] | None = None,
) -> list[BlockFit]:
    """Fit all blocks in order.

    Args:
        name: of the pass.
        chosen: index of the form of each block; others stay without compensation. None: each block takes the
            form with the smallest error.
    """
    fits = [BlockFit.from_plain(block) for block in finished.results.get(name, ())]
    settings = fit.settings
    spent = set(range(fit.images))
    if settings.gate == "holdout":  # the check at the heads reads the first fold
        spent -= set(range(0, fit.images, fit.folds))
    if settings.budget is not None and chosen is None:  # there may be another pass
        spent.clear()
    has_full = settings.target == "reference"
    with ExitStack() as stack:
        walk = _walking(fit, model, f"{name} quantized", set() if has_full else spent)
        quantized, full = stack.enter_context(walk), None
        if has_full:
            full = stack.enter_context(_walking(fit, reference, f"{name} full", spent))
            full.pending.clear()
        for block in fits:
            _finish(quantized, model, block)
        for block_name in progress(list(fit.positions)[len(fits) :], "Fitting", unit="block"):
            block = fit_block(fit, block_name, quantized, full, reference, chosen)
            _finish(quantized, model, block)
            fits.append(block)
            finished.add(name, [block.unfinished() for block in fits])
    return fits


@contextmanager
def _walking(fit: Fit, model: nn.Module, tag: str, spent: set[int]) -> Iterator[Walk]:
    """Inside: an active walk over the blocks."""
    scope = replay_scope(fit.positions)
    walk = Walk(model, fit.positions, fit.cache, scope, tag=tag, uses=fit.uses, spent=spent)
    with walk.active():
        yield walk


def _finish(walk: Walk, model: nn.Module, block: BlockFit) -> None:
    """Let the walk run a fitted block with its compensation from now on."""
    walk.pending.discard(block.name)
    if block.kept and block.kind is not None:
        module, kind = model.get_submodule(block.name), block.kind
        walk.completions[block.name] = partial(compensated, module, kind)
