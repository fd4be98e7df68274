"""Datasets: which images are chosen, which files are refused, and how many requests a choice costs."""

import io
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
from flaky_server import FlakyServer, Status
from PIL import Image
from qwt_mmdet.config import as_plain, of_repeat
from qwt_mmdet.config.datasets import PARTS, parse_dataset
from qwt_mmdet.data import download as download_module
from qwt_mmdet.data.sampling import choose_ids
from qwt_mmdet.data.sources import SOURCES, open_source
from qwt_mmdet.errors import QwtError
from qwt_mmdet.staleness import changed_files
from qwt_mmdet.steps.prepare import prepare_dataset
from qwt_mmdet.steps.select import select_images

pytestmark = pytest.mark.usefixtures("local_server")

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 7, "name": "zebra"}]
WIDTH, HEIGHT = 24, 16
SPLITS = ("train2017", "val2017")


def jpeg(seed: int, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", **options)
    return content.getvalue()


def coco(ids, *, unlabelled=()) -> dict:
    """One cat per image, except in the unlabelled ones; every fifth image also has a dog."""
    images = [{"id": i, "file_name": f"{i:06}.jpg", "width": WIDTH, "height": HEIGHT} for i in ids]
    shape = {"bbox": [1.5, 2, 5, 6], "area": 30, "segmentation": [[1.5, 2, 6.5, 2, 6.5, 8]]}
    annotations = [
        {"id": 10 * i + category, "image_id": i, "category_id": category, "iscrowd": 0, **shape}
        for i in set(ids) - set(unlabelled)
        for category in ([1, 3] if i % 5 == 0 else [1])
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write(root: Path, content, split="val2017") -> None:
    path = root / f"annotations/instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_split(root: Path, split: str, ids, **options) -> None:
    write(root, coco(ids, **options), split)
    (root / split).mkdir()
    for i in ids:
        (root / split / f"{i:06}.jpg").write_bytes(jpeg(i))


@pytest.fixture
def root(tmp_path) -> Path:
    """A local COCO with 40 training and 20 validation images."""
    write_split(tmp_path / "coco", "train2017", range(100, 140), unlabelled=range(100, 110))
    write_split(tmp_path / "coco", "val2017", range(1, 21))
    return tmp_path / "coco"


@pytest.fixture
def server(root):
    """Serves :func:`root` as a download."""
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as server:
        yield server


def settings(calibration=8, evaluation="all", *, seed=0, splits=SPLITS, **source):
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


def refused(config, folder: Path, message: str) -> str:
    """What is said; no evaluation images may be chosen then."""
    with pytest.raises(QwtError, match=message) as caught:
        run(config, folder)
    assert not (folder / "evaluation.json").exists()
    return str(caught.value)


def ids(content: dict) -> list[int]:
    return [image["id"] for image in content["images"]]


def draw(images, part="calibration", *, numbers=range(100), **options):
    options = {"seed": 0, "same_images": False, "name": "tiny"} | options
    return choose_ids(part, numbers, images, **options)


def choose(calibration, evaluation, **options):
    return draw(calibration, **options), draw(evaluation, "evaluation", **options)


def test_the_choice_depends_on_the_seed_and_not_on_the_order():
    forwards = choose(10, 20)
    assert forwards == choose(10, 20, numbers=list(reversed(range(100))))
    assert forwards != choose(10, 20, seed=1)
    assert [sorted(part) for part in forwards] == list(forwards)
    assert [len(set(part)) for part in forwards] == [10, 20]


@pytest.mark.parametrize("same", [True, False])
def test_more_images_contain_the_fewer_and_leave_the_other_part_alone(same):
    few_calibration, few_evaluation = choose(10, 20, same_images=same)
    more_calibration, same_evaluation = choose(30, 20, same_images=same)
    same_calibration, more_evaluation = choose(10, 40, same_images=same)
    assert set(few_calibration) < set(more_calibration)
    assert set(few_evaluation) < set(more_evaluation)
    assert (same_calibration, same_evaluation) == (few_calibration, few_evaluation)


@pytest.mark.parametrize("same", [True, False])
def test_draws_share_no_image_as_long_as_there_are_enough(same):
    draws = [draw(20, draw=n, same_images=same) for n in (1, 2, 3, 4)]
    assert draws[0] == draw(20, same_images=same)
    chosen = sum(draws, draw(20, "evaluation", same_images=True) if same else [])
    assert len(set(chosen)) == len(chosen)


def test_draws_beyond_the_images_differ_and_say_that_they_share_some(caplog):
    draws = [tuple(draw(40, numbers=range(50), draw=n)) for n in (1, 2, 3)]
    assert len(set(draws)) == 3
    assert all(len(set(draw)) == 40 for draw in draws)
    assert "draw 2 of 40 images shares some with other draws" in caplog.text


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("all", {"draw": 2}, "so draw 2 would be draw 1"),
        (60, {"draw": 2, "same_images": True}, "which serve evaluation too"),
        (101, {}, r"datasets\.tiny\.calibration\.images is 101, but there are only 100 images"),
    ],
)
def test_a_draw_that_cannot_be_is_refused(images, options, message):
    with pytest.raises(QwtError, match=message):
        draw(images, **options)


