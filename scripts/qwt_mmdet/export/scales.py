"""Passes that change scales: folding of batch norms, one scale in place of one per channel, biases as integers."""

import numpy as np
import onnx_ir as ir

from .graph import (
    constant,
    input_of,
    insert_before,
    is_known,
    is_read_once,
    return_instead,
    runs_in_integers,
    set_input,
    takes_integers,
)


def fold_batch_norms(model: ir.Model) -> None:
    """Fold each BatchNormalization behind a convolution with integer weights into it, in place.

    The scale of an output channel is multiplied with the norm's factor. If this is negative, the codes change
    sign.
    """
    for norm in [node for node in model.graph if node.op_type == "BatchNormalization"]:
        convolution = input_of(norm, 0).producer()
        if convolution is None or convolution.op_type != "Conv":
            continue
        weight = input_of(convolution, 1).producer()
        single = len(convolution.outputs[0].uses()) == len(input_of(convolution, 1).uses()) == 1
        if weight is None or weight.op_type != "DequantizeLinear" or not single:
            continue
        gamma, beta, mean, variance = (constant(value) for value in norm.inputs[1:])
        factor = gamma / np.sqrt(variance + norm.attributes["epsilon"].as_float())
        codes, scale, zero_point = (constant(value) for value in weight.inputs)
        flipped = factor < 0
        if flipped.any():  # negate signed codes; unsigned ones and their zero points: highest − x
            signed = codes.dtype == np.int8
            highest = 0 if signed else max(values.max() for values in (codes, zero_point))
            for values in (codes, zero_point):
                values[flipped] = highest - values[flipped]
        bias = constant(convolution.inputs[2]) if len(convolution.inputs) > 2 else 0
        shifted = (bias - mean) * factor + beta
        silent = factor == 0  # a scale must be above 0
        codes[silent] = zero_point[silent].reshape(-1, 1, 1, 1)
        factor[silent] = 1
        name = weight.outputs[0].name
        if (flipped | silent).any():
            set_input(model, weight, 0, codes, f"{name}.codes")
        set_input(model, weight, 1, (scale * np.abs(factor)).astype(np.float32), f"{name}.scale")
        set_input(model, weight, 2, zero_point, f"{name}.zero_point")
        set_input(model, convolution, 2, shifted.astype(np.float32), f"{name}.bias")
        return_instead(model, norm.outputs[0], convolution.outputs[0])
        norm.outputs[0].replace_all_uses_with(convolution.outputs[0])
        model.graph.remove(norm, safe=True)


def integer_biases(model: ir.Model) -> None:
    """Make biases INT32 where ONNX Runtime computes in integers, in place.

    The scale of an output channel is the input's times the weight's.
    """
    for node in list(model.graph):
        if node.op_type == "Conv" and len(node.inputs) > 2 and runs_in_integers(node):
            _make_bias_integer(model, node, node, 2)
        if node.op_type == "Add":
            product = input_of(node, 0).producer()
            if product is not None and product.op_type == "MatMul" and takes_integers(product):
                _make_bias_integer(model, product, node, 1)


def _make_bias_integer(model: ir.Model, product: ir.Node, node: ir.Node, index: int) -> None:
    """Make input ``index`` of a node INT32: the bias of a convolution or matrix product."""
    inputs, weight = (input_of(product, i).producer() for i in (0, 1))
    assert inputs is not None
    assert weight is not None
    scale = constant(inputs.inputs[1]).reshape(1) * constant(weight.inputs[1])
    bias = input_of(node, index)
    if not is_known(bias) or constant(bias).shape != scale.shape:
        return
    codes = np.rint(constant(bias).astype(np.float64) / scale)
    if np.abs(codes).max() >= 2**31:
        return
    stored = codes.astype(np.int32), scale.astype(np.float32)
    node.replace_input_with(index, insert_before(model, node, "DequantizeLinear", stored, axis=0))


def move_channel_scales(model: ir.Model) -> None:
    """Give quantizers with a scale per channel one scale, in place: runtimes have slow kernels for several scales.

    The ratios of the scales are folded into the convolution before, also through a ReLU and a max pooling, which
    commute with positive factors. Without a convolution, a multiplication is inserted.
    """
    for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        scale, zero_point = (constant(quantize.inputs[index]) for index in (1, 2))
        if scale.size == 1 or (zero_point != zero_point[0]).any():
            continue
        factor = scale.mean() / scale
        name = quantize.outputs[0].name
        if not _scale_channels(model, input_of(quantize, 0), factor):
            shape = (-1, *[1] * (3 - quantize.attributes["axis"].as_int() % 4))
            factors = [input_of(quantize, 0), factor.reshape(shape)]
            quantize.replace_input_with(0, insert_before(model, quantize, "Mul", factors))
        set_input(model, quantize, 1, np.asarray(scale.mean()), f"{name}.scale")
        set_input(model, quantize, 2, np.asarray(zero_point[0]), f"{name}.zero_point")
        quantize.attributes.pop("axis")


def _scale_channels(model: ir.Model, value: ir.Value, factor: np.ndarray) -> bool:
    """Multiply the channels of a value with factors if it is a convolution's output; return whether it is."""
    producer = value.producer()
    while producer is not None and producer.op_type in ("Relu", "MaxPool") and is_read_once(value):
        value = input_of(producer, 0)
        producer = value.producer()
    if producer is None or producer.op_type != "Conv" or not is_read_once(value):
        return False
    weight = input_of(producer, 1).producer()
    if (
        weight is None
        or weight.op_type != "DequantizeLinear"
        or not is_read_once(weight.outputs[0])
    ):
        return False
    for node, index in ((weight, 1), (producer, 2)):
        if len(node.inputs) > index:
            scaled = constant(node.inputs[index]) * factor
            set_input(model, node, index, scaled, f"{producer.outputs[0].name}.scaled{index}")
    return True
