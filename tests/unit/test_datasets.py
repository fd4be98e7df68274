"""Datasets: which images are chosen, which files are refused, and how many requests a choice costs."""

import io
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer, Status
from PIL import Image
from qwt_mmdet.config import as_plain, of_repeat
from qwt_mmdet.config.datasets import PARTS, parse_dataset
from qwt_mmdet.data import download as download_module
from qwt_mmdet.data.annotations import read_annotations
from qwt_mmdet.data.sampling import choose_ids
from qwt_mmdet.data.sources import SOURCES, open_source
from qwt_mmdet.errors import QwtError
from qwt_mmdet.staleness import changed_files
from qwt_mmdet.steps.prepare import prepare_dataset
from qwt_mmdet.steps.select import select_images

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 7, "name": "zebra"}]
WIDTH, HEIGHT = 24, 16


@pytest.fixture(autouse=True)
def _local_network(monkeypatch):
    monkeypatch.setattr(download_module, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the test server is not behind one


def jpeg(seed: int, size: tuple[int, int] = (WIDTH, HEIGHT), **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", **options)
    return content.getvalue()


def coco(ids, *, unlabelled=()) -> dict:
    """One cat per image, except in the unlabelled ones; every fifth image also has a dog."""
    annotations = [
        {
            "id": 10 * i + category,
            "image_id": i,
            "category_id": category,
            "bbox": [1.5, 2, 5, 6],
            "area": 30,
            "iscrowd": 0,
            "segmentation": [[1.5, 2, 6.5, 2, 6.5, 8]],
        }
        for i in ids
        if i not in unlabelled
        for category in ([1, 3] if i % 5 == 0 else [1])
    ]
    images = [{"id": i, "file_name": f"{i:06}.jpg", "width": WIDTH, "height": HEIGHT} for i in ids]
    return {"images": images, "annotations": annotations, "categories": [*CATEGORIES]}


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_split(root: Path, split: str, ids, **options) -> None:
    write(root / f"annotations/instances_{split}.json", coco(ids, **options))
    (root / split).mkdir(parents=True, exist_ok=True)
    for i in ids:
        (root / split / f"{i:06}.jpg").write_bytes(jpeg(i))


@pytest.fixture
def root(tmp_path) -> Path:
    """A local COCO with 40 training and 20 validation images."""
    write_split(tmp_path / "coco", "train2017", range(100, 140), unlabelled=range(100, 110))
    write_split(tmp_path / "coco", "val2017", range(1, 21))
    return tmp_path / "coco"


def settings(calibration=8, evaluation="all", *, seed=0, splits=("train2017", "val2017"), **source):
    return {
        "type": "coco",
        "seed": seed,
        **{key: str(value) for key, value in source.items()},
        "calibration": {"split": splits[0], "images": calibration},
        "evaluation": {"split": splits[1], "images": evaluation},
    }


def run(config, folder: Path, name="tiny") -> tuple[dict, dict]:
    """Both steps, as the workflow runs them."""
    for part in PARTS:
        prepare_dataset(config, part, folder=folder, output=folder / f"{part}_source.json")
    return tuple(select(config, part, folder, name) for part in PARTS)


def select(config, part: str, folder: Path, name="tiny", seen="") -> dict:
    """The second step, for one part."""
    select_images(
        config, part, name=name, source=folder / f"{part}_source.json", folder=folder,
        annotations=folder / f"{part}.json", files=folder / f"{part}_files.json", seen=seen,
    )  # fmt: skip
    return json.loads((folder / f"{part}.json").read_text())


def ids(content: dict) -> list[int]:
    return [image["id"] for image in content["images"]]


# --- The choice --------------------------------------------------------------------------------


def choose(calibration, evaluation, *, same=False, seed=0, numbers=range(100), evaluated=None):
    options = {"seed": seed, "same_images": same, "name": "tiny"}
    return (
        choose_ids("calibration", numbers, calibration, **options),
        choose_ids(
            "evaluation", numbers if evaluated is None else evaluated, evaluation, **options
        ),
    )


def test_the_choice_depends_on_the_seed_and_not_on_the_order():
    forwards = choose(10, 20)
    assert forwards == choose(10, 20, numbers=list(reversed(range(100))))
    assert forwards != choose(10, 20, seed=1)
    assert [sorted(part) for part in forwards] == list(forwards)
    assert [len(set(part)) for part in forwards] == [10, 20]


@pytest.mark.parametrize("same", [True, False])
def test_more_images_contain_the_fewer_and_leave_the_other_part_alone(same):
    few_calibration, few_evaluation = choose(10, 20, same=same)
    more_calibration, same_evaluation = choose(30, 20, same=same)
    same_calibration, more_evaluation = choose(10, 40, same=same)
    assert set(few_calibration) < set(more_calibration)
    assert set(few_evaluation) < set(more_evaluation)
    assert same_calibration == few_calibration
    assert same_evaluation == few_evaluation


@pytest.mark.parametrize("same", [True, False])
def test_draws_share_no_image_as_long_as_there_are_enough(same):
    options = {"seed": 0, "same_images": same, "name": "tiny"}
    draws = [choose_ids("calibration", range(100), 20, draw=n, **options) for n in (1, 2, 3, 4)]
    assert draws[0] == choose_ids("calibration", range(100), 20, **options)
    evaluation = choose_ids("evaluation", range(100), 20, **options)
    chosen = sum(draws, evaluation if same else [])
    assert len(set(chosen)) == len(chosen)


def test_draws_beyond_the_images_differ_and_say_that_they_share_some(caplog):
    options = {"seed": 0, "same_images": False, "name": "tiny"}
    draws = [tuple(choose_ids("calibration", range(50), 40, draw=n, **options)) for n in (1, 2, 3)]
    assert len(set(draws)) == 3
    assert all(len(set(draw)) == 40 for draw in draws)
    assert "draw 2 of 40 images shares some with other draws" in caplog.text


@pytest.mark.parametrize(
    ("images", "same", "message"),
    [("all", False, "so draw 2 would be draw 1"), (60, True, "which serve evaluation too")],
)
def test_a_draw_that_cannot_differ_is_refused(images, same, message):
    with pytest.raises(QwtError, match=message):
        choose_ids("calibration", range(100), images, draw=2, seed=0, same_images=same, name="tiny")


def test_further_draws_of_shapes_are_other_images(tmp_path):
    first = {"type": "shapes", "calibration": {"images": 2}, "evaluation": {"images": 1}}
    settings = parse_dataset(first)
    contents = []
    for name in ("calibration", "calibration@2"):
        config, part = of_repeat(as_plain(settings), name)
        prepare_dataset(config, part, folder=tmp_path, output=tmp_path / f"{part}_source.json")
        place = open_source(config, tmp_path).place(part)
        image = sorted(Path(place.image_root).glob("*.png"))[0]
        contents.append(image.read_bytes())
    assert contents[0] != contents[1]


def test_the_choice_is_the_same_for_ever():
    assert choose(3, 3, numbers=range(1000)) == ([144, 255, 317], [318, 448, 705])


def test_same_images_are_shared_out_as_long_as_there_are_enough():
    calibration, evaluation = choose(40, 60, same=True)
    assert sorted(calibration + evaluation) == list(range(100))


def test_all_means_all():
    assert choose("all", "all", evaluated=range(5)) == (list(range(100)), list(range(5)))


def test_more_than_there_are():
    with pytest.raises(
        QwtError, match=r"datasets\.tiny\.evaluation\.images is 101, but there are only 100 images"
    ):
        choose(1, 101)


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "ten", None])
def test_number_that_is_none(count):
    with pytest.raises(QwtError, match=r"datasets\.tiny\.calibration\.images is .*from 1, or all"):
        choose(count, 1)


