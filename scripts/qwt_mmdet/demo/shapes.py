"""``shapes``: an instance-segmentation dataset in COCO format that is drawn from a seed.

Textured, rotated, overlapping figures of ten classes on cluttered backgrounds. Each class has its outline. Its hue
and pattern are typical but not certain: hues of neighbouring classes overlap, the light has a colour cast, and one
figure in ten has any hue. Every image has its own random generator, seeded with (seed, split, index), so it does not
depend on the number of images, their order, or threads. Image arithmetic is in integers, so that the pixels are the
same on every machine. Only the corners of the figures are in floating point; they are rounded to 1/16 pixel.
"""

import colorsys
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from ..errors import QwtError
from ..files import read_json, write_json
from ..progress import progress

logger = logging.getLogger(__name__)

IMAGE_SIZE = 256
SPLITS = ("train", "calibration", "val")
MIN_VISIBLE_FRACTION = 0.2
MIN_VISIBLE_PIXELS = 16
GENERATOR_VERSION = 1  # in every annotation file: raise it when the pictures change

_IDS_PER_SPLIT = 10_000_000
_SUBPIXEL_BITS = 4
_CURVE_POINTS = 48
_PATTERNS = 6
_MIN_CONTRAST = 100  # sum over the three channels, each from 0 to 255

Point = tuple[float, float]
Outline = list[list[Point]]  # contours, filled by the even-odd rule


def _circle(radius: float) -> list[Point]:
    angles = [2 * math.pi * i / _CURVE_POINTS for i in range(_CURVE_POINTS)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _regular(corners: int, inner: float | None = None) -> list[Point]:
    """A regular polygon, or a star whose inner corners lie at the radius ``inner``."""
    count = corners if inner is None else 2 * corners
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(count)]
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _cross(rng: np.random.Generator) -> Outline:
    w = 0.25 + 0.15 * rng.random()
    quarter = [(w, -1.0), (w, -w), (1.0, -w)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return [corners]


def _crescent(rng: np.random.Generator) -> Outline:
    """The unit disk without a smaller disk that reaches over its edge."""
    offset, radius = 0.45 + 0.15 * rng.random(), 0.8
    x = (offset**2 + 1 - radius**2) / (2 * offset)
    outer, inner = math.acos(x), math.acos((x - offset) / radius)
    steps = [i / _CURVE_POINTS for i in range(_CURVE_POINTS + 1)]
    outside = [outer + (2 * math.pi - 2 * outer) * s for s in steps]
    inside = [2 * math.pi - inner - (2 * math.pi - 2 * inner) * s for s in steps]
    return [
        [(math.cos(a), math.sin(a)) for a in outside]
        + [(offset + radius * math.cos(a), radius * math.sin(a)) for a in inside]
    ]


def _heart(rng: np.random.Generator) -> Outline:
    angles = [2 * math.pi * i / _CURVE_POINTS for i in range(_CURVE_POINTS)]
    return [
        [
            (
                math.sin(a) ** 3,
                -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a))
                / 16,
            )
            for a in angles
        ]
    ]


def _arrow(rng: np.random.Generator) -> Outline:
    w, neck = 0.18 + 0.12 * rng.random(), 0.3 * rng.random() - 0.1
    return [[(-1.0, -w), (neck, -w), (neck, -0.7), (1.0, 0.0), (neck, 0.7), (neck, w), (-1.0, w)]]


def _ellipse(rng: np.random.Generator) -> Outline:
    ratio = 0.5 + 0.25 * rng.random()
    return [[(x, ratio * y) for x, y in _circle(1.0)]]


# One function per class, in the order of the category ids 1, 2, …; outlines have a radius of about 1.
_OUTLINES: dict[str, Callable[[np.random.Generator], Outline]] = {
    "triangle": lambda rng: [_regular(3)],
    "square": lambda rng: [_regular(4)],
    "pentagon": lambda rng: [_regular(5)],
    "star": lambda rng: [_regular(5, inner=0.4 + 0.1 * rng.random())],
    "cross": _cross,
    "ring": lambda rng: [_circle(1.0), _circle(0.45 + 0.25 * rng.random())],
    "ellipse": _ellipse,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
}
CLASSES = tuple(_OUTLINES)


