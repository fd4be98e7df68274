"""COCO-format datasets: where they come from, and which of their images are used for what."""

import logging
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from PIL import Image

from .config import DATASET_DEFAULTS
from .download import download, download_many
from .errors import QwtError
from .files import read_json, sha256_file, write_atomically, write_json
from .progress import progress

logger = logging.getLogger(__name__)

PARTS = ("calibration", "evaluation")
ARCHIVE = "annotations/annotations_trainval2017.zip"
NAMED_IN_MESSAGES = 5
EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

Count = int | Literal["all"]


def prepare_dataset(settings: Mapping[str, Any], *, folder: str | Path, output: str | Path) -> None:
    """Generate a dataset, fetch its annotation files, or check those of a local folder.

    Writes the manifest ``{"splits": {"calibration": split, "evaluation": split}}``, where each
    split is ``{"annotations": path, "image_root": folder of the images, "image_url": address of
    that folder or None, "split": name, "sha256": that of the annotation file}``.

    Args:
        settings: the config's entry: ``type`` (``shapes`` or ``coco``), for ``coco`` either
            ``root`` or ``url``, ``seed``, and for ``calibration`` and ``evaluation`` the keys
            ``split``, ``images``, ``annotations``, ``image_folder`` (the last two relative to
            the root).
        folder: where generated and downloaded files go.
        output: the manifest.

    Raises:
        QwtError: a file or folder is missing, cannot be had, or is not COCO's instances format.
    """
    settings = _with_defaults(settings)
    folder = Path(folder)
    if settings["type"] == "shapes":
        splits = _generated(settings, folder)
    elif "root" in settings:
        splits = _local(settings)
    else:
        splits = _downloaded(settings, folder)
    for part in PARTS:
        read_annotations(splits[part]["annotations"], labelled=part == "evaluation")
        splits[part]["sha256"] = sha256_file(splits[part]["annotations"])
    write_json(output, {"splits": splits}, indent=2)


def select_images(
    settings: Mapping[str, Any],
    *,
    name: str,
    source: str | Path,
    folder: str | Path,
    calibration: str | Path,
    evaluation: str | Path,
    workers: int = 8,
) -> None:
    """Choose calibration and evaluation images, fetch them if remote, and check every one.

    Writes two COCO annotation files of exactly the chosen images, in order of their ids, with the
    choice recorded under ``info``: ``image_root`` (``file_name`` is relative to it), ``dataset``,
    ``part``, ``split``, ``seed``, ``images`` (their number), ``source`` and ``source_sha256`` (the
    annotation file they are from), ``missing_classes``.

    A number of images, of either part, means a random choice of that many by ``seed``; a larger
    number contains the images of a smaller one. If both parts are of the same annotation file they
    are drawn from two ends of one shuffled list, so neither choice depends on the other's number.

    Args:
        settings: as for :func:`prepare_dataset`.
        name: name of the dataset in the config, for messages.
        source: the manifest that :func:`prepare_dataset` wrote.
        folder: downloaded images go to ``{folder}/images/{split}``.
        calibration, evaluation: the annotation files to write.
        workers: images to download or to check at a time.

    Raises:
        QwtError: no or too few images, the same image in both parts, an image that is missing,
            not decodable or of another size than its annotation says, or an evaluation without any
            object.
    """
    settings = _with_defaults(settings)
    splits = read_json(source, what="dataset manifest")["splits"]
    contents = _read_splits(splits)
    chosen = choose_ids(
        [image["id"] for image in contents["calibration"]["images"]],
        [image["id"] for image in contents["evaluation"]["images"]],
        calibration=settings["calibration"]["images"],
        evaluation=settings["evaluation"]["images"],
        seed=settings["seed"],
        same_images=splits["calibration"]["sha256"] == splits["evaluation"]["sha256"],
        name=name,
    )
    subsets = {part: _subset(contents[part], ids) for part, ids in zip(PARTS, chosen, strict=True)}
    _check_overlap(subsets, splits, name)
    for part in PARTS:
        split = splits[part]
        subsets[part]["info"] = {
            "image_root": split["image_root"],
            "dataset": name,
            "part": part,
            "split": split["split"],
            "seed": settings["seed"],
            "images": len(subsets[part]["images"]),
            "source": split["annotations"],
            "source_sha256": split["sha256"],
            "missing_classes": _report_missing_classes(subsets[part], f"{name}.{part}"),
        }
    if not subsets["evaluation"]["annotations"]:
        raise QwtError(
            f"None of the {len(subsets['evaluation']['images'])} evaluation images of {name} has "
            f"an annotation, so there is nothing to evaluate; raise datasets.{name}.evaluation."
            "images, or check the annotation file."
        )
    for part in PARTS:
        if splits[part]["image_url"] is None:
            _check_local_images(subsets[part]["images"], splits[part]["image_root"], workers)
        else:
            _fetch_images(subsets[part]["images"], splits[part], workers)
    write_json(calibration, subsets["calibration"])
    write_json(evaluation, subsets["evaluation"])


