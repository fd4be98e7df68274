"""The exported graph computes what the quantized network does, with integer weights."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx_ir
import pytest
import tiny
import torch
from mmcv.ops import SAConv2d, batched_nms
from mmdet.models import RetinaNet
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from qwt_mmdet import errors
from qwt_mmdet.cli import app
from qwt_mmdet.compensation.kinds import Linear, LowRank
from qwt_mmdet.compensation.modules import attach_compensation
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.errors import QwtError
from qwt_mmdet.export import (
    cut,
    description,
    detections,
    loading,
    onnx_file,
    packing,
    runtimes,
)
from qwt_mmdet.export.description import EXPORT_FORMAT
from qwt_mmdet.export.graph import runs_in_integers
from qwt_mmdet.files import write_json
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model, quantized_layers
from qwt_mmdet.runtime import Job
from qwt_mmdet.steps.export import export
from qwt_mmdet.steps.inputs import Inputs
from qwt_mmdet.steps.quantize import quantize
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

RUNTIMES = [name for name in ("onnxruntime", "openvino") if find_spec(name)]


class Network(nn.Module):
    """A convolution, a batch norm with factors of both signs, a depthwise convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Flatten(2),
            nn.Linear(64, 5),
        )
        norm = self.backbone[1]
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.zeros_(norm.weight[3])  # as in the last norms of residual blocks before training
        nn.init.normal_(norm.bias)
        norm.running_var.uniform_(0.2, 2)

    def data_preprocessor(self, batch: dict, training: bool) -> dict:
        return {"inputs": torch.stack(batch["inputs"]), "data_samples": None}

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.backbone(image),)


@pytest.fixture
def images() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"inputs": [torch.randn(3, 8, 8, generator=generator)]} for _ in range(4)]


def quantized(images: list[dict], **settings: object) -> Network:
    torch.manual_seed(1)
    model = Network().eval()
    quantize_model(model, QuantizationSettings.from_mapping(settings))
    return calibrate(model, images)


def graph_of(model: Network) -> onnx_ir.Model:
    return onnx_file.trace(model, {"image": torch.zeros(1, 3, 8, 8)}, ["output"])


@torch.no_grad()
@pytest.mark.parametrize("grids", ["any", "integer"])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (6, 8), (4, 8), (3, 5)])
def test_runtimes_compute_what_the_quantized_network_does(
    tmp_path, images, grids, weight_bits, activation_bits
):
    model = quantized(images, weight_bits=weight_bits, activation_bits=activation_bits, grids=grids)
    expected = [model(batch["inputs"][0][None])[0].numpy() for batch in images]
    graph = graph_of(model)
    operators = {node.op_type for node in graph.graph}
    assert "BatchNormalization" not in operators
    values = [value.const_value for value in graph.graph.initializers.values()]
    biases = [tensor for tensor in values if tensor.dtype == onnx_ir.DataType.INT32]
    narrow = weight_bits <= 6  # codes minus zero points are signed 8-bit weights
    assert len(biases) == (
        grids == "integer" or narrow
    )  # the linear layer's, whose sums are integers
    weights = [tensor.dtype for tensor in values if tensor.size >= 8 * 9]
    kinds = (
        {"INT4", "UINT4"}
        if weight_bits <= 4
        else {"INT8" if narrow or grids == "integer" else "UINT8"}
    )
    assert len(weights) == 3
    assert {*weights} <= {getattr(onnx_ir.DataType, kind) for kind in kinds}
    onnx_ir.save(graph, tmp_path / "model.onnx")
    for runtime in RUNTIMES if grids == "integer" else ["onnxruntime"]:
        run = runtimes.open_graph(tmp_path / "model.onnx", runtime)
        for batch, output in zip(images, expected, strict=True):
            found = run({"image": batch["inputs"][0][None].numpy()})["output"]
            # A tie may be rounded the other way: then one code of an activation differs.
            assert np.mean(np.abs(found - output)) < 5 * 2**-activation_bits * output.std()
    feed = {"image": images[0]["inputs"][0][None].numpy()}
    as_stored = runtimes.Graph((tmp_path / "model.onnx").read_bytes(), overflow=False)
    integers = [
        sum(k.multiply_adds for k in runtimes.OnnxRuntime().kernels(graph, feed) if k.integer)
        for graph in (as_stored, runtimes.read_graph(tmp_path / "model.onnx"))
    ]
    assert integers[0] == integers[1], "whoever opens the file"
    assert (integers[0] > 0) == (grids == "integer" or narrow)
    model(images[0]["inputs"][0][None])  # it runs again after the export
    assert all("forward" not in vars(layer) for layer in quantized_layers(model).values())


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_files_are_small_and_compute_in_floating_point(tmp_path, images, bits):
    model = quantized(images, weight_bits=bits, activation_bits=32)
    graph = graph_that_runs(model, images, tmp_path / "model.onnx")
    assert not any(node.op_type == "QuantizeLinear" for node in graph.graph)
    values = [value.const_value for value in graph.graph.initializers.values()]
    weights = [tensor.dtype.name for tensor in values if tensor.size >= 8 * 9]
    assert len(weights) == 3
    assert {*weights} <= {"INT8", "UINT8"} if bits == 8 else {"INT4", "UINT4"}
    feed = {"image": images[0]["inputs"][0][None].numpy()}
    expected = model(images[0]["inputs"][0][None])[0].numpy()
    for runtime in RUNTIMES:
        run = runtimes.open_graph(tmp_path / "model.onnx", runtime)
        assert np.abs(run(feed)["output"] - expected).max() < 1e-4
    found = runtimes.OnnxRuntime().kernels(runtimes.read_graph(tmp_path / "model.onnx"), feed)
    assert found
    assert not any(kernel.integer for kernel in found)


