"""Pictures of the report: detections of each variant on a few images, beside the ground truth.

Images are chosen by rules, not by hand. An image's score is F1 = 2 hits / (2 hits + false alarms + missed
objects), over detections with a score of at least ``SCORE``. A hit has an IoU of at least 0.5 with an object of
its class, by COCO's own matching. Crowd regions are left out.
"""

import base64
import io
import math
import os
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO

from ..data.images import read_image
from ..errors import QwtError
from ..evaluation.coco import iou_types, load_ground_truth, match_detections

SCORE = 0.3
SIDE = 480  # pixels of the longer side of a picture
LEAST = 7  # pixels of the shorter side of a drawn box, so that a tiny one can be seen
QUALITY = 60  # of WebP: about 20 kB a picture
RULES = {"largest loss": 3, "largest recovery": 3, "drawn at random": 2}

FONT = cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=18))  # with a size it is one

# Okabe and Ito's colours; missed objects are also dashed.
COLOURS = {"object": "#009E73", "hit": "#56B4E9", "false": "#D55E00", "missed": "#F0E442"}


@dataclass
class ImageMatches:
    """Matches of a variant on one image: COCO records of hits, false alarms and missed objects."""

    hit: list[dict[str, Any]] = field(default_factory=list)
    false: list[dict[str, Any]] = field(default_factory=list)
    missed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def f1(self) -> float:
        """F1; 1 where there are neither objects nor detections."""
        errors = len(self.false) + len(self.missed)
        return 2 * len(self.hit) / (2 * len(self.hit) + errors) if self.hit or errors else 1.0


@dataclass(frozen=True)
class Picture:
    """An image of the report: its id, the rule that chose it, and the matches of each variant by title."""

    image: int
    rule: str
    truth: COCO
    matches: Mapping[str, ImageMatches]
    masks: bool

    @property
    def name(self) -> str:
        return self.truth.imgs[self.image]["file_name"]

    def panels(self) -> list[dict[str, Any]]:
        """Ground truth and each variant: title, data URI, width, height and found objects.

        Raises:
            QwtError: the image is missing, not readable, or has another size than annotated.
        """
        image = _read(self.truth, self.image)
        objects = [a for a in self.truth.imgToAnns[self.image] if not a["iscrowd"]]
        count = f"{len(objects)} object{'s' if len(objects) != 1 else ''}"
        panels = [self._panel(image, "ground truth", {"object": objects}, count)]
        for title, matched in self.matches.items():
            found = f"{len(matched.hit)} of {len(matched.hit) + len(matched.missed)} found"
            found = f"{found}, {len(matched.false)} false"
            panels.append(self._panel(image, title, vars(matched), found))
        return panels

    def _panel(
        self, image: Image.Image, title: str, records: Mapping[str, Any], found: str
    ) -> dict[str, Any]:
        picture, stream = draw_records(image, records, self.truth, masks=self.masks), io.BytesIO()
        picture.save(stream, "WEBP", quality=QUALITY, method=6)
        return {
            "title": title,
            "data": f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}",
            "width": picture.width,
            "height": picture.height,
            "found": found,
        }


def match_images(
    ground_truth: COCO, predictions: Sequence[dict[str, Any]], *, masks: bool
) -> dict[int, ImageMatches]:
    """Matches on each image, by its id."""
    evaluator = match_detections(ground_truth, predictions, iou_types(masks)[-1])
    matches = {image: ImageMatches() for image in ground_truth.imgs}
    detections = evaluator.cocoDt.anns
    everything = evaluator.params.areaRng[0]
    for entry in evaluator.evalImgs:
        if entry is None or entry["aRng"] != everything:
            continue
        matched = matches[entry["image_id"]]
        # Index 0: IoU 0.5. COCO matches detections by falling score, so leaving out low scores changes no other
        # match.
        for index, identifier in enumerate(entry["dtIds"]):
            detection = detections[identifier]
            if detection["score"] < SCORE or entry["dtIgnore"][0, index]:
                continue
            (matched.hit if entry["dtMatches"][0, index] else matched.false).append(detection)
        for index, identifier in enumerate(entry["gtIds"]):
            match = int(entry["gtMatches"][0, index])
            found = match and detections[match]["score"] >= SCORE
            if not entry["gtIgnore"][index] and not found:
                matched.missed.append(ground_truth.anns[identifier])
    return matches


def choose_images(
    matches: Mapping[str, Mapping[int, ImageMatches]], *, seed: int
) -> dict[str, list[int]]:
    """Choose images by ``RULES``: the ids of the chosen images, by rule.

    Images with equal differences of F1 are ordered by the number of hits, most first.
    """

    def ranked(a: str, b: str) -> list[int]:
        if a not in matches or b not in matches:
            return []
        better, worse = matches[a], matches[b]
        differences = {
            image: (better[image].f1 - worse[image].f1, len(better[image].hit)) for image in better
        }
        gaining = [image for image, (difference, _) in differences.items() if difference > 0]
        return sorted(gaining, key=lambda image: (*(-d for d in differences[image]), image))

    shuffled = sorted(next(iter(matches.values())))
    random.Random(seed).shuffle(shuffled)
    by_rule = {
        "largest loss": ranked("baseline", "quantized"),
        "largest recovery": ranked("compensated", "quantized"),
        "drawn at random": shuffled,
    }
    chosen: dict[str, list[int]] = {}
    for rule, count in RULES.items():
        taken = [image for images in chosen.values() for image in images]
        chosen[rule] = [image for image in by_rule[rule] if image not in taken][:count]
    return chosen


