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
from qwt_mmdet.steps import evaluate as steps_evaluate
from qwt_mmdet.steps.evaluate import evaluate_detector, gathered
from random_detections import detection, one_object, write

CATEGORIES = {"categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]}

QUANTIZED = Record(quantization=Quantization(QuantizationSettings(8, 8)))
DETECTOR = {
    "cfg": {},
    "with_mask": False,
    "dataset_meta": {"classes": ("cat",)},
    "parameters": list,
}


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
    sample = DetDataSample(pred_instances=instances(), metainfo={"img_id": 42})
    found = predict(Model([sample]), [{"inputs": [torch.zeros(3, 4, 4)]}], tmp_path / "a.json")
    assert ([record["category_id"] for record in found.records], found.not_finite) == ([7], 0)


def test_no_detection_gives_no_record():
    empty = InstanceData(
        bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 10, 6, dtype=torch.bool),
    )  # fmt: skip
    assert detections(empty, 1, [3, 7]) == []


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["bboxes", "scores"])
def test_detections_that_are_not_finite_are_left_out_and_counted(tmp_path, key, value):
    bad = instances(masks=torch.zeros(2, 10, 6, dtype=torch.bool))
    getattr(bad, key).view(-1)[0] = value
    sample = DetDataSample(pred_instances=bad, metainfo={"img_id": 42})
    (tmp_path / "a.json").write_text(json.dumps(CATEGORIES))
    found = predict(Model([sample]), [{"inputs": [torch.zeros(3, 4, 4)]}], tmp_path / "a.json")
    (record,) = found.records
    assert record["score"] == 0.25
    assert "segmentation" in record
    assert found.not_finite == 1


class Model:
    """Gives the same detections for each batch."""

    dataset_meta: ClassVar = {"classes": ("dog", "cat")}

    def __init__(self, samples):
        self.test_step = lambda batch: samples


def test_a_detector_without_a_detection_shows_its_masks(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(CATEGORIES))
    for extra in ({}, {"masks": torch.zeros(2, 10, 6, dtype=torch.bool)}):
        nothing = instances(**extra)[:0]
        sample = DetDataSample(pred_instances=nothing, metainfo={"img_id": 42})
        found = predict(Model([sample]), [{"inputs": [torch.zeros(3, 4, 4)]}], tmp_path / "a.json")
        assert found == ([], 0, bool(extra))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Predictions([], 0, False), "makes no detection"),
        (Predictions([{}], 3, False), "^3 det"),
    ],
)
def test_only_the_full_precision_detector_must_detect(tmp_path, monkeypatch, found, message):
    path = write(tmp_path, one_object([20.0, 30.0, 60.0, 50.0]))
    loader = SimpleNamespace(dataset=[0])
    monkeypatch.setattr(steps_evaluate, "make_loader", lambda *args, **kwargs: loader)
    monkeypatch.setattr(steps_evaluate, "predict", lambda *args, **kwargs: found)
    with pytest.raises(QwtError, match=message):
        evaluate_detector(SimpleNamespace(**DETECTOR), path)
    found = found._replace(records=[], masks=True)
    quantized = SimpleNamespace(**DETECTOR, qwt_record=QUANTIZED)
    metrics, records = evaluate_detector(quantized, path)
    assert records == []
    assert metrics["collapsed"] is True
    assert metrics["not_finite"] == found.not_finite
    assert (
        metrics["bbox"]["AP"] == metrics["segm"]["AP"] == metrics["per_class"]["cat"]["segm"] == 0
    )


def test_a_quantized_detector_that_finds_something_has_not_collapsed(tmp_path, monkeypatch):
    box = [20.0, 30.0, 60.0, 50.0]
    path = write(tmp_path, one_object(box))
    found = Predictions([detection(box, 0.5)], 7, True)
    loader = SimpleNamespace(dataset=[0])
    monkeypatch.setattr(steps_evaluate, "make_loader", lambda *args, **kwargs: loader)
    monkeypatch.setattr(steps_evaluate, "predict", lambda *args, **kwargs: found)
    metrics, _ = evaluate_detector(SimpleNamespace(**DETECTOR, qwt_record=QUANTIZED), path)
    assert metrics["bbox"]["AP"] == pytest.approx(1)
    assert (metrics["collapsed"], metrics["not_finite"]) == (False, 7)


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
def test_each_image_of_a_batch_is_seen_as_it_would_be_alone(tmp_path, size):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(CATEGORIES))
    images = [torch.zeros(3, *shape) for shape in [(4, 6), (8, 6), (4, 6), (6, 4), (8, 6)]]
    loader = [
        {"inputs": images[i : i + size], "data_samples": list(range(i, min(5, i + size)))}
        for i in range(0, 5, size)
    ]
    found = predict(PaddingDetector(), loader, path).records
    assert [record["image_id"] for record in found] == [0, 1, 2, 3, 4]
    for record, image in zip(found, images, strict=True):
        assert record["bbox"] == [0, 0, image.shape[2], image.shape[1]]
