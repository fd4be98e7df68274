"""Classes of a detector: outputs of heads, and names in config, checkpoint and annotations.

A detector has only a number of classes; their names come from elsewhere, and wrong names give a wrong AP. So the
outputs of all heads, the names in config and checkpoint and the categories of the annotations are compared before
anything runs.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdet.models import BaseDetector
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import nn

from ..data.annotations import NAMED_IN_MESSAGES, few
from ..data.loaders import test_datasets
from ..errors import QwtError
from ..files import read_text

logger = logging.getLogger(__name__)

HEADS = ("bbox_head", "mask_head", "roi_head", "panoptic_head")
"""Attributes of mmdet's detectors with heads that predict classes; ``rpn_head`` only separates objects from
background."""

OTHER_OUTPUTS = ("rpn_head", "semantic", "loss")
"""Words in names of modules in a head that count something else: regions, stuff, training."""


@dataclass(frozen=True)
class ConfigNames:
    """Class names that a config gives, or the type of its data set.

    Args:
        names: in the order of the labels; None where there are none.
        place: key of the config that holds them, or should.
        dataset: type of the data set whose own names they are; None where the config lists them.
    """

    names: tuple[str, ...] | None
    place: str
    dataset: str | None

    def line(self, names: Sequence[str]) -> str:
        """The setting of a model that gives these names."""
        return f"config_options: {{{self.place}: [{', '.join(names)}]}}"


def head_outputs(model: nn.Module) -> dict[str, int]:
    """Number of classes that each head of a detector tells apart, by the name of its module.

    Heads that tell none apart are left out: proposals, semantic segmentation beside instances, masks
    of whatever class.
    """
    found = {}
    for head in HEADS:
        component = getattr(model, head, None) or nn.Identity()  # SOLO's bbox_head is None
        for name, module in component.named_modules(prefix=head):
            count = getattr(module, "num_classes", None)
            if isinstance(count, int) and not (
                any(word in name for word in OTHER_OUTPUTS)
                or getattr(module, "class_agnostic", False)
            ):
                found[name] = count
    return found


def _as_names(value: Any, place: str) -> tuple[str, ...]:
    """Class names of a config's value: a list, one name, or a file with a name in each line.

    Raises:
        QwtError: it is something else, or holds a name twice.
    """
    if isinstance(value, str):
        is_file = os.path.isfile(value)
        value = read_text(value, "list of classes").split("\n") if is_file else [value]
        value = [name for name in value if name]
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(name, str) for name in value)
    ):
        raise QwtError(f"{place} is {value!r:.200}; give a list of class names.")
    twice = sorted({name for name in value if value.count(name) > 1})
    if twice:
        raise QwtError(f"{place} has {twice[0]!r} twice; give each class a name of its own.")
    return tuple(value)


def config_names(config: Config) -> ConfigNames:
    """Class names of a config: of its test data set, of its top, or of the data set's type.

    Raises:
        QwtError: they are no names, or the data sets of a concatenation have different ones.
    """
    found = []
    for path, dataset in test_datasets(config):
        place, metainfo = f"{path}.metainfo.classes", dataset.get("metainfo") or {}
        dataset_class = dataset.get("type")
        if isinstance(dataset_class, str):
            dataset_class = DATASETS.get(dataset_class)
        default = (getattr(dataset_class, "METAINFO", None) or {}).get("classes")
        for source, where in (
            (metainfo, place),
            (config.get("metainfo") or {}, "metainfo.classes"),
        ):
            given = source.get("classes", source.get("CLASSES"))
            if given is not None:
                found.append(ConfigNames(_as_names(given, where), place, None))
                break
        else:
            names = default and _as_names(default, f"METAINFO of {dataset_class.__name__}")
            found.append(
                ConfigNames(names, place, getattr(dataset_class, "__name__", str(dataset_class)))
            )
    first = found[0]
    for other in found[1:]:
        if other.names != first.names:
            raise QwtError(
                f"{first.place} and {other.place} name other classes; all test data sets need "
                "the names of the model's labels, in the same order."
            )
    return first


def _number(names: Sequence[str]) -> str:
    return f"{len(names)} class{'es' if len(names) != 1 else ''} ({few(names)})"


def class_names(
    config: Config, outputs: Mapping[str, int], trained: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Names of a detector's labels.

    The checkpoint's names go before those that the data set's type has. They go before those that the
    config lists where these are the same in another order, since the order is that of the weights. A
    class that the config calls otherwise than the checkpoint keeps the config's name.

    Args:
        config: of the model.
        outputs: from :func:`head_outputs`.
        trained: names that the checkpoint carries.

    Returns:
        One name for each label.

    Raises:
        QwtError: heads or names contradict each other; says which line mends it.
    """
    given = config_names(config)
    if len(set(outputs.values())) > 1:
        heads = ", ".join(f"{name} {count}" for name, count in outputs.items())
        raise QwtError(
            f"The heads of the model have different numbers of classes: {heads}; set num_classes of "
            "each head in the model config to the number that it was trained with."
        )
    count = next(iter(outputs.values()), None)
    head = f"the model's head ({next(iter(outputs), '')}) has {count} output" + "s" * (count != 1)
    if trained is not None and count not in (None, len(trained)):
        logger.warning(
            "The checkpoint names %s, but %s; its names are not used.", _number(trained), head
        )
        trained = None
    if trained is not None:
        return _with_trained(given, tuple(trained), head)
    if given.names is not None and count in (None, len(given.names)):
        return given.names
    if count is None:
        raise QwtError(
            f"The model config names no classes; set {given.place} to the names of all labels, in the "
            "order of training."
        )
    labels = [f"name of label {label}" for label in range(count)]
    wanted = given.line(labels[:NAMED_IN_MESSAGES] + ["…"] * (count > NAMED_IN_MESSAGES))
    if given.names is None:
        what = f"The model config names no classes, but {head}"
    elif given.dataset is None:
        what = f"The model config names {_number(given.names)}, but {head}"
    else:
        what = f"{given.dataset} has {len(given.names)} classes, but {head}"
    raise QwtError(
        f"{what}. Give the names of all labels in the order of training: {wanted}; annotations may "
        "hold some of these classes only."
    )


