"""Quantize the outputs of convolutions, as integer kernels of ONNX Runtime require.

Most outputs are quantized as the next layer's input. Two kinds are not: outputs that are added to others, as in
residual blocks, and maps for a second stage.
"""

import logging
from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..quantization.primitives import quantization_parameters
from ..quantization.ranges import RangeObserver
from . import packing, placing
from .runtimes import open_model

logger = logging.getLogger(__name__)

BITS = 8


def quantize_outputs(
    model: ir.Model, images: Iterable[Tensor], maps: Collection[str], *, symmetric: bool = False
) -> None:
    """Quantize the outputs of convolutions that nothing else quantizes in a quantized network's graph, in place.

    Args:
        images: inputs of the graph, [batch, 3, height, width], to estimate ranges on. Without any, the graph
            does not change, and a warning is logged.
        maps: names of the graph's outputs for a second stage.
        symmetric: whether grids are symmetric around 0, of signed codes.
    """
    values = {str(value.name): value for value in placing.outputs_without_grid(model, maps)}
    if not values:  # no image needs to be read
        return
    inputs = [image[None].numpy() for batch in images for image in batch]
    if not inputs:
        logger.warning(
            "There are no calibration images, so the outputs of %d convolutions are not quantized (they are added to "
            "others or go to a second stage). ONNX Runtime computes these convolutions in floating point. For the "
            "same file as the workflow's, give the calibration images (`qwt-mmdet export` takes --calibration or "
            "--coco-root).",
            len(values),
        )
        return
    probe = model.clone()
    probe.graph.outputs.clear()
    for node in probe.graph:
        for value in node.outputs:
            if value.name in values:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                probe.graph.outputs.append(value)
    placing.keep_in_floating_point(probe)
    packing.store_weights(probe)
    run = open_model(probe, "onnxruntime")
    observers = {name: RangeObserver(name, symmetric=symmetric) for name in values}
    for image in inputs:
        for name, output in run({"image": image}).items():
            observers[name].update(torch.from_numpy(output))
    for name, observer in observers.items():
        limits = observer.estimate("mse", BITS, 100.0)
        scale, zero_point = quantization_parameters(*limits, BITS, symmetric=symmetric)
        code = np.int8(0) if symmetric else np.uint8(zero_point.item())
        placing.quantize_value(model, values[name], float(scale), code)
