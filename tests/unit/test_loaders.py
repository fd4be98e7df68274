import json
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from qwt_mmdet.data.loaders import make_loader
from qwt_mmdet.detectors.build import read_config
from qwt_mmdet.errors import QwtError
from qwt_mmdet.inference import run_on_images

NANO = "yolox/yolox_nano_8xb8-300e_coco.py"


@pytest.fixture
def annotations(tmp_path):
    (tmp_path / "images").mkdir()
    images = []
    for index, (height, width) in enumerate([(40, 60), (90, 30), (50, 50)]):
        name = f"{index}.png"
        pixels = np.full((height, width, 3), 10 * index, np.uint8)
        cv2.imwrite(str(tmp_path / "images" / name), pixels)
        images.append({"id": index + 5, "file_name": name, "height": height, "width": width})
    path = tmp_path / "annotations.json"
    content = {"images": images, "annotations": [], "categories": []}
    path.write_text(json.dumps({**content, "info": {"image_root": str(tmp_path / "images")}}))
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_images_come_in_order_at_the_configs_resolution(annotations, workers):
    loader = make_loader(read_config(NANO), annotations, batch_size=2, workers=workers)
    batches = list(loader)
    assert [len(batch["inputs"]) for batch in batches] == [2, 1]
    samples = [sample for batch in batches for sample in batch["data_samples"]]
    assert [sample.img_id for sample in samples] == [5, 6, 7]
    assert all(tuple(image.shape) == (3, 416, 416) for b in batches for image in b["inputs"])
    assert samples[0].ori_shape == (40, 60)
    # The second image has value 10, and 114 where it is padded.
    assert set(batches[0]["inputs"][1].unique().tolist()) == {10, 114}


def test_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(QwtError, match=r"absent\.json does not exist"):
        make_loader(read_config(NANO), tmp_path / "absent.json")


def test_annotation_file_that_does_not_say_where_its_images_are(annotations):
    content = json.loads(annotations.read_text())
    for root, remedy in (("gone", "work in the run's folder"), ("/gone", "put it back.$")):
        annotations.write_text(json.dumps({**content, "info": {"image_root": root}}))
        with pytest.raises(QwtError, match=f"image folder {root} of .* does not exist.*{remedy}"):
            make_loader(read_config(NANO), annotations)
    annotations.write_text(json.dumps({**content, "info": {}}))
    with pytest.raises(
        QwtError, match=r"annotations\.json has no info\.image_root; put the folder"
    ):
        make_loader(read_config(NANO), annotations)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_not_what_it_was_is_named(annotations, workers):
    image = annotations.parent / "images" / "1.png"
    whole = image.read_bytes()

    def read():
        return list(make_loader(read_config(NANO), annotations, workers=workers))

    for content in (b"", whole[: len(whole) // 2], b"<html>"):
        image.write_bytes(content)
        with pytest.raises(QwtError, match=r"1\.png cannot be .* Put it back") as caught:
            read()
        assert "Traceback" not in str(caught.value)
    image.unlink()
    with pytest.raises(QwtError, match=r"1\.png .*No such file.* Put it back"):
        read()
    content = json.loads(annotations.read_text())
    content["images"][1] |= {"width": 1, "height": 3000}
    annotations.write_text(json.dumps(content))
    cv2.imwrite(str(image), np.zeros((3000, 1, 3), np.uint8))
    with pytest.raises(
        QwtError, match=r"cannot prepare .*1\.png \(1x3000 pixels\).*take this image"
    ):  # before the first image
        make_loader(read_config(NANO), annotations, workers=workers)
    model = SimpleNamespace(cfg=read_config(NANO), dataset_meta={"classes": ("thing",)})
    with pytest.raises(QwtError, match=r"cannot prepare .*1\.png \(1x3000 pixels\)"):
        run_on_images(model, [image], annotations.parent / "found")


@pytest.mark.parametrize("workers", [0, 1])
def test_faults_of_the_machine_come_out_of_a_reading_process_as_they_are(
    annotations, workers, monkeypatch
):
    loader = make_loader(read_config(NANO), annotations, workers=workers)
    for error in (OSError(24, "Too many open files", "1.png"), MemoryError("no room")):
        monkeypatch.setattr(loader.dataset, "pipeline", Mock(side_effect=error))
        with pytest.raises(type(error)) as caught:
            list(loader)
        assert caught.value.args == error.args


def test_exif_decides_how_the_pipeline_reads_whatever_it_says_itself(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=orientation)
    Image.fromarray(pixels).save(tmp_path / "upright.png")

    def read(name, exif, **step):
        config = read_config(NANO)
        config.test_dataloader.dataset.pipeline[0].update(step)
        size = {"height": 60, "width": 40} if exif == "apply" else {"height": 40, "width": 60}
        info = {"image_root": str(tmp_path), "exif": exif, "exif_rotated": 1}
        content = {"images": [{"id": 1, "file_name": name, **size}], "info": info}
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps({**content, "annotations": [], "categories": []}))
        (batch,) = make_loader(config, path)
        return batch["inputs"][0], batch["data_samples"][0].ori_shape

    for flag in ("color", "color_ignore_orientation"):
        ignored, shape = read("turned.png", "ignore", color_type=flag)
        assert torch.equal(ignored, read("upright.png", "apply")[0])
        assert shape == (40, 60)
        assert read("turned.png", "apply", color_type=flag)[1] == (60, 40)
    with pytest.raises(QwtError, match="1 images have an EXIF rotation; set exif: ignore"):
        read("turned.png", "apply", color_type="unchanged")
