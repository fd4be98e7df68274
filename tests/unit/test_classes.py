"""Outputs of heads, names in config and checkpoint, categories of annotations."""

import logging
import re

import pytest
import yaml
from mmengine.config import Config
from mmengine.model import BaseModule
from qwt_mmdet.detectors.classes import (
    category_ids,
    check_annotations,
    class_names,
    config_names,
    head_outputs,
    log_left_out,
)
from qwt_mmdet.errors import QwtError
from torch import nn

COCO = {"type": "CocoDataset"}
AB = {"classes": ["a", "b"]}


def config(dataset=None, **other):
    return Config({"test_dataloader": {"dataset": dataset or COCO}, **other})


def named(*names):
    return {**COCO, "metainfo": {"classes": names}}


class Detector(BaseModule):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_heads_are_counted_but_for_proposals_and_masks_of_any_class():
    head = {count: Detector(num_classes=count) for count in (1, 3, 183)}
    roi_head = Detector(
        bbox_head=nn.ModuleList([head[3], Detector(num_classes=3, loss_cls=Detector(num_classes=9))]),
        mask_head=Detector(num_classes=7, class_agnostic=True), semantic_head=head[183],
    )  # fmt: skip
    detector = Detector(rpn_head=head[1], roi_head=roi_head, bbox_head=None)
    assert head_outputs(detector) == {"roi_head.bbox_head.0": 3, "roi_head.bbox_head.1": 3}


@pytest.mark.parametrize(
    "given",
    [
        config(named("a", "b")),
        config(COCO, metainfo=AB),
        config({**COCO, "metainfo": {"CLASSES": ["a", "b"]}}, metainfo={"classes": ("c",)}),
        config({"type": "RepeatDataset", "times": 2, "dataset": named("a", "b")}),
        config({"type": "ConcatDataset", "datasets": [named("a", "b"), named("a", "b")]}),
        config({"type": "ConcatDataset", "datasets": [COCO, COCO]}, metainfo=AB),
    ],
)
def test_names_are_found_wherever_a_config_keeps_them(given):
    assert class_names(given, {"bbox_head": 2}) == ("a", "b")


def test_names_without_any_come_from_the_type_of_the_data_set():
    assert class_names(config(), {"bbox_head": 80})[:2] == ("person", "bicycle")


def test_a_plain_string_is_one_class_or_a_file_of_names(tmp_path):
    one = config({**COCO, "metainfo": {"classes": "person"}})
    assert class_names(one, {"bbox_head": 1}) == ("person",)
    with pytest.raises(QwtError, match=r"names 1 class \(person\).*bbox_head\) has 2 outputs"):
        class_names(one, {"bbox_head": 2})
    file = config({**COCO, "metainfo": {"classes": str(tmp_path / "classes.txt")}})
    for text in ("a\nb\n", "\ufeffa\r\nb\r\n"):
        (tmp_path / "classes.txt").write_bytes(text.encode())
        assert class_names(file, {"bbox_head": 2}) == ("a", "b")
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(QwtError, match=r"list of classes .*classes\.txt cannot be read: 'utf-8'"):
        class_names(file, {"bbox_head": 2})


@pytest.mark.parametrize("value", [[], 3, [1, 2], ["a", "a"], {"a": 1}])
def test_other_values_are_no_names(value):
    with pytest.raises(QwtError, match=r"metainfo\.classes"):
        config_names(config({**COCO, "metainfo": {"classes": value}}))


@pytest.mark.parametrize(
    ("given", "outputs", "message"),
    [
        (config(), {"bbox_head": 80, "mask_head": 3}, "bbox_head 80, mask_head 3; set num_classes"),
        (
            config({"type": "ConcatDataset", "datasets": [named("a"), named("b")]}),
            {"bbox_head": 1},
            r"datasets\.0\.metainfo.* and .*datasets\.1\.metainfo",
        ),
    ],
)
def test_heads_or_data_sets_that_differ_are_named(given, outputs, message):
    with pytest.raises(QwtError, match=message):
        class_names(given, outputs)


