"""Detectors of MMDetection: configs that are refused, weights that arrive, what mmdet gets wrong."""

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from qwt_mmdet.detectors import build
from qwt_mmdet.detectors.build import (
    load_detector,
    random_detector,
    read_config,
    resolve_config,
    without_training,
)
from qwt_mmdet.detectors.forward import count_operations
from qwt_mmdet.errors import LONGEST_REASON, QwtError, reason
from qwt_mmdet.inference import run_on_images
from qwt_mmdet.record import record_of
from qwt_mmdet.steps.fetch import fetch_checkpoint
from torch import nn

NANO = "yolox/yolox_nano_8xb8-300e_coco.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = random_detector(NANO)
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {}}, path)
    return path


def own(tmp_path, lines: str, base: str = NANO):
    """A config that changes one of the zoo."""
    (tmp_path / "own.py").write_text(f"_base_ = {str(resolve_config(base))!r}\n{lines}\n")
    return tmp_path / "own.py"


def test_zoo_names_and_paths_are_found():
    path = resolve_config(NANO)
    assert path.is_file()
    assert resolve_config(path) == path
    with pytest.raises(QwtError, match="yolox_nano_8xb8-300e_coco"):
        resolve_config("yolox/yolox_nano_8xb8_300e_coco.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", r"own\.py cannot be read"),
        ("model = dict(type='YOLOX')", "test_dataloader"),
    ],
)
def test_broken_and_incomplete_configs_are_named(tmp_path, text, message):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(QwtError, match=message):
        read_config(tmp_path / "own.py")


SOFT_TEACHER = "soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py"
QDTRACK = "qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py"


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ("pascal_voc/retinanet_r50_fpn_1x_voc0712.py", "VOCMetric"),
        ("panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py", "panoptic"),
        (f"soft_teacher/{SOFT_TEACHER}", "semi-supervised"),
        ("fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py", "proposals that another model made"),
        ("rpn/rpn_r50_fpn_1x_coco.py", "region proposals"),
        (f"qdtrack/{QDTRACK}", "videos"),
        ("glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py", "transformers"),
    ],
)
def test_other_tasks_are_refused(config, task):
    with pytest.raises(QwtError, match=rf"{task}.*(give|take|cannot)"):
        read_config(config)


def test_weights_arrive_and_the_model_is_ready(checkpoint, device):
    model = load_detector(NANO, checkpoint, device=str(device))
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value.cpu(), saved[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert model.dataset_meta["classes"][:2] == ("person", "bicycle")
    assert len(model.dataset_meta["classes"]) == 80


def test_fingerprint_follows_weights_and_config(checkpoint, tmp_path):
    first = record_of(load_detector(NANO, checkpoint)).fingerprint
    assert record_of(load_detector(NANO, checkpoint)).fingerprint == first
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["backbone.stem.conv.bn.bias"][0] += 1e-6
    changed = tmp_path / "changed.pth"
    torch.save(content, changed)
    other = record_of(load_detector(NANO, changed)).fingerprint
    assert other["model"] == first["model"]
    assert other["weights"] != first["weights"]
    options = {"model.test_cfg.score_thr": 0.5}
    other = record_of(load_detector(NANO, checkpoint, config_options=options)).fingerprint
    assert other["model"] != first["model"]


def test_checkpoint_of_another_model_lists_the_keys(checkpoint):
    with pytest.raises(QwtError, match=r"(?s)nano\.pth.*missing.*unexpected") as caught:
        load_detector("yolox/yolox_tiny_8xb8-300e_coco.py", checkpoint)
    assert "backbone.stem.conv.conv.weight" in str(caught.value)


def test_fcos_with_the_names_of_mmdet_1(tmp_path):
    config = "fcos/fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py"
    new = random_detector(config).state_dict()
    old = {
        key.replace("bbox_head.conv_", "bbox_head.fcos_").replace(
            ".conv2.conv_offset.", ".conv2_offset."
        ): value
        for key, value in new.items()
    }
    assert len(old.keys() - new.keys()) > 10
    torch.save({"state_dict": old, "meta": {}}, tmp_path / "fcos.pth")
    fetch_checkpoint(tmp_path / "fcos.pth", tmp_path / "fetched.pth")
    loaded = load_detector(config, tmp_path / "fetched.pth").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in new.items())


