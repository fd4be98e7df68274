"""coco_metrics gives pycocotools' numbers, quietly, and refuses what is no result."""

import contextlib
import copy
import io
import json

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from qwt_mmdet.errors import QwtError
from qwt_mmdet.evaluation.bootstrap import bootstrap
from qwt_mmdet.evaluation.coco import AP_METRICS, AR_METRICS, coco_metrics
from random_detections import compressed, detection, one_object, random_detections, write

BOX = [20.0, 30.0, 60.0, 50.0]
SMALL = compressed([[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]], 20, 30)


def official_stats(annotations, predictions, iou_type):
    """The twelve numbers, as mmdet's CocoMetric has pycocotools compute them."""
    records = copy.deepcopy(predictions)
    if iou_type == "segm":
        for record in records:
            record.pop("bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(annotations))
        evaluator = COCOeval(ground_truth, ground_truth.loadRes(records), iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("scores", [None, 5])
def test_numbers_are_those_of_pycocotools(tmp_path, capsys, scores):
    """Nothing is printed, and predictions stay as they are."""
    sizes = {"images": 8, "detections": 25, "classes": 4}
    content, predictions = random_detections(**sizes, seed=3, scores=scores)
    path = write(tmp_path, content)
    before = copy.deepcopy(predictions)
    metrics = coco_metrics(path, predictions, masks=True)
    assert predictions == before
    assert capsys.readouterr().out == ""
    for iou_type in ("bbox", "segm"):
        evaluator = official_stats(path, predictions, iou_type)
        official = dict(zip([*AP_METRICS, *AR_METRICS], evaluator.stats, strict=True))
        assert metrics[iou_type] == official
        assert 0 < official["AP"] < 1
        for index, category in enumerate(evaluator.params.catIds):
            precision = evaluator.eval["precision"][:, :, index, 0, -1]
            expected = precision.mean() if precision.min() > -1 else None
            assert metrics["per_class"][f"class {category}"][iou_type] == expected
    assert metrics["images"] == 8


def test_some_classes_are_measured_as_if_the_file_had_no_others(tmp_path):
    content, predictions = random_detections(images=8, detections=25, classes=4, seed=3)
    few = copy.deepcopy(content)
    few["categories"] = few["categories"][1:3]
    kept = [category["id"] for category in few["categories"]]
    few["annotations"] = [a for a in few["annotations"] if a["category_id"] in kept]
    found = [record for record in predictions if record["category_id"] in kept]
    classes = [category["name"] for category in few["categories"]] + ["a class without objects"]
    expected = coco_metrics(write(tmp_path, few, "few.json"), found, masks=True)
    path = write(tmp_path, content)
    assert coco_metrics(path, found, masks=True, classes=classes) == expected
    statistics = bootstrap(path, {"a": found}, masks=True, classes=classes, resamples=10)
    for kind in ("bbox", "segm"):
        assert statistics.values["a"][kind]["AP"] == pytest.approx(expected[kind]["AP"], abs=1e-9)


def test_more_than_a_hundred_detections_of_a_class_are_cut(tmp_path):
    path = write(tmp_path, one_object(BOX))
    elsewhere = [detection([200, 150, 20, 20], 0.9) for _ in range(100)]
    found = detection(BOX, 0.1)
    assert coco_metrics(path, [*elsewhere, found], masks=False)["bbox"]["AP"] == 0
    assert coco_metrics(path, [*elsewhere[1:], found], masks=False)["bbox"]["AP"] > 0


def test_size_of_a_detected_mask_is_its_area_not_its_box(tmp_path):
    # The false positive ranks first. Its mask is small, so it counts against small objects, although
    # its box is larger than 32 x 32.
    small = [5.0, 5.0, 20.0, 20.0]
    path = write(tmp_path, one_object(small, area=300))
    line = compressed([[100.0, 100.0, 160.0, 160.0, 162.0, 160.0, 102.0, 100.0]])
    false_positive = detection([100.0, 100.0, 62.0, 60.0], 0.9, segmentation=line)
    metrics = coco_metrics(path, [false_positive, detection(small, 0.8)], masks=True)
    assert metrics["bbox"]["APs"] == pytest.approx(1.0)
    assert metrics["segm"]["APs"] == pytest.approx(0.5)


def test_what_no_object_defines_is_none(tmp_path):
    content = one_object(BOX)
    content["categories"].append({"id": 2, "name": "dog"})
    content["annotations"].append({**content["annotations"][0], "id": 2, "iscrowd": 1})
    metrics = coco_metrics(write(tmp_path, content), [detection(BOX, 0.5)], masks=False)
    assert metrics["bbox"]["APm"] == pytest.approx(1.0)
    assert metrics["bbox"]["APs"] is metrics["bbox"]["APl"] is metrics["bbox"]["ARs"] is None
    assert metrics["per_class"]["cat"] == {"bbox": pytest.approx(1.0), "annotations": 1}
    assert metrics["per_class"]["dog"] == {"bbox": None, "annotations": 0}
    json.dumps(metrics, allow_nan=False)


def test_an_annotation_with_id_zero_can_be_found(tmp_path):
    # COCOeval itself takes a match with object 0 for no match.
    path = write(tmp_path, one_object(BOX, id=0))
    assert official_stats(path, [detection(BOX, 0.5)], "bbox").stats[0] == 0
    metrics = coco_metrics(path, [detection(BOX, 0.5)], masks=False)
    assert metrics["bbox"]["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (detection(BOX, float("nan")), "image 1 has score nan"),
        (detection([0.0, 0.0, float("inf"), 1.0], 0.5), "image 1 .* inf"),
        (detection(BOX, 0.5, image_id=7), "image 7, which is not in the annotation file"),
        (detection(BOX, 0.5, category_id=9), "category 9, which is not in the annotation file"),
        (detection(BOX, 0.5, segmentation=None), "image 1 has no compressed RLE mask"),
        (
            detection(BOX, 0.5, segmentation=SMALL),
            r"mask of \[20, 30\], the image has \[200, 260\]",
        ),
        ({"image_id": 1, "category_id": 1, "bbox": BOX}, "image 1 has no 'score'"),
    ],
)
def test_a_prediction_that_is_no_result_is_refused(tmp_path, record, message):
    with pytest.raises(QwtError, match=message):
        coco_metrics(write(tmp_path, one_object(BOX)), [detection(BOX, 0.5), record], masks=True)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "no ground truth objects"),
        (one_object(BOX, iscrowd=1)["annotations"], "no ground truth objects"),
        (one_object(BOX, segmentation=[])["annotations"], "has no mask"),
        (None, "no list 'annotations'"),
    ],
)
def test_a_broken_annotation_file_is_refused(tmp_path, annotations, message):
    """What else is refused is in test_annotations."""
    content = one_object(BOX) | {"annotations": annotations}
    with pytest.raises(QwtError, match=message):
        coco_metrics(write(tmp_path, content), [detection(BOX, 0.5)], masks=True)
