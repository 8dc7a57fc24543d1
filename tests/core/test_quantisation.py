# SPDX-License-Identifier: Apache-2.0
"""Graphs in eight bits: scales, zero points and results worked out by hand, what stays in single precision, bad input."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import onnxruntime as ort
import pytest

onnx = pytest.importorskip("onnx", reason="quantising graphs needs the export or tensorrt extra")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from occflownet_core.errors import BundleError, DatasetError, EngineError  # noqa: E402
from occflownet_core.runtime.bundle import load_bundle, write_bundle  # noqa: E402
from occflownet_core.runtime.comparison import require_same_sizes  # noqa: E402
from occflownet_core.runtime.drive import EngineInput  # noqa: E402
from occflownet_core.runtime.half_precision import to_half  # noqa: E402
from occflownet_core.runtime.native_operators import require_native  # noqa: E402
from occflownet_core.runtime.quantisation import (  # noqa: E402
    layers_to_quantise,
    quantise_bundle,
    quantised,
    recorded_feeds,
)
from tests.core import graph_by_hand  # noqa: E402

WEIGHT = np.array([[1.27, -0.64], [0.0127, 0.0064]], np.float32)
"""By channel 0.01 times [127, -64], and 0.0001 times [127, 64]."""


def tensor(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(nodes, inputs, outputs, constants, opset: int = 18) -> onnx.ModelProto:
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(result)
    return result


def two_layers() -> onnx.ModelProto:
    """y = sum of relu(WEIGHT images + [0.1, 0]): the first layer bears eight bits, the last before an output does not."""
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["first"], name="first"),
        helper.make_node("Relu", ["first"], ["positive"], name="relu"),
        helper.make_node("Conv", ["positive", "ones"], ["y"], name="last"),
    ]
    constants = {
        "weight": WEIGHT.reshape(2, 2, 1, 1),
        "bias": np.array([0.1, 0], np.float32),
        "ones": np.ones((1, 2, 1, 1), np.float32),
    }
    return model(nodes, [tensor("images", 1, 2, 1, 2)], [tensor("y", 1, 1, 1, 2)], constants)


def feed(*channels: tuple[float, float]) -> dict[str, np.ndarray]:
    return {"images": np.array(channels, np.float32).reshape(1, 2, 1, 2)}


def run(graph: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(graph)
    session = ort.InferenceSession(graph.SerializeToString(), disabled_optimizers=["WeightBiasQuantization"])
    return session.run(None, feeds)[0].ravel()


def constants_of(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {c.name: numpy_helper.to_array(c) for c in graph.graph.initializer}


def of_kind(graph: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in graph.graph.node if node.op_type == kind]


def test_for_tensorrt_by_hand():
    """Largest magnitude 2.54: scale 0.02. Then 1.003 becomes 50, that is 1.0; and -3 becomes -128, that is -2.56."""
    graph = quantised(two_layers(), [feed((-1, 2), (0.5, 2.54)), feed((0, 0), (0, 0))], "tensorrt")
    constants = constants_of(graph)
    (quantise,) = of_kind(graph, "QuantizeLinear")
    assert quantise.input[0] == "images"
    assert constants[quantise.input[1]] == pytest.approx(0.02) and constants[quantise.input[1]].dtype == np.float32
    assert constants[quantise.input[2]] == 0 and constants[quantise.input[2]].dtype == np.int8
    weight, activation = sorted(
        of_kind(graph, "DequantizeLinear"), key=lambda node: node.input[0] == quantise.output[0]
    )
    assert activation.input[1:] == quantise.input[1:]
    assert constants[weight.input[0]].dtype == np.int8
    np.testing.assert_array_equal(constants[weight.input[0]].reshape(2, 2), [[127, -64], [127, 64]])
    np.testing.assert_allclose(constants[weight.input[1]], [0.01, 0.0001], rtol=1e-6)
    np.testing.assert_array_equal(constants[weight.input[2]], [0, 0])
    first, last = of_kind(graph, "Conv")
    assert list(first.input) == [activation.output[0], weight.output[0], "bias"]
    assert constants["bias"].dtype == np.float32 and list(last.input) == ["positive", "ones"]
    require_native(graph)
    # 1.27 x 1.0 + 0.64 x 2.56 + 0.1; the other channel, 0.0127 - 0.0064 x 2.56, is negative. Then 0 and 0: the bias.
    np.testing.assert_allclose(run(graph, **feed((1.003, 0), (-3, 0))), [3.0084, 0.1], rtol=1e-6)


def test_for_the_cpu_by_hand():
    """-0.55 to 2.0 in 255 steps: scale 0.01, zero point 55. The first layer's results reach 1.27 x 2 + 0.1 = 2.64."""
    graph = quantised(two_layers(), [feed((-0.55, 2.0), (0, 0))], "cpu")
    constants = constants_of(graph)
    inputs, results = of_kind(graph, "QuantizeLinear")
    assert constants[inputs.input[1]] == pytest.approx(0.01)
    assert constants[inputs.input[2]] == 55 and constants[inputs.input[2]].dtype == np.uint8
    assert constants[results.input[1]] == pytest.approx(2.64 / 255) and constants[results.input[2]] == 0
    assert not of_kind(graph, "Relu")  # a zero point of 0 cuts off what is negative
    bias = next(array for name, array in constants.items() if name.startswith("bias") and array.dtype == np.int32)
    np.testing.assert_array_equal(bias, [1000, 0])  # 0.1 in steps of 0.01 x 0.01
    # 1.003 becomes 1.0; 1.37 becomes round(132.33) steps, 0.0127 round(1.23).
    np.testing.assert_allclose(run(graph, **feed((1.003, 0), (0, 0)))[0], 133 * 2.64 / 255, rtol=1e-5)
    with pytest.raises(EngineError, match=r"in place of INT8.*quantise with --target tensorrt"):
        require_native(graph)