def test_negative_seed():
    with pytest.raises(QwtError, match=r"datasets\.tiny\.seed is -1"):
        choose(1, 1, seed=-1)


# --- A local folder ----------------------------------------------------------------------------


def test_local_folder_end_to_end(root, tmp_path):
    calibration, evaluation = run(settings(root=root), tmp_path / "out")
    source = json.loads((tmp_path / "out/evaluation_source.json").read_text())
    assert source == {
        "annotations": str(root / "annotations/instances_val2017.json"),
        "image_root": str(root / "val2017"),
        "split": "val2017",
        "sha256": source["sha256"],
    }
    assert ids(evaluation) == list(range(1, 21))
    assert len(ids(calibration)) == 8
    assert set(ids(calibration)) < set(range(100, 140))
    assert len(evaluation["annotations"]) == 20 + 4
    assert {a["image_id"] for a in calibration["annotations"]} <= set(ids(calibration))
    assert calibration["categories"] == evaluation["categories"] == CATEGORIES
    assert evaluation["info"] == {
        "image_root": str(root / "val2017"),
        "dataset": "tiny",
        "part": "evaluation",
        "split": "val2017",
        "seed": 0,
        "images": 20,
        "source": str(root / "annotations/instances_val2017.json"),
        "source_sha256": source["sha256"],
        "missing_classes": ["zebra"],
        "exif": "apply",
        "exif_rotated": 0,
    }