@pytest.mark.parametrize(
    "given",
    [
        config(),
        config(named("a", "b", "c", "d")),
        config({"type": "Unknown"}),
        config({"type": "RepeatDataset", "dataset": COCO}),
        config({"type": "ConcatDataset", "datasets": [named("a", "b")]}),
    ],
)
def test_the_line_that_a_message_shows_mends_the_config(given):
    with pytest.raises(QwtError, match=r"head \(h\) has 3 outputs") as caught:
        class_names(given, {"h": 3})
    (line,) = re.findall(r"config_options: \{.*\]\}", str(caught.value))
    options = yaml.safe_load(line)["config_options"]
    given.merge_from_dict(options)
    assert class_names(given, {"h": 3}) == ("name of label 0", "name of label 1", "name of label 2")


def test_the_order_is_the_checkpoints(caplog):
    outputs = {"bbox_head": 3}
    trained = ["a", "b", "c"]
    assert class_names(config(), outputs, trained) == ("a", "b", "c")
    assert class_names(config(named("c", "b", "a")), outputs, trained) == ("a", "b", "c")
    assert "another order than the checkpoint" in caplog.text


def test_a_class_of_another_name_keeps_the_configs(caplog):
    assert class_names(config(named("a", "B")), {"h": 2}, ["a", "b"]) == ("a", "B")
    assert "b → B" in caplog.text


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a", "d"), ("a", "c", "b2")])
def test_names_that_contradict_the_checkpoint_can_be_removed(names):
    with pytest.raises(QwtError, match=r"remove metainfo\.classes from the model config"):
        class_names(config(named(*names)), {"h": 3}, ["a", "b", "c"])
    assert class_names(config(), {"h": 3}, ["a", "b", "c"]) == ("a", "b", "c")


def test_names_of_a_checkpoint_that_its_head_does_not_have_are_not_used(caplog):
    assert class_names(config(named("a", "b")), {"h": 2}, ["a", "b", "c"]) == ("a", "b")
    assert "its names are not used" in caplog.text


def annotations(*names):
    return {"categories": [{"id": 10 - i, "name": name} for i, name in enumerate(names)]}


def test_categories_are_matched_by_name_and_either_side_may_lack_classes(caplog):
    caplog.set_level(logging.INFO)
    assert category_ids(("dog", "cat"), annotations("cat", "dog")) == [9, 10]
    assert category_ids(("dog", "cow", "cat"), annotations("cat", "dog")) == [9, None, 10]
    assert category_ids(("dog",), annotations("cat", "dog")) == [9]
    log_left_out(("dog", "cow"), annotations("cat", "dog"))
    log_left_out(("dog", "cow"), annotations("cat", "dog"), logging.INFO)
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "model has no" in r.message]
    assert said == [
        (level, "Not evaluated, since the model has no such class: cat")
        for level in ("WARNING", "INFO")
    ]


@pytest.mark.parametrize("classes", [("dog", "Cat"), ("cow",), ("DOG", "CAT", "COW")])
def test_classes_that_both_sides_lack_may_be_misspelled(classes):
    message = f"Only the model has: .*{classes[-1]}.*Only the annotations"
    with pytest.raises(QwtError, match=message):
        category_ids(classes, annotations("cat", "dog"))


def test_masks_are_needed_where_the_detector_predicts_some():
    boxes = {**annotations("dog"), "annotations": [{"bbox": [0, 0, 1, 1]}]}
    detector = Detector(dataset_meta={"classes": ("dog",)}, with_mask=False)
    check_annotations(detector, boxes)
    detector.with_mask = True
    with pytest.raises(QwtError, match="predicts masks, but the annotations have none; take"):
        check_annotations(detector, boxes)
    boxes["annotations"].append({"segmentation": [[0, 0, 1, 0, 1, 1]]})
    check_annotations(detector, boxes)