def test_in_half_precision_scales_are_too_and_no_cast_parts_a_layer_from_its_scales():
    graph = quantised(two_layers(), [feed((-1, 2), (0.5, 2.54))], "tensorrt")
    half = to_half(graph)
    require_native(half)
    constants = constants_of(half)
    maker = {name: node for node in half.graph.node for name in node.output}
    first = of_kind(half, "Conv")[0]
    assert [maker[name].op_type for name in first.input[:2]] == ["DequantizeLinear"] * 2
    for node in (*of_kind(half, "QuantizeLinear"), *of_kind(half, "DequantizeLinear")):
        assert constants[node.input[1]].dtype == np.float16 and constants[node.input[2]].dtype == np.int8
    np.testing.assert_allclose(run(half, **feed((1.003, 0), (-3, 0))), [3.0084, 0.1], rtol=2e-3)


def test_scales_that_half_precision_would_lose():
    graph = quantised(two_layers(), [feed((-1, 2), (0.5, 2.54))], "tensorrt")
    for constant in graph.graph.initializer:
        if constant.name == of_kind(graph, "DequantizeLinear")[0].input[1]:
            constant.CopyFrom(numpy_helper.from_array(np.full(constant.dims, 1e-12, np.float32), constant.name))
    halves = [array for array in constants_of(to_half(graph)).values() if array.dtype == np.float16]
    assert min(array[array != 0].min() for array in halves if array.any()) == np.float16(2**-24)


def test_before_opset_19_scales_stay_in_single_precision():
    graph = quantised(two_layers(), [feed((-1, 2), (0.5, 2.54))], "tensorrt")
    del graph.opset_import[:]
    graph.opset_import.append(helper.make_opsetid("", 18))
    half = to_half(graph)
    onnx.checker.check_model(half)
    for node in (*of_kind(half, "QuantizeLinear"), *of_kind(half, "DequantizeLinear")):
        assert constants_of(half)[node.input[1]].dtype == np.float32
    np.testing.assert_allclose(run(half, **feed((1.003, 0), (-3, 0))), [3.0084, 0.1], rtol=2e-3)