def test_result_is_readable_by_pycocotools(root, tmp_path):
    from pycocotools.coco import COCO

    run(settings(root=root), tmp_path / "out")
    ground_truth = COCO(tmp_path / "out/evaluation.json")
    assert len(ground_truth.getImgIds(catIds=[3])) == 4
    assert ground_truth.annToMask(ground_truth.anns[11]).shape == (HEIGHT, WIDTH)


def test_paths_stay_relative(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, evaluation = run(settings(root="coco"), Path("out"))
    assert evaluation["info"]["image_root"] == "coco/val2017"
    assert evaluation["info"]["source"] == "coco/annotations/instances_val2017.json"


def test_order_of_the_annotation_file_does_not_matter(root, tmp_path):
    config = settings(5, 5, root=root)
    first = run(config, tmp_path / "a")
    for split in ("train2017", "val2017"):
        path = root / f"annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        write(path, {key: value[::-1] for key, value in content.items()})
    second = run(config, tmp_path / "b")
    for before, after in zip(first, second, strict=True):
        assert before["images"] == after["images"]
        assert before["annotations"] == after["annotations"]


def test_calibration_may_be_unlabelled(tmp_path, root):
    content = coco(range(100, 140))
    del content["annotations"], content["categories"]
    write(root / "annotations/instances_train2017.json", content)
    calibration, _ = run(settings(root=root), tmp_path / "out")
    assert calibration["annotations"] == []
    assert len(calibration["images"]) == 8


def test_classes_that_the_choice_misses_are_reported(root, tmp_path, caplog):
    _, evaluation = run(settings(8, 1, root=root), tmp_path / "out")
    there = {annotation["category_id"] for annotation in evaluation["annotations"]}
    assert evaluation["info"]["missing_classes"] == [
        category["name"] for category in CATEGORIES if category["id"] not in there
    ]
    assert "tiny.evaluation" in caplog.text
    assert "zebra" in caplog.text


def test_crowd_flag_defaults_to_no_crowd(root, tmp_path):
    content = coco(range(1, 21))
    for annotation in content["annotations"]:
        del annotation["iscrowd"]
    write(root / "annotations/instances_val2017.json", content)
    _, evaluation = run(settings(root=root), tmp_path / "out")
    assert {annotation["iscrowd"] for annotation in evaluation["annotations"]} == {0}


def test_evaluation_without_objects(root, tmp_path):
    content = coco(range(1, 21), unlabelled=range(1, 21))
    write(root / "annotations/instances_val2017.json", content)
    with pytest.raises(
        QwtError, match="None of the 20 evaluation images of tiny has an annotation"
    ):
        run(settings(root=root), tmp_path / "out")


# --- Overlap -----------------------------------------------------------------------------------


def test_one_split_for_both_parts_is_shared_out(root, tmp_path):
    config = settings(15, 25, root=root, splits=("train2017", "train2017"))
    calibration, evaluation = run(config, tmp_path / "out")
    assert not set(ids(calibration)) & set(ids(evaluation))
    assert len(calibration["images"]) + len(evaluation["images"]) == 40


def test_all_of_the_split_that_calibrates(root, tmp_path):
    config = settings(6, "all", root=root, splits=("val2017", "val2017"))
    chosen, _ = choose(6, "all", same=True, numbers=range(1, 21))
    with pytest.raises(QwtError, match="of tiny would share 6 images, with the ids ") as caught:
        run(config, tmp_path / "out")
    assert ", ".join(map(str, chosen[:5])) + ", … (6 in all)" in str(caught.value)
    assert not (tmp_path / "out/calibration.json").exists()
    assert not (tmp_path / "out/evaluation.json").exists()


def test_copy_of_the_annotation_file_is_the_same_split(root, tmp_path):
    original = (root / "annotations/instances_val2017.json").read_bytes()
    (root / "annotations/copy.json").write_bytes(original)
    config = settings(10, 10, root=root, splits=("val2017", "val2017"))
    config["calibration"]["annotations"] = "annotations/copy.json"
    calibration, evaluation = run(config, tmp_path / "out")
    assert not set(ids(calibration)) & set(ids(evaluation))


def test_two_annotation_files_over_the_same_images(root, tmp_path):
    write(root / "annotations/instances_half.json", coco(range(11, 21)))
    config = settings("all", "all", root=root, splits=("half", "val2017"))
    config["calibration"]["image_folder"] = "val2017"
    with pytest.raises(QwtError, match=r"share 10 images, with the ids 11, 12, 13, 14, 15, …"):
        run(config, tmp_path / "out")


def test_linked_folder_is_the_same_folder(root, tmp_path):
    (root / "link").symlink_to(root / "val2017")
    content = coco(range(1, 21))
    content["info"] = {"description": "another file"}
    write(root / "annotations/instances_link.json", content)
    with pytest.raises(QwtError, match="would share 20 images"):
        run(settings("all", "all", root=root, splits=("link", "val2017")), tmp_path / "out")


def test_splits_that_number_their_images_alike_do_not_overlap(tmp_path):
    write_split(tmp_path / "coco", "train2017", range(1, 21))
    write_split(tmp_path / "coco", "val2017", range(1, 11))
    calibration, evaluation = run(settings("all", "all", root=tmp_path / "coco"), tmp_path / "out")
    assert ids(calibration)[:10] == ids(evaluation)


# --- Files that are wrong ------------------------------------------------------------------------


def broken(**changes):
    """A COCO file with the first element of some lists changed or removed."""
    content = coco(range(1, 4))
    for key, change in changes.items():
        if change is None:
            del content[key]
        elif isinstance(change, dict):
            content[key][0] = {**content[key][0], **change}
        else:
            content[key] = change
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "has no list 'images'"),
        ({"a": 1}, "has no list 'images'"),
        (broken(images=None), "has no list 'images'"),
        (broken(annotations=None), "has no list 'annotations'"),
        (broken(categories=None), "has no list 'categories'"),
        (broken(images=[]), "lists no images"),
        (broken(images={"id": 2}), "image id 2 appears twice"),
        (broken(images={"file_name": "000002.jpg"}), "file_name '000002.jpg' appears twice"),
        (broken(images={"id": "a"}), "image number 0 has no id that is a whole number"),
        (broken(images={"file_name": None}), "image 1 has no file_name"),
        (broken(images={"width": 0}), "image 1 has no width and height"),
        (broken(annotations={"id": 21}), "annotation id 21 appears twice"),
        (broken(annotations={"image_id": 99}), "annotation 11 belongs to image 99, which the file"),
        (broken(annotations={"category_id": 99}), "annotation 11 has category 99, which the file"),
        (broken(annotations={"bbox": [1, 2, 3]}), "annotation 11 has no bbox"),
        (broken(annotations={"bbox": [1, 2, 3, float("nan")]}), "annotation 11 has no bbox"),
        (broken(annotations={"area": None}), "annotation 11 has no area"),
        (broken(categories={"id": 3}), "category id 3 appears twice"),
        (broken(categories={"name": "dog"}), "category name 'dog' appears twice"),
    ],
)
def test_annotation_file_that_is_not_coco(root, tmp_path, content, message):
    path = root / "annotations/instances_val2017.json"
    write(path, content)
    with pytest.raises(QwtError, match=r"annotation file .*instances_val2017\.json") as caught:
        run(settings(root=root), tmp_path)
    assert message in " ".join(str(caught.value).split()).replace("it has no list", "has no list")
    assert not (tmp_path / "evaluation_source.json").exists()


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), ('{"images": [', "is not valid JSON")]
)
def test_annotation_file_that_is_cut(root, tmp_path, content, message):
    (root / "annotations/instances_train2017.json").write_text(content)
    with pytest.raises(QwtError, match=rf"instances_train2017\.json {message}"):
        run(settings(root=root), tmp_path)
    assert not (tmp_path / "calibration_source.json").exists()


