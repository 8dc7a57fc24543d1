# SPDX-License-Identifier: Apache-2.0
"""The deployment graph of a network in ONNX, of operators that every runtime has."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch

from occflownet_core.errors import ExportError
from occflownet_core.model import DeployedModel, OccFlowNet
from occflownet_core.runtime.bundle import GRAPH
from training.parity import drive, ring_rig, table_tensors

OPSET = 18

_LARGE = 1024
_FOREIGN_OPERATORS = ("Scatter", "Loop", "If", "Scan", "NonZero", "Unique", "NonMaxSuppression", "Sequence", "Optional")


def export_graph(model: OccFlowNet) -> onnx.ModelProto:
    """The deployment graph of a network.

    Raises:
        ExportError: it needs an operator that a runtime lacks.
    """
    deployed = DeployedModel(model).eval()
    inputs = _example_inputs(deployed)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            deployed,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(deployed.inputs),
            output_names=list(deployed.outputs),
            verbose=False,
        )
        path = Path(folder) / GRAPH
        program.save(path, external_data=False)
        graph = onnx.load(path)
    _strip_notes(graph)
    require_native_operators(graph)
    return graph


def require_native_operators(graph: onnx.ModelProto) -> None:
    """Refuse operators that ONNX Runtime or TensorRT runs late, slowly or not at all (DESIGN: graph boundary).

    Raises:
        ExportError: a scatter, a data-dependent shape, control flow, a function, or a GridSample of more than 2D.
    """
    inferred = onnx.shape_inference.infer_shapes(graph)
    values = [*inferred.graph.input, *inferred.graph.value_info]
    rank = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    for node in inferred.graph.node:
        if node.op_type.startswith(_FOREIGN_OPERATORS) or node.domain not in ("", "ai.onnx"):
            raise ExportError(f"the graph uses {node.op_type}, which not every runtime has; write the model without it")
        if node.op_type == "GridSample" and rank.get(node.input[0]) != 4:
            raise ExportError("the graph uses GridSample on other than 2D maps, which TensorRT lacks; fold axes first")


def store_half(graph: onnx.ModelProto) -> None:
    """Keep large constants as float16, each with a cast back to float32, which runtimes do once, as they load."""
    casts = []
    for constant in graph.graph.initializer:
        if constant.data_type != onnx.TensorProto.FLOAT or np.prod(constant.dims) < _LARGE:
            continue
        name, half = constant.name, onnx.numpy_helper.to_array(constant).astype(np.float16)
        constant.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_half"))
        casts.append(onnx.helper.make_node("Cast", [constant.name], [name], to=onnx.TensorProto.FLOAT))
    for cast in reversed(casts):
        graph.graph.node.insert(0, cast)


def _example_inputs(deployed: DeployedModel) -> tuple[torch.Tensor, ...]:
    config = deployed.model.config
    images, previous_from_current = next(drive(config, 1))
    return (
        torch.from_numpy(images),
        *table_tensors(ring_rig(config), deployed.model),
        torch.from_numpy(previous_from_current).float(),
        torch.tensor(config.occupancy_threshold),
        *deployed.empty_memory(),
    )


def _strip_notes(graph: onnx.ModelProto) -> None:
    """Drop stack traces and names of source files, which the exporter leaves in every node."""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    for entry in (
        *graph.graph.node,
        *graph.graph.value_info,
        *graph.graph.initializer,
        *graph.graph.input,
        *graph.graph.output,
    ):
        entry.doc_string = ""
        del entry.metadata_props[:]
