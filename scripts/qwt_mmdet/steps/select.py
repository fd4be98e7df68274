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

    Writes a COCO annotation file of exactly the chosen images, in order of their ids, with the
    choice recorded under ``info``: ``image_root`` (``file_name`` is relative to it), ``dataset``,
    ``part``, ``split``, ``seed``, ``images`` (their number), ``source`` and ``source_sha256`` (the
    annotation file they are from), ``missing_classes``, ``exif`` (whether loaders turn images as
    their EXIF orientation says) and ``exif_rotated`` (how many have one).

    A number of images means a random choice of that many by ``seed``; a larger number contains the
    images of a smaller one. If both parts are of the same annotation file they are drawn from two
    ends of one shuffled list, so neither choice depends on the other's number. Whichever part is
    chosen last finds out whether they share an image.

    Args:
        settings: as for :func:`.prepare.prepare_dataset`; those of the other part tell whether both
            parts would share an image.
        part: ``calibration`` or ``evaluation``.
        name: name of the dataset in the config, for messages.
        source: what :func:`.prepare.prepare_dataset` wrote for the part.
        folder: where generated and downloaded files are.
        annotations: the annotation file to write.
        files: the file to write that tells which image files were chosen, and how they are (see
            :func:`.staleness.file_note`).
        seen: the change of these files that made this choice necessary.
        most_bytes: largest size of a download, should the annotation file be gone.
        workers: images to download or to check at a time.

    Raises:
        QwtError: no or too few images, the same image in both parts, an image that is missing,
            outside of the root, not readable by MMDetection's loader or of another size than its
            annotation says, or an evaluation without any object.
    """
    noted = read_json(source, what="dataset source")
    origin = open_source(settings, folder)
    origin.prepare(part, most_bytes)  # generated and downloaded files that went away come back
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
    """Say which images carry an EXIF rotation; return their number."""
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