def graph_that_runs(model: Network, images: list[dict], path: Path) -> onnx_ir.Model:
    """The graph of a calibrated network, after a check that ONNX Runtime computes what the network does."""
    inputs = [batch["inputs"][0][None] for batch in images]
    graph = onnx_file.trace(model, {"image": inputs[0]}, ["output"], images=inputs)
    onnx_ir.save(graph, path)
    run = runtimes.open_graph(path, "onnxruntime")
    for image in inputs:
        expected = model(image)[0].numpy()
        found = run({"image": image.numpy()})["output"]
        assert np.mean(np.abs(found - expected)) < 0.02 * expected.std()
    return graph


class Residual(nn.Module):
    """A residual block behind a max pooling, and a convolution that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.outer, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(image).relu(), 2)
        return self.last((self.outer(x) + self.inner(x)).relu())


@torch.no_grad()
def test_onnx_runtime_computes_a_residual_network_in_integers(tmp_path, images):
    torch.manual_seed(1)
    model = Network().eval()
    model.backbone = Residual().eval()
    quantize_model(model, QuantizationSettings(8, 8, grids="integer", migrate_scales=False))
    calibrate(model, images)
    graph = graph_that_runs(model, images, tmp_path / "model.onnx")
    operators = [node.op_type for node in graph.graph]
    assert "Relu" not in operators  # the quantizers clip at 0
    assert operators.count("Conv") == 4
    values = [value.const_value.dtype for value in graph.graph.initializers.values()]
    assert (
        values.count(onnx_ir.DataType.INT32) == 3
    )  # biases of all but the last, whose output nobody quantizes


class Separable(nn.Module):
    """Convolutions, one of them depthwise, with ReLU6 between them; many of their outputs are above 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.last, self.output = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.relu6(self.first(image))
        x = nn.functional.relu6(4 * self.depthwise(x))
        return self.output(nn.functional.relu6(self.last(x)))


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_relu6_is_the_clipping_of_quantizers(tmp_path, images, bits):
    torch.manual_seed(1)
    model = Network().eval()
    model.backbone = Separable().eval()
    quantize_model(model, QuantizationSettings(8, bits, input_bits=bits, grids="integer"))
    calibrate(model, images)
    graph = graph_that_runs(model, images, tmp_path / "model.onnx")
    operators = [node.op_type for node in graph.graph]
    assert operators.count("Clip") == (4 if bits < 8 else 0), "of codes alone"


