"""Sources of images and annotations: one class for each, registered by name.

Snakemake imports this whenever it reads the workflow, so OpenCV and network packages are imported in functions.
"""

import contextlib
import fcntl
import filecmp
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config.datasets import PARTS, Coco, Exif, Part, Shapes, parse_dataset
from ..config.section import as_plain
from ..errors import QwtError, Registry
from .annotations import few, read_annotations
from .image_checks import check_images, outside_of


class Place(NamedTuple):
    """Paths of a part's annotations and images, which may not exist yet."""

    annotations: str
    image_root: str
    split: str


class Source(ABC):
    """The source of a data set.

    Args:
        settings: its section of the configuration.
        folder: for generated and downloaded files.
    """

    def __init__(self, settings: Any, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.root: str | None = None
        """The user's folder with annotations and images; None if they are generated or downloaded."""

    @abstractmethod
    def place(self, part: Part) -> Place:
        """Paths of a part, which may not exist yet."""

    @abstractmethod
    def prepare(self, part: Part, most_bytes: int) -> None:
        """Make the annotation file of a part available at its path.

        Args:
            most_bytes: largest size of a download, and of an annotation file in it.

        Raises:
            QwtError: it is not available.
        """

    def fetch(
        self, part: Part, images: Sequence[Mapping[str, Any]], *, name: str, workers: int
    ) -> list[int]:
        """Make images of a part available at their paths, and check each.

        Args:
            images: entries of the annotation file.
            name: name of the dataset in the config, for messages.
            workers: images to fetch or to check at a time.

        Returns:
            The EXIF orientation of each image, 1 to 8.

        Raises:
            QwtError: an image is missing, unreadable or of another size than its entry says.
        """
        return check_images(images, self.place(part).image_root, self.exif, name, workers)

    @property
    def exif(self) -> Exif:
        """Whether images are turned by their EXIF orientation when they are read."""
        return self.settings.exif

    def identity(self, part: Part, file_name: str) -> str:
        """An identifier of an image file; equal only for the same image."""
        return os.path.realpath(os.path.join(self.place(part).image_root, file_name))

    def local_annotations(self, part: Part) -> str | None:
        """The annotation file of a part if it is a file of the user."""
        return None

    def available(self, part: Part) -> int | None:
        """Number of images to choose from; None if unknown before annotations are fetched."""
        return None

    def draw(self, part: Part) -> int:
        """Number of the draw of images from the part's annotation file."""
        return getattr(getattr(self.settings, part), "draw", 1)

    @property
    def shared(self) -> bool:
        """Whether both parts are chosen from the same images."""
        return self.place("calibration").annotations == self.place("evaluation").annotations

    def annotation_settings(self, part: Part) -> dict[str, Any]:
        """The settings that the annotations of a part depend on."""
        plain = as_plain(self.settings)
        choice = ("images", "draw")
        plain[part] = {key: value for key, value in plain[part].items() if key not in choice}
        return {
            key: value
            for key, value in plain.items()
            if key not in ("seed", "exif", "allow_outside_root", _other(part))
        }

    def choice_settings(self, part: Part) -> dict[str, Any]:
        """The settings that the choice of a part's images, and their reading, depend on."""
        plain = as_plain(self.settings)
        del plain[_other(part)]
        return {**self.annotation_settings(part), **plain, "shares_annotations": self.shared}


SOURCES: Registry[Callable[[Any, Path], Source]] = Registry("The type of a data set", imports=True)
register_source = SOURCES.register
"""Decorator: the class, or function, makes the sources of data sets with a ``type``, of its settings and folder."""


def open_source(settings: Mapping[str, Any], folder: str | Path) -> Source:
    """The source of a data set.

    Args:
        settings: the config's entry.
        folder: where generated and downloaded files go.

    Raises:
        QwtError: a setting is not allowed, or nothing is registered for its type.
    """
    section = parse_dataset(settings)
    return SOURCES.find(section.type)(section, Path(folder))


def number_of_images(settings: Mapping[str, Any], part: Part) -> int | None:
    """Number of images of a part of a data set; None if unknown before its annotations are fetched.

    Args:
        settings: the config's entry.

    Raises:
        QwtError: all images of an annotation file are asked for, and it cannot be read.
    """
    count = settings[part]["images"]
    return open_source(settings, "").available(part) if count == "all" else count


@register_source("shapes")
class Generated(Source):
    """Images that are drawn from a seed."""

    settings: Shapes

    def place(self, part: Part) -> Place:
        split = getattr(self.settings, part).split
        folder = self._folder(part)
        return Place(
            str(folder / f"annotations/instances_{split}.json"), str(folder / split), split
        )

    def _folder(self, part: Part) -> Path:
        """Where a part is; further draws of calibration images have folders of their own."""
        draw = self.settings.calibration.draw
        return self.folder / f"draw-{draw}" if part == "calibration" and draw > 1 else self.folder

    def prepare(self, part: Part, most_bytes: int) -> None:
        """Draw the images of a part; complete splits are kept."""
        import numpy as np

        from ..demo.shapes import generate_shapes

        place, folder = self.place(part), self._folder(part)
        shared_out = [key for key in PARTS if self.place(key) == place]
        count = sum(getattr(self.settings, key).images for key in shared_out)
        seed = self.settings.seed
        if folder != self.folder:
            seeds = np.random.SeedSequence([seed, self.settings.calibration.draw])
            seed = int(seeds.generate_state(1)[0])
        with alone(self.folder):
            generate_shapes(folder, seed=seed, images={place.split: count})

    def draw(self, part: Part) -> int:
        return 1  # each draw has an annotation file of its own

    @property
    def exif(self) -> Exif:
        return "apply"  # drawn images have no orientation

    def annotation_settings(self, part: Part) -> dict[str, Any]:
        """The settings that decide what is drawn, with the numbers of images."""
        plain = as_plain(self.settings)
        if not self.shared:
            del plain[_other(part)]
        return plain


@register_source("coco")
def _coco(settings: Coco, folder: Path) -> Source:
    if settings.root is not None:
        return LocalFolder(settings, folder, settings.root)
    from .coco_download import Download

    return Download(settings, folder, str(settings.url).rstrip("/"))


class LocalFolder(Source):
    """A folder of the user's in COCO's format."""

    settings: Coco
    root: str

    def __init__(self, settings: Coco, folder: Path, root: str) -> None:
        super().__init__(settings, folder)
        self.root = root

    def place(self, part: Part) -> Place:
        images = getattr(self.settings, part)
        root = Path(self.root)
        return Place(str(root / images.annotations), str(root / images.image_folder), images.split)

    def prepare(self, part: Part, most_bytes: int) -> None:
        """Check that the folders are there."""
        if not os.path.isdir(self.root):
            raise QwtError(f"The dataset root {self.root} is not a folder; check the path.")
        image_root = self.place(part).image_root
        if not os.path.isdir(image_root):
            raise QwtError(
                f"The {part} images should be in {image_root}, which is not a folder; check root and "
                f"{part}.image_folder."
            )

    def fetch(
        self, part: Part, images: Sequence[Mapping[str, Any]], *, name: str, workers: int
    ) -> list[int]:
        """Check the images; see :meth:`Source.fetch`."""
        outside = outside_of(images, self.place(part).image_root, self.root)
        if outside and not self.settings.allow_outside_root:
            raise QwtError(
                f"{len(outside)} of {len(images)} chosen images lie outside of the root {self.root}, "
                f"where the annotation file or a link leads: {few(outside)}; if you trust that, set "
                f"datasets.{name}.allow_outside_root: true."
            )
        return super().fetch(part, images, name=name, workers=workers)

    def local_annotations(self, part: Part) -> str:
        return self.place(part).annotations

    def available(self, part: Part) -> int:
        path = self.place(part).annotations
        return len(read_annotations(path, labelled=False, objects=False)["images"])

    @property
    def shared(self) -> bool:
        """Also true if one annotation file is a copy of the other."""
        first, second = (self.place(part).annotations for part in PARTS)
        there = os.path.exists(first) and os.path.exists(second)
        return super().shared or (there and filecmp.cmp(first, second, shallow=False))


def _other(part: Part) -> Part:
    return "evaluation" if part == "calibration" else "calibration"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a lock: one process at a time prepares a part in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
