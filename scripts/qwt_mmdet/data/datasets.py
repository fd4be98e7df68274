"""COCO-format datasets: where they come from, and which of their images are used for what."""

import contextlib
import fcntl
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from ..config.datasets import resolve_dataset
from ..errors import QwtError
from ..files import read_json, sha256_file, write_atomically, write_json
from ..progress import progress
from ..staleness import image_files
from .annotations import few, read_annotations
from .download import LARGEST_BYTES, download, download_many
from .images import SIDEWAYS, UPRIGHT, Exif, TurnedImageError, check_image

logger = logging.getLogger(__name__)

PARTS = ("calibration", "evaluation")
ARCHIVE = "annotations/annotations_trainval2017.zip"
PROBLEMS_IN_MESSAGES = 5

Count = int | Literal["all"]


def prepare_dataset(
    settings: Mapping[str, Any],
    part: str,
    *,
    folder: str | Path,
    output: str | Path,
    most_bytes: int = LARGEST_BYTES,
) -> None:
    """Get the annotations of one part of a dataset: generate them, fetch them, or check a local file.

    Writes the source ``{"annotations": path, "image_root": folder of the images, "image_url":
    address of that folder or None, "split": name, "sha256": that of the annotation file}``.

    Args:
        settings: the config's entry: ``type`` (``shapes`` or ``coco``), for ``coco`` either
            ``root`` or ``url``, ``seed``, ``exif``, ``allow_outside_root``, and for
            ``calibration`` and ``evaluation`` the keys ``split``, ``images``, ``annotations``,
            ``image_folder`` (the last two relative to the root).
        part: ``calibration`` or ``evaluation``.
        folder: where generated and downloaded files go.
        output: the source.
        most_bytes: largest size of a download, and of an annotation file in it.

    Raises:
        QwtError: a file or folder is missing, cannot be had, or is not COCO's instances format.
    """
    settings = resolve_dataset(settings)
    source = _source(settings, part, Path(folder))
    if settings["type"] == "shapes":
        _generate(settings, part, Path(folder))
    elif "root" in settings:
        _check_folders(settings, part, source)
    else:
        _download_annotations(settings, part, Path(folder), most_bytes)
    read_annotations(source["annotations"], labelled=part == "evaluation")
    write_json(output, {**source, "sha256": sha256_file(source["annotations"])}, indent=2)