def choose_ids(
    calibration_ids: Iterable[int],
    evaluation_ids: Iterable[int],
    *,
    calibration: Count,
    evaluation: Count,
    seed: int,
    same_images: bool,
    name: str,
) -> tuple[list[int], list[int]]:
    """Draw image ids for both parts; the order in which they are given does not matter.

    Args:
        calibration_ids, evaluation_ids: the ids to draw from.
        calibration, evaluation: how many to draw, or ``"all"``.
        same_images: both parts are drawn from the same images, so they shall share none as long as
            there are enough.
        name: name of the dataset in the config, for messages.

    Returns:
        The calibration ids and the evaluation ids, each in ascending order.

    Raises:
        QwtError: a number is not positive, or larger than the number of ids.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise QwtError(f"datasets.{name}.seed is {seed!r}; it must be a whole number from 0.")
    ids = {"calibration": sorted(calibration_ids), "evaluation": sorted(evaluation_ids)}
    wanted = {"calibration": calibration, "evaluation": evaluation}
    chosen = {}
    for stream, part in enumerate(PARTS, start=1):
        count = _count(wanted[part], len(ids[part]), f"datasets.{name}.{part}.images")
        generator = np.random.default_rng([seed, 0 if same_images else stream])
        shuffled = [ids[part][index] for index in generator.permutation(len(ids[part]))]
        if same_images and part == "calibration":
            shuffled.reverse()
        chosen[part] = sorted(shuffled[:count])
    return chosen["calibration"], chosen["evaluation"]


def read_annotations(path: str | Path, *, labelled: bool = True) -> dict[str, Any]:
    """Read a COCO instances file and check what later steps rely on.

    Args:
        labelled: the file must have annotations and categories, and boxes and areas in them.

    Returns:
        The content, with ``images``, ``annotations`` and ``categories`` at least.

    Raises:
        QwtError: the file is missing, empty, not JSON, not in COCO's format, or contradicts itself.
    """
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        raise QwtError(f"The annotation file {path} is empty; get it again.")
    content = read_json(path, what="annotation file")
    for key in ("images", "annotations", "categories"):
        optional = key != "images" and not labelled
        if not isinstance(content, dict) or not isinstance(
            content.setdefault(key, [] if optional else None), list
        ):
            raise QwtError(
                f"The annotation file {path} is not in COCO's instances format: it has no list "
                f"{key!r}; take an instances_*.json file."
            )
    if not content["images"]:
        raise QwtError(f"The annotation file {path} lists no images; take another file.")
    _check_unique(path, content["images"], "image", "id", int)
    _check_unique(path, content["images"], "image", "file_name", str)
    _check_unique(path, content["categories"], "category", "id", int)
    _check_unique(path, content["categories"], "category", "name", str)
    _check_unique(path, content["annotations"], "annotation", "id", int)
    for image in content["images"]:
        if not (_is_size(image.get("width")) and _is_size(image.get("height"))):
            _contradiction(path, f"image {image['id']} has no width and height in whole pixels")
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        number = annotation["id"]
        if annotation.get("image_id") not in images:
            _contradiction(
                path,
                f"annotation {number} belongs to image {annotation.get('image_id')}, which the "
                "file does not list",
            )
        if annotation.get("category_id") not in categories:
            _contradiction(
                path,
                f"annotation {number} has category {annotation.get('category_id')}, which the "
                "file does not list",
            )
        if labelled and not _is_box(annotation.get("bbox")):
            _contradiction(path, f"annotation {number} has no bbox [x, y, width, height]")
        if labelled and not _is_number(annotation.get("area")):
            _contradiction(path, f"annotation {number} has no area in pixels")
    return content


def check_image(path: str | Path, width: int, height: int) -> None:
    """Decode a whole image file and compare its size with the annotation's.

    The annotation may count pixels as stored or as shown, that is turned by the EXIF orientation:
    both are in use.

    Args:
        width, height: size in pixels according to the annotation.

    Raises:
        QwtError: the file is not an image that can be decoded, or has another size.
    """
    try:
        with Image.open(path) as image:
            image.load()
            sizes = [image.size]
            if image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS:
                sizes.append(image.size[::-1])
    except Exception as error:  # every decoder has errors of its own
        raise QwtError(f"{path} cannot be decoded as an image ({error}).") from error
    if (width, height) not in sizes:
        raise QwtError(
            f"{path} is {sizes[0][0]}x{sizes[0][1]} pixels, but its annotation says "
            f"{width}x{height}."
        )


# --- Where the data comes from ---------------------------------------------------------------


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    kind = settings.get("type")
    if kind not in DATASET_DEFAULTS:
        raise QwtError(
            f"The dataset type is {kind!r}; choose one of {', '.join(DATASET_DEFAULTS)}."
        )
    if kind == "coco" and ("root" in settings) == ("url" in settings):
        raise QwtError(
            "A dataset of type coco needs either root (a local folder) or url (to download from)."
        )
    filled = {"seed": 0, **settings}
    for part in PARTS:
        images = {**DATASET_DEFAULTS[kind][part], **settings.get(part, {})}
        images.setdefault("annotations", f"annotations/instances_{images['split']}.json")
        images.setdefault("image_folder", images["split"])
        filled[part] = images
    return filled


def _manifest_entry(
    images: Mapping[str, Any], root: Path, image_root: Path, image_url: str | None = None
) -> dict[str, Any]:
    return {
        "annotations": str(root / images["annotations"]),
        "image_root": str(image_root),
        "image_url": image_url,
        "split": images["split"],
    }


def _generated(settings: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    from .shapes import generate_shapes  # needs OpenCV, which other datasets do without

    counts: dict[str, int] = {}
    for part in PARTS:
        split, count = settings[part]["split"], settings[part]["images"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise QwtError(
                f"{part}.images of a dataset of shapes is {count!r}; shapes are generated, so give "
                "a number from 1."
            )
        counts[split] = counts.get(split, 0) + count
    generate_shapes(folder, seed=settings["seed"], images=counts)
    return {
        part: _manifest_entry(settings[part], folder, folder / settings[part]["split"])
        for part in PARTS
    }


def _local(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    root = Path(settings["root"])
    if not root.is_dir():
        raise QwtError(f"The dataset root {root} is not a folder; check the path.")
    splits = {}
    for part in PARTS:
        image_root = root / settings[part]["image_folder"]
        if not image_root.is_dir():
            raise QwtError(
                f"The {part} images should be in {image_root}, which is not a folder; check root "
                f"and {part}.image_folder."
            )
        splits[part] = _manifest_entry(settings[part], root, image_root)
    return splits


def _downloaded(settings: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    url = settings["url"].rstrip("/")
    _claim(folder, url)
    names = {settings[part]["annotations"] for part in PARTS}
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        archive = folder / PurePosixPath(ARCHIVE).name
        download(f"{url}/{ARCHIVE}", archive)
        try:
            _extract(archive, absent, folder, f"{url}/{ARCHIVE}")
        finally:
            archive.unlink()
    return {
        part: _manifest_entry(
            settings[part],
            folder,
            folder / "images" / settings[part]["split"],
            f"{url}/{settings[part]['image_folder']}",
        )
        for part in PARTS
    }


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


def _extract(archive: Path, names: Sequence[str], folder: Path, url: str) -> None:
    try:
        with zipfile.ZipFile(archive) as content:
            there = [name for name in content.namelist() if "instances_" in name]
            for name in names:
                if name not in there:
                    raise QwtError(
                        f"{url} holds no {name}; it holds {', '.join(there) or 'no instances'}. "
                        "Correct the split or the annotations of the dataset."
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


def _contradiction(path: str | Path, what: str) -> None:
    raise QwtError(f"The annotation file {path} is wrong: {what}; correct it or get it again.")


def _check_unique(
    path: str | Path, entries: Sequence[Any], what: str, key: str, kind: type
) -> None:
    seen = set()
    for position, entry in enumerate(entries):
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            wanted = "a whole number" if kind is int else "a text"
            _contradiction(path, f"{what} number {position} has no {key} that is {wanted}")
        if value in seen:
            _contradiction(path, f"the {what} {key} {value!r} appears twice")
        seen.add(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(map(_is_number, value))
        and value[2] >= 0
        and value[3] >= 0
    )


def _read_splits(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Read the annotation files; one that serves both parts is read once."""
    contents: dict[str, dict[str, Any]] = {}
    by_hash: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        path, expected = splits[part]["annotations"], splits[part]["sha256"]
        if not Path(path).is_file() or sha256_file(path) != expected:
            raise QwtError(
                f"The annotation file {path} is missing or has changed since it was checked; run "
                "again with --forcerun prepare_dataset."
            )
        if expected not in by_hash:
            by_hash[expected] = read_json(path, what="annotation file")
        contents[part] = by_hash[expected]
    return contents