def test_further_draws_of_shapes_are_other_images(tmp_path):
    first = {"type": "shapes", "calibration": {"images": 2}, "evaluation": {"images": 1}}
    contents = []
    for name in ("calibration", "calibration@2"):
        config, part = of_repeat(as_plain(parse_dataset(first)), name)
        prepare_dataset(config, part, folder=tmp_path, output=tmp_path / f"{part}_source.json")
        image_root = open_source(config, tmp_path).place(part).image_root
        contents.append(min(Path(image_root).glob("*.png")).read_bytes())
    assert contents[0] != contents[1]


def test_the_choice_is_the_same_for_ever():
    assert choose(3, 3, numbers=range(1000)) == ([144, 255, 317], [318, 448, 705])


def test_local_folder_end_to_end(root, tmp_path, monkeypatch, caplog):
    """Paths stay relative, too."""
    monkeypatch.chdir(tmp_path)
    calibration, evaluation = run(settings(root="coco"), Path("out"))
    annotations, image_root = "coco/annotations/instances_val2017.json", "coco/val2017"
    source = json.loads((tmp_path / "out/evaluation_source.json").read_text())
    sha256 = source["sha256"]
    assert source == {
        "annotations": annotations, "image_root": image_root, "split": "val2017", "sha256": sha256,
    }  # fmt: skip
    assert ids(evaluation) == list(range(1, 21))
    assert len(ids(calibration)) == 8
    assert set(ids(calibration)) < set(range(100, 140))
    assert len(evaluation["annotations"]) == 20 + 4
    assert {a["image_id"] for a in calibration["annotations"]} <= set(ids(calibration))
    assert calibration["categories"] == evaluation["categories"] == CATEGORIES
    assert evaluation["info"] == {
        "image_root": image_root, "dataset": "tiny", "part": "evaluation", "split": "val2017",
        "seed": 0, "images": 20, "source": annotations, "source_sha256": sha256,
        "missing_classes": ["zebra"], "exif": "apply", "exif_rotated": 0,
    }  # fmt: skip
    assert (
        "tiny.evaluation: 1 of 3 classes do not occur in the 20 chosen images: zebra" in caplog.text
    )


def test_order_of_the_annotation_file_does_not_matter(root, tmp_path):
    first = run(settings(5, 5, root=root), tmp_path / "a")
    for split in SPLITS:
        content = json.loads((root / f"annotations/instances_{split}.json").read_text())
        write(root, {key: value[::-1] for key, value in content.items()}, split)
    second = run(settings(5, 5, root=root), tmp_path / "b")
    for before, after in zip(first, second, strict=True):
        assert before["images"] == after["images"]
        assert before["annotations"] == after["annotations"]


def test_calibration_may_be_unlabelled(tmp_path, root):
    write(root, {"images": coco(range(100, 140))["images"]}, "train2017")
    calibration, _ = run(settings(root=root), tmp_path / "out")
    assert calibration["annotations"] == []
    assert len(calibration["images"]) == 8