def test_the_names_of_the_checkpoint_are_those_of_its_labels(tmp_path):
    options = {"model.bbox_head.num_classes": 2}
    path = tmp_path / "two.pth"
    names = {"test_dataloader.dataset.metainfo.classes": ["cat", "dog"]}
    state = random_detector(NANO, options | names).state_dict()
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": ("dog", "cat")}}}, path)
    for given in ({}, names):
        model = load_detector(NANO, path, config_options=options | given)
        assert model.dataset_meta["classes"] == ("dog", "cat")
    with pytest.raises(QwtError, match=r"CocoDataset has 80 classes.*2 outputs"):
        random_detector(NANO, options)


PIPELINE = "test_dataloader = dict(dataset=dict(pipeline=[%s]))"
TTA = "dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[])"
GREY = "data_preprocessor=dict(mean=[{0}], std=[{0}], bgr_to_rgb=False)"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("model = dict(bbox_head=dict(type='NoSuchHead'))", "cannot be built.*NoSuchHead"),
        ("custom_imports = dict(imports=['no_such_module.part'])", "Python module no_such_module"),
        ("custom_imports = dict(imports=['mmpretrain.models'])", "pip install mmpretrain"),
        (PIPELINE % TTA, r"TestTimeAug.*set test_dataloader\.dataset\.pipeline"),
        ("model = dict(_delete_=True, type='DetTTAModel')", "test-time augmentation"),
        (f"model = dict({GREY.format(1.0)}, backbone=dict(type='ResNet', depth=18, in_channels=1, "
         "_delete_=True))", "set its color_type to 'grayscale'"),
        ("model = [1]", "a model that is .*should be a dict"),
        ("model = dict(backbone='ResNet')", r"a model\.backbone that is 'ResNet'; it should be a d"),
        ("model = dict(backbone=None)", "cannot be built"),
        ("model = dict(data_preprocessor=None)", r"no model\.data_preprocessor.*set it"),
        ("metainfo = 'person'", "a metainfo that is 'person'; it should be a dict"),
        ("test_dataloader = dict(dataset=dict(metainfo=['person']))",
         r"a test_dataloader\.dataset\.metainfo that is .*should be a dict"),
        ("test_dataloader = dict(_delete_=True, dataset=[dict(type='CocoDataset')])",
         r"a test_dataloader\.dataset that is .*should be a dict"),
        (PIPELINE % "'LoadImage'", r"pipeline\.0 that is 'LoadImage'; it should be a dict"),
        (PIPELINE % "dict(scale=3)", r"has no test_dataloader\.dataset\.pipeline\.0\.type; add it"),
        ("test_evaluator = 'CocoMetric'", "a test_evaluator that is .*a dict or list of dicts"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_one_short_sentence(tmp_path, lines, message):
    config = own(tmp_path, lines)
    with pytest.raises(QwtError, match=message) as caught:
        random_detector(config)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + 2 * len(str(config))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("mmdet.configs.rtmdet.rtmdet_tiny_8xb32_300e_coco", "wheel does not hold.*'mmdet::"),
        (".missing", r"takes \.missing as its base \(read_base\), but there is no such file"),
        ("mmnowhere.configs.some", "Python module mmnowhere"),
    ],
)
def test_a_base_that_python_would_import_is_named(tmp_path, base, message):
    text = f"from mmengine.config import read_base\nwith read_base():\n    from {base} import *\n"
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(QwtError, match=rf"{message}.*\.$"):
        random_detector(tmp_path / "own.py")


def test_a_line_of_several_thousand_letters_is_cut():
    assert len(reason(ValueError(torch.rand(10_000).tolist()))) == LONGEST_REASON