def _subset(content: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    wanted = set(ids)
    subset: dict[str, Any] = {
        "info": {},
        "images": sorted(
            (image for image in content["images"] if image["id"] in wanted),
            key=lambda image: image["id"],
        ),
        "annotations": sorted(
            # pycocotools needs iscrowd, which many tools leave out when it is 0
            (
                {"iscrowd": 0, **annotation}
                for annotation in content.get("annotations", [])
                if annotation["image_id"] in wanted
            ),
            key=lambda annotation: annotation["id"],
        ),
        "categories": content.get("categories", []),
    }
    if "licenses" in content:
        subset["licenses"] = content["licenses"]
    return subset


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


def _few(values: Sequence[Any]) -> str:
    more = f", … ({len(values)} in all)" if len(values) > NAMED_IN_MESSAGES else ""
    return ", ".join(map(str, values[:NAMED_IN_MESSAGES])) + more


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
            f"{_few(shared)}; ask for fewer images, or take them from different splits."
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
            what, len(missing), len(subset["categories"]), len(subset["images"]), _few(missing),
        )  # fmt: skip
    return missing


# --- Image files -------------------------------------------------------------------------------


def _problem(image: Mapping[str, Any], root: str) -> str | None:
    try:
        check_image(os.path.join(root, image["file_name"]), image["width"], image["height"])
    except QwtError as error:
        return str(error)
    return None