def test_annotation_file_that_is_missing(root, tmp_path):
    with pytest.raises(QwtError, match=r"instances_test\.json does not exist"):
        run(
            settings(root=root, splits=("train2017", "test"))
            | {"evaluation": {"split": "test", "image_folder": "val2017"}},
            tmp_path / "out",
        )


def test_folder_that_is_missing(root, tmp_path):
    with pytest.raises(QwtError, match=r"dataset root .*nowhere is not a folder"):
        run(settings(root=tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(QwtError, match=r"evaluation images should be in .*test, which is not"):
        run(settings(root=root, splits=("train2017", "test")), tmp_path / "out")


def test_annotation_file_that_changed_after_its_check(root, tmp_path):
    config = settings(root=root)
    run(config, tmp_path)
    write(root / "annotations/instances_val2017.json", coco(range(1, 5)))
    with pytest.raises(QwtError, match=r"instances_val2017\.json is missing or has changed"):
        select(config, "evaluation", tmp_path)


def test_images_that_are_missing(root, tmp_path):
    for number in range(3, 10):
        (root / f"val2017/{number:06}.jpg").unlink()
    with pytest.raises(
        QwtError,
        match=r"7 of 20 chosen images are missing in .*val2017: 000003\.jpg, 000004\.jpg, ",
    ):
        run(settings(root=root), tmp_path / "out")
    assert not (tmp_path / "out/evaluation.json").exists()


def test_missing_images_that_were_not_chosen_do_not_matter(root, tmp_path):
    calibration, _ = run(settings(root=root), tmp_path / "a")
    for path in (root / "train2017").iterdir():
        if int(path.stem) not in ids(calibration):
            path.unlink()
    run(settings(root=root), tmp_path / "b")


def test_images_that_cannot_be_decoded(root, tmp_path):
    whole = root / "val2017/000003.jpg"
    whole.write_bytes(whole.read_bytes()[:-200])
    (root / "val2017/000004.jpg").write_text("<html>")
    with pytest.raises(QwtError, match=r"2 of 20 chosen images .* are not usable") as caught:
        run(settings(root=root), tmp_path / "out")
    assert "000003.jpg cannot be decoded" in str(caught.value)
    assert "000004.jpg cannot be decoded" in str(caught.value)
    assert not (tmp_path / "out/evaluation.json").exists()


def name_of_image_3(root: Path, name: str) -> None:
    content = coco(range(1, 21))
    content["images"][2]["file_name"] = name
    write(root / "annotations/instances_val2017.json", content)


@pytest.mark.parametrize(
    "kind", ["dots", "absolute", "linked file", "linked folder", "backslashes"]
)
def test_images_outside_of_the_root_are_read_where_the_config_allows_it(root, tmp_path, kind):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    inside = root / "val2017/000003.jpg"
    inside.rename(outside / "x.jpg")
    if kind == "linked file":
        inside.symlink_to(outside / "x.jpg")
    elif kind == "linked folder":
        (root / "val2017/link").symlink_to(outside)
    names = {
        "dots": "../../elsewhere/x.jpg",
        "absolute": str(outside / "x.jpg"),
        "linked file": "000003.jpg",
        "linked folder": "link/x.jpg",
        "backslashes": r"..\..\elsewhere\x.jpg",
    }
    name_of_image_3(root, names[kind])
    config = settings(root=root)
    with pytest.raises(QwtError, match="1 of 20 chosen images lie outside of the root") as caught:
        run(config, tmp_path / "out")
    assert "set datasets.tiny.allow_outside_root: true" in str(caught.value)
    assert not (tmp_path / "out/evaluation.json").exists()
    _, evaluation = run(config | {"allow_outside_root": True}, tmp_path / "out")
    assert ids(evaluation) == list(range(1, 21))


def test_links_and_folders_within_the_root_need_no_permission(root, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    (root / "val2017/000003.jpg").rename(root / "x.jpg")
    name_of_image_3(root, r"..\x.jpg")
    run(settings(root=tmp_path / "alias"), tmp_path / "out")
    # The config itself names a folder outside of the root.
    config = settings(root=root / "annotations")
    for part, split in (("calibration", "train2017"), ("evaluation", "val2017")):
        config[part] |= {
            "annotations": f"instances_{split}.json",
            "image_folder": str(root / split),
        }
    name_of_image_3(root, "x/../000003.jpg")
    (root / "x.jpg").rename(root / "val2017/000003.jpg")
    (root / "val2017/x").mkdir()
    run(config, tmp_path / "other")


def turned(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.write_bytes(jpeg(0, exif=exif))


def test_a_size_that_fits_without_the_exif_rotation_alone(root, tmp_path, caplog):
    turned(root / "val2017/000003.jpg", 6)
    turned(root / "val2017/000004.jpg", 3)
    config = settings(root=root)
    with pytest.raises(QwtError, match="1 of 20 chosen images") as caught:
        run(config, tmp_path / "out")
    assert "(EXIF orientation 6, apply) is 16x24 pixels, but its annotation says 24x16" in str(
        caught.value
    )
    assert "set datasets.tiny.exif: ignore" in str(caught.value)
    caplog.clear()
    _, evaluation = run(config | {"exif": "ignore"}, tmp_path / "out")
    assert evaluation["info"]["exif"] == "ignore"
    assert evaluation["info"]["exif_rotated"] == 2
    assert "000003.jpg (orientation 6), 000004.jpg (orientation 3)" in caplog.text
    assert "sizes cannot tell whether the boxes of 1 of these" in caplog.text


def test_a_size_that_fits_with_the_exif_rotation_alone(root, tmp_path):
    turned(root / "val2017/000003.jpg", 8)
    content = coco(range(1, 21))
    content["images"][2] |= {"width": HEIGHT, "height": WIDTH}
    write(root / "annotations/instances_val2017.json", content)
    _, evaluation = run(settings(root=root), tmp_path / "out")
    assert evaluation["info"]["exif_rotated"] == 1
    with pytest.raises(QwtError, match=r"set datasets\.tiny\.exif: apply"):
        run(settings(root=root, exif="ignore"), tmp_path / "out")


def test_an_image_that_the_detectors_loader_cannot_read_is_found(root, tmp_path):
    floats = Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32))
    floats.save(root / "val2017/000003.jpg", "TIFF")
    with pytest.raises(QwtError, match=r"000003\.jpg cannot be read by OpenCV"):
        run(settings(root=root), tmp_path / "out")


def test_numbers_that_are_not_finite_in_keys_that_nobody_reads(root, tmp_path):
    content = coco(range(100, 140))
    for key in ("images", "annotations", "categories"):
        content[key][0]["score"] = float("nan")
    content |= {"info": [float("inf")], "licenses": float("nan")}
    write(root / "annotations/instances_train2017.json", content)
    calibration, _ = run(settings("all", root=root), tmp_path / "out")
    assert len(calibration["images"]) == 40


def test_crowd_regions_alone_are_nothing_to_evaluate(root, tmp_path):
    content = coco(range(1, 21))
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    write(root / "annotations/instances_val2017.json", content)
    with pytest.raises(QwtError, match=r"None of the 20 evaluation images .* of an object"):
        run(settings(root=root), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "voc"}, "type is 'voc'; it should be one of 'shapes', 'coco'"),
        ({"url": "http://host"}, "give either root"),
        ({"root": None}, "give either root"),
    ],
)
def test_settings_that_do_not_say_where_the_data_is(root, tmp_path, change, message):
    config = {
        key: value for key, value in {**settings(root=root), **change}.items() if value is not None
    }
    with pytest.raises(QwtError, match=message):
        run(config, tmp_path)


