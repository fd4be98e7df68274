"""Latencies of exported files, and the part of their multiply-adds that a runtime computes with integers."""

import json
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from qwt_mmdet.errors import QwtError
from qwt_mmdet.export import benchmark, profile
from qwt_mmdet.export.description import EXPORT_FORMAT
from qwt_mmdet.export.runtimes import RUNTIMES, Graph, OnnxRuntime, open_graph, runtime_by_name
from qwt_mmdet.files import sha256_file


def test_multiply_adds_are_those_of_the_formula():
    # 3×3 convolution of 8 channels in 2 groups to 4 channels at 5×6: each output sums 4 · 9 products
    assert profile.convolution([1, 4, 5, 6], [4, 4, 3, 3]) == 4 * 5 * 6 * 4 * 9
    assert profile.convolution([1, 4, 5, 6], [2, 2, 4, 3, 3]) == 4 * 5 * 6 * 4 * 9
    assert profile.convolution([1, 5, 6, 4], [4, 4, 3, 3]) == 4 * 5 * 6 * 4 * 9
    # transposed, of 8 channels to 4 by 2×2: each input adds to 4 · 4 outputs
    assert profile.convolution([1, 8, 5, 6], [8, 4, 2, 2]) == 8 * 5 * 6 * 4 * 4
    assert profile.product([2, 3, 5], [2, 3, 7]) == 2 * 3 * 5 * 7


