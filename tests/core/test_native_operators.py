# SPDX-License-Identifier: Apache-2.0
"""What a graph may use: each rule by a graph that breaks it, named by its node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="checking graphs needs the export or tensorrt extra")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from occflownet_core.errors import EngineError  # noqa: E402
from occflownet_core.runtime.native_operators import NATIVE, require_native  # noqa: E402

DEMO = Path(__file__).resolve().parents[2] / "demo" / "bundle" / "model.onnx"
FLOAT, WHOLE, BYTE, DOUBLE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.DOUBLE


def one(op, inputs, output=(1,), constants=None, opset=18, output_kind=FLOAT, outputs=("out",), **attributes):
    """A graph of one node called "culprit"; inputs are (name, type, shape)."""
    constants = constants or {}
    names = [name for name, *_ in inputs] + list(constants)
    node = helper.make_node(op, names, list(outputs), name="culprit", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info("out", output_kind, output)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("ours", 1)])


def scaled(op="QuantizeLinear", scale=0.5, zero_point=None, opset=19, **attributes):
    """A graph of one node called "culprit" that quantises, or the reverse."""
    kind = np.int8 if zero_point is None else np.asarray(zero_point).dtype
    bits = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    shape = [2, 2]
    down = op == "QuantizeLinear"
    zero = np.zeros(np.shape(scale), np.int8) if zero_point is None else zero_point
    return one(
        op, [("x", FLOAT if down else bits, shape)], shape, {"s": np.asarray(scale, np.float32), "z": zero}, opset,
        bits if down else FLOAT, **attributes,
    )  # fmt: skip


MAP4, MAP5 = ("x", FLOAT, [1, 1, 2, 2]), ("x", FLOAT, [1, 1, 2, 2, 2])


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (one("ScatterND", [MAP4]), "node 'culprit' uses ScatterND, and it is not an operator that every runtime has"),
        (one("Pool", [MAP4], domain="ours"), r"node 'culprit' uses ours\.Pool"),
        (one("GridSample", [MAP5, ("g", FLOAT, [1, 2, 2, 2, 3])]), "on other than 2D maps .5 dimensions.*fold axes"),
        (one("Conv", [("x", FLOAT, [1, 1, 9]), ("w", FLOAT, [1, 1, 3])]), "on other than 2D or 3D maps"),
        (one("Exp", [("x", DOUBLE, [1])], output_kind=DOUBLE), r"has DOUBLE \(x\), a type that TensorRT lacks there"),
        (one("Transpose", [("x", BYTE, [1, 2])], (2, 1), output_kind=BYTE), r"has UINT8 \(x\)"),
        (one("Cast", [("x", FLOAT, [1])], to=DOUBLE, output_kind=DOUBLE), r"DOUBLE \(out\).*use a type that TensorRT has"),
        (one("Exp", [("x", FLOAT, ["n"])], ("n",)), r"has a tensor \(x\) whose shape is not fixed"),
        (one("Exp", [("x", FLOAT, [1] * 9)], [1] * 9), "a tensor of 9 dimensions; TensorRT has 8"),
        (one("ReduceSum", [MAP4, ("a", WHOLE, [1])], (1, 1, 1, 2)), "computes its input 2, which must be a constant"),
        (one("Resize", [MAP4], constants={"r": np.zeros(0, np.float32), "s": np.float32([1, 1, 2, 2])}, output=(1, 1, 4, 4),
             mode="cubic"), "has mode 'cubic', which TensorRT lacks"),
        (one("Resize", [MAP4], constants={"r": np.zeros(0, np.float32), "s": np.float32([1, 1, 2, 2])}, output=(1, 1, 4, 4),
             antialias=1, mode="linear"), "has antialias"),
        (one("MaxPool", [MAP4], (1, 1, 1, 1), kernel_shape=[2, 2], outputs=("out", "places")), "has a second output"),
        (one("ArgMax", [MAP4], (1, 1, 2, 2), output_kind=WHOLE, select_last_index=1), "has select_last_index"),
        (one("GridSample", [MAP4, ("g", FLOAT, [1, 2, 2, 2])], (1, 1, 2, 2), mode="bicubic"), "has mode 'bicubic'"),
        (scaled(zero_point=np.uint8(0)), r"node 'culprit' uses QuantizeLinear, and it has UINT8 .out. in place of INT8"),
        (scaled("DequantizeLinear", zero_point=np.int32(0)), r"has INT32 .x. in place of INT8.*quantise with --target tensorrt"),
        (scaled(zero_point=np.int8(3)), "has a zero point of 3, TensorRT knows 0 alone"),
        (scaled(scale=0.0), "has a scale of 0, TensorRT wants more than 0"),
        (scaled(scale=[0.5, 0.25], opset=12), "has scales per channel before opset 13"),
        (one("QuantizeLinear", [("x", FLOAT, [1]), ("s", FLOAT, [])], output_kind=TensorProto.INT8), "computes its input 2"),
        (one("Exp", [("x", FLOAT, [1])], opset=8), "the graph is of opset 8; TensorRT 11 and ONNX Runtime run 9 to 21"),
        (one("Exp", [("x", FLOAT, [1])], opset=22), "opset 22"),
    ],
)  # fmt: skip
def test_what_a_runtime_lacks_is_refused_and_its_node_named(graph, words):
    with pytest.raises(EngineError, match=words):
        require_native(graph)


@pytest.mark.parametrize(
    "graph",
    [
        one("Cast", [("x", BYTE, [1])], to=FLOAT),
        one("Cast", [("x", FLOAT, [1])], to=BYTE, output_kind=BYTE),
        one("GridSample", [MAP4, ("g", FLOAT, [1, 2, 2, 2])], (1, 1, 2, 2)),
        one("Conv", [MAP5, ("w", FLOAT, [1, 1, 1, 1, 1])], (1, 1, 2, 2, 2)),
        one("ReduceSum", [MAP4], (1, 1, 1, 2), constants={"a": np.array([2])}),
        scaled(),
        scaled("DequantizeLinear"),
        scaled(scale=[0.5, 0.25], axis=0),
        scaled("DequantizeLinear", scale=[0.5, 0.25], axis=1),
        one("Gather", [("x", FLOAT, [4, 2]), ("i", TensorProto.INT32, [3])], (3, 2)),
    ],
)
def test_what_both_run_passes(graph):
    require_native(graph)


def test_bytes_are_for_the_boundary_only():
    nodes = [
        helper.make_node("Cast", ["x"], ["bytes"], name="down", to=BYTE),
        helper.make_node("Cast", ["bytes"], ["out"], name="up", to=FLOAT),
    ]
    values = [helper.make_tensor_value_info(name, FLOAT, [1]) for name in ("x", "out")]
    graph = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 18)]
    )
    with pytest.raises(EngineError, match=r"node 'down' uses Cast, and it computes in UINT8 \(bytes\)"):
        require_native(graph)


def test_a_node_without_a_name_is_called_by_what_it_makes():
    graph = one("NonZero", [MAP4])
    graph.graph.node[0].name = ""
    with pytest.raises(EngineError, match="the node that makes 'out' uses NonZero"):
        require_native(graph)


def test_every_operator_of_the_table_exists_in_onnx():
    for name in NATIVE:
        assert onnx.defs.get_schema(name, 21).name == name


def test_the_demos_graph_passes_in_both_precisions():
    from occflownet_core.runtime.half_precision import to_half

    graph = onnx.load(DEMO)
    require_native(graph)
    require_native(to_half(graph))
