"""Choice of a data set's images for calibration and evaluation."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config.datasets import PARTS, Part
from ..errors import QwtError
from ..files import sha256_file
from .annotations import few, read_annotations
from .sources import Source

logger = logging.getLogger(__name__)

Count = int | Literal["all"]


def choose_ids(
    part: Part,
    ids: Iterable[int],
    images: Count,
    *,
    seed: int,
    same_images: bool,
    name: str,
    draw: int = 1,
) -> list[int]:
    """Draw image ids for a part; the order of ``ids`` does not matter.

    Args:
        part: ``calibration`` or ``evaluation``.
        ids: the ids to draw from.
        images: number of images to draw, or ``"all"``.
        same_images: whether both parts are drawn from the same images; then they share none if there are enough.
        name: name of the dataset in the config, for messages.
        draw: 1 or more. Draws share no image as long as there are enough; further draws are independent and share
            some.

    Returns:
        The ids in ascending order.

    Raises:
        QwtError: the number is too large; a draw above 1 is of all ids; or both parts are drawn from the same
            images and there are too few for the draw.
    """
    ids = sorted(ids)
    count = len(ids) if images == "all" else images
    if count > len(ids):
        raise QwtError(
            f"datasets.{name}.{part}.images is {count}, but there are only {len(ids)} images; ask for fewer, or all."
        )
    stream = 0 if same_images else 1 + PARTS.index(part)
    shuffled = [ids[index] for index in np.random.default_rng([seed, stream]).permutation(len(ids))]
    if same_images and part == "calibration":
        shuffled.reverse()
    if draw > 1 and count == len(ids):
        raise QwtError(
            f"datasets.{name}.{part}.images is all {count} images, so draw {draw} would be draw 1; ask for "
            "fewer images, or for one draw (repeats: 1)."
        )
    if draw * count > len(ids):
        if same_images:
            raise QwtError(
                f"Draw {draw} of {count} images is beyond the {len(ids)} images of datasets.{name}, which "
                "serve evaluation too; ask for fewer images or draws (repeats)."
            )
        logger.warning(
            "%s.%s: draw %d of %d images shares some with other draws, as there are only %d images; so "
            "draws differ less than those of a large data set",
            name, part, draw, count, len(ids),
        )  # fmt: skip
        order = np.random.default_rng([seed, stream, draw]).permutation(len(ids))
        return sorted(ids[index] for index in order[:count])
    return sorted(shuffled[(draw - 1) * count : draw * count])


def choose(source: Source, part: Part, *, name: str) -> dict[str, Any]:
    """Choose the images of a part.

    Args:
        source: with the annotation file of the part, and perhaps that of the other part.
        name: name of the dataset in the config, for messages.

    Returns:
        The annotation file of exactly these images, in order of their ids.

    Raises:
        QwtError: there are too few images, or both parts share one.
    """
    contents = _read_parts(source)
    same_images = len({id(content) for content in contents.values()}) < len(contents)
    chosen = {}
    for key, content in contents.items():
        ids = choose_ids(
            key,
            [image["id"] for image in content["images"]],
            getattr(source.settings, key).images,
            seed=source.settings.seed,
            same_images=same_images,
            name=name,
            draw=source.draw(key),
        )
        chosen[key] = _subset(content, ids)
    if len(chosen) == len(PARTS):
        _check_overlap(source, chosen, name)
    return chosen[part]


def _read_parts(source: Source) -> dict[Part, dict[str, Any]]:
    """Read the annotation files that exist; a file of both parts is read once."""
    paths = {part: source.place(part).annotations for part in PARTS}
    hashes = {part: sha256_file(path) for part, path in paths.items() if Path(path).is_file()}
    by_hash: dict[str, dict[str, Any]] = {}
    for part, found in hashes.items():
        if found not in by_hash:
            labelled = found == hashes.get("evaluation")
            by_hash[found] = read_annotations(paths[part], labelled=labelled)
    return {part: by_hash[found] for part, found in hashes.items()}


def _subset(content: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    wanted = set(ids)
    return {
        "info": {},
        "images": sorted(
            (image for image in content["images"] if image["id"] in wanted),
            key=lambda image: image["id"],
        ),
        "annotations": sorted(
            (found for found in content["annotations"] if found["image_id"] in wanted),
            key=lambda found: found["id"],
        ),
        "categories": content["categories"],
    }


def _check_overlap(source: Source, chosen: Mapping[Part, Mapping[str, Any]], name: str) -> None:
    """Check that no image file is in both parts, even with different ids."""
    evaluated = {
        source.identity("evaluation", image["file_name"])
        for image in chosen["evaluation"]["images"]
    }
    shared = [
        image["id"]
        for image in chosen["calibration"]["images"]
        if source.identity("calibration", image["file_name"]) in evaluated
    ]
    if shared:
        raise QwtError(
            f"Calibration and evaluation of {name} would share {len(shared)} images, with the ids "
            f"{few(shared)}; ask for fewer images, or take them from different splits."
        )


def missing_classes(subset: Mapping[str, Any], what: str) -> list[str]:
    """Names of the classes without an object in the chosen images, which are also logged.

    Args:
        what: name of the chosen images in the log.
    """
    there = {annotation["category_id"] for annotation in subset["annotations"]}
    missing = [
        category["name"]
        for category in sorted(subset["categories"], key=lambda category: category["id"])
        if category["id"] not in there
    ]
    if missing:
        logger.warning(
            "%s: %d of %d classes do not occur in the %d chosen images: %s",
            what, len(missing), len(subset["categories"]), len(subset["images"]), few(missing),
        )  # fmt: skip
    return missing