@pytest.mark.parametrize("unlabelled", [(), range(1, 21)], ids=["crowds", "nothing"])
def test_evaluation_without_objects(root, tmp_path, unlabelled):
    content = coco(range(1, 21), unlabelled=unlabelled)
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    write(root, content)
    message = "None of the 20 evaluation images of tiny has an annotation of an object"
    refused(settings(root=root), tmp_path / "out", message)


@pytest.mark.parametrize("split", ["train2017", "copy"])
def test_one_split_for_both_parts_is_shared_out(root, tmp_path, split):
    """Also where one part names a copy of the annotation file."""
    for name in ("train2017", "copy"):
        write(root, coco(range(100, 140)), name)
    config = settings(15, 25, root=root, splits=(split, "train2017"))
    config["calibration"]["image_folder"] = "train2017"
    chosen = run(config, tmp_path / "out")
    assert sorted(i for part in chosen for i in ids(part)) == list(range(100, 140))


@pytest.mark.parametrize(
    ("split", "folder", "count", "shared"),
    [
        ("val2017", "val2017", 6, r"6 images, with the ids (\d+, ){5}… \(6 in all\)"),
        ("half", "val2017", "all", "10 images, with the ids 11, 12, 13, 14, 15, …"),
        ("link", "link", "all", "20 images"),
    ],
)
def test_an_image_of_both_parts_is_refused(root, tmp_path, split, folder, count, shared):
    write(root, coco(range(11, 21)), "half")
    write(root, coco(range(1, 21)) | {"info": {"description": "another file"}}, "link")
    (root / "link").symlink_to(root / "val2017")
    config = settings(count, "all", root=root, splits=(split, "val2017"))
    config["calibration"]["image_folder"] = folder
    refused(config, tmp_path / "out", f"of tiny would share {shared}")
    assert not (tmp_path / "out/calibration.json").exists()


def test_splits_that_number_their_images_alike_do_not_overlap(tmp_path):
    write_split(tmp_path / "coco", "train2017", range(1, 21))
    write_split(tmp_path / "coco", "val2017", range(1, 11))
    calibration, evaluation = run(settings("all", "all", root=tmp_path / "coco"), tmp_path / "out")
    assert ids(calibration)[:10] == ids(evaluation)


@pytest.mark.parametrize(
    ("part", "split", "content", "message"),
    [
        ("evaluation", "val2017", '{"images": [{"id": 1}]}', "no list 'annotations'"),
        ("calibration", "train2017", '{"images": [', r"instances_train2017\.json is not valid"),
    ],
)
def test_a_broken_annotation_file_is_no_source(root, tmp_path, part, split, content, message):
    (root / f"annotations/instances_{split}.json").write_text(content)
    refused(settings(root=root), tmp_path, message)
    assert not (tmp_path / f"{part}_source.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": "nowhere"}, r"dataset root nowhere is not a folder"),
        ({"evaluation": {"split": "test"}}, "evaluation images should be in .*test, which is not"),
        (
            {"evaluation": {"split": "test", "image_folder": "val2017"}},
            r"instances_test\.json does not exist",
        ),
    ],
)
def test_settings_that_do_not_say_where_the_data_is(root, tmp_path, change, message):
    refused(settings(root=root) | change, tmp_path / "out", message)


def test_annotation_file_that_changed_after_its_check(root, tmp_path):
    config = settings(root=root)
    run(config, tmp_path)
    write(root, coco(range(1, 5)))
    with pytest.raises(QwtError, match=r"instances_val2017\.json is missing or has changed"):
        select(config, "evaluation", tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), r"are missing in .*val2017: 000003\.jpg, 000004\.jpg, "),
        (lambda path: os.truncate(path, 400), r"000003\.jpg cannot be decoded.*000004\.jpg cannot"),
    ],
)
def test_images_that_cannot_be_read(root, tmp_path, spoil, message):
    for number in range(3, 10):
        spoil(root / f"val2017/{number:06}.jpg")
    refused(settings(root=root), tmp_path / "out", rf"(?s)7 of 20 chosen images .*{message}")


