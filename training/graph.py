# SPDX-License-Identifier: Apache-2.0
"""The deployment graph of a network in ONNX, of operators that every runtime has."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from occflownet_core.deployed_field import DeployedField
from occflownet_core.errors import EngineError, ExportError
from occflownet_core.model import DeployedModel, OccFlowNet
from occflownet_core.runtime.bundle import GRAPH
from occflownet_core.runtime.native_operators import require_native
from training.parity import drive, ring_rig, table_tensors

OPSET = 18

_LARGE = 1024


def export_graph(model: OccFlowNet) -> onnx.ModelProto:
    """The deployment graph of a network.

    Raises:
        ExportError: it needs an operator that a runtime lacks.
    """
    deployed = DeployedModel(model)
    graph = _exported(deployed, _example_inputs(deployed), deployed.inputs, deployed.outputs)
    require_native_operators(graph)
    return graph


def export_field_graph(model: OccFlowNet) -> onnx.ModelProto:
    """The graph of queries: reads ``field_features`` at any number of points, each kind of them perhaps none.

    Its shapes are not fixed, so that it is for ONNX Runtime alone.
    """
    x, y, z = model.grid.shape
    inputs = (torch.zeros(1, z, y, x, model.config.field.channels), torch.zeros(3, 3), torch.zeros(2, 3))
    deployed = DeployedField(model.decoder, model.grid, model.config.grid.voxel_size_m)
    any_number = {0: torch.export.Dim.DYNAMIC}
    return _exported(deployed, inputs, deployed.INPUTS, deployed.OUTPUTS, ({}, any_number, any_number))


def _exported(
    module: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[dict, ...] | None = None,
) -> onnx.ModelProto:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
        path = Path(folder) / GRAPH
        program.save(path, external_data=False)
        graph = onnx.load(path)
    _strip_notes(graph)
    return graph


def require_native_operators(graph: onnx.ModelProto) -> None:
    """Refuse what ONNX Runtime or TensorRT runs late, slowly or not at all (DESIGN: graph boundary).

    Raises:
        ExportError: the first node that is not in the table of ``native_operators``, by name, and why.
    """
    try:
        require_native(graph)
    except EngineError as error:
        raise ExportError(str(error)) from None


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
