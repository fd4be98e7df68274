"""Pictures: the rule that chooses images, the matches on each, and what is drawn."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from qwt_mmdet.errors import QwtError
from qwt_mmdet.evaluation.coco import load_ground_truth
from qwt_mmdet.reporting.pictures import (
    COLOURS,
    SIDE,
    ImageMatches,
    choose_images,
    choose_pictures,
    draw_records,
    match_images,
    visible_box,
)
from random_detections import compressed, detection, hexagon, one_object, write

BOX = [60.0, 50.0, 100.0, 80.0]
TITLES = {"baseline": "baseline", "quantized": "w4", "compensated": "w4 + qwt"}


def matched(hits: int, false: int = 0, missed: int = 0) -> ImageMatches:
    return ImageMatches([{}] * hits, [{}] * false, [{}] * missed)


@pytest.mark.parametrize(
    ("counts", "f1"), [((2,), 1), ((1, 0, 1), 2 / 3), ((1, 1, 1), 0.5), ((0, 3), 0), ((0,), 1)]
)
def test_f1_by_hand(counts, f1):
    assert matched(*counts).f1 == pytest.approx(f1)


@pytest.fixture(params=[False, True], ids=["boxes", "masks"])
def masks(request) -> bool:
    return request.param


def truth_of(folder, content=None, masks=False):
    return load_ground_truth(write(folder, content or one_object(BOX)), masks=masks)


def grey(size=(260, 200)) -> Image.Image:
    return Image.new("RGB", size, "#808080")


def test_matches_tell_hits_false_alarms_and_what_was_missed(tmp_path, masks):
    content = one_object(BOX)
    content["annotations"].append({**content["annotations"][0], "id": 2, "iscrowd": 1})
    content["images"].append({**content["images"][0], "id": 2, "file_name": "2.png"})
    truth = truth_of(tmp_path, content, masks)
    elsewhere = [200.0, 150.0, 30.0, 30.0]
    found = [detection(BOX, 0.9), detection(elsewhere, 0.8), detection(elsewhere, 0.1)]
    found_matches = match_images(truth, found, masks=masks)
    assert [record["score"] for record in found_matches[1].hit] == [0.9]
    assert [record["score"] for record in found_matches[1].false] == [0.8]  # 0.1 is not shown
    assert found_matches[1].missed == []  # the crowd region does not count
    assert found_matches[2] == ImageMatches()
    unsure = match_images(truth, [detection(BOX, 0.2)], masks=masks)
    assert unsure[1].hit == unsure[1].false == []
    assert [record["id"] for record in unsure[1].missed] == [1]


def test_images_are_chosen_where_most_is_lost_or_regained():
    images = range(20)
    baseline = {image: matched(2) for image in images}
    quantized = dict(baseline)
    compensated = dict(baseline)
    for image in (3, 4, 5, 6, 7):  # lost and not regained, 7 most
        quantized[image] = compensated[image] = matched(2 - (image > 3), missed=image)
    quantized[11] = matched(2, missed=1)
    matches = {"baseline": baseline, "quantized": quantized, "compensated": compensated}
    chosen = choose_images(matches, seed=0)
    assert chosen["largest loss"] == [7, 6, 5]
    assert chosen["largest recovery"] == [11]
    assert len(chosen["drawn at random"]) == 2
    assert chosen == choose_images(matches, seed=0)
    others = [choose_images(matches, seed=seed) for seed in range(1, 6)]
    assert any(other != chosen for other in others)


def test_without_loss_only_random_images_are_shown():
    same = {image: matched(1) for image in range(5)}
    for names in (("baseline", "quantized"), ("compensated",)):
        chosen = choose_images(dict.fromkeys(names, same), seed=0)
        assert [rule for rule, images in chosen.items() if images] == ["drawn at random"]


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def test_boxes_have_the_colour_of_what_they_are(tmp_path):
    truth, scale = truth_of(tmp_path), SIDE / 260
    for what in COLOURS:
        records = {what: [{"bbox": BOX, "category_id": 1}]}
        picture = np.asarray(draw_records(grey(), records, truth, masks=False))
        assert max(picture.shape) == SIDE
        rows, columns = np.nonzero((picture == rgb(COLOURS[what])).all(axis=2))
        found = np.array([columns.min(), columns.max(), rows.max()])
        expected = np.array([BOX[0], BOX[0] + BOX[2], BOX[1] + BOX[3]]) * scale
        assert found == pytest.approx(expected, abs=4)
        assert (picture[5, 5] == 128).all()


def test_a_mask_is_tinted(tmp_path):
    content = one_object(BOX)
    truth = truth_of(tmp_path, content, True)
    records = {"object": content["annotations"]}
    plain, tinted = (
        np.asarray(draw_records(grey(), records, truth, masks=masks)) for masks in (False, True)
    )
    middle = tuple(round((BOX[1 - i] + BOX[3 - i] / 2) * SIDE / 260) for i in range(2))
    assert (plain[middle] == 128).all()
    towards = np.sign(rgb(COLOURS["object"]) - 128)
    assert (np.sign(tinted[middle].astype(int) - 128) == towards).all()
    missed = draw_records(grey(), {"missed": content["annotations"]}, truth, masks=True)
    assert (np.asarray(missed)[middle] == 128).all()


RIGHT = [detection(BOX, 0.9, image_id=number) for number in range(1, 10)]


@pytest.fixture
def scene(tmp_path):
    """Annotations of nine noisy images with an object each, and where they lie."""
    content = one_object(BOX)
    generator = np.random.default_rng(0)
    for number in range(1, 10):
        pixels = generator.integers(0, 255, (200, 260, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (image,), (annotation,) = content["images"], content["annotations"]
    numbers = range(1, 10)
    content["images"] = [{**image, "id": n, "file_name": f"{n}.png"} for n in numbers]
    content["annotations"] = [{**annotation, "id": n, "image_id": n} for n in numbers]
    content["info"] = {"image_root": str(tmp_path), "exif": "apply"}
    return write(tmp_path, content)


def pictures_of(scene, most=8, **variants):
    return choose_pictures(scene, variants, TITLES, masks=False, seed=0, most=most)


def test_pictures_are_small_and_say_what_was_found(scene):
    pictures = pictures_of(scene, baseline=RIGHT, quantized=RIGHT[:4], compensated=RIGHT)
    rules = [picture.rule for picture in pictures]
    assert rules == ["largest loss"] * 3 + ["largest recovery"] * 2 + ["drawn at random"] * 2
    for panel in (panel for picture in pictures for panel in picture.panels()):
        data = base64.b64decode(panel["data"].removeprefix("data:image/webp;base64,"))
        assert len(data) < 150_000  # noise is the worst case
        assert Image.open(io.BytesIO(data)).size == (panel["width"], panel["height"])
        assert max(panel["width"], panel["height"]) == SIDE
    lost = pictures[0].panels()
    assert [panel["title"] for panel in lost] == ["ground truth", "baseline", "w4", "w4 + qwt"]
    assert [panel["found"] for panel in lost[:3]] == [
        "1 object", "1 of 1 found, 0 false", "0 of 1 found, 0 false",
    ]  # fmt: skip


def test_fewer_pictures_keep_one_of_each_rule(scene):
    variants = {"baseline": RIGHT[:8], "quantized": RIGHT[4:], "compensated": RIGHT}
    assert len({picture.rule for picture in pictures_of(scene, 3, **variants)}) == 3


def test_an_image_that_is_gone_costs_no_other_picture(scene, tmp_path):
    (tmp_path / "1.png").unlink()
    Image.new("RGB", (30, 40)).save(tmp_path / "2.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    pictures = pictures_of(scene, baseline=RIGHT[:3], quantized=RIGHT[3:4])
    lost = [picture for picture in pictures if picture.rule == "largest loss"]
    whole = [picture for picture in pictures if picture.rule != "largest loss"]
    messages = ("cannot be read", "(30, 40) pixels, but (260, 200)", "cannot be read")
    for picture, message in zip(sorted(lost, key=lambda p: p.name), messages, strict=True):
        with pytest.raises(QwtError, match=re.escape(message)):
            picture.panels()
    assert all(len(picture.panels()) == 3 for picture in whole)


@pytest.mark.parametrize(
    "box",
    [
        [60, 50, 0, 0],  # a point
        [60, 50, 1e-9, 80],  # a line
        [60, 50, 2, 2],  # under 3 pixels
        [60, 50, -20, -10],  # turned inside out
        [-500, -500, 20, 20],  # beside the image
        [0, 0, 1e30, 1e30],  # far beyond it
        [float("nan"), 0, 10, 10],
        [0, 0, float("inf"), 10],
    ],
)
def test_any_box_leaves_a_picture(tmp_path, box, masks):
    truth = truth_of(tmp_path, masks=masks)
    record = {**detection(BOX, 0.5), "bbox": box}
    for what in COLOURS:
        picture = np.asarray(draw_records(grey(), {what: [record]}, truth, masks=masks))
        assert (picture != 128).any() == np.isfinite(box).all()


def test_a_tiny_box_is_large_enough_to_be_seen():
    assert visible_box([100, 100, 101, 100], (480, 300)).tolist() == [97, 96.5, 104, 103.5]
    assert visible_box([-50, 400, -40, 420], (480, 300)).tolist() == [0, 292, 7, 299]
    assert visible_box([10, 10, 60, 90], (480, 300)).tolist() == [10, 10, 60, 90]


def test_images_of_any_shape_can_be_drawn_on(tmp_path):
    truth, records = truth_of(tmp_path), {"object": [detection(BOX, 0.5)]}
    for size in ((1, 1), (1, 4000), (4000, 1)):
        assert max(draw_records(grey(size), records, truth, masks=False).size) == SIDE


@pytest.mark.parametrize("name", ["two\nlines", "tab\t\r\x00", "\ud800", "", "long " * 100])
def test_any_class_name_can_be_written_beside_a_box(tmp_path, name):
    truth = truth_of(tmp_path)
    truth.cats[1]["name"] = name
    draw_records(grey(), {"hit": [detection(BOX, 0.5)]}, truth, masks=False)


def test_a_mask_of_another_size_is_not_stretched(tmp_path):
    truth = truth_of(tmp_path, masks=True)
    record = detection(BOX, 0.5, segmentation=compressed(hexagon(1, 1, 9, 9), 20, 30))
    with pytest.raises(QwtError, match=r"A mask has \(30, 20\) pixels, but its image \(260, 200\)"):
        draw_records(grey(), {"hit": [record]}, truth, masks=True)


def test_detections_that_are_not_finite_are_left_out(scene):
    nowhere = {**detection(BOX, 0.9), "bbox": [float("nan")] * 4}
    bad = [detection(BOX, 0.9), nowhere, detection(BOX, float("inf"))]
    pictures = pictures_of(scene, 9, quantized=bad)
    texts = {panel["found"] for picture in pictures for panel in picture.panels()}
    assert texts
    assert not any("1 false" in text for text in texts)
