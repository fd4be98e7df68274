"""What the runtime's own tool gets into integer kernels, our file has there, too: profiles of both.

Kernels are compared in the place of times, which depend on the processor. SiLU is left out: static quantization rounds its
inputs, which costs the AP that docs/export.md tells, and ours does not.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir
import pytest
import test_export
import tiny
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.export import onnx_file, runtimes
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from torch import nn

SIDE = 64


class Reader(quantization.CalibrationDataReader):
    """Images, for static quantization."""

    def __init__(self, images: list[dict]) -> None:
        self.images: Iterator[dict] = iter(images)

    def get_next(self) -> dict | None:
        image = next(self.images, None)
        return image and {"image": image["inputs"][0][None].numpy()}


class Maps(nn.Module):
    """A backbone whose last map is convolved."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Conv2d(channels, 4, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(image)[-1])


class Blocks(nn.Module):
    """Residual blocks; the stem of mmdet's ResNet is left out, whose convolution before a max pooling is not in integers."""

    def __init__(self) -> None:
        super().__init__()
        whole = tiny.backbone("resnet")
        self.stem, self.layers = nn.Conv2d(3, 8, 3), nn.ModuleList([whole.layer1, whole.layer2])

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(image)
        for layer in self.layers:
            x = layer(x)
        return [x]


class Separable(nn.Sequential):
    """Convolutions with ReLU6, as of MobileNetV2."""

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [super().forward(image)]


NETWORKS = {
    "residual blocks": lambda: Maps(Blocks(), 16),
    "windows": lambda: Maps(tiny.backbone("swin"), 32),
    "ReLU6": lambda: Maps(
        Separable(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6()), 8
    ),
}


def integers(content: bytes, image: np.ndarray) -> list[int]:
    """Multiply-adds of what ONNX Runtime computes with integers, one number for each kernel."""
    graph = runtimes.Graph(content, overflow=False)
    found = runtimes.OnnxRuntime().kernels(graph, {"image": image})
    return [kernel.multiply_adds for kernel in found if kernel.integer]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", NETWORKS)
def test_as_much_is_computed_in_integers_as_after_static_quantization(kind, tmp_path):
    torch.manual_seed(0)
    model = test_export.Network().eval()
    model.backbone = NETWORKS[kind]().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # a random ResNet has 0 there, and no weights then
    images = [{"inputs": [torch.randn(3, SIDE, SIDE)]} for _ in range(4)]
    example = {"image": images[0]["inputs"][0][None]}
    full, ready, static = (tmp_path / f"{name}.onnx" for name in ("full", "ready", "static"))
    onnx_ir.save(onnx_file.trace(model, example, ["output"]), full)
    quant_pre_process(full, ready, skip_symbolic_shape=True)
    quantization.quantize_static(
        ready, static, Reader(images), per_channel=True,
        weight_type=quantization.QuantType.QInt8, activation_type=quantization.QuantType.QUInt8,
    )  # fmt: skip
    quantize_model(model, QuantizationSettings(8, 8, grids="integer"))
    calibrate(model, images)
    inputs = [batch["inputs"][0][None] for batch in images]
    ours = tmp_path / "ours.onnx"
    onnx_ir.save(onnx_file.trace(model, example, ["output"], images=inputs), ours)
    image = example["image"].numpy()
    mine, its = (integers(path.read_bytes(), image) for path in (ours, static))
    height, width = model.backbone(example["image"]).shape[2:]
    left = Counter(
        {4 * model.backbone.head.in_channels * height * width: 1}
    )  # no reader has a grid
    if kind == "windows":  # nor that of the patches, which layer norm reads
        left[(3 * 4 * 4) * 16 * (SIDE // 4) ** 2] += 1
    assert Counter(its) - Counter(mine) == left
    assert not Counter(mine) - Counter(its)
