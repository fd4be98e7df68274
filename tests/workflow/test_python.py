"""The library from Python: the README's example, and a compensated model as mmdet's own."""

import copy
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from qwt_mmdet import load_compensation, load_detector, load_warmup, make_loader
from qwt_mmdet.config.datasets import PARTS
from qwt_mmdet.steps.prepare import prepare_dataset
from qwt_mmdet.steps.select import select_images
from running import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What the README's example leaves: its folder and its names."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "workflow").symlink_to(ROOT / "workflow")
    settings = {"type": "shapes", "calibration": {"images": 5}, "evaluation": {"images": 3}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = Path("results/datasets/shapes")
        for part in PARTS:
            source = data / f"{part}_source.json"
            prepare_dataset(settings, part, folder=data, output=source)
            select_images(
                settings, part, name="shapes", source=source, folder=data,
                annotations=data / f"{part}.json", files=data / f"{part}_files.json",
            )  # fmt: skip
        (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        names: dict = {}
        exec(compile(code, "README.md", "exec"), names)
        yield folder, names


@pytest.fixture
def image(example):
    folder, _ = example
    shapes = folder / "results/datasets/shapes"
    images = json.loads((shapes / "evaluation.json").read_text())["images"]
    return shapes / "val" / images[0]["file_name"]


def boxes(sample):
    return sample.pred_instances.bboxes.float().numpy()


def test_the_example_finds_objects(example):
    _, names = example
    assert 0.2 < names["metrics"]["bbox"]["AP"] <= 1
    assert names["detections"]


def test_its_files_make_the_same_detector(example, image):
    folder, names = example
    model = load_detector(f"{names['demo']}.py", f"{names['demo']}.pth")
    load_warmup(model, folder / "warmup.pth")
    load_compensation(model, folder / "compensation.pth")
    expected = boxes(inference_detector(names["model"], str(image)))
    np.testing.assert_array_equal(boxes(inference_detector(model, str(image))), expected)

    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(names["model"].state_dict())
    np.testing.assert_array_equal(boxes(inference_detector(model, str(image))), expected)


def test_a_copy_is_the_same_detector(example, image):
    _, names = example
    expected = boxes(inference_detector(names["model"], str(image)))
    again = copy.deepcopy(names["model"]).to("cpu")
    with torch.inference_mode():
        np.testing.assert_array_equal(boxes(inference_detector(again, str(image))), expected)


def test_autograd_changes_no_result_and_reaches_image_and_weights(example):
    folder, names = example
    model = copy.deepcopy(names["model"])
    loader = make_loader(model.cfg, folder / "results/datasets/shapes/evaluation.json")
    inputs = model.data_preprocessor(next(iter(loader)), False)["inputs"].requires_grad_()
    features = model.extract_feat(inputs)
    with torch.no_grad():
        expected = model.extract_feat(inputs)
    assert all(map(torch.equal, features, expected))
    sum(feature.square().mean() for feature in features).backward()
    assert inputs.grad.isfinite().all()
    assert inputs.grad.any()
    for name, parameter in model.backbone.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), name


def test_it_has_a_loss_to_train_with(example):
    _, names = example
    model = copy.deepcopy(names["model"]).train()
    sample = DetDataSample(metainfo={"img_shape": (96, 128), "pad_shape": (96, 128)})
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[10.0, 10.0, 60.0, 60.0]]), labels=torch.tensor([1]),
        masks=BitmapMasks(np.ones((1, 96, 128), np.uint8), 96, 128),
    )  # fmt: skip
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
    loss, _ = model.parse_losses(model.loss(torch.randn(1, 3, 96, 128), [sample]))
    loss.backward()
    assert model.backbone.patch_embed.projection.weight.grad.any()


def test_its_features_can_be_computed_under_autocast(example):
    folder, names = example
    model = names["model"]
    loader = make_loader(model.cfg, folder / "results/datasets/shapes/evaluation.json")
    inputs = model.data_preprocessor(next(iter(loader)), False)["inputs"]
    with torch.inference_mode():
        expected = model.extract_feat(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.extract_feat(inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 0.5 * theirs.norm()


def test_mmdets_own_inferencer_takes_it(example, image):
    _, names = example
    inferencer = DetInferencer(f"{names['demo']}.py", f"{names['demo']}.pth", device="cpu")
    inferencer.model = names["model"]
    (found,) = inferencer(cv2.imread(str(image)), no_save_vis=True)["predictions"]
    expected = inference_detector(names["model"], str(image)).pred_instances
    np.testing.assert_allclose(found["scores"], expected.scores.numpy(), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_moves_to_a_gpu(example):
    folder, names = example
    model = copy.deepcopy(names["model"]).cuda()
    loader = make_loader(model.cfg, folder / "results/datasets/shapes/evaluation.json")
    batch = next(iter(loader))
    (found,), (expected,) = (detector.test_step(batch) for detector in (model, names["model"]))
    assert found.pred_instances.bboxes.is_cuda
    assert len(found.pred_instances) == pytest.approx(len(expected.pred_instances), abs=2)