def _check_local_images(images: Sequence[Mapping[str, Any]], root: str, workers: int) -> None:
    absent = [
        image["file_name"]
        for image in images
        if not os.path.isfile(os.path.join(root, image["file_name"]))
    ]
    if absent:
        raise QwtError(
            f"{len(absent)} of {len(images)} chosen images are missing in {root}: {_few(absent)}; "
            "add them, or correct the image folder."
        )
    with ThreadPoolExecutor(max_workers=min(workers, os.cpu_count() or 1)) as executor:
        results = executor.map(partial(_problem, root=root), images)
        found = progress(results, f"Checking images in {root}", total=len(images))
        problems = [problem for problem in found if problem]
    if problems:
        raise QwtError(
            f"{len(problems)} of {len(images)} chosen images in {root} are not usable: "
            f"{' '.join(problems[:NAMED_IN_MESSAGES])} Replace them."
        )


def _fetch_images(
    images: Sequence[Mapping[str, Any]], split: Mapping[str, Any], workers: int
) -> None:
    by_name = {image["file_name"]: image for image in images}
    for name in by_name:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise QwtError(
                f"The annotation file {split['annotations']} has an image {name!r}, which would be "
                "stored outside of the dataset's folder; do not use this source."
            )

    def check(name: str, path: Path) -> None:
        check_image(path, by_name[name]["width"], by_name[name]["height"])

    download_many(
        [(f"{split['image_url']}/{quote(name)}", name) for name in by_name],
        split["image_root"],
        workers,
        check=check,
        description=f"Fetching images of {split['split']}",
    )
