"""COCO by download, from its own site or a mirror."""

import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from ..config.datasets import PARTS, Coco, Part
from ..errors import QwtError
from ..files import read_json, write_atomically, write_json
from .image_checks import orientation_of
from .sources import Place, Source, alone

ARCHIVE = "annotations/annotations_trainval2017.zip"
COCO_IMAGES = {"train2017": 118287, "val2017": 5000}
"""How many images a split of COCO has."""


class Download(Source):
    """COCO by download: the archive of all annotations, and the chosen images one by one."""

    settings: Coco

    def __init__(self, settings: Coco, folder: Path, url: str) -> None:
        super().__init__(settings, folder)
        self.url = url

    def place(self, part: Part) -> Place:
        images = getattr(self.settings, part)
        return Place(
            str(self.folder / images.annotations),
            str(self.folder / "images" / images.split),
            images.split,
        )

    def prepare(self, part: Part, most_bytes: int) -> None:
        """Download the archive, and extract the missing annotation files of both parts."""
        from .download import download

        names = {getattr(self.settings, key).annotations for key in PARTS}
        for name in names:
            if _leaves(name):
                raise QwtError(
                    f"The annotations {name!r} would be stored outside of the dataset's folder; name a "
                    f"file of {self.url}/{ARCHIVE}."
                )
        with alone(self.folder):
            self._claim()
            if os.path.isfile(self.place(part).annotations):
                return
            absent = sorted(name for name in names if not (self.folder / name).is_file())
            archive = self.folder / PurePosixPath(ARCHIVE).name
            download(f"{self.url}/{ARCHIVE}", archive, most_bytes=most_bytes)
            try:
                _extract(archive, absent, self.folder, f"{self.url}/{ARCHIVE}", most_bytes)
            finally:
                archive.unlink()

    def _claim(self) -> None:
        """Record the address of the files in the folder; refuse files from another one."""
        origin = self.folder / "origin.json"
        if origin.is_file():
            noted = read_json(origin, what="note of a download's origin").get("url")
        else:
            there = [name for name in ("annotations", "images") if (self.folder / name).exists()]
            noted = "elsewhere" if there else None
        if noted is None:
            write_json(origin, {"url": self.url})
        elif noted != self.url:
            raise QwtError(
                f"{self.folder} holds files from {noted}, not from {self.url}; remove that folder, or "
                "give the dataset another name."
            )

    def fetch(
        self, part: Part, images: Sequence[Mapping[str, Any]], *, name: str, workers: int
    ) -> list[int]:
        """Download images that are missing or damaged; see :meth:`Source.fetch`."""
        from .download import download_many

        place = self.place(part)
        by_name = {image["file_name"]: image for image in images}
        for file_name in filter(_leaves, by_name):
            raise QwtError(
                f"The annotation file {place.annotations} has an image {file_name!r}, which would be "
                "stored outside of the dataset's folder; do not use this source."
            )
        orientations = {}

        def check(file_name: str, path: Path) -> None:
            found = orientation_of(path, by_name[file_name], self.exif)
            if isinstance(found, QwtError):
                raise found
            orientations[file_name] = found

        download_many(
            [(self._image_url(part, file_name), file_name) for file_name in by_name],
            place.image_root,
            workers,
            check=check,
            most_bytes=lambda key: 10_000_000 + 16 * by_name[key]["width"] * by_name[key]["height"],
            description=f"Fetching images of {place.split}",
        )
        return [orientations[image["file_name"]] for image in images]

    def _image_url(self, part: Part, file_name: str) -> str:
        return f"{self.url}/{getattr(self.settings, part).image_folder}/{quote(file_name)}"

    def identity(self, part: Part, file_name: str) -> str:
        return self._image_url(part, file_name)

    def available(self, part: Part) -> int | None:
        return COCO_IMAGES.get(self.place(part).split)


def _leaves(name: str) -> bool:
    """Whether a relative name leads out of its folder, or is not relative."""
    return bool(PureWindowsPath(name).anchor) or ".." in PurePosixPath(name).parts


def _extract(archive: Path, names: Sequence[str], folder: Path, url: str, most_bytes: int) -> None:
    try:
        with zipfile.ZipFile(archive) as content:
            there = [name for name in content.namelist() if "instances_" in name]
            for name in names:
                if name not in there:
                    raise QwtError(
                        f"{url} holds no {name}; it holds {', '.join(there) or 'no instances'}. "
                        "Correct the split or the annotations of the dataset."
                    )
                if content.getinfo(name).file_size > most_bytes:
                    raise QwtError(
                        f"{url} holds a {name} of more than {most_bytes / 1e9:g} GB; check the address, or "
                        "raise max_download_gb in the configuration."
                    )
                with (
                    write_atomically(folder / name) as target,
                    content.open(name) as stream,
                    open(target, "wb") as file,
                ):
                    shutil.copyfileobj(stream, file)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise QwtError(
            f"{url} is not a whole zip file ({error}); check the address and run again."
        ) from error