def test_ssd_predicts():
    options = {"model.bbox_head.num_classes": 2}
    options |= {"test_dataloader.dataset.metainfo.classes": ["a", "b"]}
    model = random_detector("ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py", options)
    sample = DetDataSample()
    sample.set_metainfo(
        {"img_shape": (320, 320), "ori_shape": (320, 320), "scale_factor": (1.0, 1.0)}
    )
    with torch.no_grad():
        (found,) = model.predict(torch.rand(1, 3, 320, 320), [sample])
    assert set(found.pred_instances.labels.tolist()) <= {0, 1}


def test_a_detector_of_one_channel_reads_grey_images(tmp_path):
    steps = (
        "dict(type='LoadImageFromFile', color_type='grayscale'),"
        "dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='PackDetInputs')"
    )
    lines = (
        f"model = dict({GREY.format(99.0)}, neck=dict(in_channels=[8, 16, 32, 64]),"
        f"backbone=dict(in_channels=1, base_channels=8, stem_channels=8))\n{PIPELINE % steps}"
    )
    config = own(tmp_path, lines, "retinanet/retinanet_r18_fpn_1x_coco.py")
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    assert run_on_images(random_detector(config), [image], tmp_path / "out") >= 0
    assert (tmp_path / "out" / "predictions.json").is_file()


def test_a_config_brings_modules_of_its_own(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "own_backbone.py").write_text(
        "from mmdet.models.backbones import CSPDarknet\n"
        "from mmdet.registry import MODELS\n"
        "@MODELS.register_module()\n"
        "class DarknetOfAConfig(CSPDarknet):\n    pass\n"
    )
    lines = "custom_imports = dict(imports=['own_backbone'])\n"
    config = own(tmp_path, lines + "model = dict(backbone=dict(type='DarknetOfAConfig'))")
    with pytest.raises(QwtError, match="own_backbone"):
        load_detector(config, checkpoint)
    monkeypatch.syspath_prepend(tmp_path)
    assert type(load_detector(config, checkpoint).backbone).__name__ == "DarknetOfAConfig"


def test_what_training_alone_needs_is_dropped():
    model = {
        "norm_cfg": {"type": "MMSyncBN", "requires_grad": True},
        "backbone": {"init_cfg": {"type": "Pretrained", "checkpoint": "torchvision://resnet50"}},
        "neck": {"rfp_backbone": {"pretrained": "torchvision://resnet50", "depth": 50}},
    }
    without_training(model)
    assert model == {
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "backbone": {"init_cfg": None},
        "neck": {"rfp_backbone": {"pretrained": None, "depth": 50}},
    }


def test_a_model_whose_eval_returns_nothing_is_returned(monkeypatch):
    """As mmdet's distillation detectors are, which override ``train``."""

    class Distilled(torch.nn.Linear):
        def train(self, mode=True):
            super().train(mode)

        def init_weights(self):
            pass

    monkeypatch.setattr(build, "build_detector", lambda *arguments: Distilled(1, 1))
    model = build.random_detector(NANO)
    assert isinstance(model, Distilled)
    assert not model.training


@pytest.mark.parametrize(
    "box", [(-9, 2, -3, 6), (20, 2, 30, 6), (2, -9, 6, -3), (2, 20, 6, 30), (float("nan"),) * 4]
)
def test_a_mask_beside_the_image_is_empty(box):
    from mmdet.models.roi_heads.mask_heads import fcn_mask_head

    random_detector("mask_rcnn/mask-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py")
    image = torch.zeros(1, 10, 12)
    found, region = fcn_mask_head._do_paste_mask(
        torch.ones(1, 1, 4, 4), torch.tensor([box]), image.shape[1], image.shape[2]
    )
    image[(slice(None), *region)] = (found >= 0.5).float()
    assert not image.any()


def test_operations_are_counted_where_a_weight_is_used_through_a_view():
    """Deformable DETR splits its queries, which are weights, and maps a part of them."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.ones(5, 8))
            self.points = nn.Linear(4, 2)

        def forward(self):
            return self.points(torch.split(self.queries, 4, dim=1)[0])

    model = Queries()
    with torch.no_grad(), count_operations(model) as counter:
        model()
    assert counter.get_total_flops() == 2 * 5 * 4 * 2
    assert all(parameter.requires_grad for parameter in model.parameters())