def _dashed(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: str, width: int) -> None:
    left, top, right, bottom = box
    for x in np.arange(left, right, 14):
        for y in (top, bottom):
            draw.line((x, y, min(x + 8, right), y), colour, width)
    for y in np.arange(top, bottom, 14):
        for x in (left, right):
            draw.line((x, y, x, min(y + 8, bottom)), colour, width)


def _draw_label(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: str
) -> None:
    """Write a name above a corner (x, y) of a box, or below it at the top of the picture."""
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    width, height = draw.textlength(text, FONT) + 6, sum(FONT.getmetrics())
    x = max(min(corner[0], draw.im.size[0] - width), 0)
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 3, y), text, fill="black", font=FONT)


def _finite(record: Mapping[str, Any]) -> bool:
    return all(map(math.isfinite, (*record["bbox"], record.get("score", 0))))


def visible_box(
    box: Sequence[float] | NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.float64]:
    """The drawn part of a box [left, top, right, bottom]: clipped to the picture, at least ``LEAST`` pixels a side.

    A box outside of the picture is drawn as a mark at its edge.
    """
    limit = np.asarray(size, dtype=float) - 1
    corners = np.clip(np.reshape(box, (2, 2)), 0, limit)
    half = np.maximum(abs(corners[1] - corners[0]), LEAST) / 2
    middle = np.clip(corners.mean(axis=0), LEAST / 2, np.maximum(limit - LEAST / 2, LEAST / 2))
    return np.concatenate([middle - half, middle + half])


def draw_records(
    image: Image.Image, records: Mapping[str, Sequence[dict[str, Any]]], truth: COCO, *, masks: bool
) -> Image.Image:
    """Draw COCO records onto an RGB image in its original size; the picture's longer side has ``SIDE`` pixels.

    Args:
        records: by a key of ``COLOURS``; those that are not finite are left out.
        truth: for names of categories and decoding of masks.

    Raises:
        QwtError: a mask has another size than the image.
    """
    scale = SIDE / max(image.size)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    records = {what: [r for r in group if _finite(r)] for what, group in records.items()}
    picture = image.resize(size, Image.Resampling.LANCZOS)
    if masks:
        # no tint on missed objects: they would look found
        for what in [key for key in records if key != "missed"]:
            for record in records[what]:
                mask = Image.fromarray(truth.annToMask(record) * 110)
                if mask.size != image.size:
                    raise QwtError(
                        f"A mask has {mask.size} pixels, but its image {image.size} (width, height)."
                    )
                picture.paste(COLOURS[what], mask=mask.resize(size))
    draw = ImageDraw.Draw(picture)
    boxes = [
        (what, record, visible_box(scale * np.array([x, y, x + w, y + h]), size).tolist())
        for what, group in records.items()
        for record in group
        for x, y, w, h in (record["bbox"],)
    ]
    for what, _, box in boxes:
        if what == "missed":
            _dashed(draw, box, "black", 5)
            _dashed(draw, box, COLOURS[what], 3)
        else:
            draw.rectangle(box, outline="black", width=5)
            draw.rectangle([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], None, COLOURS[what], 3)
    for what, record, box in boxes:
        # names of missed objects go below, so that they do not hide names of detections
        corner = (box[0], box[3] if what == "missed" else box[1])
        _draw_label(draw, corner, truth.cats[record["category_id"]]["name"], COLOURS[what])
    return picture


def choose_pictures(
    annotations: str | os.PathLike[str],
    variants: Mapping[str, Sequence[dict[str, Any]]],
    titles: Mapping[str, str],
    *,
    masks: bool,
    classes: Collection[str] | None = None,
    seed: int,
    most: int,
) -> list[Picture]:
    """Choose at most ``most`` images by rule.

    Args:
        annotations: COCO annotation file with ``info.image_root``.
        variants: detections of baseline, quantized and compensated, if evaluated; ``titles``: their names in the report.
        classes: names of the categories that were evaluated; None: all.
    """
    truth = load_ground_truth(annotations, masks=masks, classes=classes)
    matches = {
        name: match_images(truth, list(filter(_finite, found)), masks=masks)
        for name, found in variants.items()
    }
    by_rule = choose_images(matches, seed=seed)
    # one of each rule after the other, so that also a smaller number has pictures of each rule
    in_turn = [image for images in zip_longest(*by_rule.values()) for image in images]
    kept = [image for image in in_turn if image is not None][:most]
    return [
        Picture(
            image,
            rule,
            truth,
            {titles[name]: found[image] for name, found in matches.items()},
            masks,
        )
        for rule, images in by_rule.items()
        for image in images
        if image in kept
    ]


def _read(truth: COCO, identifier: int) -> Image.Image:
    """Read an image as the detector saw it."""
    about, info = truth.imgs[identifier], truth.dataset["info"]
    path = Path(info["image_root"]) / about["file_name"]
    pixels = read_image(path, exif=info["exif"])
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))
    size = (about["width"], about["height"])
    if image.size != size:
        raise QwtError(
            f"{path} has {image.size} pixels, but {size} in the annotations (width, height)."
        )
    return image
