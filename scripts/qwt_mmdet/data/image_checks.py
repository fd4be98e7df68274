"""Checks of chosen images: that they are there, readable, of the size that annotations say, and in their folder."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..config.datasets import Exif
from ..errors import QwtError
from ..progress import progress
from .annotations import few

PROBLEMS_IN_MESSAGES = 5


def outside_of(
    images: Sequence[Mapping[str, Any]], image_root: str, root: str | os.PathLike[str]
) -> list[str]:
    """Names of images whose path, with links resolved, is outside of the dataset's root.

    If the config names an image folder outside of the root, that folder is the root of its images.
    """
    named = Path(os.path.abspath(image_root)).is_relative_to(os.path.abspath(root))
    allowed = os.path.realpath(root if named else image_root)
    names = [image["file_name"] for image in images]
    return [
        name
        for name in names
        if not Path(os.path.realpath(os.path.join(image_root, name))).is_relative_to(allowed)
    ]


def check_images(
    images: Sequence[Mapping[str, Any]], image_root: str, exif: Exif, name: str, workers: int
) -> list[int]:
    """Check that images exist and fit their entries; return their EXIF orientations."""

    def path(image: Mapping[str, Any]) -> str:
        return os.path.join(image_root, image["file_name"])

    absent = [image["file_name"] for image in images if not os.path.isfile(path(image))]
    if absent:
        raise QwtError(
            f"{len(absent)} of {len(images)} chosen images are missing in {image_root}: "
            f"{few(absent)}; add them, or correct the image folder."
        )
    with ThreadPoolExecutor(max_workers=min(workers, os.cpu_count() or 1)) as executor:
        results = executor.map(lambda image: orientation_of(path(image), image, exif), images)
        found = list(progress(results, f"Checking images in {image_root}", total=len(images)))
    problems = [result for result in found if isinstance(result, QwtError)]
    if problems:
        raise QwtError(
            f"{len(problems)} of {len(images)} chosen images in {image_root} are not usable: "
            f"{' '.join(map(str, problems[:PROBLEMS_IN_MESSAGES]))} Replace them; where sizes differ, correct "
            f"those in the annotation file, or set datasets.{name}.exif."
        )
    return [result for result in found if not isinstance(result, QwtError)]


def orientation_of(path: str | Path, image: Mapping[str, Any], exif: Exif) -> int | QwtError:
    """EXIF orientation of an image file, or what is wrong with it."""
    from .images import check_image

    try:
        return check_image(path, image["width"], image["height"], exif=exif)
    except QwtError as error:
        return error
