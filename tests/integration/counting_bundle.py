# SPDX-License-Identifier: Apache-2.0
"""A model bundle whose network counts: what the node publishes then tells what happened to its memory.

Every voxel that a camera sees is labelled with the number of sets since the memory was forgotten (16 at most, 17 is
free). An image with a pixel of 250 or more (``fails_from``) makes ONNX Runtime fail while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import TensorProto, helper

from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec
from occflownet_core.runtime.bundle import Bundle, RecurrentState, write_bundle

WIDTH_PX, HEIGHT_PX = 64, 32
GRID = VoxelGrid((-8, -8, -2), (8, 8, 2), 2.0)  # 8 x 8 x 2 cells
_LIFT = LiftSpec(GRID, DepthBins(1.0, 12.0, 1.0), feature_height=2, feature_width=4, slots=2)


def write_counting_bundle(
    directory: Path, cameras: Sequence[str], name: str = "counting", fails_from: int = 250
) -> Path:
    """The bundle's folder; it takes images of 64 x 32 px. With ``fails_from`` 256 nothing makes it fail."""
    bundle = Bundle(
        directory=directory,
        name=name,
        cameras=tuple(cameras),
        image_width_px=WIDTH_PX,
        image_height_px=HEIGHT_PX,
        grid=GRID,
        lift=_LIFT,
        occupancy_threshold=0.25,
        recurrent=(RecurrentState("state", "next_state", (1, 1, 1, 1)),),
        outputs=("labels", "occupancy_probability"),
    )
    write_bundle(bundle, {"model.onnx": _graph(len(cameras), fails_from)})
    return directory


def _graph(cameras: int, fails_from: int) -> bytes:
    voxels, shape_xyz = GRID.size, GRID.shape
    inputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("images", TensorProto.UINT8, (cameras, HEIGHT_PX, WIDTH_PX, 3)),
            ("pixel_index", TensorProto.INT32, (voxels, 2)),
            ("depth_index", TensorProto.INT32, (voxels, 2, 2)),
            ("depth_weight", TensorProto.FLOAT, (voxels, 2, 2)),
            ("previous_from_current", TensorProto.FLOAT, (4, 4)),
            ("occupancy_threshold", TensorProto.FLOAT, ()),
            ("state", TensorProto.FLOAT, (1, 1, 1, 1)),
        )
    ]
    outputs = [
        helper.make_tensor_value_info("labels", TensorProto.UINT8, shape_xyz),
        helper.make_tensor_value_info("occupancy_probability", TensorProto.FLOAT, shape_xyz),
        helper.make_tensor_value_info("next_state", TensorProto.FLOAT, (1, 1, 1, 1)),
    ]
    constants = [
        helper.make_tensor("one", TensorProto.FLOAT, (), [1]),
        helper.make_tensor("sixteen", TensorProto.FLOAT, (), [16]),
        helper.make_tensor("free", TensorProto.FLOAT, (), [17]),
        helper.make_tensor("zeros", TensorProto.FLOAT, (fails_from,), [0.0] * fails_from),
        helper.make_tensor("last_axes", TensorProto.INT64, (2,), [1, 2]),
        helper.make_tensor("zyx", TensorProto.INT64, (3,), list(shape_xyz[::-1])),
        helper.make_tensor("no_axes", TensorProto.INT64, (0,), []),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.INT32),
        helper.make_node("ReduceMax", ["pixels"], ["brightest"], keepdims=0),
        helper.make_node("Gather", ["zeros", "brightest"], ["nothing"]),  # out of bounds where an image is too bright
        helper.make_node("Add", ["state", "one"], ["counted"]),
        helper.make_node("Add", ["counted", "nothing"], ["next_state"]),
        helper.make_node("ReduceSum", ["depth_weight", "last_axes"], ["weight"], keepdims=0),  # [V]
        helper.make_node("Reshape", ["weight", "zyx"], ["volume"]),
        helper.make_node("Transpose", ["volume"], ["occupancy_probability"], perm=(2, 1, 0)),
        helper.make_node("Greater", ["occupancy_probability", "occupancy_threshold"], ["occupied"]),
        helper.make_node("Min", ["next_state", "sixteen"], ["shown"]),
        helper.make_node("Reshape", ["shown", "no_axes"], ["value"]),
        helper.make_node("Where", ["occupied", "value", "free"], ["label"]),
        helper.make_node("Cast", ["label"], ["labels"], to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(nodes, "counting", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()
