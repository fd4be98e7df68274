"""Annotation files: what is harmless is read, what is harmful is a sentence that names the entry."""

import copy
import json

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from qwt_mmdet.data.annotations import read_annotations
from qwt_mmdet.errors import QwtError
from qwt_mmdet.evaluation.coco import coco_metrics
from random_detections import HEIGHT, WIDTH, detection, one_object, write

BOX = [20.0, 30.0, 60.0, 50.0]
NAN, INF = float("nan"), float("inf")
TRIANGLE = [20.0, 30.0, 80.0, 30.0, 80.0, 80.0]
PIXELS = WIDTH * HEIGHT


def rle(counts, size=(HEIGHT, WIDTH)) -> dict:
    return {"segmentation": {"size": list(size), "counts": counts}}


def read(folder, kind, change, **options):
    content = one_object(BOX)
    content[kind][0] |= change
    return read_annotations(write(folder, content), **options)[kind][0]


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("annotations", {"iscrowd": None}, {"iscrowd": 0}),
        ("annotations", {"iscrowd": False}, {"iscrowd": 0}),
        ("annotations", {"iscrowd": True}, {"iscrowd": 1}),
        ("annotations", {"iscrowd": 1.0}, {"iscrowd": 1}),
        ("annotations", {"id": 7.0, "image_id": 1.0, "category_id": 1.0}, {"id": 7, "image_id": 1}),
        ("annotations", {"segmentation": [TRIANGLE, []]}, {"segmentation": [TRIANGLE]}),
        ("annotations", {"bbox": [-20, -9.5, 300, 230]}, {"bbox": [-20, -9.5, 300, 230]}),
        ("annotations", rle([0.0, PIXELS]), rle([0, PIXELS])),
        ("annotations", {"keypoints": NAN, "score": INF}, {"id": 1}),
        ("images", {"id": 1.0, "width": float(WIDTH)}, {"id": 1, "width": WIDTH}),
        ("images", {"file_name": r".\a\b.png"}, {"file_name": "a/b.png"}),
        ("images", {"file_name": "Ä né 猫.png"}, {"file_name": "Ä né 猫.png"}),
        ("images", {"license": [], "date_captured": NAN}, {"id": 1}),
        ("categories", {"name": "crème brûlée", "supercategory": 3}, {"name": "crème brûlée"}),
    ],
)
def test_what_is_harmless_is_read(tmp_path, kind, change, expected):
    found = read(tmp_path, kind, change)
    assert expected.items() <= found.items()
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("empty", [None, [], {}, [[]], [[], []]])
def test_an_empty_mask_is_none(tmp_path, empty):
    assert "segmentation" not in read(tmp_path, "annotations", {"segmentation": empty})
    with pytest.raises(QwtError, match="annotation 1 has no mask, which a mask detector needs"):
        read(tmp_path, "annotations", {"segmentation": empty}, masks=True)


def with_each(key, *values):
    return [{key: value} for value in values]


def polygons(*values):
    return with_each("segmentation", *([value] for value in values))