def test_missing_images_that_were_not_chosen_do_not_matter(root, tmp_path):
    calibration, _ = run(settings(root=root), tmp_path / "a")
    for path in (root / "train2017").iterdir():
        if int(path.stem) not in ids(calibration):
            path.unlink()
    run(settings(root=root), tmp_path / "b")


def name_of_image_3(root: Path, name: str) -> None:
    content = coco(range(1, 21))
    content["images"][2]["file_name"] = name
    write(root, content)


@pytest.mark.parametrize(
    ("name", "link", "target"),
    [
        ("../../elsewhere/x.jpg", None, None),
        ("{}/elsewhere/x.jpg", None, None),
        (r"..\..\elsewhere\x.jpg", None, None),
        ("000003.jpg", "000003.jpg", "x.jpg"),
        ("link/x.jpg", "link", ""),
    ],
    ids=["dots", "absolute", "backslashes", "linked file", "linked folder"],
)
def test_images_outside_of_the_root_are_read_where_the_config_allows_it(
    root, tmp_path, name, link, target
):
    (tmp_path / "elsewhere").mkdir()
    (root / "val2017/000003.jpg").rename(tmp_path / "elsewhere/x.jpg")
    if link:
        (root / "val2017" / link).symlink_to(tmp_path / "elsewhere" / target)
    name_of_image_3(root, name.format(tmp_path))
    config = settings(root=root)
    said = refused(config, tmp_path / "out", "1 of 20 chosen images lie outside of the root")
    assert "set datasets.tiny.allow_outside_root: true" in said
    _, evaluation = run(config | {"allow_outside_root": True}, tmp_path / "out")
    assert ids(evaluation) == list(range(1, 21))


