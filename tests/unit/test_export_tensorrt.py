"""Files with symmetric grids keep TensorRT's rules, and the check finds what breaks them."""

import numpy as np
import onnx_ir
import pytest
import test_export
import tiny
import torch
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.errors import QwtError
from qwt_mmdet.export import onnx_file
from qwt_mmdet.export.tensorrt import check_tensorrt, problems
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import activation_quantizers, quantize_model
from torch import nn

images = test_export.images  # the fixture


@torch.no_grad()
def test_a_network_with_symmetric_grids_is_in_tensorrts_form(images, tmp_path):
    model = test_export.quantized(images, weight_bits=8, activation_bits=8, grids="symmetric")
    for quantizer in activation_quantizers(model).values():
        assert quantizer.zero_point.unique().tolist() == [128]
    graph = test_export.graph_that_runs(model, images, tmp_path / "model.onnx")
    assert list(problems(graph)) == []
    stored = {value.const_value.dtype for value in graph.graph.initializers.values()}
    assert onnx_ir.DataType.UINT8 not in stored
    assert onnx_ir.DataType.INT32 not in stored  # no bias
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("QuantizeLinear") == 3
    assert kinds.count("DequantizeLinear") == 6  # of weights, too, for each layer


@torch.no_grad()
def test_weights_whose_codes_are_small_keep_a_byte_each(images):
    torch.manual_seed(1)
    model = test_export.Network().eval()
    model.backbone = nn.Sequential(nn.Conv2d(3, 8, 1))
    calibrate(quantize_model(model, QuantizationSettings(8, 8, grids="symmetric")), images)
    layer = model.backbone[0]
    layer.weight_codes = (layer.weight_codes.float() - 128).clamp(-7, 7).add(128).to(torch.uint8)
    assert list(problems(test_export.graph_of(model))) == []


class Split(nn.Module):
    """A convolution that a depthwise one reads, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + self.depthwise(x)


@torch.no_grad()
def test_an_activation_that_others_read_has_one_scale(images):
    torch.manual_seed(1)
    model = test_export.Network().eval()
    model.backbone = Split().eval()
    quantize_model(model, QuantizationSettings(8, 8, grids="symmetric"))
    calibrate(model, images)
    assert model.backbone.depthwise.input_quantizer.scale.numel() == 8
    assert list(problems(test_export.graph_of(model))) == []


@torch.no_grad()
def test_sums_of_residual_blocks_keep_the_rules(images, tmp_path):
    torch.manual_seed(0)
    model = test_export.Network().eval()
    model.backbone = test_export.Residual().eval()
    settings = QuantizationSettings(8, 8, grids="symmetric")
    calibrate(quantize_model(model, settings), images)
    graph = test_export.graph_that_runs(model, images, tmp_path / "model.onnx")
    assert list(problems(graph)) == []
    assert "Relu" in {node.op_type for node in graph.graph}  # signed codes do not clip at 0


@torch.no_grad()
def test_a_swin_has_symmetric_grids(tmp_path):
    model = nn.Module()
    model.backbone = tiny.backbone("swin")
    quantize_model(model, QuantizationSettings(8, 8, grids="symmetric"))
    assert all(quantizer.symmetric for quantizer in activation_quantizers(model).values())
    assert not any(quantizer.logarithmic for quantizer in activation_quantizers(model).values())


def test_the_check_names_the_node(images):
    model = test_export.quantized(images, weight_bits=8, activation_bits=8, grids="integer")
    graph = test_export.graph_of(model)
    with pytest.raises(QwtError, match=r"the node .* has codes of the type uint8, not int8 \(and"):
        check_tensorrt(graph)


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (1, np.float32([1, 2, 3]), "has 3 scales of an activation, not one"),
        (1, np.float32(0), "has a scale that is not positive"),
        (2, np.int8(3), "has the zero point 3, not 0"),
    ],
)
def test_each_rule_is_checked(images, index, values, message):
    model = test_export.quantized(images, weight_bits=8, activation_bits=8, grids="symmetric")
    graph = test_export.graph_of(model)
    node = next(node for node in graph.graph if node.op_type == "QuantizeLinear")
    onnx_file.scales.set_input(graph, node, index, np.asarray(values), "wrong")
    with pytest.raises(QwtError, match=message):
        check_tensorrt(graph)


def test_symmetric_grids_have_8_bits():
    with pytest.raises(QwtError, match=r"TensorRT.*8 bits alone, but weight_bits is 4; take 8"):
        QuantizationSettings(4, 8, grids="symmetric")
    override = [{"pattern": "backbone.*", "activation_bits": 6}]
    with pytest.raises(QwtError, match=r"activation_bits of backbone\.\* is 6"):
        QuantizationSettings(8, 8, grids="symmetric", overrides=override)
