# SPDX-License-Identifier: Apache-2.0
"""A bundle's graph in eight bits: which layers, with which scales, written as explicit QuantizeLinear / DequantizeLinear.

Scales come from a recorded drive (calibration: the smallest and largest value of each tensor), weights have one per output
channel, symmetric. ONNX Runtime's ``quantize_static`` does both; what is chosen here is where, and in which manner:

``tensorrt``
    Activations symmetric int8 with zero point 0, one scale per tensor, quantised where a layer reads them and nowhere else;
    weights stored as int8 with a DequantizeLinear between them and their layer; biases in floating point. So NVIDIA asks for
    it: "Working with Quantized Types" and "Explicit Quantization" of TensorRT 11's documentation, looked up on 2026-11-29
    (symmetric only; quantise all inputs of layers with weights, not their outputs; a shortcut that is added is read in eight
    bits, too). It runs in ONNX Runtime as well, more slowly than the other.
``cpu``
    Activations asymmetric uint8, results of convolutions, of what is added to them and of ReLU in eight bits as well, biases
    int32: the pattern that ONNX Runtime's kernels take whole (QLinearConv), after the advice in ``quantize_static`` for
    x86-64 with VNNI. TensorRT refuses such a graph.

Needs the package ``onnx``.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, version_converter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from occflownet_core.errors import BundleError, DatasetError, EngineError
from occflownet_core.runtime.bundle import (
    CPU,
    FIELD_FEATURES,
    FIELD_GRAPH,
    GRAPH,
    TARGETS,
    TENSORRT,
    Bundle,
    load_bundle,
    write_bundle,
)
from occflownet_core.runtime.drive import EngineInput, predictions
from occflownet_core.runtime.half_precision import with_single_weights
from occflownet_core.runtime.native_operators import opset, require_native
from occflownet_core.runtime.onnx_engine import OnnxEngine

_LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_BETWEEN = ("Relu", "Clip", "Add", "MaxPool")
"""What ONNX Runtime computes in eight bits between two layers."""
_OPSET = 19
"""From here on scales may be float16 (``half_precision``)."""
_NO_TABLES = frozenset({"images", "previous_from_current", "occupancy_threshold"})


def quantise_bundle(
    bundle: Bundle, frames: Iterable[EngineInput], target: str, directory: Path, data: str, threads: int = 1
) -> Bundle:
    """Write a bundle whose graph computes in eight bits; it carries no weights for PyTorch.

    Args:
        bundle: from ``load_bundle``, not quantised yet.
        frames: of a drive like those to come, in order of time; a few dozen are enough.
        target: ``cpu`` or ``tensorrt``.
        directory: of the new bundle; must not exist.
        data: what the frames are, in words, for ``bundle.yaml``.
        threads: CPU threads of the calibration.

    Raises:
        BundleError: the bundle is quantised, or ``directory`` exists or cannot be written.
        DatasetError: there is no frame.
        EngineError: the target is unknown, the graph has no layer to quantise or uses what TensorRT lacks.
    """
    if target not in TARGETS:
        raise EngineError(f"there is no target '{target}'; use one of {', '.join(TARGETS)}")
    if bundle.quantisation:
        raise BundleError(f"bundle {bundle.directory} is quantised already; give the one that it was made of")
    if directory.exists():
        raise BundleError(f"{directory} exists already; give a folder for the quantised bundle that does not")
    feeds = _Counted(recorded_feeds(bundle, frames, threads))
    graph = quantised(
        onnx.load(bundle.graph_path),
        feeds,
        target,
        recurrent=[(state.input, state.output) for state in bundle.recurrent],
        decoders_read=FIELD_FEATURES if bundle.field_channels else None,
    )
    if target == TENSORRT:
        require_native(graph)
    files = {GRAPH: graph.SerializeToString()}
    if bundle.field_graph_path:
        files[FIELD_GRAPH] = bundle.field_graph_path.read_bytes()
    note = {"target": target, "data": data, "frames": feeds.count, "date": date.today().isoformat()}
    write_bundle(dataclasses.replace(bundle, directory=directory, quantisation=note), files)
    return load_bundle(directory)


def recorded_feeds(bundle: Bundle, frames: Iterable[EngineInput], threads: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """All inputs of the graph, frame by frame, the memory as the unquantised graph left it.

    Raises:
        EngineError, CalibrationError: the engine refuses a frame or its rig.
    """
    engine = _Recorder(bundle, threads)
    for _ in predictions(engine, frames):
        yield engine.feeds


def quantised(
    graph: ModelProto,
    feeds: Iterable[dict[str, np.ndarray]],
    target: str,
    recurrent: Collection[tuple[str, str]] = (),
    decoders_read: str | None = None,
) -> ModelProto:
    """The graph with its layers in eight bits.

    Args:
        graph: in single precision, its weights float32, or float16 with a cast behind them.
        feeds: values of all of its inputs, for calibration.
        target: ``cpu`` or ``tensorrt``.
        recurrent: names of inputs and outputs that are memory.
        decoders_read: name of the tensor behind which nothing is quantised.

    Returns:
        A new model, of opset 19 or newer.

    Raises:
        DatasetError: ``feeds`` is empty.
        EngineError: there is nothing to quantise, or the graph cannot be brought to opset 19.
    """
    model = _named(_at_opset(with_single_weights(graph)))
    layers = layers_to_quantise(model, recurrent, decoders_read)
    if not layers:
        raise EngineError("the graph has no convolution or matrix product that may be quantised; use it as it is")
    nodes = layers | _between(model, layers) if target == CPU else layers
    reader = _Reader(feeds)
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        source, result = Path(folder) / "single.onnx", Path(folder) / "quantised.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            result,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*_LAYERS, *(_BETWEEN if target == CPU else ())],
            nodes_to_quantize=sorted(nodes),
            per_channel=True,
            activation_type=QuantType.QUInt8 if target == CPU else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options=_options(target),
        )
        return onnx.load(result)


def layers_to_quantise(
    model: ModelProto, recurrent: Collection[tuple[str, str]] = (), decoders_read: str | None = None
) -> set[str]:
    """Names of the layers (convolutions and matrix products with constant weights) that bear eight bits.

    All but: the first behind the lift's tables and the cameras' matrices, whose input is the lifted volume (mostly nothing,
    some values large: alone it cost 1.5 % of all labels); the last before a softmax (the depth distribution), before a
    running sum, before positions that a GridSample reads at, and before an output; the decoders. An attention's softmax
    follows a product of two activations, so the layers before that are quantised.
    """
    nodes, constants = model.graph.node, {c.name for c in model.graph.initializer}
    layers = {n.name for n in nodes if n.op_type in _LAYERS and n.input[1] in constants and n.input[0] not in constants}
    memory_in, memory_out = {name for name, _ in recurrent}, {name for _, name in recurrent}
    tables = {v.name for v in model.graph.input} - constants - _NO_TABLES - memory_in
    ends = [v.name for v in model.graph.output if v.name not in memory_out and v.name != decoders_read]
    ends += [n.input[0] for n in nodes if n.op_type in ("Softmax", "LogSoftmax", "CumSum")]
    ends += [n.input[1] for n in nodes if n.op_type == "GridSample"]
    left_out = _first_behind(nodes, tables) | _last_before(nodes, ends)
    if decoders_read:
        left_out |= _behind(nodes, {decoders_read})
    return layers - left_out


def _first_behind(nodes: Iterable[NodeProto], names: set[str]) -> set[str]:
    """Names of the layers that some of the tensors reach without passing another layer."""
    reached, found = set(names), set()
    for node in nodes:
        if reached & set(node.input):
            if node.op_type in _LAYERS:
                found.add(node.name)
            else:
                reached |= set(node.output)
    return found


def _behind(nodes: Iterable[NodeProto], names: set[str]) -> set[str]:
    """Names of all nodes that some of the tensors reach."""
    reached, found = set(names), set()
    for node in nodes:
        if reached & set(node.input):
            found.add(node.name)
            reached |= set(node.output)
    return found


def _last_before(nodes: Iterable[NodeProto], ends: Iterable[str]) -> set[str]:
    """Names of the layers whose results reach some of the tensors without passing another layer."""
    maker = {name: node for node in nodes for name in node.output}
    pending, seen, found = list(ends), set(), set()
    while pending:
        node = maker.get(pending.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in _LAYERS:
            found.add(node.name)
        else:
            pending += node.input
    return found


def _between(model: ModelProto, layers: set[str]) -> set[str]:
    """Names of the nodes behind quantised convolutions that compute in eight bits with them."""
    constants = {c.name for c in model.graph.initializer}
    chosen, made = set(), set()
    for node in model.graph.node:
        read = {name for name in node.input if name and name not in constants}
        if node.name in layers and node.op_type.startswith("Conv"):
            made |= set(node.output)
        elif node.op_type in _BETWEEN and read and read <= made:
            chosen.add(node.name)
            made |= set(node.output)
    return chosen


def _options(target: str) -> dict[str, object]:
    """Results of matrix products stay in floating point: a bias follows, and ONNX Runtime has a kernel for just that."""
    floating = ["MatMul", "Gemm"]
    if target == CPU:
        return {"OpTypesToExcludeOutputQuantization": floating}
    return {
        "ActivationSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": [*floating, "Conv", "ConvTranspose"],
    }


def _at_opset(model: ModelProto) -> ModelProto:
    version = opset(model)
    if version >= _OPSET:
        return model
    try:
        return version_converter.convert_version(model, _OPSET)
    except Exception as error:  # the converter's own share no narrower base
        reason = " ".join(str(error).split())[:200]
        raise EngineError(
            f"the graph of opset {version} cannot be brought to opset {_OPSET} ({reason}); export it for that"
        ) from None


def _named(model: ModelProto) -> ModelProto:
    """The model itself, every node with a name of its own: ONNX Runtime is told nodes by name."""
    taken = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{i}_{node.output[0]}"
        taken.add(node.name)
    return model


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without ONNX Runtime's advice, on the root logger, to prepare graphs that are prepared."""

    def keep(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


class _Recorder(OnnxEngine):
    """Keeps the inputs of its last run in ``feeds``."""

    def _forward(self, images: np.ndarray, previous_from_current: np.ndarray) -> object:
        memory = self.memory()
        self.feeds = {
            "images": images,
            "previous_from_current": previous_from_current,
            "occupancy_threshold": np.array(self.occupancy_threshold, np.float32),
            **{name: np.ascontiguousarray(array) for name, array in self._tables.arrays().items()},
            **{state.input: memory[state.output] for state in self.bundle.recurrent},
        }
        return super()._forward(images, previous_from_current)


class _Counted:
    """Feeds, and how many were taken."""

    def __init__(self, feeds: Iterable[dict[str, np.ndarray]]) -> None:
        self._feeds, self.count = feeds, 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for feed in self._feeds:
            self.count += 1
            yield feed


class _Reader(CalibrationDataReader):
    """Feeds as ONNX Runtime asks for them; the first is taken at once, so that none is found out early.

    Raises:
        DatasetError: there is none.
    """

    def __init__(self, feeds: Iterable[dict[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)
        self._next = next(self._feeds, None)
        if self._next is None:
            raise DatasetError("there is no frame to calibrate on; give a drive with at least one complete image set")

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed, self._next = self._next, next(self._feeds, None) if self._next is not None else None
        return feed