def test_a_sum_behind_convolutions_is_in_eight_bits_on_the_cpu_and_its_inputs_are_for_tensorrt():
    """out = last(relu(second(first) + first)): both summands come from eight bits."""
    nodes = [
        helper.make_node("Conv", ["images", "a"], ["first"], name="first"),
        helper.make_node("Conv", ["first", "b"], ["second"], name="second"),
        helper.make_node("Add", ["second", "first"], ["sum"], name="sum"),
        helper.make_node("Relu", ["sum"], ["positive"], name="relu"),
        helper.make_node("Conv", ["positive", "c"], ["y"], name="last"),
    ]
    weights = {name: np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1) for name in "abc"}
    graph = model(nodes, [tensor("images", 1, 2, 1, 2)], [tensor("y", 1, 2, 1, 2)], weights)
    frames = [feed((-1, 2), (0.5, 2.54))]
    for target, sources in (("cpu", ["images", "first", "second", "sum"]), ("tensorrt", ["images", "first"])):
        result = quantised(graph, frames, target)
        read = [node.input[0] for node in of_kind(result, "QuantizeLinear")]
        assert sorted(read) == sorted(sources if target == "tensorrt" else ["images", "first", "second", "positive"])
        np.testing.assert_allclose(run(result, **feed((1, 0), (2, 1))), [2, 0, 4, 2], atol=0.05)


def test_which_layers_bear_eight_bits():
    def layer(name: str, source: str, kind: str = "Conv") -> onnx.NodeProto:
        return helper.make_node(kind, [source, "k" if kind == "Conv" else "w"], [name], name=name)

    nodes = [
        layer("stem", "images"),
        layer("body", "stem"),
        layer("depth", "body"),
        helper.make_node("Softmax", ["depth"], ["shares"], name="softmax", axis=1),
        layer("query", "stem", "MatMul"),
        layer("key", "stem", "MatMul"),
        helper.make_node("MatMul", ["query", "key"], ["alike"], name="alike"),
        helper.make_node("Softmax", ["alike"], ["attention"], name="attend", axis=-1),
        helper.make_node("Add", ["shares", "attention"], ["seen"], name="see"),
        helper.make_node("Mul", ["seen", "depth_weight"], ["lifted"], name="lift"),
        layer("frame", "lifted"),
        layer("next_state", "frame"),
        layer("motion", "previous_from_current", "MatMul"),
        helper.make_node("Reshape", ["motion", "shape"], ["grid"], name="positions"),
        helper.make_node("GridSample", ["state", "grid"], ["warped"], name="warp", align_corners=0),
        helper.make_node("Add", ["next_state", "warped"], ["both"], name="fuse"),
        layer("volume", "both"),
        layer("sums", "volume"),
        helper.make_node("CumSum", ["sums", "axis"], ["running"], name="running"),
        layer("head", "running"),
        helper.make_node("Relu", ["head"], ["field_features"], name="relu"),
        layer("hidden", "field_features", "MatMul"),
        layer("logits", "hidden", "MatMul"),
    ]
    constants = {
        "k": np.ones((1, 1, 1, 1), np.float32),
        "w": np.eye(2, dtype=np.float32),
        "shape": np.array([1, 2, 1, 2]),
        "axis": np.array(2),
    }
    inputs = [tensor(name, 1, 1, 2, 2) for name in ("images", "depth_weight", "state")]
    inputs.append(tensor("previous_from_current", 2, 2))
    outputs = [tensor("next_state", 1, 1, 2, 2), tensor("field_features", 1, 1, 2, 2), tensor("logits", 1, 1, 2, 2)]
    graph = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in constants.items()]),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    memory = [("state", "next_state")]
    chosen = {"stem", "body", "query", "key", "next_state", "volume", "head"}
    assert layers_to_quantise(graph, memory, "field_features") == chosen
    # Without a name for the features they are an output like any other, and what reads them may be quantised.
    assert layers_to_quantise(graph, memory) == chosen - {"head"} | {"hidden"}
    # An input that is not called memory counts as a table.
    assert layers_to_quantise(graph) == chosen - {"head", "next_state", "volume"} | {"hidden"}


