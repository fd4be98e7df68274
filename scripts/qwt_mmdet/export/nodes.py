"""Quantized layers and activations as nodes of an ONNX graph.

Inside of :func:`onnx_nodes`, quantizers and layers add QuantizeLinear and DequantizeLinear nodes to the graph
that torch traces, with their scales, zero points and integer weights. Then the model can be traced, but not run.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config.export import LEAST_OPSET
from ..quantization.convert import activation_quantizers, quantized_layers
from ..quantization.layers import QuantizedLayer
from ..quantization.quantizer import ActivationQuantizer
from ..quantization.subclasses import Products


def _node(operator: str, *inputs: Tensor, dtype: torch.dtype, **attributes: Any) -> Tensor:
    """A node whose output has the shape of its first input."""
    return torch.onnx.ops.symbolic(
        operator, inputs, attributes, dtype=dtype, shape=inputs[0].shape, version=LEAST_OPSET
    )


Grid = tuple[tuple[Tensor, ...], dict[str, int]]
"""Scale and zero point as inputs of a node, and its attributes."""


def _grid(scale: Tensor, zero_point: Tensor, axis: int | None) -> Grid:
    values = scale, zero_point
    if axis is None:
        return tuple(value.reshape(-1)[0].clone() for value in values), {}
    return tuple(value.clone() for value in values), {"axis": axis}


def _dequantized(codes: Tensor, grid: Grid) -> Tensor:
    inputs, attributes = grid
    return _node("DequantizeLinear", codes, *inputs, dtype=torch.float32, **attributes)


class ActivationNodes:
    """The nodes of an activation's quantizer: to 8-bit codes, and back to values.

    Args:
        take_factors: dequantize with the mean scale in place of the channels' scales, whose ratios are folded
            into the weights.
    """

    def __init__(self, quantizer: ActivationQuantizer, *, take_factors: bool = False) -> None:
        assert quantizer.scale is not None
        assert quantizer.zero_point is not None
        scale, zero_point = quantizer.scale, quantizer.zero_point.to(torch.uint8)
        self.dtype = torch.uint8
        if quantizer.symmetric:  # signed codes, whose zero point is 0
            self.dtype, zero_point = torch.int8, torch.zeros_like(zero_point, dtype=torch.int8)
        self.rounds = quantizer.rounds
        axis = quantizer.channel_axis
        self.largest = 2**quantizer.bits - 1
        self.rounding = _grid(scale, zero_point, axis)
        if axis is not None and take_factors:
            scale = scale.mean().repeat(len(scale))
            axis = None if bool((zero_point == zero_point[0]).all()) else axis
        self.values = _grid(scale, zero_point, axis)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` on its grid."""
        if not self.rounds:
            return x
        inputs, attributes = self.rounding
        codes = _node("QuantizeLinear", x, *inputs, dtype=self.dtype, **attributes)
        if self.largest < 255:
            codes = codes.clamp(0, self.largest)
        return _dequantized(codes, self.values)


def integer_weight(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """Codes of a layer's weights, [out, …], and their zero points, [out].

    They are int8 and 0 if the negative of each is one of them, too; else both are uint8. ONNX Runtime has no
    integer kernel for a matrix product whose weights lack zero points.
    """
    middle = 2 ** (layer.weight_bits - 1)
    codes, zero_point = layer.weight_codes, layer.weight_zero_point
    assert codes is not None
    assert zero_point is not None
    if bool((zero_point == middle).all()) and bool(codes.min() >= 1):
        return (codes.short() - middle).to(torch.int8), torch.zeros_like(
            zero_point, dtype=torch.int8
        )
    return codes, zero_point.to(torch.uint8)


class LayerNodes:
    """The nodes of a quantized layer."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer = layer
        self.input = ActivationNodes(layer.input_quantizer, take_factors=True)
        codes, zero_point = integer_weight(layer)
        self.is_linear = isinstance(layer, nn.Linear)
        self.codes = codes.T.contiguous() if self.is_linear else codes  # as MatMul takes them
        assert layer.weight_scale is not None
        self.grid = _grid(layer.weight_scale, zero_point, 1 if self.is_linear else 0)
        bias = layer.effective_bias()
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output."""
        original = getattr(type(self.layer), "original", None)
        if original is None:
            return self._product(x)
        with Products(self.layer, self._product):
            return original.forward(self.layer, x)

    def _product(self, x: Tensor) -> Tensor:
        x, weight = self.input(x), _dequantized(self.codes, self.grid)
        if not self.is_linear:
            return self.layer._compute(x, weight, self.bias)
        if self.bias is None:
            return x @ weight
        if self.layer.input_quantizer.symmetric:
            # ONNX Runtime (1.32) fails on the Gemm that it makes of signed codes and a bias of one dimension.
            return x @ weight + self.bias.view(*[1] * (x.dim() - 1), -1)
        return x @ weight + self.bias


@contextlib.contextmanager
def onnx_nodes(model: nn.Module) -> Iterator[None]:
    """Inside: tracing a quantized model adds ONNX nodes; the model cannot run."""
    nodes: dict[nn.Module, Callable[[Tensor], Tensor]] = {
        layer: LayerNodes(layer) for layer in quantized_layers(model).values()
    }
    for quantizer in activation_quantizers(model).values():
        nodes[quantizer] = ActivationNodes(quantizer)
    for module, forward in nodes.items():
        module.forward = lambda x, forward=forward, **_: forward(x)
    try:
        yield
    finally:
        for module in nodes:
            del module.forward