def _place(rng: np.random.Generator, outline: Outline, radius: float) -> list[np.ndarray]:
    """Stretch, shear, rotate and move an outline; contours in 1/16 pixel, int32, shape (n, 1, 2)."""
    angle = 2 * math.pi * rng.random()
    stretch = 0.85 + 0.3 * rng.random()
    shear = 0.24 * rng.random() - 0.12
    margin = min(radius * 0.5, IMAGE_SIZE / 3)
    centre_x = margin + (IMAGE_SIZE - 2 * margin) * rng.random()
    centre_y = margin + (IMAGE_SIZE - 2 * margin) * rng.random()
    cos, sin = math.cos(angle), math.sin(angle)
    unit = 1 << _SUBPIXEL_BITS
    contours = []
    for contour in outline:
        points = []
        for x, y in contour:
            x, y = radius * (stretch * x + shear * y), radius * y / stretch
            points.append(
                [
                    round(unit * (centre_x + cos * x - sin * y)),
                    round(unit * (centre_y + sin * x + cos * y)),
                ]
            )
        contours.append(np.array(points, dtype=np.int32)[:, None, :])
    return contours


def _fill(contours: list[np.ndarray]) -> np.ndarray:
    """Pixels inside of the contours: bool, shape (IMAGE_SIZE, IMAGE_SIZE)."""
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    cv2.fillPoly(canvas, contours, 1, lineType=cv2.LINE_8, shift=_SUBPIXEL_BITS)
    return canvas.astype(bool)


