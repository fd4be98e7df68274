"""The workflow's steps, from files to files: what the scripts call."""

import logging
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import mmengine
import numpy as np
import torch
import yaml
from torch import nn

from . import __version__
from .archives import WARMUP_FORMAT, copy_with_summary, worst_layers
from .compensation.fit import fit_compensation
from .compensation.state import load_compensation, save_compensation
from .config import (
    CompensationSettings,
    QuantizationSettings,
    as_entry,
    as_plain,
)
from .detectors.build import load_detector
from .detectors.classes import category_ids
from .errors import QwtError
from .evaluation.coco import coco_metrics, load_ground_truth
from .evaluation.predict import predict
from .files import read_json, sha256_file, write_atomically, write_json
from .loaders import make_loader
from .quantization.calibrate import calibrate
from .quantization.convert import quantize_model
from .quantization.sensitivity import choose_bits, mixed_precision, rank_layers
from .quantization.state import load_warmup, save_warmup
from .record import quantization_of, record_of
from .staleness import source_hash

logger = logging.getLogger(__name__)

Pathlike = str | os.PathLike[str]


def provenance(
    *, checkpoint: Pathlike, annotations: Pathlike, device: str, seed: int, **settings: Any
) -> dict[str, Any]:
    """Where a result comes from: settings, seed, versions, hashes, device and number of images."""
    cuda = device.startswith("cuda")
    return {
        "settings": settings,
        "seed": seed,
        "versions": {
            "qwt_mmdet": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a class of its own, which archives must not hold
            "mmdet": mmdet.__version__,
            "mmcv": mmcv.__version__,
            "mmengine": mmengine.__version__,
            "pycocotools": version("pycocotools"),
            "numpy": np.__version__,
        },
        "checkpoint_sha256": sha256_file(checkpoint),
        "annotations_sha256": sha256_file(annotations),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "images": len(read_json(annotations, what="annotation file")["images"]),
    }