def select_images(
    settings: Mapping[str, Any],
    part: str,
    *,
    name: str,
    source: str | Path,
    folder: str | Path,
    annotations: str | Path,
    files: str | Path,
    seen: str = "",
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
        settings: as for :func:`prepare_dataset`; those of the other part tell whether both parts
            would share an image.
        part: ``calibration`` or ``evaluation``.
        name: name of the dataset in the config, for messages.
        source: what :func:`prepare_dataset` wrote for the part.
        folder: downloaded images go to ``{folder}/images/{split}``.
        annotations: the annotation file to write.
        files: the file to write that tells which image files were chosen, and how they are (see
            :func:`.staleness.image_files`).
        seen: the change of these files that made this choice necessary.
        workers: images to download or to check at a time.

    Raises:
        QwtError: no or too few images, the same image in both parts, an image that is missing,
            outside of the root, not readable by MMDetection's loader or of another size than its
            annotation says, or an evaluation without any object.
    """
    settings = resolve_dataset(settings)
    split = read_json(source, what="dataset source")
    if settings["type"] == "shapes":  # images that went away are drawn again
        _generate(settings, part, Path(folder))
    if (
        not Path(split["annotations"]).is_file()
        or sha256_file(split["annotations"]) != split["sha256"]
    ):
        raise QwtError(
            f"The annotation file {split['annotations']} is missing or has changed since it was "
            "checked; run again with --forcerun prepare_dataset."
        )
    (other,) = set(PARTS) - {part}
    splits = {part: split, other: _source(settings, other, Path(folder))}
    contents = _read_splits(splits)
    subsets = {}
    for key, content in contents.items():
        chosen = choose_ids(
            key,
            [image["id"] for image in content["images"]],
            settings[key]["images"],
            seed=settings["seed"],
            same_images=contents.get(other) is contents[part],
            name=name,
        )
        subsets[key] = _subset(content, chosen)
    if other in subsets:
        _check_overlap(subsets, splits, name)
    subset = subsets[part]
    images = subset["images"]
    subset["info"] = {
        "image_root": split["image_root"],
        "dataset": name,
        "part": part,
        "split": split["split"],
        "seed": settings["seed"],
        "images": len(images),
        "source": split["annotations"],
        "source_sha256": split["sha256"],
        "missing_classes": _report_missing_classes(subset, f"{name}.{part}"),
    }
    if part == "evaluation" and all(found["iscrowd"] for found in subset["annotations"]):
        raise QwtError(
            f"None of the {len(images)} evaluation images of {name} has an annotation of an object "
            "(crowd regions are none), so there is nothing to evaluate; raise "
            f"datasets.{name}.evaluation.images, or check the annotation file."
        )
    if split["image_url"] is None:
        turned = _check_local_images(images, split["image_root"], settings, name, workers)
    else:
        turned = _fetch_images(images, split, settings, name, workers)
    subset["info"] |= {
        "exif": settings.get("exif", "apply"),
        "exif_rotated": _report_orientations(
            images, turned, settings.get("exif", "apply"), name=name, part=part
        ),
    }
    write_json(annotations, subset)
    names = [image["file_name"] for image in images]
    write_json(files, image_files(split["image_root"], names, seen))


def choose_ids(
    part: str, ids: Iterable[int], images: Count, *, seed: int, same_images: bool, name: str
) -> list[int]:
    """Draw image ids for a part; the order in which they are given does not matter.

    Args:
        part: ``calibration`` or ``evaluation``.
        ids: the ids to draw from.
        images: how many to draw, or ``"all"``.
        same_images: both parts are drawn from the same images, so they shall share none as long as
            there are enough.
        name: name of the dataset in the config, for messages.

    Returns:
        The ids in ascending order.

    Raises:
        QwtError: the number is not positive, or larger than the number of ids.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise QwtError(f"datasets.{name}.seed is {seed!r}; it must be a whole number from 0.")
    ids = sorted(ids)
    count = _count(images, len(ids), f"datasets.{name}.{part}.images")
    stream = 0 if same_images else 1 + PARTS.index(part)
    shuffled = [ids[index] for index in np.random.default_rng([seed, stream]).permutation(len(ids))]
    if same_images and part == "calibration":
        shuffled.reverse()
    return sorted(shuffled[:count])


# --- Where the data comes from ---------------------------------------------------------------


def _source(settings: Mapping[str, Any], part: str, folder: Path) -> dict[str, Any]:
    """Where the annotations and images of a part are, once they are there."""
    images = settings[part]
    split = images["split"]
    image_folder = images.get("image_folder", split)
    annotations = images.get("annotations", f"annotations/instances_{split}.json")
    root, image_root, image_url = folder, folder / split, None
    if "root" in settings:
        root = Path(settings["root"])
        image_root = root / image_folder
    elif "url" in settings:
        image_root = folder / "images" / split
        image_url = f"{settings['url'].rstrip('/')}/{image_folder}"
    return {
        "annotations": str(root / annotations),
        "image_root": str(image_root),
        "image_url": image_url,
        "split": split,
    }


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other process pass that prepares the other part in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _generate(settings: Mapping[str, Any], part: str, folder: Path) -> None:
    from ..demo.shapes import generate_shapes  # needs OpenCV, which other datasets do without

    split = settings[part]["split"]
    count = 0
    for other in PARTS:  # parts of one split share its images out
        images = settings[other]["images"]
        if isinstance(images, bool) or not isinstance(images, int) or images < 1:
            raise QwtError(
                f"{other}.images of a dataset of shapes is {images!r}; shapes are generated, so "
                "give a number from 1."
            )
        count += images if settings[other]["split"] == split else 0
    with _alone(folder):
        generate_shapes(folder, seed=settings["seed"], images={split: count})


def _check_folders(settings: Mapping[str, Any], part: str, source: Mapping[str, Any]) -> None:
    if not Path(settings["root"]).is_dir():
        raise QwtError(f"The dataset root {settings['root']} is not a folder; check the path.")
    if not Path(source["image_root"]).is_dir():
        raise QwtError(
            f"The {part} images should be in {source['image_root']}, which is not a folder; check "
            f"root and {part}.image_folder."
        )


def _download_annotations(
    settings: Mapping[str, Any], part: str, folder: Path, most_bytes: int
) -> None:
    url = settings["url"].rstrip("/")
    names = {settings[key]["annotations"] for key in PARTS}
    for name in names:
        if PureWindowsPath(name).anchor or ".." in PurePosixPath(name).parts:
            raise QwtError(
                f"The annotations {name!r} would be stored outside of the dataset's folder; name a "
                f"file of {url}/{ARCHIVE}."
            )
    with _alone(folder):
        _claim(folder, url)
        if (folder / settings[part]["annotations"]).is_file():
            return
        # the archive holds both parts, and comes once
        absent = sorted(name for name in names if not (folder / name).is_file())
        archive = folder / PurePosixPath(ARCHIVE).name
        download(f"{url}/{ARCHIVE}", archive, most_bytes=most_bytes)
        try:
            _extract(archive, absent, folder, f"{url}/{ARCHIVE}", most_bytes)
        finally:
            archive.unlink()


def _claim(folder: Path, url: str) -> None:
    """Note which address the files in ``folder`` are from; never mix two."""
    origin = folder / "origin.json"
    if origin.is_file():
        noted = read_json(origin, what="note of a download's origin").get("url")
    else:
        there = [name for name in ("annotations", "images") if (folder / name).exists()]
        noted = "elsewhere" if there else None
    if noted is None:
        write_json(origin, {"url": url})
    elif noted != url:
        raise QwtError(
            f"{folder} holds files from {noted}, not from {url}; remove that folder, or give the "
            "dataset another name."
        )


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


# --- Annotation files ------------------------------------------------------------------------


def _read_splits(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Read the annotation files that are there; one that serves both parts is read once."""
    contents: dict[str, dict[str, Any]] = {}
    paths = {part: split["annotations"] for part, split in splits.items()}
    hashes = {part: sha256_file(path) for part, path in paths.items() if Path(path).is_file()}
    by_hash: dict[str, dict[str, Any]] = {}
    for part, found in hashes.items():
        if found not in by_hash:
            labelled = found == hashes.get("evaluation")
            by_hash[found] = read_annotations(paths[part], labelled=labelled)
        contents[part] = by_hash[found]
    return contents


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


# --- The choice --------------------------------------------------------------------------------


def _count(wanted: Count, available: int, key: str) -> int:
    if wanted == "all":
        return available
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise QwtError(f"{key} is {wanted!r}; it must be a number from 1, or all.")
    if wanted > available:
        raise QwtError(
            f"{key} is {wanted}, but there are only {available} images; ask for fewer, or all."
        )
    return wanted


def _check_overlap(
    subsets: Mapping[str, Mapping[str, Any]], splits: Mapping[str, Mapping[str, Any]], name: str
) -> None:
    """No image file may be in both parts, whatever its id in either annotation file."""
    identity: dict[str, Callable[[str], str]] = {}
    for part in PARTS:
        if splits[part]["image_url"] is None:
            root = splits[part]["image_root"]
            identity[part] = lambda file, root=root: os.path.realpath(os.path.join(root, file))
        else:
            base = splits[part]["image_url"]
            identity[part] = lambda file, base=base: f"{base}/{file}"
    evaluated = {identity["evaluation"](i["file_name"]) for i in subsets["evaluation"]["images"]}
    shared = [
        image["id"]
        for image in subsets["calibration"]["images"]
        if identity["calibration"](image["file_name"]) in evaluated
    ]
    if shared:
        raise QwtError(
            f"Calibration and evaluation of {name} would share {len(shared)} images, with the ids "
            f"{few(shared)}; ask for fewer images, or take them from different splits."
        )


def _report_missing_classes(subset: Mapping[str, Any], what: str) -> list[str]:
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


# --- Image files -------------------------------------------------------------------------------


def _outside(
    images: Sequence[Mapping[str, Any]], image_root: str, root: str | os.PathLike[str]
) -> list[str]:
    """Names of images that the annotation file or a link looks for outside of the dataset's root.

    An image folder that the config itself names outside of the root is a root of its own.
    """
    named = Path(os.path.abspath(image_root)).is_relative_to(os.path.abspath(root))
    allowed = os.path.realpath(root if named else image_root)
    names = [image["file_name"] for image in images]
    return [
        name
        for name in names
        if not Path(os.path.realpath(os.path.join(image_root, name))).is_relative_to(allowed)
    ]


def _check(image: Mapping[str, Any], root: str, exif: Exif) -> int | QwtError:
    path = os.path.join(root, image["file_name"])
    try:
        return check_image(path, image["width"], image["height"], exif=exif)
    except QwtError as error:
        return error


def _advice(name: str, exif: Exif) -> str:
    other = {"apply": "ignore", "ignore": "apply"}[exif]
    pixels = {"apply": "pixels as they are stored", "ignore": "turned image"}[exif]
    return (
        f"If sizes and boxes refer to the {pixels}, set datasets.{name}.exif: {other}; if the boxes "
        "do not, correct width and height in the annotation file."
    )


def _check_local_images(
    images: Sequence[Mapping[str, Any]],
    image_root: str,
    settings: Mapping[str, Any],
    name: str,
    workers: int,
) -> list[int]:
    """Check all images of a part; return their EXIF orientations."""
    if "root" in settings and not settings["allow_outside_root"]:
        outside = _outside(images, image_root, settings["root"])
        if outside:
            raise QwtError(
                f"{len(outside)} of {len(images)} chosen images lie outside of the root "
                f"{settings['root']}, where the annotation file or a link leads: {few(outside)}; if "
                f"you trust that, set datasets.{name}.allow_outside_root: true."
            )
    absent = [
        image["file_name"]
        for image in images
        if not os.path.isfile(os.path.join(image_root, image["file_name"]))
    ]
    if absent:
        raise QwtError(
            f"{len(absent)} of {len(images)} chosen images are missing in {image_root}: "
            f"{few(absent)}; add them, or correct the image folder."
        )
    check = partial(_check, root=image_root, exif=settings.get("exif", "apply"))
    with ThreadPoolExecutor(max_workers=min(workers, os.cpu_count() or 1)) as executor:
        results = executor.map(check, images)
        found = list(progress(results, f"Checking images in {image_root}", total=len(images)))
    problems = [result for result in found if isinstance(result, QwtError)]
    if problems:
        turned = any(isinstance(problem, TurnedImageError) for problem in problems)
        raise QwtError(
            f"{len(problems)} of {len(images)} chosen images in {image_root} are not usable: "
            f"{' '.join(map(str, problems[:PROBLEMS_IN_MESSAGES]))} "
            f"{_advice(name, settings.get('exif', 'apply')) if turned else 'Replace them.'}"
        )
    return found


def _fetch_images(
    images: Sequence[Mapping[str, Any]],
    split: Mapping[str, Any],
    settings: Mapping[str, Any],
    name: str,
    workers: int,
) -> list[int]:
    """Download and check all images of a part; return their EXIF orientations."""
    by_name = {image["file_name"]: image for image in images}
    for file_name in by_name:
        if PureWindowsPath(file_name).anchor or ".." in PurePosixPath(file_name).parts:
            raise QwtError(
                f"The annotation file {split['annotations']} has an image {file_name!r}, which would "
                "be stored outside of the dataset's folder; do not use this source."
            )
    orientations = {}

    def check(file_name: str, path: Path) -> None:
        image = by_name[file_name]
        try:
            orientations[file_name] = check_image(
                path, image["width"], image["height"], exif=settings.get("exif", "apply")
            )
        except TurnedImageError as error:
            raise QwtError(f"{error} {_advice(name, settings.get('exif', 'apply'))}") from error

    download_many(
        [(f"{split['image_url']}/{quote(file_name)}", file_name) for file_name in by_name],
        split["image_root"],
        workers,
        check=check,
        most_bytes=lambda name: 10_000_000 + 16 * by_name[name]["width"] * by_name[name]["height"],
        description=f"Fetching images of {split['split']}",
    )
    return [orientations[image["file_name"]] for image in images]


def _report_orientations(
    images: Sequence[Mapping[str, Any]],
    orientations: Sequence[int],
    exif: Exif,
    *,
    name: str,
    part: str,
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
