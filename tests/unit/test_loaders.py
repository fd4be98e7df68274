import json

import cv2
import numpy as np
import pytest
from qwt_mmdet.detectors import read_config
from qwt_mmdet.errors import QwtError
from qwt_mmdet.loaders import make_loader

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
