"""Build a detector from an mmdet config and a checkpoint."""

import copy
import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmdet
from mmdet.models import (
    BaseDetector,
    DetectionTransformer,
    SingleStageDetector,
    TwoStageDetector,
)
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import nn

from ..data.loaders import inference_pipeline, transform_name
from ..data.trial import try_pipeline
from ..devices import use_full_precision
from ..errors import QwtError, reason
from ..fingerprint import settings_fingerprint, weights_fingerprint
from ..record import record_of
from .checkpoint import read_checkpoint
from .classes import class_names, head_outputs
from .repairs import repair
from .shape import check_shape
from .weights import load_weights

logger = logging.getLogger(__name__)

ZOO = Path(mmdet.__file__).parent / ".mim" / "configs"
"""The configs that mmdet ships."""


PACKAGES = {
    "mmpretrain": "mmpretrain==1.2.0",
    "skimage": "scikit-image",
}
"""What pip installs beside the pinned packages for configs of mmdet that need more; see
docs/install.md for what was tried."""

OTHER_METRICS = {"VOCMetric", "LVISMetric", "OpenImagesMetric", "CrowdHumanMetric"}
"""Metrics of mmdet whose figures COCO's AP would not be."""

TRACKING_METRICS = {"MOTChallengeMetric", "CocoVideoMetric", "YouTubeVISMetric"}
"""Metrics of mmdet for videos."""

USUAL = (SingleStageDetector, TwoStageDetector, DetectionTransformer)
"""Detectors that take images from a data preprocessor of mmdet's alone."""


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
    if metrics & TRACKING_METRICS:
        raise QwtError(
            f"The model config {path} is for tracking objects through videos; give the config of its "
            "detector alone."
        )
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
    class_name = str(config.get("model", {}).get("type")).split(".")[-1]
    if class_name.endswith("TTAModel"):
        raise QwtError(
            f"The model config {path} has a {class_name}, which runs a detector on several images made of "
            "one (test-time augmentation); give the config of the detector alone."
        )
    if class_name == "FastRCNN":
        raise QwtError(
            f"The model config {path} is for Fast R-CNN, which needs proposals that another model "
            "made; take a config that makes its own, such as "
            "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py."
        )
    if "language_model" in config.get("model", {}):
        raise QwtError(
            f"The model config {path} is for a {class_name}, which reads a text with each image; this "
            "workflow gives none. It would also need the package transformers below version 5, which "
            "cannot be installed beside this environment: it replaces the pinned huggingface_hub."
        )
    measured = [evaluator.get("metric") for evaluator in evaluators if "CocoMetric" in metrics]
    if measured and all(metric in ("proposal", "proposal_fast") for metric in measured):
        raise QwtError(
            f"The model config {path} is for region proposals, which have no class and so no AP; give "
            "one for object detection or instance segmentation."
        )


