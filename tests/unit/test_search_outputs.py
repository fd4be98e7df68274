"""A search measures a two-stage detector at both stages, the second one for the same proposals."""

import copy

import pytest
import tiny
import torch
from qwt_mmdet.config import Override, QuantizationSettings
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.detectors.forward import head_tensors
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.search.outputs import PROPOSALS, OutputError, Reference
from qwt_mmdet.search.sensitivity import rank_layers


@pytest.fixture(scope="module")
def full():
    torch.manual_seed(0)
    return random_detector(tiny.DEMO, tiny.SMALL_MASK_RCNN)


def quantized(full, *, keep_weights, **settings):
    settings |= {"scope": "detector", "refit": "none", "bias_correction": False}
    model = quantize_model(copy.deepcopy(full), QuantizationSettings(4, 4, **settings))
    return calibrate(model, tiny.photos(), keep_weights=keep_weights, noise_images=0)


def test_the_reference_has_both_stages_on_the_best_proposals(full):
    reference = Reference.of(full, tiny.photos()[0])
    (proposals,) = reference.proposals
    assert 0 < len(proposals) <= PROPOSALS
    assert proposals.scores[0] == proposals.scores.max()
    dense, second = reference.stages
    assert [t.shape for t in dense] == [t.shape for t in head_tensors(full, tiny.photos()[0])]
    scores, boxes, masks = second
    assert len(scores) == len(boxes) == len(masks) == len(proposals)


def test_full_precision_has_no_error_and_one_stage_has_no_proposals(full):
    error = OutputError()
    assert error.relative() == 0
    error.update(Reference.of(full, tiny.photos()[0]), full)
    assert error.relative() == 0
    single = tiny.detector("resnet")
    assert Reference.of(single, tiny.batches(1)[0]).proposals is None


def test_layers_of_the_second_stage_have_the_error_of_a_model_with_them_alone_quantized(full):
    name = "roi_head.bbox_head.fc_cls"
    model = quantized(full, keep_weights=True)
    ranked = {entry.name: entry for entry in rank_layers(model, tiny.photos()[:1])}
    second = {key: entry.relative_error for key, entry in ranked.items() if "roi_head" in key}
    assert {"roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits"} < {*second}
    assert all(second.values())
    reference = Reference.of(full, tiny.photos()[0])
    others = tuple(Override(other, skip=True) for other in ranked if other != name)
    alone = quantized(full, keep_weights=False, overrides=others, input_bits=4)
    error = OutputError()
    error.update(reference, alone)
    assert ranked[name].relative_error == pytest.approx(error.relative(), rel=1e-3)
    data = full.data_preprocessor(tiny.photos()[0], False)
    with torch.no_grad():
        features = full.extract_feat(data["inputs"])
        scores, *_ = alone.roi_head(features, reference.proposals, data["data_samples"])
    exact = reference.stages[1][0]
    share = float((exact - scores).square().sum() / exact.square().sum())
    by_hand = share / 3 / 2  # one of three tensors, in one of two stages
    assert error.relative() == pytest.approx(by_hand, rel=1e-3)
