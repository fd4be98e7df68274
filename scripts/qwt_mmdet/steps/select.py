"""Choose the images of a part of a data set."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.datasets import Exif, Part
from ..data.annotations import few
from ..data.download import LARGEST_BYTES
from ..data.images import SIDEWAYS, UPRIGHT
from ..data.sampling import choose, missing_classes
from ..data.sources import open_source
from ..errors import QwtError
from ..files import read_json, sha256_file, write_json
from ..staleness import file_note

logger = logging.getLogger(__name__)


def select_images(
    settings: Mapping[str, Any],
    part: Part,
    *,
    name: str,
    source: str | Path,
    folder: str | Path,
    annotations: str | Path,
    files: str | Path,
    seen: str = "",
    most_bytes: int = LARGEST_BYTES,
    workers: int = 8,
) -> None:
    """Choose the images of one part, fetch them if remote, and check every one.

    Writes a COCO annotation file of the chosen images, in order of their ids. Its ``info`` records the choice:
    ``image_root`` (``file_name`` is relative to it), ``dataset``, ``part``, ``split``, ``seed``, ``images``
    (their number), ``source`` and ``source_sha256`` (of the original annotation file), ``missing_classes``,
    ``exif`` (whether loaders apply EXIF orientations) and ``exif_rotated`` (number of images with one).

    A number of images is drawn at random by ``seed``; a larger number contains the images of a smaller one. If
    both parts are of one annotation file, they are drawn from the two ends of one shuffled list, so neither
    choice depends on the other's number. The part that is chosen last checks that they share no image.

    Args:
        settings: as for :func:`.prepare.prepare_dataset`.
        part: ``calibration`` or ``evaluation``.
        name: name of the dataset in the config, for messages.
        source: the file that :func:`.prepare.prepare_dataset` wrote for the part.
        folder: where generated and downloaded files are.
        annotations: the annotation file to write.
        files: the file to write about the chosen image files and their state (see
            :func:`.staleness.file_note`).
        seen: the change of these files that made this choice necessary.
        most_bytes: largest size of a download, if the annotation file is missing.
        workers: number of images to download or to check at a time.

    Raises:
        QwtError: there are no or too few images; both parts share an image; an image is missing, outside of the
            root, not readable by MMDetection's loader or has another size than in its annotation; or the
            evaluation images have no object.
    """
    noted = read_json(source, what="dataset source")
    origin = open_source(settings, folder)
    origin.prepare(part, most_bytes)  # makes missing generated and downloaded files again
    place = origin.place(part)
    path = place.annotations
    if not os.path.isfile(path) or sha256_file(path) != noted["sha256"]:
        raise QwtError(
            f"The annotation file {path} is missing or has changed since it was checked; run again "
            "with --forcerun prepare_dataset."
        )
    subset = choose(origin, part, name=name)
    images = subset["images"]
    missing = missing_classes(subset, f"{name}.{part}")
    if part == "evaluation" and all(found["iscrowd"] for found in subset["annotations"]):
        raise QwtError(
            f"None of the {len(images)} evaluation images of {name} has an annotation of an object "
            "(crowd regions are none), so there is nothing to evaluate; raise "
            f"datasets.{name}.evaluation.images, or check the annotation file."
        )
    orientations = origin.fetch(part, images, name=name, workers=workers)
    subset["info"] = {
        "image_root": place.image_root,
        "dataset": name,
        "part": part,
        "split": place.split,
        "seed": origin.settings.seed,
        "images": len(images),
        "source": path,
        "source_sha256": noted["sha256"],
        "missing_classes": missing,
        "exif": origin.exif,
        "exif_rotated": _report_orientations(
            images, orientations, origin.exif, name=name, part=part
        ),
    }
    write_json(annotations, subset)
    names = [image["file_name"] for image in images]
    write_json(files, file_note(names, root=place.image_root, seen=seen, how="time"))


def _report_orientations(
    images: Sequence[Mapping[str, Any]],
    orientations: Sequence[int],
    exif: Exif,
    *,
    name: str,
    part: Part,
) -> int:
    """Log the images with an EXIF rotation; return their number."""
    turned = [
        (image, orientation)
        for image, orientation in zip(images, orientations, strict=True)
        if orientation != UPRIGHT
    ]
    if turned:
        read = {
            "apply": "are turned upright when they are read (exif: apply)",
            "ignore": "are read as they are stored (exif: ignore)",
        }[exif]
        logger.warning(
            "%s.%s: %d of %d chosen images carry an EXIF rotation and %s: %s",
            name, part, len(turned), len(images), read,
            few([f"{image['file_name']} (orientation {number})" for image, number in turned]),
        )  # fmt: skip
    unknown = [
        image["file_name"]
        for image, orientation in turned
        if orientation not in SIDEWAYS or image["width"] == image["height"]
    ]
    if unknown:
        logger.warning(
            "%s.%s: sizes cannot tell whether the boxes of %d of these refer to the turned image or to "
            "the pixels as stored, so look at them, and set datasets.%s.exif: apply or ignore: %s",
            name, part, len(unknown), name, few(unknown),
        )  # fmt: skip
    return len(turned)
