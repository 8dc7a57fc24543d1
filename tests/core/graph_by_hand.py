# SPDX-License-Identifier: Apache-2.0
"""A deployment graph small enough to be worked out by hand, for engines of every kind.

next_state = state + mean(images) + 10 * (forward motion in metres);
probability = sum of a voxel's depth weights / 2 (0.5 where a camera sees it, else 0);
label = next_state where probability > occupancy_threshold, else 17.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec
from occflownet_core.runtime.bundle import Bundle, RecurrentState, load_bundle, write_bundle

GRID = VoxelGrid((-8, -4, -2), (8, 4, 2), 2.0)  # 8 x 4 x 2 cells
SPEC = LiftSpec(GRID, DepthBins(1.0, 9.0, 1.0), feature_height=2, feature_width=4, slots=2)
VOXELS = GRID.size


def hand_made_graph() -> onnx.ModelProto:
    def tensor(name: str, kind: int, shape: Sequence[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [
        tensor("images", TensorProto.UINT8, (2, 8, 16, 3)),
        tensor("pixel_index", TensorProto.INT32, (VOXELS, 2)),
        tensor("depth_index", TensorProto.INT32, (VOXELS, 2, 2)),
        tensor("depth_weight", TensorProto.FLOAT, (VOXELS, 2, 2)),
        tensor("previous_from_current", TensorProto.FLOAT, (4, 4)),
        tensor("occupancy_threshold", TensorProto.FLOAT, ()),
        tensor("state", TensorProto.FLOAT, (1, 1, 1, 1)),
    ]
    outputs = [
        tensor("labels", TensorProto.UINT8, GRID.shape),
        tensor("occupancy_probability", TensorProto.FLOAT, GRID.shape),
        tensor("next_state", TensorProto.FLOAT, (1, 1, 1, 1)),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["brightness"], keepdims=1),  # [1, 1, 1, 1]
        helper.make_node("Gather", ["previous_from_current", "at"], ["row"], axis=0),
        helper.make_node("Gather", ["row", "three"], ["forward"], axis=0),
        helper.make_node("Mul", ["forward", "ten"], ["moved"]),
        helper.make_node("Add", ["state", "brightness"], ["brighter"]),
        helper.make_node("Add", ["brighter", "moved"], ["next_state"]),
        helper.make_node("ReduceSum", ["depth_weight", "last_axes"], ["weight"], keepdims=0),  # [V]
        helper.make_node("Mul", ["weight", "half"], ["seen"]),
        helper.make_node("Reshape", ["seen", "zyx"], ["volume"]),
        helper.make_node("Transpose", ["volume"], ["occupancy_probability"], perm=(2, 1, 0)),
        helper.make_node("Greater", ["occupancy_probability", "occupancy_threshold"], ["occupied"]),
        helper.make_node("Reshape", ["next_state", "no_axes"], ["value"]),
        helper.make_node("Where", ["occupied", "value", "free"], ["label"]),
        helper.make_node("Cast", ["label"], ["labels"], to=TensorProto.UINT8),
    ]
    constants = [
        helper.make_tensor("at", TensorProto.INT64, (), [0]),
        helper.make_tensor("three", TensorProto.INT64, (), [3]),
        helper.make_tensor("ten", TensorProto.FLOAT, (), [10]),
        helper.make_tensor("last_axes", TensorProto.INT64, (2,), [1, 2]),
        helper.make_tensor("half", TensorProto.FLOAT, (), [0.5]),
        helper.make_tensor("zyx", TensorProto.INT64, (3,), [2, 4, 8]),
        helper.make_tensor("no_axes", TensorProto.INT64, (0,), []),
        helper.make_tensor("free", TensorProto.FLOAT, (), [17]),
    ]
    graph = helper.make_graph(nodes, "by_hand", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(directory, graph: bytes, **changes) -> Bundle:
    settings = {
        "name": "by hand",
        "cameras": ("front", "back"),
        "image_width_px": 16,
        "image_height_px": 8,
        "grid": GRID,
        "lift": SPEC,
        "occupancy_threshold": 0.25,
        "recurrent": (RecurrentState("state", "next_state", (1, 1, 1, 1)),),
        "outputs": ("labels", "occupancy_probability"),
    } | changes
    write_bundle(Bundle(directory=directory, **settings), {"model.onnx": graph})
    return load_bundle(directory)


def rig(*names: str, width_px: int = 32, height_px: int = 16) -> CameraRig:
    """The first camera looks forward, the next one backward, and so on."""
    cameras = []
    for i, name in enumerate(names):
        sign = 1 - 2 * (i % 2)
        ego_from_camera = np.eye(4)
        ego_from_camera[:3, :3] = np.array([[0, 0, sign], [-sign, 0, 0], [0, -1, 0]])
        intrinsic = np.array([[width_px / 2, 0, width_px / 2], [0, width_px / 2, height_px / 2], [0, 0, 1]])
        cameras.append(Camera(name, width_px, height_px, intrinsic, ego_from_camera))
    return CameraRig(tuple(cameras))


def images(value: int) -> np.ndarray:
    return np.full((2, 8, 16, 3), value, np.uint8)


def forward(metres: float) -> np.ndarray:
    return poses.pose(np.array([metres, 0, 0]), np.array([1, 0, 0, 0]))


def occupied_label(prediction) -> int:
    values = np.unique(prediction.labels[prediction.labels != 17])
    assert len(values) == 1
    return int(values[0])
