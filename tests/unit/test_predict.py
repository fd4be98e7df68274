import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from pycocotools import mask as mask_api
from qwt_mmdet.errors import QwtError
from qwt_mmdet.evaluation.predict import category_ids, detections

CATEGORIES = {"categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]}


def instances(**extra):
    return InstanceData(
        bboxes=torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 2.0, 2.0]]),
        scores=torch.tensor([0.5, 0.25]),
        labels=torch.tensor([1, 0]),
        **extra,
    )


def test_category_ids_are_matched_by_name_not_by_order():
    assert category_ids(("dog", "cat"), CATEGORIES) == [3, 7]


@pytest.mark.parametrize("classes", [("dog",), ("dog", "cat", "cow")])
def test_classes_that_differ_show_both_lists(classes):
    with pytest.raises(QwtError, match=f"Model: {', '.join(classes)}.*Annotations: cat, dog"):
        category_ids(classes, CATEGORIES)


def test_boxes_become_x_y_width_height():
    first, second = detections(instances(), 42, [3, 7])
    assert first == {"image_id": 42, "category_id": 7, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert second["category_id"] == 3


def test_masks_survive_run_length_encoding():
    masks = torch.zeros(2, 10, 6, dtype=torch.bool)
    masks[0, 2:5, 1:3] = True
    results = detections(instances(masks=masks), 1, [3, 7])
    for result, mask in zip(results, masks, strict=True):
        assert np.array_equal(mask_api.decode(result["segmentation"]), mask.numpy())
        assert isinstance(result["segmentation"]["counts"], str)


def test_no_detection_gives_no_record():
    empty = InstanceData(
        bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 10, 6, dtype=torch.bool),
    )  # fmt: skip
    assert detections(empty, 1, [3, 7]) == []


@pytest.mark.parametrize("key", ["bboxes", "scores"])
def test_values_that_are_not_finite_name_the_image(key):
    bad = instances()
    getattr(bad, key).view(-1)[0] = float("nan")
    with pytest.raises(QwtError, match="image 42"):
        detections(bad, 42, [3, 7])
