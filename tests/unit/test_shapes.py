"""The images of the demo: the same everywhere, and annotated as they are drawn."""

import hashlib
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from qwt_mmdet.demo.shapes import CLASSES, IMAGE_SIZE, SPLITS, draw_image, generate_shapes
from qwt_mmdet.errors import QwtError

# Of the pixels and annotations of two images; the same on every machine.
KNOWN = {
    "train": "eda509d4e37817317fa12fb068f923458d879cfa05ae6345ad44abb77ae66d75",
    "calibration": "9dc2b6f0550980caf4ab8191956a34e1ace255ee6fb8e38c18f728eefc6c2f83",
    "val": "a1765873405a5402a5ecc0b79827f022bcbc5adfcfacd993ead7d7799a4032f8",
}


@pytest.fixture(scope="module")
def drawings():
    return [draw_image(0, "val", index) for index in range(40)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    generate_shapes(folder, seed=0, images=dict.fromkeys(SPLITS, 3), workers=2)
    return folder


def annotations_of(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_and_annotations_are_the_same_on_every_machine(split):
    digest = hashlib.sha256()
    for index in range(2):
        pixels, annotations = draw_image(0, split, index)
        drawing = pixels.tobytes() + json.dumps(annotations, sort_keys=True).encode()
        digest.update(hashlib.sha256(drawing).hexdigest().encode())
    assert digest.hexdigest() == KNOWN[split]


def test_files_hold_what_is_drawn(dataset):
    pixels, figures = draw_image(0, "val", 2)
    annotations = annotations_of(dataset, "val")
    image = annotations["images"][2]
    assert np.array_equal(cv2.imread(str(dataset / "val" / image["file_name"])), pixels)
    stored = [a for a in annotations["annotations"] if a["image_id"] == image["id"]]
    drawn = [{**figure, "image_id": image["id"]} for figure in figures]
    assert [{k: v for k, v in a.items() if k != "id"} for a in stored] == drawn
    assert [category["name"] for category in annotations["categories"]] == list(CLASSES)


def test_masks_fill_their_boxes_and_areas_and_do_not_overlap(drawings):
    for _, annotations in drawings:
        covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=int)
        for annotation in annotations:
            mask = coco_mask.decode(annotation["segmentation"])
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
            assert mask.sum() == annotation["area"]
            covered += mask
        assert covered.max(initial=0) <= 1  # every pixel shows the topmost figure only


def contrast_at_edges(drawings, shift: tuple[int, int]) -> float:
    """Mean change of colour across the edges of the masks, all moved by ``shift`` pixels."""
    changes = []
    for pixels, annotations in drawings:
        change = np.abs(np.diff(pixels.astype(int), n=2, axis=1)).sum(axis=2)
        owner = sum(i * coco_mask.decode(a["segmentation"]) for i, a in enumerate(annotations, 1))
        moved = np.roll(owner.astype(int), shift, axis=(0, 1))
        changes.append(change[(np.diff(moved, axis=1) != 0)[:, 1:]].mean())
    return float(np.mean(changes))


@pytest.mark.parametrize("shift", [(3, 3), (-4, 2), (0, -5), (0, 5)])
def test_the_edges_of_the_masks_are_edges_in_the_picture(drawings, shift):
    at_edges = contrast_at_edges(drawings[:20], (0, 0))
    assert at_edges > 1.1 * contrast_at_edges(drawings[:20], shift)


def test_all_classes_and_all_sizes_of_coco_occur(drawings):
    areas = np.array([a["area"] for _, annotations in drawings for a in annotations])
    categories = {a["category_id"] for _, annotations in drawings for a in annotations}
    assert categories == set(range(1, len(CLASSES) + 1))
    assert (areas < 32**2).mean() > 0.2
    assert ((areas >= 32**2) & (areas < 96**2)).mean() > 0.2
    assert (areas >= 96**2).mean() > 0.02
    assert areas.min() >= 16


def test_splits_share_no_picture_and_no_id(dataset):
    pictures = [path.read_bytes() for split in SPLITS for path in (dataset / split).iterdir()]
    assert len(set(pictures)) == len(pictures) == 9
    for kind in ("images", "annotations"):
        ids = [entry["id"] for split in SPLITS for entry in annotations_of(dataset, split)[kind]]
        assert len(set(ids)) == len(ids)


def test_the_first_images_do_not_depend_on_how_many_there_are_or_on_threads(dataset, tmp_path):
    generate_shapes(tmp_path, seed=0, images={"val": 2}, workers=1)
    few, many = annotations_of(tmp_path, "val"), annotations_of(dataset, "val")
    assert few["images"] == many["images"][:2]
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]
    for image in few["images"]:
        name = image["file_name"]
        assert (tmp_path / "val" / name).read_bytes() == (dataset / "val" / name).read_bytes()


def state_of(folder) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.*")}


def test_a_complete_split_is_left_alone_and_one_that_lost_a_file_is_drawn_again(tmp_path):
    generate_shapes(tmp_path, seed=3, images={"val": 2})
    before = state_of(tmp_path)
    generate_shapes(tmp_path, seed=3, images={"val": 2})
    assert state_of(tmp_path) == before
    for lost in ("annotations/instances_val.json", "val/000020000002.png"):
        (tmp_path / lost).unlink()
        generate_shapes(tmp_path, seed=3, images={"val": 2})
        again = state_of(tmp_path)
        assert {path: content for path, (_, content) in again.items()} == {
            path: content for path, (_, content) in before.items()
        }


def test_an_interrupted_generation_leaves_nothing_to_trust(tmp_path, monkeypatch):
    generate_shapes(tmp_path, seed=3, images={"val": 2})

    def interrupted(seed, split, index):
        if index == 1:
            raise KeyboardInterrupt
        return draw_image(seed, split, index)

    with monkeypatch.context() as patch:
        patch.setattr("qwt_mmdet.demo.shapes.draw_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_shapes(tmp_path, seed=4, images={"val": 2}, workers=1)
    assert not (tmp_path / "annotations" / "instances_val.json").exists()
    generate_shapes(tmp_path, seed=4, images={"val": 2})
    image = annotations_of(tmp_path, "val")["images"][0]
    pixels = cv2.imread(str(tmp_path / "val" / image["file_name"]))
    assert np.array_equal(pixels, draw_image(4, "val", 0)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations", "val"]


def test_fewer_images_leave_no_others_behind(tmp_path):
    generate_shapes(tmp_path, seed=3, images={"val": 2})
    generate_shapes(tmp_path, seed=3, images={"val": 1})
    assert len(list((tmp_path / "val").iterdir())) == 1


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(QwtError, match="no split 'test'"):
        generate_shapes(tmp_path, seed=0, images={"val": 1, "test": 1})
    assert not any(tmp_path.iterdir())