def _noise(rng: np.random.Generator, cells: int, height: int, width: int) -> np.ndarray:
    """Smooth noise with ``cells`` by ``cells`` knots: int32 from 0 to 255, shape (height, width)."""
    knots = rng.integers(0, 256, size=(cells, cells), dtype=np.uint8)
    # The exact variant of bilinear interpolation is the one that is the same on all processors.
    field = cv2.resize(knots, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    return field.astype(np.int32)


def _blend(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mix two colours (or images) by a weight from 0 to 255; int32, shape (height, width, 3)."""
    weight = weight[..., None]
    return (first * (255 - weight) + second * weight) // 255


def _texture(rng: np.random.Generator, height: int, width: int, pattern: int) -> np.ndarray:
    """Pattern that mixes the two colours of a figure: int32 from 0 to 255, shape (height, width)."""
    y, x = np.ogrid[:height, :width]
    a, b = (int(v) for v in rng.integers(-16, 17, size=2))
    if abs(a) + abs(b) < 8:
        a = 12
    period = int(rng.integers(4, 13)) * 16  # of the projection a·x + b·y
    if pattern == 0:  # plain
        return np.zeros((height, width), dtype=np.int32)
    if pattern == 1:  # stripes
        return 255 * (((a * x + b * y) // period) & 1).astype(np.int32)
    if pattern == 2:  # checks
        return 255 * (((a * x + b * y) // period + (a * y - b * x) // period) & 1).astype(np.int32)
    if pattern == 3:  # dots
        pitch = int(rng.integers(5, 13))
        distance = (x % pitch - pitch // 2) ** 2 + (y % pitch - pitch // 2) ** 2
        return 255 * (9 * distance < pitch**2).astype(np.int32)
    if pattern == 4:  # clouds
        return _noise(rng, int(rng.integers(3, 12)), height, width)
    ramp = a * x + b * y
    ramp = ramp - ramp.min()
    return (255 * ramp // max(1, int(ramp.max()))).astype(np.int32)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Blotches, clouds and grain in three colours: int32, shape (IMAGE_SIZE, IMAGE_SIZE, 3)."""
    size = IMAGE_SIZE
    colours = rng.integers(30, 226, size=(3, 3)).astype(np.int32)
    colours[1:] = (colours[1:] + colours[0]) // 2  # related colours, as in a landscape or a wall
    colours = (colours + colours.mean(axis=1, keepdims=True).astype(np.int32)) // 2  # rather dull
    image = _blend(colours[0], colours[1], _noise(rng, int(rng.integers(2, 6)), size, size))
    strength = int(rng.integers(60, 200))
    clouds = _noise(rng, int(rng.integers(8, 24)), size, size) * strength // 255
    image = _blend(image, colours[2], clouds)
    grain = _noise(rng, int(rng.integers(32, 65)), size, size) - 128
    fine = _noise(rng, 128, size, size) - 128
    amount = int(rng.integers(5, 40))
    return image + ((grain + fine) * amount // 255)[..., None]


def _add_distractors(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draw strokes and shapeless blobs that belong to no class."""
    for _ in range(int(rng.integers(0, 4))):
        corners = int(rng.integers(6, 11))
        radii = [0.35 + 0.65 * rng.random() for _ in range(corners)]
        blob = [
            (r * math.cos(2 * math.pi * i / corners), r * math.sin(2 * math.pi * i / corners))
            for i, r in enumerate(radii)
        ]
        mask = _fill(_place(rng, [blob], 8 + 40 * rng.random()))
        image = _paint(rng, image, mask, None)
    canvas = image.clip(0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(3, 13))):
        steps = rng.integers(-60, 61, size=(int(rng.integers(2, 6)), 2))
        points = rng.integers(0, IMAGE_SIZE, size=2) + steps.cumsum(axis=0)
        colour = tuple(int(c) for c in rng.integers(0, 256, size=3))
        thickness = int(rng.integers(1, 4))
        cv2.polylines(canvas, [points.astype(np.int32)[:, None]], False, colour, thickness)
    return canvas.astype(np.int32)


def _colours(rng: np.random.Generator, category: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of a figure, int32 BGR, near the typical hue of its class; any for ``None`` or one in ten."""
    if category is None or rng.random() < 0.1:
        hue = rng.random()
    else:
        hue = (category + 1.2 * rng.random() - 0.6) / len(CLASSES)
    saturation, value = 0.55 + 0.45 * rng.random(), 0.45 + 0.55 * rng.random()
    other_value = value * (0.45 + 0.35 * rng.random())
    first, second = (
        np.array([round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, v)], dtype=np.int32)
        for v in (value, other_value)
    )
    return (first[::-1], second[::-1]) if rng.random() < 0.5 else (second[::-1], first[::-1])


def _paint(
    rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, category: int | None
) -> np.ndarray:
    """Fill ``mask`` with a pattern in two colours, the first of which differs from what it covers."""
    if not mask.any():
        return image
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = mask[window]
    covered = image[window][inside].sum(axis=0) // int(inside.sum())
    for _ in range(8):
        first, second = _colours(rng, category)
        if np.abs(first - covered).sum() >= _MIN_CONTRAST:
            break
    if category is not None and rng.random() < 0.6:
        pattern = category % _PATTERNS
    else:
        pattern = int(rng.integers(0, _PATTERNS))
    height, width = inside.shape
    texture = _blend(first, second, _texture(rng, height, width, pattern))
    image = image.copy()
    image[window][inside] = texture[inside]
    return image


def _shadow(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Darken what lies behind a figure, a few pixels to one side of it."""
    dx, dy = (int(v) for v in rng.integers(-5, 6, size=2))
    shifted = np.roll(mask, (dy, dx), axis=(0, 1))
    return np.where(shifted[..., None], image * int(rng.integers(55, 95)) // 100, image)


def _blur(image: np.ndarray) -> np.ndarray:
    """Binomial filter of 3 by 3 pixels in whole numbers."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:] + 8) // 16


def _expose(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light from one side, a colour cast, the lens's blur and the sensor's noise; uint8."""
    size = IMAGE_SIZE
    y, x = np.ogrid[:size, :size]
    slope_x, slope_y = (int(v) for v in rng.integers(-80, 81, size=2))
    gain = int(rng.integers(190, 290)) + (
        slope_x * (2 * x - size) // size + slope_y * (2 * y - size) // size
    )
    cast = rng.integers(225, 288, size=3).astype(np.int32)
    image = (image * gain[..., None] // 256) * cast // 256
    for _ in range(1 + int(rng.integers(0, 4) == 0)):
        image = _blur(image)
    amount = int(rng.integers(1, 9))
    noise = rng.integers(-amount, amount + 1, size=(2, *image.shape), dtype=np.int32)
    return (image + noise.sum(axis=0)).clip(0, 255).astype(np.uint8)


def _radii(rng: np.random.Generator) -> list[float]:
    """Sizes of an image's figures, largest first: a few of every COCO size."""
    radii = [80 + 45 * rng.random()] if rng.random() < 0.45 else []
    radii += [24 * 2.6 ** rng.random() for _ in range(int(rng.integers(1, 5)))]
    radii += [11 * 2.2 ** rng.random() for _ in range(int(rng.integers(1, 6)))]
    return sorted(radii, reverse=True)


def draw_image(seed: int, split: str, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw one image and describe the figures that can be seen in it.

    Returns:
        The image, uint8 BGR, shape (IMAGE_SIZE, IMAGE_SIZE, 3), and its COCO annotations without
        their ids: category_id, bbox, area, segmentation (compressed RLE of what is visible), iscrowd.

    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))
    image = _add_distractors(rng, _background(rng))
    owner = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.int32)
    figures = []
    for number, radius in enumerate(_radii(rng), start=1):
        category = int(rng.integers(0, len(CLASSES)))
        mask = _fill(_place(rng, _OUTLINES[CLASSES[category]](rng), radius))
        if rng.random() < 0.5:
            image = _shadow(rng, image, mask)
        image = _paint(rng, image, mask, category)
        owner[mask] = number
        figures.append((number, category + 1, int(mask.sum())))
    annotations = []
    for number, category_id, drawn in figures:
        visible = owner == number
        area = int(visible.sum())
        if area < MIN_VISIBLE_PIXELS or area < MIN_VISIBLE_FRACTION * drawn:
            continue
        encoded = coco_mask.encode(np.asfortranarray(visible, dtype=np.uint8))
        annotations.append(
            {
                "category_id": category_id,
                "bbox": [float(v) for v in coco_mask.toBbox(encoded)],
                "area": area,
                "segmentation": {
                    "size": [IMAGE_SIZE, IMAGE_SIZE],
                    "counts": encoded["counts"].decode("ascii"),
                },
                "iscrowd": 0,
            }
        )
    return _expose(rng, image), annotations


def _image_id(split: str, index: int) -> int:
    return SPLITS.index(split) * _IDS_PER_SPLIT + index + 1


def _is_complete(folder: Path, split: str, info: Mapping[str, Any]) -> bool:
    annotation_file = folder / "annotations" / f"instances_{split}.json"
    if not annotation_file.exists():
        return False
    annotations = read_json(annotation_file, what="annotation file")
    names = {image["file_name"] for image in annotations["images"]}
    return annotations["info"] == info and names <= {
        path.name for path in (folder / split).glob("*")
    }


def _generate_split(folder: Path, split: str, *, seed: int, count: int, workers: int) -> None:
    info = {
        "description": "shapes: textured figures on cluttered backgrounds, drawn from a seed",
        "version": str(GENERATOR_VERSION),
        "seed": seed,
        "split": split,
        "images": count,
    }
    if _is_complete(folder, split, info):
        logger.info("shapes: %s has its %d images already", split, count)
        return
    annotation_file = folder / "annotations" / f"instances_{split}.json"
    # The annotation file is removed first and written last, so an existing one has all of its images.
    annotation_file.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder, prefix=f".{split}."))
    partial.chmod(0o755)

    def draw(index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        pixels, figures = draw_image(seed, split, index)
        image_id = _image_id(split, index)
        name = f"{image_id:012d}.png"
        if not cv2.imwrite(str(partial / name), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
            raise QwtError(
                f"The image {folder / split / name} cannot be written; is the disk full?"
            )
        image = {"id": image_id, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        return image, [{**figure, "image_id": image_id} for figure in figures]

    try:
        with ThreadPoolExecutor(workers) as pool:
            drawn = list(
                progress(pool.map(draw, range(count)), f"Drawing shapes/{split}", total=count)
            )
        image_folder = folder / split
        if image_folder.exists():
            shutil.rmtree(image_folder)
        partial.rename(image_folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    figures = [figure for _, image_figures in drawn for figure in image_figures]
    first_id = SPLITS.index(split) * _IDS_PER_SPLIT + 1
    write_json(
        annotation_file,
        {
            "info": info,
            "licenses": [],
            "images": [image for image, _ in drawn],
            "annotations": [{"id": first_id + i, **figure} for i, figure in enumerate(figures)],
            "categories": [
                {"id": i, "name": name, "supercategory": "shape"}
                for i, name in enumerate(CLASSES, start=1)
            ],
        },
    )


def generate_shapes(
    folder: str | os.PathLike[str],
    *,
    seed: int,
    images: Mapping[str, int],
    workers: int = os.cpu_count() or 1,
) -> None:
    """Draw splits of ``shapes`` in COCO's layout; complete splits are kept.

    Writes ``folder/{split}/*.png`` and then ``folder/annotations/instances_{split}.json``. The first
    n images of a split do not depend on the number of images.

    Args:
        seed: 0 or more.
        images: number of images per split; the splits are in ``SPLITS``.
        workers: threads; the result does not depend on them.

    Raises:
        QwtError: an unknown split, or a full disk.
    """
    if unknown := images.keys() - set(SPLITS):
        raise QwtError(f"shapes has no split {min(unknown)!r}; choose one of {', '.join(SPLITS)}.")
    for split, count in images.items():
        _generate_split(Path(folder), split, seed=seed, count=count, workers=workers)
