# SPDX-License-Identifier: Apache-2.0
"""A graph in half precision, every type written into it: TensorRT 11 computes what the graph says and picks no
precision by itself (its networks are strongly typed). Needs the package ``onnx``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from occflownet_core.errors import EngineError
from occflownet_core.runtime.native_operators import opset

_HALF_SUFFIX, _SINGLE_SUFFIX = "__half", "__single"
_LARGEST_HALF = float(np.finfo(np.float16).max)
_SMALLEST_HALF = np.finfo(np.float16).smallest_subnormal
_SINGLE_ONLY = frozenset({"Constant", "ConstantOfShape", "Range"})
"""Operators left in single precision: they make constants."""
_QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear"})
_HALF_SCALES_SINCE = 19
"""The opset from which on QuantizeLinear and DequantizeLinear take scales, and what they scale, in half precision."""
_MOVING = frozenset({"Gather", "Concat", "Slice", "Reshape", "Transpose", "Pad", "Squeeze", "Unsqueeze", "Split"})
"""Operators that move numbers about and leave their values alone."""
_SINGLE_INPUTS = {"Resize": (1, 2)}
"""Inputs (roi, scales) that ONNX wants in single precision whatever the data's."""


def to_half(graph: ModelProto, keep_single: Collection[str] = ()) -> ModelProto:
    """The graph computing in float16, its inputs and outputs as before.

    A GridSample stays in single precision, and so does all that leads to the positions it reads at: computed in eleven
    bits they would be off by decimetres in 80 m. So does a running sum (CumSum, by which splatting adds up a voxel's
    points) until the difference of two of its entries is taken, what is only handed through from an input to an output,
    and the nodes in ``keep_single``. What was quantised stays so: from opset 19 on with scales in half precision (no cast
    comes between a quantised tensor and its layer, so that TensorRT sees them as one), before with scales in single.

    Args:
        graph: in single precision, its weights float32, or float16 with a cast behind them.
        keep_single: names of outputs of nodes that stay in single precision, e.g. for the range of their values.

    Returns:
        A new model.

    Raises:
        EngineError: a weight is too large for half precision, or the types of the graph cannot be inferred.
    """
    model = with_single_weights(graph)
    floats = _float_tensors(model)
    positive = _kept_positive(model)
    single = _single_nodes(model, keep_single)
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
    wanted_half: dict[str, bool] = defaultdict(bool)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            wanted_half[name] |= name in floats and node.output[0] not in single and not _is_single_input(node, i)
    for constant in model.graph.initializer:
        result.graph.initializer.append(constant)
        if wanted_half[constant.name]:
            result.graph.initializer.append(_half_constant(constant, constant.name in positive))
    for value in model.graph.input:
        if wanted_half[value.name]:
            result.graph.node.append(_cast(value.name, value.name + _HALF_SUFFIX, TensorProto.FLOAT16))
    made_half = {
        name for node in model.graph.node if node.output[0] not in single for name in node.output if name in floats
    }
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        is_half = node.output[0] not in single
        result.graph.node.append(_retyped(node, is_half, floats))
        for name in node.output:
            if name not in floats:
                continue
            if is_half and (name in outputs or _read_in_single(model, name, single)):
                result.graph.node.append(_cast(name + _HALF_SUFFIX, name, TensorProto.FLOAT))
            elif name not in made_half and wanted_half[name]:
                result.graph.node.append(_cast(name, name + _HALF_SUFFIX, TensorProto.FLOAT16))
    _drop_unread_constants(result)
    return result


def with_single_weights(graph: ModelProto) -> ModelProto:
    """A copy of the graph with float32 weights: a cast behind a stored float16 is undone."""
    model = ModelProto()
    model.CopyFrom(graph)
    halves = {c.name: c for c in model.graph.initializer if c.data_type == TensorProto.FLOAT16}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "Cast" and node.input[0] in halves and _cast_target(node) == TensorProto.FLOAT:
            array = numpy_helper.to_array(halves[node.input[0]]).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        else:
            model.graph.node.append(node)
    _drop_unread_constants(model)
    return model