def _with_trained(given: ConfigNames, trained: tuple[str, ...], head: str) -> tuple[str, ...]:
    """Names of the labels where the checkpoint has some, as many as its head has outputs."""
    if given.names is None or given.dataset is not None:
        if given.names != trained:
            logger.info("The classes are the checkpoint's: %s", few(trained))
        return trained
    if given.names == trained:
        return trained
    remove = "remove metainfo.classes from the model config, and the checkpoint's names are used"
    if len(given.names) != len(trained):
        raise QwtError(
            f"The model config names {_number(given.names)}, but {head}; {remove}. Annotations may "
            "hold some of these classes only."
        )
    if set(given.names) == set(trained):
        logger.warning(
            "The model config names the classes in another order than the checkpoint; the order of "
            "the checkpoint is used: %s",
            few(trained),
        )
        return trained
    pairs = list(zip(given.names, trained, strict=True))
    moved = [(ours, theirs) for ours, theirs in pairs if ours != theirs and ours in trained]
    if moved:
        ours, theirs = moved[0]
        raise QwtError(
            f"The model config calls label {given.names.index(ours)} {ours!r}, the checkpoint "
            f"{theirs!r}, and it has {ours!r} as label {trained.index(ours)}; {remove}."
        )
    logger.warning(
        "The model config gives classes other names than the checkpoint: %s",
        few([f"{theirs} → {ours}" for ours, theirs in pairs if ours != theirs]),
    )
    return given.names


def category_ids(classes: Sequence[str], annotations: Mapping[str, Any]) -> list[int | None]:
    """COCO category id of each of the model's labels, matched by name.

    Either side may have classes that the other lacks: annotations of some of the model's classes
    measure these, and a model of some of the categories is measured on those.

    Returns:
        For each label an id, or None for a class that the annotations lack.

    Raises:
        QwtError: both have classes that the other lacks, so that a name may be misspelled; or they
            have none in common.
    """
    by_name = {category["name"]: category["id"] for category in annotations["categories"]}
    missing = [name for name in classes if name not in by_name]
    unknown = [name for name in by_name if name not in classes]
    if (missing and unknown) or len(missing) == len(classes):
        raise QwtError(
            f"The classes of the model and of the annotations differ. Only the model has: "
            f"{few(missing) or 'none'}. Only the annotations have: {few(unknown) or 'none'}. If "
            "names are spelled differently, set test_dataloader.dataset.metainfo.classes in the model "
            f"config to the {len(classes)} names of the model, in their order and with the annotations' "
            "spelling; otherwise use annotations with the model's classes, or with some of them."
        )
    return [by_name.get(name) for name in classes]


def check_annotations(model: BaseDetector, annotations: Mapping[str, Any]) -> None:
    """Check that a detector can be evaluated on the annotations of a file, whichever of its images are chosen.

    Args:
        annotations: from :func:`.annotations.read_annotations`.

    Raises:
        QwtError: the classes differ (see :func:`category_ids`), or it predicts masks and the annotations have none.
    """
    category_ids(model.dataset_meta["classes"], annotations)
    if model.with_mask and not any(one.get("segmentation") for one in annotations["annotations"]):
        raise QwtError(
            "The detector predicts masks, but the annotations have none; take annotations with masks (segmentation), "
            "or a detector without them."
        )


def log_left_out(
    classes: Sequence[str], annotations: Mapping[str, Any], level: int = logging.WARNING
) -> None:
    """Log which classes of the model or of the annotations an evaluation leaves out.

    Args:
        level: of the message about annotated classes that the model lacks.
    """
    categories = [category["name"] for category in annotations["categories"]]
    if missing := [name for name in classes if name not in categories]:
        logger.info("Not evaluated, since the annotations have no such class: %s", few(missing))
    if unknown := [name for name in categories if name not in classes]:
        logger.log(level, "Not evaluated, since the model has no such class: %s", few(unknown))