@torch.no_grad()
@pytest.mark.parametrize("first", [nn.Identity(), nn.ReLU6()])
@pytest.mark.parametrize("bits", [4, 8])
def test_grids_that_integer_kernels_do_not_take_are_computed_in_floating_point(
    bits, first, tmp_path, images
):
    torch.manual_seed(1)
    model = Network().eval()
    layers = [nn.Conv2d(3, 8, 3), first, nn.Conv2d(8, 8, 3), nn.Identity(), nn.Conv2d(8, 4, 1)]
    model.backbone = nn.Sequential(*layers).eval()
    middle = layers[2]  # its output has zero points from 0 to 255, some weights need nine bits
    middle.weight += torch.linspace(-0.2, 0.2, 8).view(8, 1, 1, 1)
    middle.bias[:] = torch.linspace(-2, 2, 8)
    quantize_model(model, QuantizationSettings(bits, 8, grids="any"))
    graph_that_runs(calibrate(model, images), images, tmp_path / "model.onnx")


class Pyramid(nn.Module):
    """A map that a second stage takes, and a head for it and for a pooled one, with two readers of its map."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.classes, self.boxes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        feature = self.outputs(image)
        maps = [self.shared(x).relu() for x in (feature, nn.functional.max_pool2d(feature, 2))]
        return *(head(x) for head in (self.classes, self.boxes) for x in maps), feature


@torch.no_grad()
def test_one_quantizer_serves_all_that_reads_a_map(images):
    torch.manual_seed(1)
    model = Network().eval()
    model.backbone = Pyramid().eval()
    model.forward = model.backbone.forward
    quantize_model(model, QuantizationSettings(8, 8, grids="integer"))
    calibrate(model, images)
    image = images[0]["inputs"][0][None]
    names = ["class_0", "class_1", "box_0", "box_1", "feature"]
    graph = onnx_file.trace(model, {"image": image}, names, maps=["feature"])
    integer = [runs_in_integers(node) for node in graph.graph if node.op_type == "Conv"]
    assert integer.count(True) == 4  # both of the map, and the shared one twice
    assert integer.count(False) == 4  # what the graph returns
    assert [output.name for output in graph.graph.outputs] == names
    found = runtimes.open_model(graph, "onnxruntime")({"image": image.numpy()})
    for name, expected in zip(names, model(image), strict=True):
        difference = np.mean(np.abs(found[name] - expected.numpy()))
        assert difference < 0.02 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("weights", ["packed", "bytes"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_shared_in_the_file_and_each_readers_own_for_16_bit_sums(
    weights, bits, tmp_path, images, monkeypatch
):
    torch.manual_seed(1)
    model = Network().eval()
    model.backbone = Pyramid().eval()
    model.forward = model.backbone.forward
    quantize_model(model, QuantizationSettings(bits, 8, grids="integer"))
    calibrate(model, images)
    image = images[0]["inputs"][0][None]
    names = ["class_0", "class_1", "box_0", "box_1", "feature"]
    graph = onnx_file.trace(model, {"image": image}, names, maps=["feature"], weights=weights)
    path, feed = tmp_path / "model.onnx", {"image": image.numpy()}
    onnx_ir.save(graph, path)
    tensors = [v.const_value for v in graph.graph.initializers.values()]
    codes = [t for t in tensors if t.dtype != onnx_ir.DataType.FLOAT and t.size >= 8 * 4]
    assert len(codes) == 5  # of five layers, of which three run twice
    bytes_of_weights = sum(t.nbytes for t in codes)
    values = sum(layer.weight.numel() for layer in quantized_layers(model).values())
    assert bytes_of_weights == (values // 2 if bits == 4 and weights == "packed" else values)
    expected = runtimes.open_graph(path, "onnxruntime")(feed)
    monkeypatch.setattr(runtimes, "_adds_in_16_bits", lambda: True)
    opened = runtimes.read_graph(path)
    assert opened.overflow == (bits == 8)
    changed = onnx_ir.from_proto(onnx.load_model_from_string(opened.content)).graph
    nodes = [n for n in changed if n.op_type == "DequantizeLinear" and n.inputs[0].is_initializer()]
    assert len({node.inputs[0] for node in nodes}) == len(nodes)
    for name, values in runtimes.open_graph(path, "onnxruntime")(feed).items():
        near(torch.from_numpy(values), torch.from_numpy(expected[name]))


def test_weights_of_their_own_are_given_once(images):
    """As ncnn's writer does with a graph that was made for a processor without VNNI."""
    graph = graph_of(quantized(images, weight_bits=7, activation_bits=8, grids="integer"))
    packing.own_weights(graph)
    once = onnx_ir.to_proto(graph).SerializeToString()
    packing.own_weights(graph)
    assert onnx_ir.to_proto(graph).SerializeToString() == once


