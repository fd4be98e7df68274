"""Reading and checking of COCO annotation files, for all steps.

Harmless deviations are accepted: ids written as 3.0, ``iscrowd`` that is missing or null, empty polygons,
backslashes in file names, a byte order mark. Faults that would make a later step fail, or silently change AP,
raise an error that names the entry.
"""

import json
import logging
import math
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from ..errors import QwtError
from ..files import MADE_BY_US, read_json

logger = logging.getLogger(__name__)

NAMED_IN_MESSAGES = 5
LONGEST_NAME = 4000  # bytes
LARGEST_ID = 2**63 - 1
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, ends of lines


class _Fault(Exception):
    """A fault of an entry; ``read_annotations`` adds the file's name."""


def read_annotations(
    path: str | os.PathLike[str],
    *,
    labelled: bool = True,
    masks: bool = False,
    objects: bool = True,
) -> dict[str, Any]:
    """Read a COCO instances file and check all that later steps rely on.

    Two faults only cause a warning: a box or mask outside of its image, which COCO's AP counts as a missed object;
    and, without ``masks``, an invalid segmentation.

    Args:
        labelled: the file must have annotations and categories, and boxes and areas in them.
        masks: every annotation must have a valid mask. False: invalid segmentations are kept unchanged.
        objects: False: read only images; ``annotations`` is empty and not checked.

    Returns:
        ``info`` as it is; ``images`` with id, file_name (relative, with slashes), width and height;
        ``annotations`` with id, image_id, category_id and iscrowd (0 or 1), and bbox, area and
        segmentation where the file has them; ``categories`` with id and name. Other keys are left
        out.

    Raises:
        QwtError: the file is missing, empty, not JSON, not in COCO's format, or contradicts itself.
    """
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        raise QwtError(f"The annotation file {path} is empty; get it again.")
    content = read_json(
        path,
        what="annotation file",
        remedy=f"copy or fetch it again, or, if the workflow wrote it, {MADE_BY_US}",
    )
    for key in ("images", "annotations", "categories"):
        if isinstance(content, dict) and key != "images" and not labelled:
            content[key] = content.get(key) or []
        if isinstance(content, dict) and key == "annotations" and not objects:
            content[key] = []
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise QwtError(
                f"The annotation file {path} is not in COCO's instances format: it has no list "
                f"{key!r}; take an instances_*.json file."
            )
    if not content["images"]:
        raise QwtError(f"The annotation file {path} lists no images; take another file.")
    try:
        images = _read_entries(content["images"], "image", _image)
        _check_unique(content["images"], "image", "file_name")
        categories = _read_entries(content["categories"], "category", _category)
        _check_unique(content["categories"], "category", "name")
        unfindable: list[int] = []
        unreadable: list[str] = []

        def annotation(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
            found = _annotation(entry, number, images, categories, labelled=labelled)
            image, given = images[found["image_id"]], entry.get("segmentation")
            try:
                mask = _segmentation(given, image, f"annotation {number}")
            except _Fault as fault:
                if masks:
                    raise
                unreadable.append(str(fault))
                mask = None
                # NaN, which no JSON has, as a text
                found["segmentation"] = json.loads(json.dumps(given), parse_constant=str)
            if mask:
                found["segmentation"] = mask
            elif masks:
                raise _Fault(f"annotation {number} has no mask, which a mask detector needs")
            if not _is_visible(found.get("bbox"), mask, image):
                unfindable.append(number)
            return found

        _read_entries(content["annotations"], "annotation", annotation)
    except _Fault as fault:
        raise QwtError(
            f"The annotation file {path} is wrong: {fault}; correct it or get it again."
        ) from None
    if unfindable:
        logger.warning(
            "%s: %d boxes or masks have no pixel in their image, and AP counts them as missed; "
            "annotations %s",
            path, len(unfindable), few(unfindable),
        )  # fmt: skip
    if unreadable:
        logger.warning(
            "%s: a detector with masks could not be evaluated, since %s%s",
            path, unreadable[0], f" ({len(unreadable)} annotations are like that)" * (len(unreadable) > 1),
        )  # fmt: skip
    info = content.get("info")
    return {
        "info": info if isinstance(info, dict) else {},
        **{key: content[key] for key in ("images", "annotations", "categories")},
    }


def few(values: Sequence[Any]) -> str:
    """The first few values as text, with the number of all if some are left out."""
    more = f", … ({len(values)} in all)" if len(values) > NAMED_IN_MESSAGES else ""
    return ", ".join(map(str, values[:NAMED_IN_MESSAGES])) + more


def _read_entries(
    entries: list[Any], what: str, read: Callable[[Mapping[str, Any], int], dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Check all entries and replace each by its checked form; return them by id."""
    by_id: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        number = _whole(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            raise _Fault(f"{what} number {position} has no id that is a whole number")
        if number in by_id:
            raise _Fault(f"the {what} id {number} appears twice")
        entries[position] = by_id[number] = {"id": number, **read(entry, number)}
    return by_id


def _check_unique(entries: Sequence[Mapping[str, Any]], what: str, key: str) -> None:
    seen = set()
    for entry in entries:
        if entry[key] in seen:
            raise _Fault(f"the {what} {key} {entry[key]!r} appears twice")
        seen.add(entry[key])


def _image(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    name = _text(entry.get("file_name"), f"image {number}", "file_name")
    name = str(PurePosixPath(name.replace("\\", "/")))
    width, height = _whole(entry.get("width")), _whole(entry.get("height"))
    if width is None or height is None or width < 1 or height < 1:
        raise _Fault(f"image {number} has no width and height in whole pixels")
    return {"file_name": name, "width": width, "height": height}


def _category(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {"name": _text(entry.get("name"), f"category {number}", "name")}


def _annotation(
    entry: Mapping[str, Any],
    number: int,
    images: Mapping[Any, Mapping[str, Any]],
    categories: Mapping[int, Any],
    *,
    labelled: bool,
) -> dict[str, Any]:
    here = f"annotation {number}"
    image = images.get(_whole(entry.get("image_id")))
    if image is None:
        raise _Fault(
            f"{here} belongs to image {_quoted(entry.get('image_id'))}, which the file does not list"
        )
    category = _whole(entry.get("category_id"))
    if category not in categories:
        raise _Fault(
            f"{here} has category {_quoted(entry.get('category_id'))}, which the file does not list"
        )
    crowd = entry.get("iscrowd")
    if crowd is not None and not (isinstance(crowd, int | float) and crowd in (0, 1)):
        raise _Fault(f"{here} has the iscrowd {_quoted(crowd)}, which must be 0 or 1")
    found = {"image_id": image["id"], "category_id": category, "iscrowd": int(crowd or 0)}
    box, area = entry.get("bbox"), entry.get("area")
    if labelled or box is not None:
        if not _is_box(box):
            raise _Fault(f"{here} has no bbox [x, y, width, height] of finite numbers")
        _check_range(box[0], box[0] + box[2], box[1], box[1] + box[3], image, f"{here} has a bbox")
        found["bbox"] = box
    if labelled or area is not None:
        largest = (3 * max(image["width"], image["height"])) ** 2
        if not _is_number(area):
            raise _Fault(f"{here} has no area in pixels")
        if not 0 <= area <= largest:
            raise _Fault(f"{here} has an area of {area} pixels, which its image cannot hold")
        found["area"] = area
    return found


def _segmentation(value: Any, image: Mapping[str, Any], here: str) -> Any:
    """A mask for pycocotools: polygons without empty ones, or RLE; None without a mask."""
    if not value and not isinstance(value, int | float):
        return None
    if isinstance(value, dict):
        return _run_length_mask(value, image, here)
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        raise _Fault(f"{here} has a segmentation that is neither a list of polygons nor RLE")
    polygons = [polygon for polygon in value if polygon]
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise _Fault(
                f"{here} has a polygon of {len(polygon)} numbers; it must be x and y of 3 points or "
                "more"
            )
        try:
            finite = math.isfinite(sum(map(abs, polygon)))
        except (TypeError, OverflowError):  # something else than numbers, or without any limit
            finite = False
        if not finite:
            raise _Fault(f"{here} has a polygon with something that is not a finite number")
        x, y = polygon[::2], polygon[1::2]
        _check_range(min(x), max(x), min(y), max(y), image, f"{here} has a polygon")
    return polygons


def _run_length_mask(value: Mapping[str, Any], image: Mapping[str, Any], here: str) -> dict:
    size, counts = value.get("size"), value.get("counts")
    expected = [image["height"], image["width"]]
    if not isinstance(size, list) or list(map(_whole, size)) != expected:
        raise _Fault(
            f"{here} has an RLE mask of the size {_quoted(size)}, but its image has {expected} "
            "(height, width)"
        )
    if isinstance(counts, str):
        found: Sequence[int | None] | None = _decompressed(counts)
    else:
        counts = found = list(map(_whole, counts)) if isinstance(counts, list) else None
    lengths = [length for length in found or () if length is not None and length >= 0]
    if found is None or len(lengths) < len(found):
        raise _Fault(f"{here} has an RLE mask whose counts cannot be read")
    if sum(lengths) != image["height"] * image["width"]:
        raise _Fault(
            f"{here} has an RLE mask whose counts add up to {sum(lengths)} pixels; its image has "
            f"{image['height'] * image['width']}"
        )
    return {"size": expected, "counts": counts}


def _decompressed(text: str) -> list[int] | None:
    """Run lengths of a compressed RLE mask, or None if it is none.

    pycocotools writes a length as digits of 5 bits, the lowest first, each a character from ``0`` on. The sixth bit
    says that another digit follows. From the fourth length on, the difference to the length two before is written.
    pycocotools itself reads beyond the end of a truncated text.
    """
    lengths: list[int] = []
    value = bits = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or bits > 60:
            return None
        value |= (digit & 31) << bits
        bits += 5
        if not digit & 32:
            value -= (digit & 16) << (bits - 4)  # the highest bit is the sign
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = bits = 0
    return None if bits else lengths


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _text(value: Any, here: str, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise _Fault(f"{here} has no {key} that is a text")
    for character in "" if value.isprintable() else value:
        if unicodedata.category(character) in UNPRINTABLE:
            raise _Fault(f"{here} has the {key} {_quoted(value)} with the character {character!r}")
    if len(value.encode()) > LONGEST_NAME:
        raise _Fault(f"{here} has the {key} {_quoted(value)}, longer than {LONGEST_NAME} bytes")
    return value


def _whole(value: Any) -> int | None:
    """The whole number that a value is (3 or 3.0), or None."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) <= LARGEST_ID else None


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < 1e300  # false for NaN


def _is_box(value: Any) -> TypeGuard[list[float]]:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(map(_is_number, value))
        and value[2] >= 0
        and value[3] >= 0
    )


def _check_range(
    left: float, right: float, top: float, bottom: float, image: Mapping[str, Any], what: str
) -> None:
    """Raise if coordinates are outside of the image by more than its size."""
    width, height = image["width"], image["height"]
    margin = max(width, height)
    if min(left, top) < -margin or right > width + margin or bottom > height + margin:
        raise _Fault(
            f"{what} from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), far outside of its image "
            f"of {width}x{height} pixels"
        )


def _is_visible(box: Sequence[float] | None, mask: Any, image: Mapping[str, Any]) -> bool:
    """Whether box and mask, if given, cover a part of the image."""
    ranges = []
    if box is not None:
        x, y, width, height = box
        ranges.append((x, x + width, y, y + height))
    if mask and isinstance(mask, list):
        xs = [value for polygon in mask for value in polygon[::2]]
        ys = [value for polygon in mask for value in polygon[1::2]]
        ranges.append((min(xs), max(xs), min(ys), max(ys)))
    return all(
        min(right, image["width"]) > max(left, 0) and min(bottom, image["height"]) > max(top, 0)
        for left, right, top, bottom in ranges
    )