def test_links_and_folders_within_the_root_need_no_permission(root, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    (root / "val2017/000003.jpg").rename(root / "x.jpg")
    name_of_image_3(root, r"..\x.jpg")
    run(settings(root=tmp_path / "alias"), tmp_path / "out")
    # The config itself names a folder outside of the root.
    config = settings(root=root / "annotations")
    for part, split in zip(PARTS, SPLITS, strict=True):
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
    said = refused(config, tmp_path / "out", "1 of 20 chosen images")
    assert "(EXIF orientation 6, apply) is 16x24 pixels, but its annotation says 24x16" in said
    assert "it fits with exif: ignore" in said
    assert "set datasets.tiny.exif" in said
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
    write(root, content)
    _, evaluation = run(settings(root=root), tmp_path / "out")
    assert evaluation["info"]["exif_rotated"] == 1
    refused(settings(root=root, exif="ignore"), tmp_path / "other", "it fits with exif: apply")


OWN_MODULE = """
import json
from pathlib import Path
from qwt_mmdet.data.sources import Place, Source, register_source

@register_source("mylab.list")
class List(Source):
    def place(self, part):
        split = getattr(self.settings, part).split
        root = Path(self.settings.options["folder"], split)
        return Place(str(self.folder / f"{split}.json"), str(root), split)

    def prepare(self, part, most_bytes):
        place, images, boxes = self.place(part), [], []
        for path in Path(place.image_root).glob("*.jpg"):
            number = int(path.stem)
            images.append({"id": number, "file_name": path.name, "width": 24, "height": 16})
            boxes.append({"id": number, "image_id": number, "category_id": 1,
                          "bbox": [0, 0, 9, 9], "area": 81})
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
        self.folder.mkdir(exist_ok=True)
        Path(place.annotations).write_text(json.dumps(content))
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/mylab.py").write_text(OWN_MODULE)
    with tiny.restored(SOURCES):
        yield


def test_a_source_from_outside_of_the_package(root, tmp_path, own_module):
    config = settings(8, 5)
    own = config | {"type": "mylab.list", "options": {"folder": str(root)}}
    usual = run(config | {"root": str(root)}, tmp_path / "usual")
    assert [ids(part) for part in run(own, tmp_path / "own")] == [ids(part) for part in usual]
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
    refused({"type": kind, "options": {}}, tmp_path / "out", message)


ARCHIVE = "annotations/annotations_trainval2017.zip"


def zipped(root: Path, splits=SPLITS) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in splits:
            name = f"annotations/instances_{split}.json"
            archive.write(root / name, name)
            archive.writestr(f"annotations/captions_{split}.json", "{}")
    return content.getvalue()


def test_download_fetches_the_annotations_and_the_chosen_images_alone(root, tmp_path, server):
    """The choice is that of a local folder."""
    calibration, evaluation = run(settings(6, 4, url=server.base + "/"), tmp_path / "out")
    asked = [path for path, _ in server.requests]
    assert asked[0] == ARCHIVE
    chosen = [f"train2017/{i:06}.jpg" for i in ids(calibration)]
    chosen += [f"val2017/{i:06}.jpg" for i in ids(evaluation)]
    assert sorted(asked[1:]) == sorted(chosen)
    assert calibration["info"]["image_root"] == str(tmp_path / "out/images/train2017")
    local = run(settings(6, 4, root=root), tmp_path / "local")
    for one, other in zip(local, (calibration, evaluation), strict=True):
        assert one["images"] == other["images"]
        assert one["annotations"] == other["annotations"]
    for name in chosen:
        assert (tmp_path / "out/images" / name).read_bytes() == (root / name).read_bytes()
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path / "out")) for path in paths} == {
        *(f"images/{name}" for name in chosen),
        *(f"annotations/instances_{split}.json" for split in SPLITS),
        "origin.json",
        *(f"{part}{kind}.json" for part in PARTS for kind in ("_source", "", "_files")),
    }


def test_two_jobs_at_once_fetch_the_annotations_once(tmp_path, server):
    out, config = tmp_path / "out", settings(6, 4, url=server.base)
    with ThreadPoolExecutor() as executor:
        jobs = [
            executor.submit(prepare_dataset, config, part, folder=out, output=out / part)
            for part in PARTS
        ]
    assert all(job.result() is None for job in jobs)
    assert len(server.requests) == 1


def test_download_from_a_server_that_breaks_and_is_unavailable_now_and_then(
    tmp_path, monkeypatch, server
):
    # which file meets how many failures is up to the threads
    monkeypatch.setattr(download_module, "ATTEMPTS_WITHOUT_PROGRESS", 50)
    monkeypatch.setattr(download_module, "LONGEST_WAIT_SECONDS", 0.01)
    server.unavailable_every, server.drop_every = 4, 3
    calibration, evaluation = run(settings(30, "all", url=server.base), tmp_path / "out")
    assert len(server.requests) > 51
    assert (len(calibration["images"]), len(evaluation["images"])) == (30, 20)
    images = [path for path in (tmp_path / "out/images").rglob("*") if path.is_file()]
    assert len(images) == 50
    assert all(path.read_bytes() == jpeg(int(path.stem)) for path in images)


def test_interrupted_download_goes_on_with_what_is_missing(tmp_path, monkeypatch, server):
    monkeypatch.setattr(download_module, "ATTEMPTS_WITHOUT_PROGRESS", 1)
    config, out = settings(10, 5, url=server.base), tmp_path / "out"
    last = f"train2017/{draw(10, numbers=range(100, 140))[-1]:06}.jpg"
    server.plan[last].append(Status(503))
    refused(config, out, "could not be downloaded")
    assert not (out / "calibration.json").exists()
    there = {path.name for path in (out / "images").rglob("*.jpg")}
    assert there
    before = len(server.requests)
    run(config, out)
    again = {Path(path).name for path, _ in server.requests[before:]}
    assert not again & {*there, Path(ARCHIVE).name}
    before = len(server.requests)
    run(config, out)
    assert len(server.requests) == before  # everything is there and whole
    (out / "images" / last).write_bytes(b"rubbish")
    run(config, out)
    assert [path for path, _ in server.requests[before:]] == [last]


def test_a_downloaded_image_that_is_gone_is_noticed_and_fetched_again(root, tmp_path, server):
    out = tmp_path / "out"
    note = out / "evaluation_files.json"
    config = settings(3, 4, url=server.base)
    _, before = run(config, out)
    assert changed_files(note) == ""
    gone = f"val2017/{before['images'][1]['file_name']}"
    (out / "images" / gone).unlink()
    said = changed_files(note)  # a parameter of the rule: another value runs it again
    assert said != ""
    requests = len(server.requests)
    assert select(config, "evaluation", out, seen=said) == before
    assert [path for path, _ in server.requests[requests:]] == [gone]
    assert (out / "images" / gone).read_bytes() == (root / gone).read_bytes()
    assert changed_files(note) == said  # so that nothing runs a third time


def test_downloaded_annotations_that_are_gone_are_fetched_again(tmp_path, server):
    out, config = tmp_path / "out", settings(3, 4, url=server.base)
    _, before = run(config, out)
    (out / "annotations/instances_val2017.json").unlink()
    assert select(config, "evaluation", out) == before
    assert server.requests[-1][0] == ARCHIVE


def test_an_image_that_cannot_be_downloaded_is_not_stored(root, tmp_path, server):
    config = settings(2, url=server.base)
    server.files["val2017/000007.jpg"] = b"<html>busy</html>"
    refused(config, tmp_path / "out", r"val2017/000007\.jpg: .* cannot be decoded")
    assert not list((tmp_path / "out/images/val2017").glob("000007*"))
    del server.files["val2017/000007.jpg"]
    (root / "val2017/000007.jpg").unlink()
    refused(config, tmp_path / "out", r"val2017/000007\.jpg answered 404")


NOT_WHOLE = "is not a whole zip file"
LACKS = r"holds no annotations/instances_train2017\.json; it holds annotations/instances_val2017"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: zipped(root)[:1000], NOT_WHOLE),
        (lambda root: bytes(b ^ 255 * (i == 200) for i, b in enumerate(zipped(root))), NOT_WHOLE),
        (lambda root: zipped(root, ["val2017"]), LACKS),
    ],
    ids=["cut", "flipped", "lacks the split"],
)
def test_an_archive_without_annotations_is_refused(root, tmp_path, server, spoil, message):
    server.files[ARCHIVE] = spoil(root)
    refused(settings(2, url=server.base), tmp_path / "out", message)
    assert not list((tmp_path / "out").rglob("instances_train2017.json"))
    assert not list((tmp_path / "out").rglob("*.zip"))


def test_files_of_two_addresses_are_never_mixed(root, tmp_path, server):
    run(settings(2, 2, url=server.base), tmp_path / "out")
    (tmp_path / "out/evaluation.json").unlink()
    with FlakyServer({ARCHIVE: zipped(root)}, folder=root) as other:
        message = "remove that folder, or give the dataset another"
        refused(settings(2, 2, url=other.base), tmp_path / "out", message)


@pytest.mark.parametrize(
    "name", ["../../../evil.jpg", r"..\..\evil.jpg", "/tmp/evil.jpg", r"C:\evil.jpg"]
)
def test_file_names_that_lead_out_of_the_folder(root, tmp_path, server, name):
    name_of_image_3(root, name)
    server.files[ARCHIVE] = zipped(root)
    refused(settings(2, url=server.base), tmp_path / "out", "outside of the dataset's folder")
    assert not any("evil" in path for path, _ in server.requests)


@pytest.mark.parametrize("split", ["calibration", "val"])
def test_shapes_need_nothing_not_even_a_split_for_each_part(tmp_path, monkeypatch, split):
    monkeypatch.chdir(tmp_path)
    parts = {"calibration": {"split": split, "images": 4}, "evaluation": {"images": 5}}
    chosen = run({"type": "shapes", **parts}, Path("results/datasets/demo"), name="demo")
    assert [len(part["images"]) for part in chosen] == [4, 5]
    assert len({i for part in chosen for i in ids(part)}) == 9
    assert chosen[1]["annotations"]
    folders = [part["info"]["image_root"] for part in chosen]
    assert folders == [f"results/datasets/demo/{name}" for name in (split, "val")]