def test_whole_numbers_take_a_byte_each_in_the_file():
    mask = np.where(np.eye(64) > 0, 0, -100).astype(np.float32)
    for values, expected in ((mask, onnx_ir.DataType.INT8), (mask + 0.5, onnx_ir.DataType.FLOAT)):
        tape = onnx_ir.tape.Tape()
        image = onnx_ir.Value(name="image", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
        image.shape = onnx_ir.Shape([64, 64])
        stored = tape.initializer(onnx_ir.tensor(values, name="mask"))
        total = tape.op("Add", [image, stored])
        total.name, total.type, total.shape = "total", image.type, image.shape
        graph = onnx_ir.Graph(
            [image],
            [total],
            nodes=tape.nodes,
            initializers=[stored],
            opset_imports={"": 21},
            name="g",
        )
        model = onnx_ir.Model(graph, ir_version=10)
        packing.narrow_constants(model)
        packing.keep_what_runs(model)
        assert [v.const_value.dtype for v in graph.initializers.values()] == [expected]
        found = runtimes.open_model(model, "onnxruntime")({"image": np.ones_like(values)})
        assert (found["total"] == values + 1).all()


def compensation_of(bits: int) -> tuple[Linear, LowRank]:
    """One of eight channels to eight, and one of 64 to five, of rank 2."""
    matrices = [torch.randn(shape) for shape in ((8, 8), (64, 2), (2, 5))]
    if bits == 32:
        return Linear(matrices[0], torch.randn(8)), LowRank(*matrices[1:], torch.randn(5))
    codes = [(40 * matrix).clamp(-127, 127).to(torch.int8) for matrix in matrices]
    scales = [torch.rand(matrix.shape[1]) / 40 for matrix in matrices]
    return (
        Linear(codes[0], torch.randn(8), scales[0]),
        LowRank(*codes[1:], torch.randn(5), *scales[1:]),
    )


@pytest.mark.parametrize("bits", [8, 32])
@torch.no_grad()
def test_a_compensation_is_part_of_the_graph(bits, tmp_path, images):
    model = quantized(images, weight_bits=8, activation_bits=8, grids="integer")
    image = images[0]["inputs"][0][None]
    plain = model(image)[0]
    maps, tokens = model.backbone[3], model.backbone[5]
    for block, kind in zip((maps, tokens), compensation_of(bits), strict=True):
        attach_compensation(block, kind)
    expected = model(image)[0]
    graph = graph_of(model)
    onnx_ir.save(graph, tmp_path / "model.onnx")
    found = runtimes.open_graph(tmp_path / "model.onnx", "onnxruntime")({"image": image.numpy()})
    near(torch.from_numpy(found["output"]), expected)
    stored = [value.const_value for value in graph.graph.initializers.values()]
    codes = [value for value in stored if value.dtype == onnx_ir.DataType.INT8]
    whole = maps.compensation_weight.shape
    assert (bits == 8) == any(tuple(value.shape) == tuple(whole) for value in codes)
    assert (plain - expected).abs().mean() > 0.5 * expected.std()


def test_a_failure_names_the_module(images):
    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * int(x.sum() > 0)

    model = quantized(images, weight_bits=8, activation_bits=8)
    model.backbone[2] = Stubborn()
    with pytest.raises(QwtError, match=r"backbone\.2"):
        graph_of(model)


def test_a_graph_for_any_size_that_fails_has_a_remedy(tmp_path, monkeypatch):
    def trace(*_, **options):
        raise QwtError("torch cannot export this detector: TraceError.")

    monkeypatch.setattr(onnx_file, "trace", trace)
    model = one_stage("FCOS")
    for dynamic, remedy in ((True, "one size may be possible"), (False, "TraceError")):
        with pytest.raises(QwtError, match=rf"{remedy}.*\.$"):
            onnx_file.export_onnx(model, tmp_path / "model.onnx", size=SIZE, dynamic=dynamic)


def test_a_network_is_refused_before_it_runs(images, tmp_path):
    settings = QuantizationSettings(8, 8, scope="detector")
    with pytest.raises(QwtError, match="not one layer is calibrated"):
        onnx_file.export_onnx(quantize_model(Network(), settings), tmp_path / "model.onnx")
    with pytest.raises(QwtError, match="A Network cannot be exported"):
        cut.check_exportable(Network())
    with pytest.raises(QwtError, match="no opset 7"):
        onnx_file.export_onnx(Network(), tmp_path / "model.onnx", opset=7)
    detector = random_detector(DEMO, SMALL)
    detector.backbone.switchable = SAConv2d(3, 3, 3)
    with pytest.raises(QwtError, match=r"The module backbone\.switchable is a SAConv2d"):
        cut.check_exportable(detector)


DEMO, SMALL, SIZE = tiny.DEMO, tiny.SMALL_MASK_RCNN, (64, 64)


def two_stages() -> nn.Module:
    """The demo's Mask R-CNN, small and with random weights, quantized."""
    torch.manual_seed(0)
    model = random_detector(DEMO, SMALL)
    settings = {"weight_bits": 8, "activation_bits": 8, "scope": "detector", "grids": "integer"}
    settings |= {"weight_range": "minmax", "activation_range": "minmax", "rounding": "nearest"}
    quantize_model(model, QuantizationSettings.from_mapping(settings))
    return calibrate(model, tiny.photos())


@torch.no_grad()
@pytest.mark.slow
def test_two_stages_are_graphs_with_mmdets_own_code_between(tmp_path, caplog):
    model = two_stages()
    path = tmp_path / "model.onnx"
    onnx_file.export_onnx(model, path, size=SIZE)
    assert "There are no calibration images" in caplog.text
    files = description.graph_files(path, description.read_description(path))
    assert [file.name for file in files] == [
        "model.onnx", "model.roi_head.bbox_head.onnx", "model.roi_head.mask_head.onnx",
    ]  # fmt: skip
    assert description.exported_bytes(path, description.read_description(path)) == sum(
        file.stat().st_size for file in files
    )
    exported = loading.load_exported(path).model
    batch = tiny.photos()[1]
    found = forward_scope(exported, copy.deepcopy(batch), "detector")[0].pred_instances
    assert len(found.masks) == len(found.bboxes) == len(found.labels) > 0

    image = model.data_preprocessor(batch, False)["inputs"]
    other = image[:, :, :, :32]  # the pipeline keeps proportions, so sizes vary
    near(list(exported.extract_feat(other)), list(model.extract_feat(other)))
    maps, features = model.extract_feat(image), exported.extract_feat(image)
    near(list(features), list(maps))
    for actual, expected in zip(exported.rpn_head(features), model.rpn_head(maps), strict=True):
        near(actual, expected)
    for head, count, side in (("bbox_head", 7, 7), ("mask_head", 1, 14)):
        regions = (
            maps[0][:, :, :side, :side].repeat(count, 1, 1, 1) / 2
        )  # within what calibration saw
        actual, expected = (
            part(regions)
            for part in (getattr(exported.roi_head, head), getattr(model.roi_head, head))
        )
        assert isinstance(actual, type(expected))
        near(actual, expected)

    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(QwtError, match=r"model.roi_head.bbox_head.onnx is not the file"):
        loading.load_exported(path)


def test_an_image_of_another_size_is_refused_where_the_graph_is_fixed():
    fixed = {"input": {"size": [64, 64], "dynamic": False}}
    with pytest.raises(QwtError, match="height 96 and width 64"):
        loading.first_graph(lambda inputs: {}, fixed, torch.zeros(1, 3, 96, 64))
    reason = cut.one_size_only(tiny.backbone("swin"))
    assert reason.startswith("The module stages.0.blocks.0.attn computes in shifted windows")


def one_stage(kind: str) -> nn.Module:
    """A small detector in full precision whose scores and boxes are spread; mmdet counts the best 100."""
    heads = {
        "RetinaNet": {
            "type": "RetinaHead", "stacked_convs": 1,
            "anchor_generator": {"type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 1,
                                 "ratios": [1.0], "strides": [4, 8]},
        },
        "FCOS": {"type": "FCOSHead", "stacked_convs": 1, "strides": [4, 8],
                 "norm_cfg": {"type": "BN"}, "conv_bias": True},
        "YOLOX": {"type": "YOLOXHead", "stacked_convs": 1, "strides": [4, 8]},
    }  # fmt: skip
    config = {
        "_delete_": True,
        "type": kind,
        "data_preprocessor": {"type": "DetDataPreprocessor"},
        "backbone": {key: value for key, value in SMALL["model.backbone"].items() if key != "_delete_"},
        "neck": {"type": "FPN", **SMALL["model.neck"]},
        "bbox_head": {"num_classes": 10, "in_channels": 8, "feat_channels": 8, **heads[kind]},
        "test_cfg": {
            "nms_pre": 10000, "min_bbox_size": 0, "score_thr": 0.2, "max_per_img": 100,
            "nms": {"type": "nms", "iou_threshold": 0.5},
        },
    }  # fmt: skip
    torch.manual_seed(0)
    model = random_detector(DEMO, {"model": config})
    for parameter in model.bbox_head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS", "YOLOX"])
def test_candidates_are_the_boxes_and_scores_that_mmdet_chooses_from(kind):
    model = one_stage(kind)
    image = torch.randn(1, 3, *SIZE)
    sample = DetDataSample(metainfo={"img_shape": SIZE, "scale_factor": (1.0, 1.0)})
    expected = model.predict(image, [sample], rescale=False)[0].pred_instances
    boxes, scores = detections.CandidateBoxes(model)(image)
    kept = scores[0].nonzero()
    labels, indices = kept.unbind(1)
    values = scores[0][labels, indices]
    _, chosen = batched_nms(boxes[0][indices], values, labels, model.test_cfg.nms)
    chosen = chosen[: 100 if kind != "YOLOX" else None]  # mmdet keeps all of YOLOX
    assert len(expected) == len(chosen) > 20
    torch.testing.assert_close(values[chosen], expected.scores)
    torch.testing.assert_close(boxes[0][indices][chosen], expected.bboxes)
    assert torch.equal(labels[chosen], expected.labels)


@torch.no_grad()
@pytest.mark.slow
def test_a_graph_with_suppression_returns_what_mmdet_does(tmp_path):
    model, path = one_stage("FCOS"), tmp_path / "model.onnx"
    onnx_file.export_onnx(model, path, size=SIZE, dynamic=False, nms=True)
    image = torch.randn(1, 3, *SIZE)
    sample = DetDataSample(metainfo={"img_shape": SIZE, "scale_factor": (1.0, 1.0)})
    expected = model.predict(image, [sample], rescale=False)[0].pred_instances
    found = runtimes.open_graph(path, "onnxruntime")({"image": image.numpy()})
    assert np.array_equal(found["labels"], expected.labels)
    np.testing.assert_allclose(found["scores"], expected.scores, rtol=1e-4)
    np.testing.assert_allclose(found["boxes"], expected.bboxes, rtol=1e-4, atol=1e-3)
    with pytest.raises(QwtError, match="without --nms"):
        loading.load_exported(path)


@torch.no_grad()
@pytest.mark.slow
def test_a_detector_on_a_gpu_is_exported_as_on_the_cpu_and_its_file_runs_beside_a_gpu(tmp_path):
    model = two_stages()
    paths = {place: tmp_path / f"{place}.onnx" for place in ("cpu", "gpu")}
    onnx_file.export_onnx(model, paths["cpu"], size=SIZE, calibration=tiny.photos())
    with tiny.computing_on("pretended") as gpu:
        model.to(gpu)
        there = [
            {**one, "inputs": [image.to(gpu) for image in one["inputs"]]} for one in tiny.photos()
        ]
        onnx_file.export_onnx(model, paths["gpu"], size=SIZE, calibration=there)
        exported = loading.load_exported(paths["gpu"]).model.cuda()
        (found,) = forward_scope(exported, tiny.photos()[1], "detector")
        assert found.pred_instances.bboxes.is_cuda
    assert paths["cpu"].read_bytes() == paths["gpu"].read_bytes()


@pytest.mark.slow
def test_the_command_writes_what_the_workflow_does(tmp_path):
    model = one_stage("RetinaNet")
    files = {name: tmp_path / name for name in ("config.py", "weights.pth", "warmup.pth", "a.json")}
    model.cfg.dump(files["config.py"])
    torch.save({"state_dict": model.state_dict()}, files["weights.pth"])
    images = [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 96} for i in range(3)]
    for image in images:
        pixels = np.random.default_rng(image["id"]).integers(0, 256, (64, 96, 3), np.uint8)
        cv2.imwrite(str(tmp_path / image["file_name"]), pixels)
    classes = [{"id": i, "name": name} for i, name in enumerate(model.dataset_meta["classes"])]
    content = {"images": images, "annotations": [], "categories": classes}
    write_json(files["a.json"], {"info": {"image_root": str(tmp_path)}, **content})
    inputs = Inputs(
        str(files["config.py"]), {}, files["weights.pth"], files["a.json"], Job("cpu", 0.0),
        seed=0, batch_size=2, workers=0,
    )  # fmt: skip
    settings = {"weight_bits": 8, "activation_bits": 8, "scope": "detector", "grids": "integer"}
    quantize(inputs, settings=settings, output=files["warmup.pth"])
    export(
        inputs, output=tmp_path / "ours.onnx", opset=21, weights="packed", images=16, warmup=files["warmup.pth"],
        graphs={"note": tmp_path / "graphs.json", "seen": None},
    )  # fmt: skip
    command = ["export", "--config", files["config.py"], "--checkpoint", files["weights.pth"]]
    command += ["--warmup", files["warmup.pth"], "--output", tmp_path / "model.onnx"]
    done = CliRunner().invoke(app, [*map(str, command), "--calibration", str(files["a.json"])])
    assert done.exit_code == 0, done.output
    ours, theirs = (tmp_path / f"{name}.onnx" for name in ("ours", "model"))
    assert ours.read_bytes() == theirs.read_bytes()
    about, other = (json.loads(file.with_suffix(".json").read_text()) for file in (ours, theirs))
    assert about.keys() - other.keys() == {"provenance"}
    assert all(about[key] == other[key] for key in other)


