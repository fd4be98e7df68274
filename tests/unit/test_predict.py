import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from pycocotools import mask as mask_api
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.data.batches import shard_of
from qwt_mmdet.errors import QwtError
from qwt_mmdet.evaluation.predict import Predictions, detections, predict
from qwt_mmdet.files import write_json
from qwt_mmdet.record import Quantization, Record
from qwt_mmdet.steps.evaluate import evaluate_detector, gathered
from random_detections import detection, one_object, write

CATEGORIES = {"categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]}

QUANTIZED = Record(quantization=Quantization(QuantizationSettings(8, 8)))
DETECTOR = {
    "cfg": {},
    "with_mask": False,
    "dataset_meta": {"classes": ("cat",)},
}


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(CATEGORIES))
    return path


def predicted(found, annotations):
    """What ``predict`` makes of a detector's detections in one image."""
    sample = DetDataSample(pred_instances=found, metainfo={"img_id": 42})
    return predict(Model([sample]), [{"inputs": [torch.zeros(3, 4, 4)]}], annotations)


def instances(**extra):
    return InstanceData(
        bboxes=torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 2.0, 2.0]]),
        scores=torch.tensor([0.5, 0.25]),
        labels=torch.tensor([1, 0]),
        **extra,
    ).to(tiny.device)


@pytest.mark.usefixtures("device")
def test_boxes_become_x_y_width_height():
    first, second = detections(instances(), 42, [3, 7])
    assert first == {"image_id": 42, "category_id": 7, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert second["category_id"] == 3


@pytest.mark.usefixtures("device")
def test_masks_survive_run_length_encoding():
    masks = torch.zeros(2, 10, 6, dtype=torch.bool)
    masks[0, 2:5, 1:3] = True
    results = detections(instances(masks=masks), 1, [3, 7])
    for result, mask in zip(results, masks, strict=True):
        assert np.array_equal(mask_api.decode(result["segmentation"]), mask.numpy())
        assert isinstance(result["segmentation"]["counts"], str)


@pytest.mark.usefixtures("device")
def test_detections_of_classes_that_the_annotations_lack_are_left_out():
    (only,) = detections(instances(), 42, [3, None])
    assert only == {"image_id": 42, "category_id": 3, "bbox": [0, 0, 2, 2], "score": 0.25}


@pytest.mark.parametrize(
    ("images", "batch_size", "shards"), [(10, 1, 3), (10, 4, 2), (3, 1, 5), (9, 4, 3), (1, 8, 1)]
)
def test_shards_hold_all_images_in_order_and_whole_batches(images, batch_size, shards):
    places = [shard_of(images, batch_size, (one, shards)) for one in range(1, shards + 1)]
    assert [i for place in places for i in range(images)[place]] == list(range(images))
    assert all(place.start % batch_size == 0 for place in places)


def test_what_shards_find_is_put_together_in_their_order(tmp_path):
    found = [Predictions([{"score": 0.1 + 0.2}], 1, True), Predictions([], 0, False)]
    paths = [tmp_path / f"{number}.json" for number in range(2)]
    for path, part in zip(paths, found, strict=True):
        write_json(path, part._asdict())
    assert gathered(paths) == Predictions([{"score": 0.1 + 0.2}], 1, True)


@pytest.mark.usefixtures("device")
def test_a_detection_that_is_left_out_for_its_class_is_finite(tmp_path):
    cats = {"categories": CATEGORIES["categories"][:1]}
    (tmp_path / "a.json").write_text(json.dumps(cats))
    found = predicted(instances(), tmp_path / "a.json")
    assert ([record["category_id"] for record in found.records], found.not_finite) == ([7], 0)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["bboxes", "scores"])
def test_detections_that_are_not_finite_are_left_out_and_counted(annotations, key, value):
    bad = instances(masks=torch.zeros(2, 10, 6, dtype=torch.bool))
    getattr(bad, key).view(-1)[0] = value
    found = predicted(bad, annotations)
    (record,) = found.records
    assert record["score"] == 0.25
    assert "segmentation" in record
    assert found.not_finite == 1


class Model:
    """Gives the same detections for each batch."""

    dataset_meta: ClassVar = {"classes": ("dog", "cat")}

    def __init__(self, samples):
        self.test_step = lambda batch: samples


def test_a_detector_without_a_detection_shows_its_masks(annotations):
    for extra in ({}, {"masks": torch.zeros(2, 10, 6, dtype=torch.bool)}):
        assert predicted(instances(**extra)[:0], annotations) == ([], 0, bool(extra))


BOX = [20.0, 30.0, 60.0, 50.0]


@pytest.mark.parametrize(
    ("records", "not_finite", "refused"),
    [([], 0, "makes no detection"), ([], 3, "^3 det"), ([detection(BOX, 0.5)], 7, "^7 det")],
)
def test_only_the_full_precision_detector_must_detect(tmp_path, records, not_finite, refused):
    path = write(tmp_path, one_object(BOX))
    found = Predictions(records, not_finite, True)
    with pytest.raises(QwtError, match=refused):
        evaluate_detector(SimpleNamespace(**DETECTOR), path, found=found)
    quantized = SimpleNamespace(**DETECTOR, qwt_record=QUANTIZED)
    metrics, kept = evaluate_detector(quantized, path, found=found)
    assert kept == records
    assert (metrics["collapsed"], metrics["not_finite"]) == (not records, not_finite)
    for ap in (metrics["bbox"]["AP"], metrics["segm"]["AP"], metrics["per_class"]["cat"]["segm"]):
        assert ap == pytest.approx(1.0 if records else 0.0)


class PaddingDetector:
    """Pads as mmdet does; each box is as large as what the network sees of its image."""

    dataset_meta: ClassVar = {"classes": ("cat", "dog")}

    def test_step(self, batch):
        seen = [max(image.shape[side] for image in batch["inputs"]) for side in (2, 1)]
        return [
            DetDataSample(
                metainfo={"img_id": number},
                pred_instances=InstanceData(
                    bboxes=torch.tensor([[0.0, 0.0, *seen]]),
                    scores=torch.tensor([0.5]),
                    labels=torch.tensor([0]),
                ),
            )
            for number in batch["data_samples"]
        ]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_image_of_a_batch_is_seen_as_it_would_be_alone(annotations, size):
    images = [torch.zeros(3, *shape) for shape in [(4, 6), (8, 6), (4, 6), (6, 4), (8, 6)]]
    loader = [
        {"inputs": images[i : i + size], "data_samples": list(range(i, min(5, i + size)))}
        for i in range(0, 5, size)
    ]
    found = predict(PaddingDetector(), loader, annotations).records
    assert [record["image_id"] for record in found] == [0, 1, 2, 3, 4]
    for record, image in zip(found, images, strict=True):
        assert record["bbox"] == [0, 0, image.shape[2], image.shape[1]]
