"""Get the annotations of a part of a data set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.datasets import Part
from ..data.annotations import read_annotations
from ..data.download import LARGEST_BYTES
from ..data.sources import open_source
from ..files import sha256_file, write_json


def prepare_dataset(
    settings: Mapping[str, Any],
    part: Part,
    *,
    folder: str | Path,
    output: str | Path,
    most_bytes: int = LARGEST_BYTES,
) -> None:
    """Get the annotations of one part of a dataset: generate them, fetch them, or check a local file.

    Writes the source ``{"annotations": path, "image_root": folder of the images, "split": name,
    "sha256": that of the annotation file}``.

    Args:
        settings: the config's entry (``config.datasets``).
        part: ``calibration`` or ``evaluation``.
        folder: for generated and downloaded files.
        output: the file to write.
        most_bytes: largest size of a download, and of an annotation file in it.

    Raises:
        QwtError: a file or folder is missing, cannot be downloaded, or is not in COCO's instances format.
    """
    source = open_source(settings, folder)
    source.prepare(part, most_bytes)
    place = source.place(part)
    read_annotations(place.annotations, labelled=part == "evaluation")
    noted = {**place._asdict(), "sha256": sha256_file(place.annotations)}
    write_json(output, noted, indent=2)