def test_suppression_is_refused_where_there_is_no_graph_for_it():
    model = one_stage("FCOS")
    model.bbox_head.test_cfg.nms.type = "soft_nms"
    with pytest.raises(QwtError, match=r"bbox_head suppresses boxes with .*soft_nms"):
        detections.check_suppression(model)


def near(actual: object, expected: object) -> None:
    """Equal but for ties that are rounded the other way."""
    for found, wanted in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert found.shape == wanted.shape
        assert (found - wanted).abs().mean() < 0.02 * wanted.std()


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(QwtError, match=r"exported file .*model\.onnx does not exist"):
        loading.load_exported(path)
    path.touch()
    with pytest.raises(QwtError, match=r"description .*model\.json of the exported file"):
        loading.load_exported(path)
    path.unlink()
    about = {"format": EXPORT_FORMAT, "sha256": "0" * 64, "suppression": None, "region_heads": {}}
    path.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(QwtError, match=r"model\.onnx does not exist"):
        loading.load_exported(path)
    with pytest.raises(QwtError, match=r"give the \.onnx file itself"):
        loading.load_exported(path.with_suffix(".json"))
    with pytest.raises(QwtError, match=r"end the name with \.onnx"):
        onnx_file.export_onnx(Network(), path.with_suffix(".json"))
    path.write_bytes(b"half of a graph")
    with pytest.raises(QwtError, match="another sha256"):
        loading.load_exported(path)
    with pytest.raises(QwtError, match="truncated"):
        runtimes.open_graph(path, "onnxruntime")


def test_unknown_and_missing_runtimes(monkeypatch):
    with pytest.raises(QwtError, match="did you mean onnxruntime"):
        runtimes.runtime_by_name("onnxruntim")
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QwtError, match="pip install openvino"):
        runtimes.runtime_by_name("openvino")


def test_configs_keep_their_tuples_and_classes_in_json():
    config = {"scale": (416, 416), "steps": [{"pad": (0, 1), "keep": True}], "none": None}
    assert description.from_json(json.loads(json.dumps(description.as_json(config)))) == config
    assert MODELS.get(description.as_json({"type": RetinaNet})["type"]) is RetinaNet