# --- A source of the user's own ------------------------------------------------------------------

OWN_MODULE = """
import json
from pathlib import Path
from qwt_mmdet.data.sources import Place, Source, register_source

@register_source("mylab.list")
class List(Source):
    "Images whose names, width and height stand in a text file."

    def place(self, part):
        split = getattr(self.settings, part).split
        root = Path(self.settings.options["folder"], split)
        return Place(str(self.folder / f"{split}.json"), str(root), split)

    def prepare(self, part, most_bytes):
        place = self.place(part)
        lines = Path(place.image_root, "list.txt").read_text().split()
        images = [
            {"id": int(name[:6]), "file_name": name, "width": int(width), "height": int(height)}
            for name, width, height in (line.split(",") for line in lines)
        ]
        boxes = [
            {"id": image["id"], "image_id": image["id"], "category_id": 1, "bbox": [0, 0, 9, 9],
             "area": 81}
            for image in images
        ]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
        self.folder.mkdir(exist_ok=True)
        Path(place.annotations).write_text(json.dumps(content))
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    monkeypatch.setattr("qwt_mmdet.data.sources.SOURCES", dict(SOURCES))
    monkeypatch.setitem(sys.modules, "mylab", None)
    monkeypatch.delitem(sys.modules, "mylab")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/mylab.py").write_text(OWN_MODULE)


def test_a_source_from_outside_of_the_package(root, tmp_path, own_module):
    for split in ("train2017", "val2017"):
        names = sorted(path.name for path in (root / split).glob("*.jpg"))
        text = "\n".join(f"{name},{WIDTH},{HEIGHT}" for name in names)
        (root / split / "list.txt").write_text(text)
    config = settings(8, 5)
    own, usual = config | {"type": "mylab.list", "options": {"folder": str(root)}}, config
    chosen = run(own, tmp_path / "own")
    assert [ids(part) for part in chosen] == [
        ids(part) for part in run(usual | {"root": str(root)}, tmp_path / "usual")
    ]
    assert open_source(own, tmp_path).choice_settings("evaluation")["options"] == own["options"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mylab.lsit", "is 'mylab.lsit', which is not registered; did you mean mylab.list"),
        ("nolab.list", "the module nolab cannot be imported"),
        ("list", "'shapes', 'coco', 'a name with a dot'"),
    ],
)
def test_a_source_that_nobody_registered_is_named(tmp_path, own_module, kind, message):
    with pytest.raises(QwtError, match=message):
        run({"type": kind, "options": {}}, tmp_path / "out")


# --- Download ----------------------------------------------------------------------------------

ARCHIVE = "annotations/annotations_trainval2017.zip"


def zipped(root: Path, names=("train2017", "val2017")) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(
                root / f"annotations/instances_{name}.json", f"annotations/instances_{name}.json"
            )
            archive.writestr(f"annotations/captions_{name}.json", "{}")
    return content.getvalue()


def image_requests(server: FlakyServer) -> list[str]:
    return [path for path, _ in server.requests if path != ARCHIVE]


def test_download_fetches_the_annotations_and_the_chosen_images_alone(root, tmp_path):
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
        calibration, evaluation = run(settings(6, 4, url=server.base + "/"), tmp_path / "out")
        assert server.requests[0][0] == ARCHIVE
        assert sorted(image_requests(server)) == sorted(
            [f"train2017/{i:06}.jpg" for i in ids(calibration)]
            + [f"val2017/{i:06}.jpg" for i in ids(evaluation)]
        )
        assert len(server.requests) == 1 + 6 + 4
    assert calibration["info"]["image_root"] == str(tmp_path / "out/images/train2017")
    for content in (calibration, evaluation):
        for image in content["images"]:
            path = Path(content["info"]["image_root"]) / image["file_name"]
            assert path.read_bytes() == jpeg(image["id"])
    left = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert {path for path in left if not path.startswith("images/")} == {
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "origin.json",
        *(f"{part}{kind}.json" for part in PARTS for kind in ("_source", "", "_files")),
    }
    assert len(left) == 9 + 10


def test_two_jobs_at_once_fetch_the_annotations_once(root, tmp_path):
    out = tmp_path / "out"
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
        config = settings(6, 4, url=server.base)
        with ThreadPoolExecutor() as executor:
            jobs = [
                executor.submit(prepare_dataset, config, part, folder=out, output=out / part)
                for part in PARTS
            ]
        assert all(job.result() is None for job in jobs)
        assert len(server.requests) == 1


def test_download_makes_the_same_choice_as_a_local_folder(root, tmp_path):
    local = run(settings(6, 4, root=root), tmp_path / "local")
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
        remote = run(settings(6, 4, url=server.base), tmp_path / "remote")
    for one, other in zip(local, remote, strict=True):
        assert one["images"] == other["images"]
        assert one["annotations"] == other["annotations"]


def test_download_from_a_server_that_breaks_and_is_unavailable_now_and_then(
    root, tmp_path, monkeypatch
):
    # which file meets how many failures is up to the threads
    monkeypatch.setattr(download_module, "ATTEMPTS_WITHOUT_PROGRESS", 50)
    monkeypatch.setattr(download_module, "LONGEST_WAIT_SECONDS", 0.01)
    with FlakyServer(
        {ARCHIVE: zipped(root)}, folder=root, unavailable_every=4, drop_every=3
    ) as server:
        calibration, evaluation = run(settings(30, "all", url=server.base), tmp_path / "out")
        assert len(server.requests) > 51
    assert len(calibration["images"]) == 30
    assert len(evaluation["images"]) == 20
    images = [path for path in (tmp_path / "out/images").rglob("*") if path.is_file()]
    assert len(images) == 50
    assert all(path.read_bytes() == jpeg(int(path.stem)) for path in images)


def test_interrupted_download_goes_on_with_what_is_missing(root, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "ATTEMPTS_WITHOUT_PROGRESS", 1)
    config = settings(10, 5)
    out = tmp_path / "out"
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
        config["url"] = server.base
        last_id = choose(10, "all", numbers=range(100, 140))[0][-1]
        last = f"train2017/{last_id:06}.jpg"
        server.plan[last].append(Status(503))
        with pytest.raises(QwtError, match="could not be downloaded"):
            run(config, out)
        assert not (out / "calibration.json").exists()
        there = {path.name for path in (out / "images").rglob("*.jpg")}
        assert there
        before = len(server.requests)
        run(config, out)
        again = {Path(path).name for path, _ in server.requests[before:]}
        assert not again & there
        assert ARCHIVE not in again
        before = len(server.requests)
        run(config, out)
        assert len(server.requests) == before  # everything is there and whole
        (out / "images" / last).write_bytes(b"rubbish")
        run(config, out)
        assert [path for path, _ in server.requests[before:]] == [last]


def test_a_downloaded_image_that_is_gone_is_noticed_and_fetched_again(root, tmp_path):
    out = tmp_path / "out"
    note = out / "evaluation_files.json"
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
        config = settings(3, 4, url=server.base)
        _, before = run(config, out)
        assert changed_files(note) == ""
        gone = before["images"][1]["file_name"]
        (out / "images/val2017" / gone).unlink()
        said = changed_files(note)  # a parameter of the rule: another value runs it again
        assert said != ""
        requests = len(server.requests)
        assert select(config, "evaluation", out, seen=said) == before
        assert [path for path, _ in server.requests[requests:]] == [f"val2017/{gone}"]
    assert (out / "images/val2017" / gone).read_bytes() == (root / "val2017" / gone).read_bytes()
    assert changed_files(note) == said  # so that nothing runs a third time


def test_downloaded_annotations_that_are_gone_are_fetched_again(root, tmp_path):
    out = tmp_path / "out"
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
        config = settings(3, 4, url=server.base)
        _, before = run(config, out)
        (out / "annotations/instances_val2017.json").unlink()
        assert select(config, "evaluation", out) == before
        assert server.requests[-1][0] == ARCHIVE


def test_download_that_is_no_image(root, tmp_path):
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
        server.files["val2017/000007.jpg"] = b"<html>busy</html>"
        with pytest.raises(QwtError, match=r"val2017/000007\.jpg: .* cannot be decoded"):
            run(settings(2, url=server.base), tmp_path / "out")
    assert not list((tmp_path / "out/images/val2017").glob("000007*"))
    assert not (tmp_path / "out/evaluation.json").exists()


def test_download_of_an_image_that_is_not_there(root, tmp_path):
    (root / "val2017/000007.jpg").unlink()
    with (
        FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server,
        pytest.raises(QwtError, match=r"val2017/000007\.jpg answered 404"),
    ):
        run(settings(2, url=server.base), tmp_path / "out")


def test_archive_that_lacks_the_split(root, tmp_path):
    with (
        FlakyServer({ARCHIVE: zipped(root, ["val2017"])}, folder=root) as server,
        pytest.raises(
            QwtError,
            match=r"holds no annotations/instances_train2017\.json; it holds annotations/instances_val2017",
        ),
    ):
        run(settings(2, url=server.base), tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_archive_that_is_damaged(root, tmp_path, damage):
    content = bytearray(zipped(root))
    if damage == "cut":
        del content[1000:]
    else:
        content[200] ^= 0xFF
    with (
        FlakyServer({ARCHIVE: bytes(content)}, folder=root) as server,
        pytest.raises(QwtError, match="is not a whole zip file"),
    ):
        run(settings(2, url=server.base), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("instances_train2017.json"))
    assert not list((tmp_path / "out").rglob("*.zip"))


def test_files_of_two_addresses_are_never_mixed(root, tmp_path):
    for _ in range(2):
        with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
            if not (tmp_path / "out").exists():
                run(settings(2, 2, url=server.base), tmp_path / "out")
                continue
            with pytest.raises(QwtError, match="remove that folder, or give the dataset another"):
                run(settings(2, 2, url=server.base), tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["../../../evil.jpg", r"..\..\evil.jpg", "/tmp/evil.jpg", r"C:\evil.jpg"]
)
def test_file_names_that_lead_out_of_the_folder(root, tmp_path, name):
    name_of_image_3(root, name)
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
        with pytest.raises(QwtError, match="outside of the dataset's folder"):
            run(settings(2, url=server.base), tmp_path / "out")
        assert not any("evil" in path for path, _ in server.requests)


# --- Generated and real data -----------------------------------------------------------------


def test_shapes_need_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "type": "shapes",
        "seed": 3,
        "calibration": {"images": 4},
        "evaluation": {"images": 5},
    }
    calibration, evaluation = run(config, Path("results/datasets/demo"), name="demo")
    assert len(calibration["images"]) == 4
    assert len(evaluation["images"]) == 5
    assert evaluation["annotations"]
    assert evaluation["info"]["image_root"] == "results/datasets/demo/val"
    assert calibration["info"]["image_root"] == "results/datasets/demo/calibration"


def test_shapes_of_one_split_for_both_parts(tmp_path):
    config = {
        "type": "shapes",
        "calibration": {"split": "val", "images": 2},
        "evaluation": {"split": "val", "images": 3},
    }
    calibration, evaluation = run(config, tmp_path / "out")
    assert len(set(ids(calibration)) | set(ids(evaluation))) == 5


@pytest.mark.parametrize("count", ["all", 0])
def test_shapes_need_a_number(tmp_path, count):
    config = {"type": "shapes", "evaluation": {"images": count}}
    with pytest.raises(QwtError, match=r"evaluation\.images is .*it should be"):
        run(config, tmp_path)


@pytest.mark.real
def test_real_coco(tmp_path):
    default = Path(__file__).parents[3] / "shared" / "coco_real"
    real = Path(os.environ.get("QWT_REAL_COCO", default))
    if not real.is_dir():
        pytest.skip(f"the real COCO sample is not in {real} (QWT_REAL_COCO)")
    calibration, evaluation = run(settings(32, "all", root=real), tmp_path / "out", name="coco")
    assert len(calibration["images"]) == 32
    assert len(evaluation["images"]) == 160
    assert len(evaluation["annotations"]) == 1370
    content = read_annotations(real / "annotations/instances_train2017.json")
    assert len(content["images"]) == 100