def network(*, integer: bool) -> onnx.ModelProto:
    """A product with a weight [48, 16] (integers, if asked for) and one with a weight [16, 16], of one image."""
    random = np.random.default_rng(0)
    weights = {
        "first": random.integers(-9, 9, (48, 16)).astype(np.int8 if integer else np.float32),
        "second": random.normal(size=(16, 16)).astype(np.float32),
        "rows": np.array([4, 48]),
    }
    nodes = [("Reshape", ["image", "rows"], ["x"])]
    if integer:
        nodes += [
            ("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
            ("MatMulInteger", ["codes", "first", "zero"], ["sums"]),
            ("Cast", ["sums"], ["y"]),
        ]
    else:
        nodes += [("MatMul", ["x", "first"], ["y"])]
    nodes += [("Relu", ["y"], ["positive"]), ("MatMul", ["positive", "second"], ["output"])]
    return model_of(nodes, weights, [4, 16])


def model_of(nodes: list[tuple], constants: dict, output: list[int]) -> onnx.ModelProto:
    """A model of an image [1, 3, 8, 8] from nodes (operator, inputs, outputs)."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(*node, **({"to": kind} if node[0] == "Cast" else {})) for node in nodes],
        "network",
        [helper.make_tensor_value_info("image", kind, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("output", kind, output)],
        [onnx.numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def kernels(model: onnx.ModelProto) -> list[profile.Kernel]:
    """The kernels that ONNX Runtime ran."""
    image = {"image": np.ones((1, 3, 8, 8), np.float32)}
    graph = Graph(model.SerializeToString(), False)
    return list(runtime_by_name("onnxruntime").kernels(graph, image))


def test_the_integer_share_is_that_of_the_kernels_which_onnx_runtime_ran():
    found = [profile.integer_share(kernels(network(integer=integer))) for integer in (False, True)]
    assert found == [0, 48 / (48 + 16)]


def test_a_convolution_whose_weight_the_runtime_packs_is_counted():
    scale, zero = np.float32(0.1), np.uint8(128)
    weight = np.random.default_rng(0).integers(-127, 127, (16, 3, 3, 3)).astype(np.int8)
    constants = {"scale": scale, "zero": zero, "weight": weight, "middle": np.int8(0)}
    names = ["scale", "zero", "weight", "scale", "middle", "scale", "zero"]
    nodes = [
        ("QuantizeLinear", ["image", "scale", "zero"], ["codes"]),
        ("QLinearConv", ["codes", *names], ["sums"]),
        ("DequantizeLinear", ["sums", "scale", "zero"], ["output"]),
    ]
    (kernel,) = kernels(model_of(nodes, constants, [1, 16, 6, 6]))
    assert kernel == (True, 16 * 6 * 6 * 3 * 3 * 3)


@pytest.fixture
def files(tmp_path):
    """An exported file with integer weights, and one in full precision."""
    paths = []
    for name, integer in (("integer", True), ("full", False)):
        path = tmp_path / f"{name}.onnx"
        onnx.save(network(integer=integer), path)
        about = {
            "format": EXPORT_FORMAT,
            "sha256": sha256_file(path),
            "fingerprint": {"weights": "cafe"},
            "input": {"name": "image", "size": [8, 8]},
            "region_heads": {},
        }
        path.with_suffix(".json").write_text(json.dumps(about))
        paths.append(path)
    return paths


def test_both_files_are_measured_in_the_same_rounds(files):
    found = benchmark.benchmark(*files, "onnxruntime")
    assert found["file_bytes"] == files[0].stat().st_size
    assert found["full_precision_file_bytes"] == files[1].stat().st_size
    assert found["rounds"] == benchmark.ROUNDS[1]
    assert found["integer_share"] == 0.75
    assert found["title"] == "ONNX Runtime"
    assert min(found["milliseconds"], found["full_precision_milliseconds"]) > 0


def test_the_ratio_is_the_median_of_the_rounds(monkeypatch, files):
    latencies = [[1.0, 2.0], [9.0, 3.0], [0.5, 2.0]]
    rounds = [[benchmark.Seconds(x, x * x) for x in entry] for entry in latencies]
    monkeypatch.setattr(benchmark, "interleaved", lambda runs, feeds: rounds)
    found = benchmark.benchmark(*files, "onnxruntime")
    assert (found["latency_ratio"], found["processor_ratio"]) == (0.5, 0.25)
    assert (found["milliseconds"], found["full_precision_milliseconds"]) == (1000, 2000)
    assert found["processor_milliseconds"] == 1000
    assert found["full_precision_processor_milliseconds"] == 4000
    assert "bfloat16_milliseconds" not in found


def test_full_precision_is_also_timed_in_bfloat16_where_that_is_a_runtimes_default(
    monkeypatch, files
):
    class Reduced(OnnxRuntime):
        def in_bfloat16(self) -> OnnxRuntime:
            return OnnxRuntime()

    monkeypatch.setitem(RUNTIMES, "onnxruntime", Reduced)
    times = [
        [benchmark.Seconds(2.0, 1.0), benchmark.Seconds(4.0, 4.0), benchmark.Seconds(1.0, 2.0)]
    ]

    def interleaved(runs: list, feeds: list) -> list:
        assert len(runs) == 3
        return times

    monkeypatch.setattr(benchmark, "interleaved", interleaved)
    found = benchmark.benchmark(*files, "onnxruntime")
    assert (found["bfloat16_latency_ratio"], found["bfloat16_processor_ratio"]) == (2, 0.5)
    assert (found["bfloat16_milliseconds"], found["latency_ratio"]) == (1000, 0.5)


def test_openvino_has_bfloat16_where_the_processor_has_it():
    openvino = pytest.importorskip("openvino")
    known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    reduced = runtime_by_name("openvino").in_bfloat16()
    assert (reduced is not None) == ("BF16" in known)
    assert reduced is None or reduced.precision == "bf16"


def test_other_work_of_the_machine_is_not_in_the_time_of_the_processor():
    (seconds,), *_ = benchmark.interleaved([lambda feeds: time.sleep(0.01)], [])
    assert seconds.latency >= 0.01
    assert seconds.processor < 0.005


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_a_gpu_runtime_says_what_is_missing(monkeypatch, files, name):
    wanted = runtime_by_name(name).providers[0]
    with pytest.raises(QwtError, match=rf"has no {wanted} .*pip install onnxruntime-gpu"):
        open_graph(files[1], name)

    class Session:
        """A session whose GPU cannot start, which ONNX Runtime only logs."""

        def __init__(self, content: bytes, options: object, providers: list[str]) -> None:
            self.providers = providers

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [wanted])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(QwtError, match=f"could not start its {wanted}"):
        open_graph(files[1], name)
    monkeypatch.setattr(Session, "get_providers", lambda self: self.providers)
    assert runtime_by_name(name)._session(Graph(b"", False), 1).providers[-1] == (
        "CPUExecutionProvider"
    )


def test_runs_take_turns_in_either_order():
    order = []
    rounds = benchmark.interleaved([lambda x: order.append("a"), lambda x: order.append("b")], [])
    measured = "".join(order[2 * benchmark.WARM_UP :])
    assert measured.startswith("baab")
    assert len(rounds) == len(measured) // 2 == benchmark.ROUNDS[1]


def test_a_second_stage_is_timed_with_as_many_regions_as_it_gets_at_most():
    head = {"inputs": {"x": [8, 7, 7]}, "most_regions": 50}
    about = {
        "input": {"name": "image", "size": [32, 64]},
        "region_heads": {"roi_head.bbox_head": head},
    }
    image, regions = benchmark.feeds_of(about)
    assert image["image"].shape == (1, 3, 32, 64)
    assert regions["x"].shape == (50, 8, 7, 7)


def test_files_of_different_weights_are_not_compared(files):
    path = files[1].with_suffix(".json")
    about = json.loads(path.read_text()) | {"fingerprint": {"weights": "beef"}}
    path.write_text(json.dumps(about))
    with pytest.raises(QwtError, match="different models or weights"):
        benchmark.benchmark(*files, "onnxruntime")
