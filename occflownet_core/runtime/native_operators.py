# SPDX-License-Identifier: Apache-2.0
"""What a graph may use: the operators, ranks and types that TensorRT 11 and ONNX Runtime both run natively.

Looked up on 2026-11-21:
- operators, types and restrictions: the operator support matrix of ONNX-TensorRT (docs/operators.md), as of its release
  10.1; the change log of TensorRT's open sources up to 11.1 (2026-06-24) adds operators since and takes none away;
- opsets: NVIDIA's ONNX opset guide for TensorRT 11.x, 9 to 25; ONNX Runtime 1.20, the oldest that this project accepts,
  runs up to 21 (its compatibility table);
- ONNX Runtime has CPU kernels in single precision for every operator below, and casts around those that lack one in half.

Scatters, loops, data-dependent shapes and GridSample in 3D are left out on purpose though TensorRT has some of them: it
runs them late, slowly, or only in some versions (docs/engines.md).

Eight bits are explicit and symmetric: int8, scales and zero points constants, zero points 0, one scale per channel from opset
13 on (TensorRT's "Working with Quantized Types" and "Explicit Quantization", looked up on 2026-11-29). A graph that
``quantisation`` wrote for ONNX Runtime's CPU kernels is not one of these. Needs the package ``onnx``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from occflownet_core.errors import EngineError

OPSETS = range(9, 22)
MOST_DIMENSIONS = 8
"""Of a TensorRT tensor (``Dims::MAX_DIMS``)."""

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_NUMBERS = _FLOATS | {TensorProto.INT32, TensorProto.INT64}
_BOOLS = frozenset({TensorProto.BOOL})
_ANY = _NUMBERS | _BOOLS
_BOUNDARY = frozenset({TensorProto.UINT8})
_QUANTISED = frozenset({TensorProto.INT8})


@dataclass(frozen=True)
class Native:
    """How an operator may be used.

    Attributes:
        types: of its tensors; shapes, axes and indices may be whole numbers besides.
        ranks: of its first input; empty for any.
        constants: inputs (by place) that must be constants of the graph.
        refuses: what is wrong with a node's attributes in words, or None.
    """

    types: frozenset[int] = _FLOATS
    ranks: Collection[int] = ()
    constants: tuple[int, ...] = ()
    refuses: Callable[[dict, NodeProto], str | None] = lambda attributes, node: None


def _resize(a: dict, node: NodeProto) -> str | None:
    coordinates = a.get("coordinate_transformation_mode", b"half_pixel").decode()
    known = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
    if coordinates not in known:
        return f"coordinate_transformation_mode '{coordinates}'"
    if a.get("mode", b"nearest") not in (b"nearest", b"linear"):
        return f"mode '{a['mode'].decode()}'"
    return "antialias" if a.get("antialias") else None


def _pooling(a: dict, node: NodeProto) -> str | None:
    if any(step != 1 for step in a.get("dilations", ())):
        return f"dilations {list(a['dilations'])}"
    return "a second output" if len(node.output) > 1 and node.output[1] else None


def _arg_max(a: dict, node: NodeProto) -> str | None:
    return "select_last_index" if a.get("select_last_index") else None


def _grid_sample(a: dict, node: NodeProto) -> str | None:
    mode = a.get("mode", b"linear").decode()
    return None if mode in ("linear", "bilinear", "nearest") else f"mode '{mode}'"


def _layer_norm(a: dict, node: NodeProto) -> str | None:
    return "more than one output" if len([name for name in node.output if name]) > 1 else None


def _constant(a: dict, node: NodeProto) -> str | None:
    wrong = [name for name in a if name in ("sparse_value", "value_string", "value_strings")]
    return wrong[0] if wrong else None


_REDUCING = Native(_NUMBERS, constants=(1,))
_CONVOLUTION = Native(_FLOATS, ranks=(4, 5))
_POOLING = Native(_FLOATS, ranks=(4, 5), refuses=_pooling)
NATIVE: dict[str, Native] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min", "Neg", "Abs", "Sign"), Native(_NUMBERS)),
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"), Native(_ANY)),
    **dict.fromkeys(("And", "Or", "Not", "Xor"), Native(_BOOLS)),
    **dict.fromkeys(
        ("Exp", "Log", "Sqrt", "Pow", "Reciprocal", "Erf", "Sin", "Cos", "Floor", "Ceil", "Round"), Native()
    ),
    **dict.fromkeys(("Sigmoid", "Tanh", "Softplus", "Elu", "LeakyRelu", "PRelu", "HardSigmoid", "HardSwish"), Native()),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Gelu", "Clip", "BatchNormalization", "InstanceNormalization"), Native()),
    **dict.fromkeys(("MatMul", "Gemm", "Einsum", "GlobalAveragePool", "GlobalMaxPool"), Native()),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"), _REDUCING),
    **dict.fromkeys(("Conv", "ConvTranspose"), _CONVOLUTION),
    **dict.fromkeys(("MaxPool", "AveragePool"), _POOLING),
    **dict.fromkeys(("Transpose", "Reshape", "Flatten", "Concat", "Split", "Expand", "Tile", "Identity"), Native(_ANY)),
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "Where", "Shape", "Size"), Native(_ANY)),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), Native(_ANY, constants=(1,))),
    "Relu": Native(_NUMBERS),
    "Slice": Native(_ANY, constants=(3,)),
    "Pad": Native(_NUMBERS, constants=(3,)),
    "Constant": Native(_ANY, refuses=_constant),
    "ConstantOfShape": Native(_ANY),
    "Range": Native(_NUMBERS),
    "CumSum": Native(_FLOATS, constants=(1,)),
    "Mod": Native(_NUMBERS),
    "DepthToSpace": Native(_NUMBERS, ranks=(4,)),
    "SpaceToDepth": Native(_NUMBERS, ranks=(4,)),
    "LayerNormalization": Native(refuses=_layer_norm),
    "ArgMax": Native(_NUMBERS, refuses=_arg_max),
    "ArgMin": Native(_NUMBERS, refuses=_arg_max),
    "Resize": Native(_FLOATS, ranks=(4,), refuses=_resize),
    "GridSample": Native(_FLOATS - {TensorProto.BFLOAT16}, ranks=(4,), refuses=_grid_sample),
    "Cast": Native(_ANY | _BOUNDARY),
    "QuantizeLinear": Native(_FLOATS | _QUANTISED, constants=(1, 2)),
    "DequantizeLinear": Native(_FLOATS | _QUANTISED, constants=(1, 2)),
}
_WHOLE = frozenset({TensorProto.INT32, TensorProto.INT64})
_SCALES_PER_CHANNEL_SINCE = 13
_REQUANTISE = "quantise with --target tensorrt"
_INSTEAD = {"GridSample": "fold axes until its maps are 2D", "Cast": "use a type that TensorRT has"}


def require_native(graph: ModelProto) -> None:
    """Refuse a graph that TensorRT 11 or ONNX Runtime does not run natively.

    Raises:
        EngineError: the opset is too old or too new, or a node (which is named) is of an unknown operator, or has a rank, a
            type, an attribute or a computed input that a runtime lacks, or a shape that is not fixed.
    """
    _require_opset(graph)
    try:
        inferred = onnx.shape_inference.infer_shapes(graph).graph
    except onnx.shape_inference.InferenceError as error:
        raise EngineError(f"the graph's shapes cannot be inferred ({str(error).splitlines()[0]})") from None
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    types |= {c.name: c.data_type for c in inferred.initializer}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in values if v.type.tensor_type.HasField("shape")}
    constants = {c.name: c for c in inferred.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in inferred.node if n.op_type == "Constant"}
    boundary = {v.name for v in (*inferred.input, *inferred.output)}
    for node in inferred.node:
        native = _native(node)
        _require_ranks(node, native, shapes)
        for place in native.constants:
            if len(node.input) > place and node.input[place] and node.input[place] not in constants:
                raise _refusal(node, f"computes its input {place + 1}, which must be a constant; make it one")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _require_symmetric(node, types, constants, opset(graph))
        _require_types(node, native, types, boundary)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if wrong := native.refuses(attributes, node):
            raise _refusal(node, f"has {wrong}, which TensorRT lacks; write the model without it")


def _require_symmetric(node: NodeProto, types: dict[str, int], constants: dict[str, TensorProto], version: int) -> None:
    """Refuse quantisation other than int8 around zero."""
    eight_bits = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
    kind = types.get(eight_bits, TensorProto.INT8)
    if kind != TensorProto.INT8:
        what = f"{TensorProto.DataType.Name(kind)} ({eight_bits})"
        raise _refusal(node, f"has {what} in place of INT8, the only one that TensorRT has; {_REQUANTISE}")
    scales, zero_points = ([numpy_helper.to_array(constants[n]) for n in node.input[i : i + 1] if n] for i in (1, 2))
    if np.any(zero_points):
        raise _refusal(node, f"has a zero point of {np.max(zero_points)}, TensorRT knows 0 alone; {_REQUANTISE}")
    if not np.all(scales[0] > 0):
        raise _refusal(node, f"has a scale of {np.min(scales[0]):g}, TensorRT wants more than 0; {_REQUANTISE}")
    if scales[0].size > 1 and version < _SCALES_PER_CHANNEL_SINCE:
        raise _refusal(node, f"has scales per channel before opset {_SCALES_PER_CHANNEL_SINCE}; {_REQUANTISE}")


def _require_opset(graph: ModelProto) -> None:
    for entry in graph.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version not in OPSETS:
            raise EngineError(
                f"the graph is of opset {entry.version}; TensorRT 11 and ONNX Runtime run {OPSETS[0]} to {OPSETS[-1]}: "
                "export it for one of them"
            )


def opset(graph: ModelProto) -> int:
    """Of ONNX's own operators; 0 where the graph has none."""
    return max((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _native(node: NodeProto) -> Native:
    if node.domain not in ("", "ai.onnx") or node.op_type not in NATIVE:
        raise _refusal(node, "is not an operator that every runtime has and runs fast; write the model without it")
    return NATIVE[node.op_type]


def _require_ranks(node: NodeProto, native: Native, shapes: dict) -> None:
    for name in (*node.input, *node.output):
        dimensions = shapes.get(name, ())
        if len(dimensions) > MOST_DIMENSIONS:
            raise _refusal(node, f"has a tensor of {len(dimensions)} dimensions; TensorRT has {MOST_DIMENSIONS}")
        if any(not d.HasField("dim_value") for d in dimensions):
            raise _refusal(node, f"has a tensor ({name}) whose shape is not fixed; export with fixed shapes")
    rank = len(shapes[node.input[0]]) if node.input and node.input[0] in shapes else None
    if native.ranks and rank is not None and rank not in native.ranks:
        which = " or ".join(f"{r - 2}D" for r in native.ranks)
        hint = _INSTEAD.get(node.op_type, "reshape around it")
        raise _refusal(node, f"works on other than {which} maps ({rank} dimensions), which TensorRT lacks; {hint}")


def _require_types(node: NodeProto, native: Native, types: dict[str, int], boundary: set[str]) -> None:
    for name in (*node.input, *node.output):
        kind = types.get(name, TensorProto.UNDEFINED)
        if kind == TensorProto.UNDEFINED or kind in native.types | _WHOLE | _BOOLS:
            if kind not in _BOUNDARY or name in boundary:
                continue
            raise _refusal(
                node, f"computes in UINT8 ({name}), which TensorRT has at the graph's boundary only; cast there"
            )
        hint = _INSTEAD.get(node.op_type, "cast before and after it")
        raise _refusal(
            node, f"has {TensorProto.DataType.Name(kind)} ({name}), a type that TensorRT lacks there; {hint}"
        )


def _refusal(node: NodeProto, wrong: str) -> EngineError:
    operator = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    which = f"node '{node.name}'" if node.name else f"the node that makes '{node.output[0]}'"
    return EngineError(f"{which} uses {operator}, and it {wrong}")
