# SPDX-License-Identifier: Apache-2.0
"""Graphs in half precision: their types are written in, their values are those of NumPy's float16."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", reason="rewriting graphs needs the export or tensorrt extra")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from occflownet_core.errors import EngineError  # noqa: E402
from occflownet_core.runtime.half_precision import to_half  # noqa: E402


def model(nodes, inputs: dict, outputs: dict, constants: dict | None = None) -> onnx.ModelProto:
    def tensors(described: dict, kind: int = TensorProto.FLOAT):
        return [helper.make_tensor_value_info(name, kind, shape) for name, shape in described.items()]

    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", tensors(inputs), tensors(outputs), weights)
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(result)
    return result


def run(graph: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(graph)
    onnx.shape_inference.infer_shapes(graph, strict_mode=True)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def types(graph: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {c.name: c.data_type for c in inferred.initializer}


def chain() -> onnx.ModelProto:
    """y = x * w + x, z = x * w."""
    nodes = [helper.make_node("Mul", ["x", "w"], ["z"]), helper.make_node("Add", ["z", "x"], ["y"])]
    return model(nodes, {"x": [3]}, {"y": [3], "z": [3]}, {"w": np.array([1 / 3, 3.3, 1000.1], np.float32)})


@settings(max_examples=30)
@given(st.lists(st.floats(-60, 60, width=32), min_size=3, max_size=3))
def test_values_are_those_of_float16(values: Sequence[float]):
    x = np.array(values, np.float32)
    half = x.astype(np.float16)
    product = half * np.array([1 / 3, 3.3, 1000.1], np.float32).astype(np.float16)
    # ONNX's own evaluator is NumPy; ONNX Runtime leaves roundings out where it computes in single precision anyway.
    y, z = ReferenceEvaluator(to_half(chain())).run(None, {"x": x})
    assert y.dtype == z.dtype == np.float32
    np.testing.assert_array_equal(z, product.astype(np.float32))
    np.testing.assert_array_equal(y, (product + half).astype(np.float32))


def test_types_are_written_into_the_graph_and_weights_are_stored_once():
    found = types(to_half(chain()))
    assert found["x"] == found["y"] == found["z"] == TensorProto.FLOAT
    assert found["z__half"] == found["y__half"] == found["w__half"] == TensorProto.FLOAT16
    assert "w" not in found


def test_positions_of_a_warp_stay_in_single_precision():
    nodes = [
        helper.make_node("Mul", ["m", "two"], ["grid"]),
        helper.make_node("Relu", ["state"], ["positive"]),
        helper.make_node("GridSample", ["positive", "grid"], ["warped"], align_corners=0),
        helper.make_node("Mul", ["warped", "two"], ["y"]),
    ]
    graph = model(nodes, {"m": [1, 2, 2, 2], "state": [1, 1, 4, 4]}, {"y": [1, 1, 2, 2]}, {"two": np.float32(2)})
    half = to_half(graph)
    found = types(half)
    assert found["grid"] == found["warped"] == TensorProto.FLOAT
    assert found["positive__half"] == found["y__half"] == TensorProto.FLOAT16
    rng = np.random.default_rng(0)
    feeds = {
        "m": rng.uniform(-0.5, 0.5, (1, 2, 2, 2)).astype(np.float32),
        "state": rng.normal(size=(1, 1, 4, 4)).astype(np.float32),
    }
    np.testing.assert_allclose(run(half, **feeds)[0], run(graph, **feeds)[0], atol=4e-3)


def test_a_running_sum_is_single_until_a_difference_is_taken():
    """The sum of the last two of 4096 numbers: in half precision the running sum would stop at 2048."""
    nodes = [
        helper.make_node("CumSum", ["x", "axis"], ["sums"]),
        helper.make_node("Gather", ["sums", "last"], ["b"]),
        helper.make_node("Gather", ["sums", "before"], ["a"]),
        helper.make_node("Sub", ["b", "a"], ["difference"]),
        helper.make_node("Mul", ["difference", "two"], ["y"]),
    ]
    constants = {"axis": np.int64(0), "last": np.int64(4095), "before": np.int64(4093), "two": np.float32(2)}
    graph = model(nodes, {"x": [4096]}, {"y": []}, constants)
    half = to_half(graph)
    found = types(half)
    assert found["sums"] == found["b"] == found["difference"] == TensorProto.FLOAT
    assert found["y__half"] == TensorProto.FLOAT16
    assert run(half, x=np.ones(4096, np.float32))[0] == 4


def test_what_is_handed_through_is_not_rounded():
    nodes = [
        helper.make_node("Unsqueeze", ["x", "first"], ["wide"]),
        helper.make_node("Identity", ["wide"], ["same"]),
        helper.make_node("Mul", ["x", "x"], ["y"]),
    ]
    graph = model(nodes, {"x": [1]}, {"same": [1, 1], "y": [1]}, {"first": np.array([0])})
    same, squared = run(to_half(graph), x=np.array([122.88], np.float32))
    assert same == np.float32(122.88) and squared == pytest.approx(122.88**2, rel=2e-3)
    assert types(to_half(graph))["y__half"] == TensorProto.FLOAT16


def test_a_node_may_be_kept_for_the_range_of_its_values():
    nodes = [
        helper.make_node("Mul", ["x", "large"], ["huge"]),
        helper.make_node("Mul", ["huge", "small"], ["y"]),
    ]
    constants = {"large": np.float32(6e4), "small": np.float32(1e-3)}
    graph = model(nodes, {"x": [1]}, {"y": [1]}, constants)
    x = np.array([2.0], np.float32)
    kept = to_half(graph, keep_single=["huge", "y"])
    np.testing.assert_allclose(run(kept, x=x)[0], 120.0, rtol=1e-6)
    assert types(kept)["huge"] == TensorProto.FLOAT
    assert types(to_half(graph))["huge__half"] == TensorProto.FLOAT16


def test_sizes_of_a_resize_and_other_types_are_left_alone():
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Cast", ["whole"], ["back"], to=TensorProto.FLOAT),
        helper.make_node("Resize", ["back", "", "scales"], ["y"], mode="nearest"),
    ]
    graph = model(nodes, {"x": [1, 1, 1, 2]}, {"y": [1, 1, 2, 4]}, {"scales": np.array([1, 1, 2, 2], np.float32)})
    half = to_half(graph)
    found = types(half)
    assert found["scales"] == TensorProto.FLOAT and found["whole"] == TensorProto.INT32
    assert found["back__half"] == TensorProto.FLOAT16
    (y,) = run(half, x=np.array([[[[3.7, 9.0]]]], np.float32))
    np.testing.assert_array_equal(y[0, 0], [[3, 3, 9, 9]] * 2)


def test_weights_stored_in_half_size_need_no_cast_any_more():
    nodes = [
        helper.make_node("Cast", ["stored"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]
    graph = model(nodes, {"x": [2]}, {"y": [2]}, {"stored": np.array([0.5, 1.5], np.float16)})
    half = to_half(graph)
    assert [node.op_type for node in half.graph.node] == ["Cast", "Add", "Cast"]  # in, the sum, out
    assert types(half)["w__half"] == TensorProto.FLOAT16
    np.testing.assert_array_equal(run(half, x=np.ones(2, np.float32))[0], [1.5, 2.5])


def test_an_input_may_be_an_output_and_constants_may_be_nodes():
    value = numpy_helper.from_array(np.array([4.0], np.float32), "c")
    nodes = [
        helper.make_node("Constant", [], ["four"], value=value),
        helper.make_node("Mul", ["x", "four"], ["y"]),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    y, same = run(to_half(model(nodes, {"x": [1]}, {"y": [1], "same": [1]})), x=np.array([1.5], np.float32))
    assert y == 6 and same == 1.5


@pytest.mark.parametrize("bounded", ["Clip", "Max"])
def test_nothing_is_divided_by_a_lower_bound_that_became_zero(bounded):
    """x / max(|x|, 1e-12), as a vector is normalised: half precision has no 1e-12, and 0 / 0 is not a number."""
    nodes = [
        helper.make_node("Abs", ["x"], ["size"]),
        helper.make_node(bounded, ["size", "least"], ["bound"]),
        helper.make_node("Div", ["x", "bound"], ["y"]),
    ]
    graph = model(nodes, {"x": [3]}, {"y": [3]}, {"least": np.float32(1e-12)})
    (y,) = ReferenceEvaluator(to_half(graph)).run(None, {"x": np.array([0, 2, -3], np.float32)})
    np.testing.assert_array_equal(y, [0, 1, -1])


def test_a_weight_that_half_precision_does_not_hold():
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    graph = model(nodes, {"x": [1]}, {"y": [1]}, {"w": np.array([7e4], np.float32)})
    with pytest.raises(EngineError, match=r"weight w holds 70000, more than half precision's 65504; use fp32"):
        to_half(graph)