def _float_tensors(model: ModelProto) -> set[str]:
    """Names of all float32 tensors."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise EngineError(f"the graph's types cannot be inferred ({str(error).splitlines()[0]})") from None
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    names = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {c.name for c in inferred.initializer if c.data_type == TensorProto.FLOAT}


def _single_nodes(model: ModelProto, keep: Collection[str]) -> set[str]:
    """The nodes that stay in single precision, by the name of their first output."""
    nodes = model.graph.node
    maker = {name: node for node in nodes for name in node.output}
    warps = [node for node in nodes if node.op_type == "GridSample"]
    single_only = _SINGLE_ONLY | (frozenset() if opset(model) >= _HALF_SCALES_SINCE else _QUANTISING)
    chosen = {node.output[0] for node in nodes if node.op_type in single_only or set(node.output) & set(keep)}
    chosen |= {node.output[0] for node in warps}
    pending = [node.input[1] for node in warps]
    while pending:
        node = maker.get(pending.pop())
        if node is not None and node.output[0] not in chosen:
            chosen.add(node.output[0])
            pending += node.input
    return chosen | _of_running_sums(model) | _handed_through(model, maker)


def _handed_through(model: ModelProto, maker: dict[str, NodeProto]) -> set[str]:
    """Nodes that only carry an input to an output, such as the cameras' matrices that stereo remembers for a frame."""
    inputs, chosen = {value.name for value in model.graph.input}, set()
    for output in model.graph.output:
        name, carriers = output.name, []
        while name in maker and maker[name].op_type in (*_MOVING, "Identity"):
            carriers.append(maker[name].output[0])
            name = maker[name].input[0]
        if name in inputs:
            chosen |= set(carriers)
    return chosen


def _of_running_sums(model: ModelProto) -> set[str]:
    """CumSum nodes, what moves their entries about, and the first that computes with them."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    pending = [node for node in model.graph.node if node.op_type == "CumSum"]
    chosen = set()
    while pending:
        node = pending.pop()
        if node.output[0] not in chosen:
            chosen.add(node.output[0])
            if node.op_type == "CumSum" or node.op_type in _MOVING:
                pending += [reader for name in node.output for reader in readers[name]]
    return chosen


def _retyped(node: NodeProto, is_half: bool, floats: set[str]) -> NodeProto:
    """The node reading and writing tensors of its precision."""
    result = NodeProto()
    result.CopyFrom(node)
    if not is_half:
        return result
    for i, name in enumerate(node.input):
        if name in floats and not _is_single_input(node, i):
            result.input[i] = name + _HALF_SUFFIX
    for i, name in enumerate(node.output):
        if name in floats:
            result.output[i] = name + _HALF_SUFFIX
    if node.op_type == "Cast" and _cast_target(node) == TensorProto.FLOAT:
        result.attribute[0].i = TensorProto.FLOAT16
    return result


def _read_in_single(model: ModelProto, name: str, single: set[str]) -> bool:
    return any(
        name == read and (node.output[0] in single or _is_single_input(node, i))
        for node in model.graph.node
        for i, read in enumerate(node.input)
    )


def _is_single_input(node: NodeProto, index: int) -> bool:
    return index in _SINGLE_INPUTS.get(node.op_type, ())


def _kept_positive(model: ModelProto) -> set[str]:
    """Names of tensors whose small positive numbers must not become 0: scales, and lower bounds of what is divided by."""
    nodes = model.graph.node
    scales = {node.input[1] for node in nodes if node.op_type in _QUANTISING}
    lower_bounds = {name for node in nodes if node.op_type == "Clip" for name in node.input[1:2]}
    return scales | lower_bounds | {name for node in nodes if node.op_type == "Max" for name in node.input}


def _half_constant(constant: TensorProto, stays_positive: bool) -> TensorProto:
    array = numpy_helper.to_array(constant)
    largest = float(np.abs(array).max(initial=0.0))
    if largest > _LARGEST_HALF:
        raise EngineError(
            f"weight {constant.name} holds {largest:g}, more than half precision's {_LARGEST_HALF:g}; use fp32"
        )
    half = array.astype(np.float16)
    if stays_positive:
        half = np.where(array > 0, np.maximum(half, _SMALLEST_HALF), half)
    return numpy_helper.from_array(half, constant.name + _HALF_SUFFIX)


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)


def _cast_target(node: NodeProto) -> int:
    return next(a.i for a in node.attribute if a.name == "to")


def _drop_unread_constants(model: ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input} | {v.name for v in model.graph.output}
    kept = [constant for constant in model.graph.initializer if constant.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