HUGE = 10**400
HARMFUL = {
    "has the iscrowd .*, which must be 0 or 1": with_each("iscrowd", "0", 2, NAN, [0]),
    "belongs to image .*, which the file": with_each("image_id", "1", [1], 99),
    "has category .*, which the file": with_each("category_id", True, NAN, 99),
    "has no bbox .* of finite numbers": with_each(
        "bbox", [1, 2, 3], [1, 2, NAN, 4], [1, 2, INF, 4], [1, 2, "3", 4], [1, 2, -3, 4], {"x": 1},
        [HUGE, 2, 1.5, 4],
    ),
    r"has a bbox from \(1, 2\) to \(1e\+30, 6\), far outside": with_each("bbox", [1, 2, 1e30, 4]),
    "far outside of its image of 260x200 pixels": with_each("bbox", [-5000, 2, 10, 4]),
    "has no area in pixels": with_each("area", NAN, "12"),
    "has an area of .* pixels, which its image cannot hold": with_each("area", -1, 1e30),
    "neither a list of polygons nor RLE": with_each("segmentation", "polygon", TRIANGLE, 0),
    "has a polygon of [47] numbers": polygons([1, 2, 3, 4], [*TRIANGLE, 5]),
    "not a finite number": polygons(
        [NAN, *TRIANGLE[1:]], [INF, *TRIANGLE[1:-1], -INF], ["20", *TRIANGLE[1:]],
        [None, *TRIANGLE[1:]], [[1, 2], [3, 4], [5, 6], 7, 8, 9], [HUGE, *TRIANGLE[1:-1], -HUGE],
    ),
    "has a polygon from .* far outside": [{"segmentation": [TRIANGLE, [1e30, *TRIANGLE[1:]]]}],
    r"size \[260, 200\], but its image has \[200, 260\]": [rle([0, PIXELS], (WIDTH, HEIGHT))],
    "an RLE mask of the size": [rle([0, PIXELS], ()), *with_each("segmentation", {"counts": [0]})],
    f"add up to {PIXELS - 1} pixels; its image has {PIXELS}": [rle([0, PIXELS - 1])],
    "add up to 0 pixels": [rle("")],
    "counts cannot be read": list(
        map(rle, ([-1, PIXELS + 1], [0.5, PIXELS - 0.5], [NAN, PIXELS], None, "~~~", "o" * 1000))
    ),
}  # fmt: skip


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("message", "change"), [(m, c) for m in HARMFUL for c in HARMFUL[m]])
def test_what_is_harmful_is_a_sentence_that_names_the_annotation(
    tmp_path, labelled, change, message
):
    masks = "segmentation" in change
    with pytest.raises(QwtError, match=rf"annotations\.json is wrong: annotation 1 .*{message}"):
        read(tmp_path, "annotations", change, labelled=labelled, masks=masks)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": [[NAN, *TRIANGLE[1:]]]},
        {"segmentation": "polygon"},
        {"segmentation": [[1e30, *TRIANGLE[1:]]]},
        rle([0, PIXELS], (WIDTH, HEIGHT)),
        rle([NAN, PIXELS]),
    ],
)
def test_what_is_no_mask_is_read_where_nobody_needs_masks(tmp_path, caplog, change, labelled):
    """It stays as it is, for those who need masks and read the file that is written of it."""
    content = one_object(BOX)
    content["annotations"][0] |= change
    found = read_annotations(write(tmp_path, content), labelled=labelled)
    assert "a detector with masks could not be evaluated, since annotation 1 has" in caplog.text
    with pytest.raises(QwtError) as before:
        read_annotations(write(tmp_path, content), masks=True)
    json.dumps(found, allow_nan=False)
    with pytest.raises(QwtError) as after:
        read_annotations(write(tmp_path, found), masks=True)
    assert str(after.value)[:100] == str(before.value)[:100]
    metrics = coco_metrics(write(tmp_path, content), [detection(BOX, 0.9)], masks=False)
    assert metrics["bbox"]["AP"] == pytest.approx(1)


@pytest.mark.parametrize("change", [{"bbox": None}, {"area": None}])
def test_calibration_needs_no_boxes(tmp_path, change):
    assert change.keys().isdisjoint(read(tmp_path, "annotations", change, labelled=False))
    with pytest.raises(QwtError, match="annotation 1 has no "):
        read(tmp_path, "annotations", change)


