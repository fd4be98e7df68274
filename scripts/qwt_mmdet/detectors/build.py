"""Build a detector from an mmdet config and a checkpoint."""

import difflib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmdet
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from ..checkpoints import load_checkpoint, load_weights
from ..devices import use_full_precision
from ..errors import QwtError
from ..fingerprint import settings_fingerprint, weights_fingerprint
from ..record import record_of

logger = logging.getLogger(__name__)

ZOO = Path(mmdet.__file__).parent / ".mim" / "configs"
"""The configs that mmdet ships."""


OTHER_METRICS = {"VOCMetric", "LVISMetric", "OpenImagesMetric", "CrowdHumanMetric"}
"""Metrics of mmdet whose figures COCO's AP would not be."""


def resolve_config(config: str | os.PathLike[str]) -> Path:
    """Return the path of a config: an existing file, or a name in mmdet's zoo.

    Raises:
        QwtError: neither; the message suggests similar zoo names.
    """
    for path in (Path(config), ZOO / config):
        if path.is_file():
            return path
    names = {str(p.relative_to(ZOO)) for p in ZOO.glob("*/*.py")}
    by_file = {Path(name).name: name for name in names}
    close = difflib.get_close_matches(Path(config).name, by_file, n=3, cutoff=0.5)
    hint = f"; similar: {', '.join(by_file[c] for c in close)}" if close else ""
    raise QwtError(
        f"The model config {str(config)!r} is neither a file nor a config that mmdet "
        f"{mmdet.__version__} ships{hint}."
    )


def _refuse_other_tasks(path: Path, config: Config) -> None:
    """Raise QwtError for configs of mmdet that train or test something else than a detector."""
    evaluators = config.get("test_evaluator") or {}
    evaluators = evaluators if isinstance(evaluators, list | tuple) else [evaluators]
    if any("Panoptic" in str(evaluator.get("type")) for evaluator in evaluators):
        raise QwtError(
            f"The model config {path} is for panoptic segmentation, which has no box or mask AP; give "
            "one for object detection or instance segmentation."
        )
    metrics = {str(evaluator.get("type")).split(".")[-1] for evaluator in evaluators}
    foreign = metrics & OTHER_METRICS
    if foreign and "CocoMetric" not in metrics:
        raise QwtError(
            f"The model config {path} is evaluated with {foreign.pop()}, not with COCO's AP; convert "
            "the annotations to COCO format and give a config with CocoMetric and the same classes, "
            "such as pascal_voc/faster-rcnn_r50_fpn_1x_voc0712-cocofmt.py for Pascal VOC."
        )
    if "semi_train_cfg" in config.get("model", {}):
        raise QwtError(
            f"The model config {path} is for semi-supervised training, with two detectors in one; give "
            "the config of the detector alone and a checkpoint with its weights alone."
        )


def read_config(
    config: str | os.PathLike[str], config_options: Mapping[str, Any] | None = None
) -> Config:
    """Read an mmdet config and apply ``{dotted.key: value}`` changes.

    Raises:
        QwtError: the file cannot be parsed, or describes no detector.
    """
    path = resolve_config(config)
    try:
        parsed = Config.fromfile(path)
        parsed.merge_from_dict(dict(config_options or {}))
    except QwtError:
        raise
    except Exception as error:
        raise QwtError(
            f"The model config {path} cannot be read: {type(error).__name__}: {error}."
        ) from error
    _refuse_other_tasks(path, parsed)
    if "model" not in parsed or "test_dataloader" not in parsed:
        raise QwtError(
            f"The model config {path} has no 'model' or no 'test_dataloader'; give a complete mmdet "
            "3.x config, not a base file."
        )
    return parsed


def without_pretraining(node: Any) -> None:
    """Drop init_cfg entries that would download ImageNet weights which the checkpoint replaces."""
    if isinstance(node, dict):
        init = node.get("init_cfg")
        if isinstance(init, dict) and "checkpoint" in init:  # PVT's has no type
            node["init_cfg"] = None
        for value in node.values():
            without_pretraining(value)
    elif isinstance(node, list | tuple):
        for value in node:
            without_pretraining(value)


def dataset_classes(config: Config) -> tuple[str, ...] | None:
    """Class names of the config's test data set, in the order of the model's labels."""
    dataset = config.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    metainfo = dataset.get("metainfo") or {}
    classes = metainfo.get("classes") or metainfo.get("CLASSES")
    if classes is None:
        kind = DATASETS.get(dataset.type) if isinstance(dataset.type, str) else dataset.type
        classes = (getattr(kind, "METAINFO", None) or {}).get("classes")
    if classes is None:
        return None
    return (classes,) if isinstance(classes, str) else tuple(classes)


def _build(config: str | os.PathLike[str], parsed: Config) -> nn.Module:
    without_pretraining(parsed.model)
    if "TimmBackbone" in str(parsed.model.get("backbone", {}).get("type")):
        from . import timm_backbone  # noqa: F401  registers it; timm takes seconds to import
    with DefaultScope.overwrite_default_scope("mmdet"):
        try:
            model = MODELS.build(parsed.model)
        except Exception as error:
            raise QwtError(
                f"The model config {config} cannot be built: {type(error).__name__}: {error}."
            ) from error
        model.dataset_meta = {"classes": dataset_classes(parsed)}
    model.cfg = parsed
    return model


def random_detector(
    config: str | os.PathLike[str], config_options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build an mmdet detector with random weights, as its trainer starts from but for pretraining.

    Args:
        config, config_options: see :func:`load_detector`.

    Returns:
        The detector in evaluation mode, with ``cfg`` and ``dataset_meta`` set.

    Raises:
        QwtError: the config cannot be read or built.
    """
    register_all_modules(init_default_scope=True)
    model = _build(config, read_config(config, config_options))
    with DefaultScope.overwrite_default_scope("mmdet"):
        model.init_weights()  # mmdet leaves some parameters of the DETR family unset before
    for module in model.modules():
        if isinstance(module, TridentConv):  # and these for good
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


def load_detector(
    config: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    device: str = "cpu",
    config_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build an mmdet detector and load its weights, strictly.

    Full precision is float32 on every GPU: TF32 is off in the process from then on.

    Args:
        config: path of an mmdet 3.x config, or its name in mmdet's zoo, such as
            ``yolox/yolox_nano_8xb8-300e_coco.py``.
        checkpoint: weights; read without running any code that the file may hold.
        device: torch device.
        config_options: changes to the config, ``{dotted.key: value}``.

    Returns:
        The detector in evaluation mode, with ``cfg`` (its config) and ``dataset_meta`` (its classes) as
        mmdet has them, and a record of what it is (:mod:`qwt_mmdet.record`).

    Raises:
        QwtError: config or checkpoint cannot be read, or do not fit each other.
    """
    register_all_modules(init_default_scope=True)
    parsed = read_config(config, config_options)
    state = load_checkpoint(checkpoint)
    model = _build(config, parsed)
    load_weights(model, state, f"The checkpoint {checkpoint} does not fit {config}")
    record_of(model).fingerprint = {
        "model": settings_fingerprint(parsed.model.to_dict()),
        "weights": weights_fingerprint(model.state_dict()),
    }
    use_full_precision()
    return model.to(device).eval()