def _missing_package(error: BaseException | None) -> str | None:
    """Name of the package without which an import failed, also where that was caught on the way."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        # as mmdet says it, and as pkg_resources does for mmengine
        said = r"(\w+) is not installed|The '(\w+)' distribution was not found"
        if match := re.match(said, str(error)):
            return match[1] or match[2]
        error = error.__cause__ or error.__context__
    return None


def _failed(config: str | os.PathLike[str], what: str, error: Exception) -> QwtError:
    """What to say where a config cannot be read or built: the package that is missing, if any."""
    package = _missing_package(error)
    if base := re.search(
        r"from (\S+) import \.\.\.", str(error)
    ):  # as mmengine shows `with read_base():`
        wheel = base[1].startswith("mmdet.configs.")
        return QwtError(
            f"The model config {config} takes {base[1]} as its base (read_base), "
            + (
                "which MMDetection's wheel does not hold: mmdet.configs is in its source alone; take the config "
                "of the same name from its zoo, as _base_ = 'mmdet::folder/name.py' or as the model config itself."
                if wheel
                else "but there is no such file; check the name."
            )
        )
    if package is None:
        return QwtError(f"The model config {config} cannot be {what}: {reason(error)}.")
    if package in PACKAGES:
        return QwtError(
            f"The model config {config} needs the package {package}, which is not installed; `pip "
            f"install {PACKAGES[package]}` puts it beside this environment (see docs/install.md)."
        )
    return QwtError(
        f"The model config {config} needs the Python module {package}, which is not found; put the "
        "folder that it lies in into PYTHONPATH, or install it."
    )


def read_config(
    config: str | os.PathLike[str], config_options: Mapping[str, Any] | None = None
) -> Config:
    """Read an mmdet config and apply ``{dotted.key: value}`` changes.

    Raises:
        QwtError: the file cannot be parsed, or describes no detector; or its test pipeline does not work (see
            :func:`.trial.try_pipeline`).
    """
    path = resolve_config(config)
    try:
        parsed = Config.fromfile(path)
        parsed.merge_from_dict(dict(config_options or {}))
    except Exception as error:
        raise _failed(path, "read", error) from error
    check_shape(parsed, str(path))
    _refuse_other_tasks(path, parsed)
    if not parsed.get("model") or not (parsed.get("test_dataloader") or {}).get("dataset"):
        raise QwtError(
            f"The model config {path} has no 'model' or no 'test_dataloader' with a 'dataset'; give a "
            "complete mmdet 3.x config, not a base file."
        )
    try_pipeline(parsed)
    return parsed


def import_custom_modules(config: str | os.PathLike[str], parsed: Config) -> None:
    """Import what a config names in ``custom_imports``, which mmengine does where it reads the config's file.

    Raises:
        QwtError: a module cannot be imported.
    """
    try:
        import_modules_from_strings(**(parsed.get("custom_imports") or {"imports": None}))
    except Exception as error:
        raise _failed(config, "built", error) from error


def without_training(node: Any) -> None:
    """Drop entries that download weights, or need packages or processes, which inference has no use for."""
    if isinstance(node, dict):
        init = node.get("init_cfg")
        if isinstance(init, dict) and "checkpoint" in init:  # PVT's has no type
            node["init_cfg"] = None
        if node.get("pretrained"):  # of DetectoRS' backbones inside of their neck
            node["pretrained"] = None
        if "teacher_ckpt" in node:  # of distillation
            node["teacher_ckpt"] = None
        if node.get("type") == "MMSyncBN":  # it asks for several processes
            node["type"] = "BN"
        if "num_cp" in node:  # recomputes in training, with the package fairscale
            node["num_cp"] = 0
        for value in node.values():
            without_training(value)
    elif isinstance(node, list | tuple):
        for value in node:
            without_training(value)


def _check_channels(config: str | os.PathLike[str], parsed: Config, model: nn.Module) -> None:
    """Raise QwtError where a detector takes one channel and its test pipeline reads three."""
    means = (parsed.model.get("data_preprocessor") or {}).get("mean") or ()
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if len(means) != 1 or first is None or first.in_channels != 1:
        return
    for transform in inference_pipeline(parsed):
        color = transform.get("color_type", "color")
        if transform_name(transform) == "LoadImageFromFile" and color.startswith("color"):
            raise QwtError(
                f"The detector of {config} takes images of one channel, but LoadImageFromFile in its "
                "test pipeline reads three; set its color_type to 'grayscale' in the model config."
            )


def build_detector(
    config: str | os.PathLike[str], parsed: Config, trained: Sequence[str] | None = None
) -> BaseDetector:
    """Build a detector whose weights are still to come.

    Args:
        trained: class names that its checkpoint carries.
    """
    without_training(parsed.model)
    if "TimmBackbone" in str((parsed.model.get("backbone") or {}).get("type")):
        from . import timm_backbone  # noqa: F401  registers it; timm takes seconds to import
    with DefaultScope.overwrite_default_scope("mmdet"):
        try:
            model = MODELS.build(copy.deepcopy(parsed.model))  # which some modules change
        except Exception as error:
            raise _failed(config, "built", error) from error
        if type(model.data_preprocessor) is BaseDataPreprocessor and isinstance(model, USUAL):
            raise QwtError(
                f"The model config {config} has no model.data_preprocessor, which normalises images and puts them "
                "into batches; set it as in training, such as dict(type='DetDataPreprocessor', mean=[…], std=[…])."
            )
        repair(model)
        _check_channels(config, parsed, model)
        try:
            names = class_names(parsed, head_outputs(model), trained)
        except QwtError as error:
            raise QwtError(f"The classes of {config} do not fit: {error}") from error
        model.dataset_meta = {"classes": names}
    model.cfg = parsed
    return model


def random_detector(
    config: str | os.PathLike[str], config_options: Mapping[str, Any] | None = None
) -> BaseDetector:
    """Build an mmdet detector with random weights, as its trainer starts from but for pretraining.

    Args:
        config, config_options: see :func:`load_detector`.

    Returns:
        The detector in evaluation mode, with ``cfg`` and ``dataset_meta`` set.

    Raises:
        QwtError: the config cannot be read or built.
    """
    register_all_modules(init_default_scope=True)
    model = build_detector(config, read_config(config, config_options))
    with DefaultScope.overwrite_default_scope("mmdet"):
        model.init_weights()  # mmdet leaves some parameters of the DETR family unset before
    for module in model.modules():
        if isinstance(module, TridentConv):  # and these for good
            nn.init.kaiming_normal_(module.weight)
    model.eval()  # what it returns is no model in mmdet's distillation
    return model


def load_detector(
    config: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    device: str = "cpu",
    config_options: Mapping[str, Any] | None = None,
) -> BaseDetector:
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
    state, classes = read_checkpoint(checkpoint)
    model = build_detector(config, parsed, classes)
    load_weights(model, state, f"The checkpoint {checkpoint} does not fit {config}")
    record_of(model).fingerprint = {
        "model": settings_fingerprint(parsed.model.to_dict()),
        "weights": weights_fingerprint(model.state_dict()),
    }
    use_full_precision()
    model.to(device).eval()
    return model