def load_quantized(
    config: str,
    checkpoint: Pathlike,
    *,
    warmup: Pathlike | None = None,
    compensation: Pathlike | None = None,
    device: str = "cpu",
    config_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a detector, quantize it with a warmup file and compensate it, as far as files are given.

    Raises:
        QwtError: a file cannot be read, or does not belong to the others.
    """
    model = load_detector(config, checkpoint, device=device, config_options=config_options)
    if warmup is not None:
        load_warmup(model, warmup)
    if compensation is not None:
        load_compensation(model, compensation)
    return model


def evaluate_detector(
    model: nn.Module, annotations: Pathlike, *, batch_size: int = 1, workers: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a detector on the images of an annotation file.

    Args:
        model: from :func:`qwt_mmdet.load_detector`, quantized and compensated or not.
        annotations: COCO annotation file whose ``info.image_root`` is the image folder.

    Returns:
        COCO's metrics (see ``evaluation.coco.coco_metrics``), and the detections as COCO results. The
        metrics also hold ``not_finite``, the number of detections with a NaN or an infinity, which
        count as not made, and ``collapsed``: whether a quantized detector finds not one object
        (box AP 0), which is a result.

    Raises:
        QwtError: the classes of model and annotations differ, or a detector that is not quantized
            makes no detection or one that is not finite.
    """
    classes = model.dataset_meta["classes"]
    # what is wrong with the annotations is told before the work
    category_ids(classes, read_json(annotations, what="annotation file"))
    load_ground_truth(annotations, masks=model.with_mask, classes=classes)
    loader = make_loader(model.cfg, annotations, batch_size=batch_size, workers=workers)
    found = predict(model, loader, annotations, total=len(loader.dataset))
    quantized = record_of(model).quantization is not None
    if not quantized and found.not_finite:
        raise QwtError(
            f"{found.not_finite} detections of the full-precision model are NaN or infinite; check "
            "the checkpoint and the preprocessing."
        )
    if not quantized and not found.records:
        raise QwtError(
            "There is not a single detection of the full-precision model, although the images contain "
            "objects; check the checkpoint, the classes and the preprocessing."
        )
    metrics = coco_metrics(annotations, found.records, masks=found.masks, classes=classes)
    metrics["collapsed"] = quantized and metrics["bbox"]["AP"] == 0
    metrics["not_finite"] = found.not_finite
    return metrics, found.records


def evaluate(
    *,
    config: str,
    checkpoint: Pathlike,
    config_options: Mapping[str, Any] | None,
    annotations: Pathlike,
    metrics: Pathlike,
    predictions: Pathlike,
    device: str,
    batch_size: int,
    workers: int,
    seed: int,
    warmup: Pathlike | None = None,
    compensation: Pathlike | None = None,
) -> None:
    """Evaluate a detector (baseline, quantized or compensated) on the images of an annotation file.

    Writes ``metrics`` and ``predictions``, both or neither.
    """
    model = load_quantized(
        config,
        checkpoint,
        warmup=warmup,
        compensation=compensation,
        device=device,
        config_options=config_options,
    )
    result, found = evaluate_detector(model, annotations, batch_size=batch_size, workers=workers)
    result["provenance"] = provenance(
        checkpoint=checkpoint,
        annotations=annotations,
        device=device,
        seed=seed,
        config=config,
        config_options=dict(config_options or {}),
        warmup=None if warmup is None else sha256_file(warmup),
        compensation=None if compensation is None else sha256_file(compensation),
    )
    write_json(predictions, found)
    write_json(metrics, result, indent=1)
    for kind in ("bbox", "segm"):
        if kind in result:
            logger.info("%s AP %.4f, AP50 %.4f", kind, result[kind]["AP"], result[kind]["AP50"])
    if result["not_finite"]:
        logger.warning("%d detections are NaN or infinite and do not count.", result["not_finite"])
    if result["collapsed"]:
        logger.warning(
            "The quantized detector collapsed: it finds not one object. Layers with the lowest "
            "signal-to-noise ratio: %s.",
            worst_layers(quantization_of(model).signal_noise) or "not measured",
        )


def quantize(
    *,
    config: str,
    checkpoint: Pathlike,
    config_options: Mapping[str, Any] | None,
    annotations: Pathlike,
    settings: Mapping[str, Any],
    output: Pathlike,
    device: str,
    batch_size: int,
    workers: int,
    seed: int,
    supplied: Pathlike | None = None,
) -> None:
    """Quantize and calibrate a detector and write its warmup state.

    Args:
        supplied: an existing warmup file to check and take instead of calibrating.
    """
    resolved = QuantizationSettings.from_mapping(settings)
    model = load_detector(config, checkpoint, device=device, config_options=config_options)
    if supplied is not None:
        load_warmup(model, supplied, resolved)
        logger.info("The warmup file %s fits and is used as it is", supplied)
        copy_with_summary(supplied, output, WARMUP_FORMAT, "warmup")
        return
    loader = make_loader(model.cfg, annotations, batch_size=batch_size, workers=workers)
    quantize_model(model, resolved)
    calibrate(model, loader)
    source = provenance(
        checkpoint=checkpoint,
        annotations=annotations,
        device=device,
        seed=seed,
        config=config,
        config_options=dict(config_options or {}),
        quantization=as_plain(resolved),
    )
    save_warmup(model, output, source)


def rank(
    *,
    config: str,
    checkpoint: Pathlike,
    config_options: Mapping[str, Any] | None,
    annotations: Pathlike,
    warmup: Pathlike,
    name: str,
    images: int,
    average_bits: float | None,
    table: Pathlike,
    suggestion: Pathlike,
    device: str,
    workers: int,
) -> None:
    """Rank a quantized detector's layers; write ``table`` (.csv) and ``suggestion`` (.yaml).

    Args:
        name: of the quantization, from which the suggested entry gets its own.
        images: calibration images to use, from the first.
        average_bits: of the weights in the suggestion; None: what they have now.
    """
    import pandas as pd  # takes a while, and most steps write no table

    model = load_detector(config, checkpoint, device=device, config_options=config_options)
    load_warmup(model, warmup, round_weights=False)
    loader = make_loader(model.cfg, annotations, batch_size=1, workers=workers)
    images = min(images, len(loader))
    ranked = rank_layers(model, islice(loader, images))
    layers = [entry for entry in ranked if entry.weight_bits is not None and entry.relative_noise]
    weights = sum(entry.weights for entry in layers)
    if average_bits is None:
        average_bits = sum(entry.weights * entry.weight_bits for entry in layers) / weights
    chosen = choose_bits(ranked, average_bits)
    rows = [
        {
            "layer": entry.name,
            "sqnr_db": entry.sqnr_db,
            "weights": entry.weights,
            "weight_bits": entry.weight_bits,
            "activation_bits": entry.activation_bits,
            "suggested_weight_bits": chosen.get(entry.name),
        }
        for entry in ranked
    ]
    settings = mixed_precision(quantization_of(model).settings, ranked, chosen)
    reached = sum(entry.weights * chosen[entry.name] for entry in layers) / weights
    note = (
        f"# Suggested from {images} calibration images: {reached:.2f} bits per weight on average.\n"
        "# Put this entry under `quantization:`.\n"
    )
    with write_atomically(table) as partial:
        pd.DataFrame(rows).astype(
            {"suggested_weight_bits": "Int64", "weight_bits": "Int64"}
        ).to_csv(partial, index=False)
    with write_atomically(suggestion) as partial:
        entry = {f"{name}-mixed": as_entry(settings)}
        partial.write_text(note + yaml.safe_dump(entry, sort_keys=False), encoding="utf-8")
    logger.info("Most harmful layers, each quantized alone:")
    for entry in ranked[:5]:
        if entry.sqnr_db is not None:
            logger.info("  %s: %.1f dB at the heads", entry.name, entry.sqnr_db)


def compensate(
    *,
    config: str,
    checkpoint: Pathlike,
    config_options: Mapping[str, Any] | None,
    annotations: Pathlike,
    warmup: Pathlike,
    settings: Mapping[str, Any],
    output: Pathlike,
    blocks: Pathlike,
    device: str,
    batch_size: int,
    workers: int,
    seed: int,
    activation_cache: Mapping[str, float] | None = None,
) -> None:
    """Fit the compensation of a quantized detector; writes ``output`` (.pth) and ``blocks`` (.csv).

    A fit that was interrupted goes on after its last finished block; until the end these lie in
    ``{output}.unfinished``.

    Args:
        activation_cache: {device_gb, memory_gb}, limits beyond which activations wait elsewhere.
    """
    import pandas as pd

    resolved = CompensationSettings.from_mapping(settings)
    reference = load_detector(config, checkpoint, device=device, config_options=config_options)
    model = load_quantized(
        config, checkpoint, warmup=warmup, device=device, config_options=config_options
    )
    loader = make_loader(model.cfg, annotations, batch_size=batch_size, workers=workers)
    unfinished = Path(f"{output}.unfinished")
    compensation = fit_compensation(
        model,
        reference,
        loader,
        resolved,
        **(activation_cache or {}),
        resume=unfinished,
        resume_inputs={"device": device, "code": source_hash("fit_compensation")},
    )
    source = provenance(
        checkpoint=checkpoint,
        annotations=annotations,
        device=device,
        seed=seed,
        config=config,
        config_options=dict(config_options or {}),
        warmup=sha256_file(warmup),
        compensation=as_plain(resolved),
    )
    with write_atomically(blocks) as partial:
        rows = [block.row() for block in compensation.blocks]
        pd.DataFrame(rows).to_csv(partial, index=False)
    save_compensation(model, compensation, output, source)
    unfinished.unlink(missing_ok=True)