NAMES = {
    "annotation number 0 has no id that": ("annotations", with_each("id", "1", 1.5, True, 2**63)),
    "image number 0 has no id that": ("images", with_each("id", NAN)),
    "image 1 has no width and height in whole": ("images", [{"width": "260"}, {"height": INF}, {"width": 0}]),
    "image 1 has no file_name that is a text": ("images", with_each("file_name", None)),
    r"image 1 has the file_name 'a\\nb\.png' with": ("images", with_each("file_name", "a\nb.png")),
    r"with the character '\\x00'": ("images", with_each("file_name", "a\0.png")),
    r"with the character '\\ud800'": ("images", with_each("file_name", "\ud800.png")),
    "longer than 4000 bytes": ("images", with_each("file_name", "a/" * 3000)),
    r"category 1 has the name 'cat\\ndog' with": ("categories", with_each("name", "cat\ndog")),
    r"with the character '\\u2028'": ("categories", with_each("name", "cat\u2028")),
    r"with the character '\\x1b'": ("categories", with_each("name", "\x1b[31m")),
    "category 1 has no name that is a text": ("categories", with_each("name", 5)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "kind", "change"), [(m, kind, c) for m, (kind, all_) in NAMES.items() for c in all_]
)
def test_ids_sizes_and_names_that_a_later_step_would_fail_on(tmp_path, kind, change, message):
    with pytest.raises(QwtError, match=message) as caught:
        read(tmp_path, kind, change)
    str(caught.value).encode()  # a message can be printed
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("images", {"file_name": "2.png"}, "image id 1"),
        ("images", {"id": 2}, "image file_name '1.png'"),
        ("annotations", {}, "annotation id 1"),
        ("categories", {"name": "dog"}, "category id 1"),
        ("categories", {"id": 2}, "category name 'cat'"),
    ],
)
def test_what_appears_twice_is_named(tmp_path, kind, change, message):
    content = one_object(BOX)
    content[kind].append(content[kind][0] | change)
    with pytest.raises(QwtError, match=f"the {message} appears twice"):
        read_annotations(write(tmp_path, content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"images": [', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        (f'{{"images": {"9" * 5000}}}', "is not valid JSON"),
        ('{"images": [{"id": 3, "id": 4}]}', "with the id 4 that has the key 'id' twice"),
        ("[1, 2]", "has no list 'images'"),
        ('{"a": 1}', "has no list 'images'"),
        ('{"images": [1]}', "has no list 'annotations'"),
        ('{"images": [1], "annotations": []}', "has no list 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no images"),
    ],
)
def test_a_file_that_is_not_coco(tmp_path, text, message):
    path = tmp_path / "annotations.json"
    path.write_text(text)
    with pytest.raises(QwtError, match=r"annotation file .*annotations\.json") as caught:
        read_annotations(path)
    assert message in str(caught.value)


def test_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(one_object(BOX)), encoding="utf-8-sig")
    assert read_annotations(path)["annotations"][0]["bbox"] == BOX


def test_compressed_masks_of_pycocotools_are_read_and_cut_ones_are_not(tmp_path):
    generator = np.random.default_rng(0)
    content = one_object(BOX)
    for number in range(2, 20):
        mask = generator.random((HEIGHT, WIDTH)) < generator.random() ** 3
        counts = mask_utils.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        annotation = {**content["annotations"][0], "id": number, **rle(counts)}
        content["annotations"].append(annotation)
    del content["annotations"][0]  # has no mask
    broken = copy.deepcopy(content)
    broken["annotations"][-1] |= rle(counts[:-1])
    read_annotations(write(tmp_path, content), masks=True)
    with pytest.raises(QwtError, match="annotation 19 has an RLE mask whose counts"):
        read_annotations(write(tmp_path, broken), masks=True)


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [20, 30, 0, 50]},
        {"bbox": [300, 30, 60, 50]},
        {"bbox": [20, -50, 60, 50]},
        {"segmentation": [[270, 30, 280, 30, 280, 80]]},
    ],
)
def test_an_object_without_a_pixel_is_told(tmp_path, caplog, change):
    read(tmp_path, "annotations", {})
    assert not caplog.text
    read(tmp_path, "annotations", change)
    assert "1 boxes or masks have no pixel in their image" in caplog.text
    assert "annotations 1" in caplog.text


@pytest.mark.parametrize("segmentation", [[[1e30, *TRIANGLE[1:]]], [[]], rle([0, 9], (3, 3))])
def test_a_mask_that_is_wrong_never_changes_an_ap_without_a_word(tmp_path, segmentation):
    content = one_object(BOX)
    content["annotations"].append({**content["annotations"][0], "id": 2})
    content["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(QwtError, match="annotation 2 has"):
        coco_metrics(write(tmp_path, content), [detection(BOX, 0.9)], masks=True)
