"""Operators of mmcv that ONNX lacks, and the detectors with them, compute the same from ONNX's own."""

from typing import Any

import mmcv.ops
import pytest
import tiny
import torch
from mmcv.ops import (
    CornerPool,
    MultiScaleDeformableAttention,
    deform_conv2d,
    modulated_deform_conv2d,
)
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.errors import QwtError
from qwt_mmdet.export import cut, loading, onnx_file, operators
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from torch import nn

SIZE = (128, 160)
"""Large enough for the queries of DINO."""
BACKBONE = tiny.SMALL_MASK_RCNN["model.backbone"]
ONE_LAYER = {f"model.{part}.num_layers": 1 for part in ("encoder", "decoder")}
ONE_MAP = {"model.backbone": BACKBONE | {"out_indices": (1,)}, "model.neck.in_channels": [16]}
LEVELS = {"model.backbone": BACKBONE, "model.neck.in_channels": [8, 16]}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "detr/detr_r50_8xb2-150e_coco.py": ONE_MAP | ONE_LAYER,
    # its decoder scales queries from the second layer on
    "dab_detr/dab-detr_r50_8xb2-50e_coco.py": ONE_MAP | ONE_LAYER | {"model.decoder.num_layers": 2},
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py": LEVELS | ONE_LAYER,
    "dino/dino-4scale_r50_8xb2-12e_coco.py": LEVELS | ONE_LAYER | {"model.num_queries": 50},
}


@pytest.mark.parametrize(
    ("groups", "deform_groups", "masked", "more"),
    [(1, 1, False, 0), (2, 2, True, 0), (1, 1, True, 3)],
)
def test_a_deformable_convolution_samples_between_pixels(groups, deform_groups, masked, more):
    """``more``: rows and columns of offsets and masks that the output lacks."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 9, 11), torch.randn(6, 8 // groups, 3, 2)
    settings = (2, (1, 2), (2, 1), groups, deform_groups)
    rows, columns = (9 + 2 - 5) // 2 + 1 + more, (11 + 4 - 2) // 2 + 1 + more
    offset = 3 * torch.randn(2, deform_groups * 12, rows, columns)  # far out of the image, too
    if masked:
        mask, bias = torch.rand(2, deform_groups * 6, rows, columns), torch.randn(6)
        found = operators.deformable_convolution(x, offset, mask, weight, bias, *settings)
        expected = modulated_deform_conv2d(x, offset, mask, weight, bias, *settings)
    else:
        found = operators.FUNCTIONS["deform_conv2d"][1](x, offset, weight, *settings)
        expected = deform_conv2d(x, offset, weight, *settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("numbers", "batch_first"), [(2, True), (4, False)])
def test_deformable_attention_samples_all_levels(numbers, batch_first):
    torch.manual_seed(0)
    module = MultiScaleDeformableAttention(16, 4, 2, 3, batch_first=batch_first, dropout=0.0).eval()
    for layer in (module.sampling_offsets, module.attention_weights):
        nn.init.normal_(layer.weight, std=0.3)
    sizes = ((4, 6), (2, 3))
    query, value = torch.randn(2, 7, 16), torch.randn(2, 30, 16)
    padded = torch.rand(2, 30) < 0.2
    arguments = {
        "query": query if batch_first else query.transpose(0, 1),
        "value": value if batch_first else value.transpose(0, 1),
        "key_padding_mask": padded,
        "reference_points": torch.rand(2, 7, 2, numbers),
    }
    arguments["query_pos"] = torch.randn_like(arguments["query"])
    starts = {"level_start_index": torch.tensor([0, 24])}
    expected = module(**arguments, spatial_shapes=torch.tensor(sizes), **starts)
    with operators.onnx_operators(module):
        found = module(**arguments, spatial_shapes=sizes, **starts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("mode", ["top", "bottom", "left", "right"])
def test_corner_pooling_is_the_largest_value_so_far(mode):
    module, x = CornerPool(mode), torch.randn(2, 3, 5, 7)
    expected = module(x)
    with operators.onnx_operators(module):
        assert torch.equal(module(x), expected)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "quantized"),
    list(zip(TRANSFORMERS, (True, False, True, False), strict=True)),
    ids=["detr, W8A8", "dab_detr", "deformable_detr, W8A8", "dino"],
)
def test_a_transformer_is_one_graph(config, quantized, tmp_path):
    torch.manual_seed(0)
    model, path = random_detector(config, TRANSFORMERS[config]), tmp_path / "model.onnx"
    if quantized:
        settings = QuantizationSettings(8, 8, scope="detector", grids="integer", refit="none")
        calibrate(quantize_model(model, settings), tiny.photos(SIZE))
    onnx_file.export_onnx(model, path, size=SIZE, dynamic=False)
    exported = loading.load_exported(path).model
    image = model.data_preprocessor(tiny.photos(SIZE)[0], False)["inputs"]
    found, expected = (cut.cut_of(detector).first(image)[0] for detector in (exported, model))
    detections = forward_scope(exported, tiny.photos(SIZE)[0], "detector")[0].pred_instances
    assert len(detections) > 5
    for mine, its in zip(found, expected, strict=True):
        if quantized:  # ties round either way, which random layers enlarge
            assert (mine - its).abs().median() < 0.1 * its.std()
        else:
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def test_a_transformer_whose_images_are_padded_is_refused():
    changes = TRANSFORMERS["detr/detr_r50_8xb2-150e_coco.py"]
    changes = changes | {"model.data_preprocessor.pad_size_divisor": 32}
    model = random_detector("detr/detr_r50_8xb2-150e_coco.py", changes)
    with pytest.raises(QwtError, match="multiples of 32, and a DETR leaves the padding out"):
        cut.check_exportable(model)


def test_a_transformer_is_for_one_image_size(tmp_path):
    config = "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
    model = random_detector(config, TRANSFORMERS[config])
    with pytest.raises(QwtError, match=r"graph of a DeformableDETR holds the sizes .* fixed size"):
        onnx_file.export_onnx(model, tmp_path / "model.onnx", size=SIZE, dynamic=True)


def test_mmcvs_functions_are_back_after_a_trace():
    original, ours = operators.FUNCTIONS["deform_conv2d"]
    with operators.onnx_operators(nn.Identity()):
        assert mmcv.ops.deform_conv2d is ours
    assert mmcv.ops.deform_conv2d is original