def test_weights_stored_in_half_size_are_quantised_too():
    graph = two_layers()
    graph.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(WEIGHT.reshape(2, 2, 1, 1).astype(np.float16), "stored")
    )
    graph.graph.node.insert(0, helper.make_node("Cast", ["stored"], ["weight"], to=TensorProto.FLOAT))
    result = quantised(graph, [feed((-1, 2), (0.5, 2.54))], "tensorrt")
    arrays = [
        array.reshape(2, 2) for array in constants_of(result).values() if array.dtype == np.int8 and array.ndim == 4
    ]
    np.testing.assert_array_equal(arrays, [[[127, -64], [127, 64]]])


def test_nothing_to_quantise_and_nothing_to_calibrate_on(caplog):
    with pytest.raises(EngineError, match="no convolution or matrix product that may be quantised"):
        quantised(graph_by_hand.hand_made_graph(), [], "cpu")
    with caplog.at_level(logging.WARNING), pytest.raises(DatasetError, match="there is no frame to calibrate on"):
        quantised(two_layers(), [], "cpu")
    assert not caplog.records


def by_hand(folder, **changes):
    return graph_by_hand.write(folder, graph_by_hand.hand_made_graph().SerializeToString(), **changes)


def frames(count: int) -> list[EngineInput]:
    rig = graph_by_hand.rig("front", "back")
    return [
        EngineInput(str(i), graph_by_hand.images(5), graph_by_hand.forward(2) if i else None, rig) for i in range(count)
    ]


def test_calibration_carries_the_memory_as_an_engine_does(tmp_path):
    """A frame adds its brightness, 5, and ten times the two metres driven; the first begins with nothing."""
    feeds = list(recorded_feeds(by_hand(tmp_path / "bundle"), frames(3)))
    assert [f["state"].item() for f in feeds] == [0, 5, 30]
    assert [f["previous_from_current"][0, 3] for f in feeds] == [0, 2, 2]
    names = {"images", "pixel_index", "depth_index", "depth_weight", "previous_from_current", "occupancy_threshold"}
    assert set(feeds[0]) == names | {"state"}


def test_a_quantised_bundle_says_how_it_came_to_be(tmp_path):
    note = {"target": "cpu", "data": "bag x", "frames": 3, "date": "2026-11-29"}
    bundle = by_hand(tmp_path / "bundle")
    assert bundle.quantisation == {}
    write_bundle(dataclasses.replace(bundle, quantisation=note), {"model.onnx": bundle.graph_path.read_bytes()})
    again = load_bundle(tmp_path / "bundle")
    assert again.quantisation == note
    with pytest.raises(BundleError, match="is quantised already; give the one that it was made of"):
        quantise_bundle(again, frames(1), "cpu", tmp_path / "out", "test")
    torch_engine = pytest.importorskip("occflownet_core.runtime.torch_engine", reason="PyTorch is not installed")
    with pytest.raises(EngineError, match=r"the quantised bundle .* carries no weights"):
        torch_engine.TorchEngine(again)


def test_what_cannot_be_quantised_is_refused_before_anything_runs(tmp_path):
    bundle = by_hand(tmp_path / "bundle")
    with pytest.raises(EngineError, match="there is no target 'gpu'; use one of cpu, tensorrt"):
        quantise_bundle(bundle, frames(1), "gpu", tmp_path / "out", "test")
    with pytest.raises(BundleError, match="exists already"):
        quantise_bundle(bundle, frames(1), "cpu", tmp_path, "test")


def test_bundles_of_other_sizes_are_not_compared(tmp_path):
    bundle = by_hand(tmp_path / "a")
    require_same_sizes(bundle, by_hand(tmp_path / "b"))
    with pytest.raises(BundleError, match=r"differ in cameras .*compare bundles of one network"):
        require_same_sizes(bundle, by_hand(tmp_path / "c", cameras=("left", "right")))
    with pytest.raises(BundleError, match="differ in memory"):
        require_same_sizes(bundle, by_hand(tmp_path / "d", recurrent=()))
