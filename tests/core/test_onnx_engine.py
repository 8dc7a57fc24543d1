# SPDX-License-Identifier: Apache-2.0
"""OnnxEngine and the factory, on a graph small enough to be worked out by hand.

The graph: next_state = state + mean(images) + 10 * (forward motion in metres);
probability = sum of a voxel's depth weights / 2 (0.5 where a camera sees it, else 0);
label = next_state where probability > occupancy_threshold, else 17.
"""

import logging
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import BundleError, CalibrationError, EngineError
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec, build_lift_tables
from occflownet_core.runtime.bundle import Bundle, RecurrentState, load_bundle, write_bundle
from occflownet_core.runtime.engine import create_engine
from occflownet_core.runtime.onnx_engine import OnnxEngine

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


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bundle"), hand_made_graph().SerializeToString())


@pytest.fixture
def engine(bundle):
    engine = OnnxEngine(bundle)
    engine.calibrate(rig("front", "back"))
    return engine


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


def test_the_memory_goes_from_run_to_run(engine):
    assert occupied_label(engine.infer(images(3), None)) == 3
    assert occupied_label(engine.infer(images(4), np.eye(4))) == 7
    assert occupied_label(engine.infer(images(2), np.eye(4))) == 9
    assert occupied_label(engine.infer(images(1), np.eye(4))) == 10


def test_ego_motion_reaches_the_graph(engine):
    engine.infer(images(1), None)
    assert occupied_label(engine.infer(images(1), forward(0.5))) == 1 + 1 + 5


def test_no_ego_motion_forgets(engine):
    engine.infer(images(9), None)
    assert occupied_label(engine.infer(images(2), None)) == 2


def test_reset_forgets(engine):
    engine.infer(images(9), np.eye(4))
    engine.reset()
    assert occupied_label(engine.infer(images(2), np.eye(4))) == 2


def test_calibrating_again_keeps_the_memory(engine):
    engine.infer(images(3), None)
    engine.calibrate(rig("front", "back"))
    assert occupied_label(engine.infer(images(1), np.eye(4))) == 4


def test_a_prediction_outlives_the_next_run(engine):
    first = engine.infer(images(3), None)
    kept = first.labels.copy(), first.probability.copy()
    engine.infer(images(5), np.eye(4), missing_cameras=[0, 1])
    np.testing.assert_array_equal(first.labels, kept[0])
    np.testing.assert_array_equal(first.probability, kept[1])


def test_what_comes_out(engine):
    prediction = engine.infer(images(3), None)
    assert prediction.labels.dtype == np.uint8
    assert prediction.labels.shape == (8, 4, 2)
    assert prediction.velocity_mps is None
    seen = prediction.probability == 0.5
    assert 0 < seen.sum() < seen.size
    # The cell at x = 5, y = 1, z = 1 is 5 m ahead, (-1, -1) off the axis: in the 90 degree wide, 53 degree high view.
    assert seen[6, 2, 1]
    # The cell at x = 1, y = 3, z = 1 is 71 degrees off the forward axis, and behind the backward camera.
    assert not seen[4, 2 + 1, 1]


def test_the_threshold_can_be_changed_between_runs(engine):
    assert engine.occupancy_threshold == 0.25
    assert (engine.infer(images(1), None).labels != 17).any()
    engine.occupancy_threshold = 0.5  # occupied means above the threshold, and 0.5 is the highest probability here
    assert (engine.infer(images(1), None).labels == 17).all()
    engine.occupancy_threshold = 0.49
    assert (engine.infer(images(1), None).labels != 17).any()


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_probability(engine, value):
    with pytest.raises(EngineError, match="give a probability from 0 to 1"):
        engine.occupancy_threshold = value


def test_a_missing_camera_is_not_read_and_comes_back(engine):
    both = engine.infer(images(1), None).probability
    front_only = engine.infer(images(1), None, missing_cameras=[1]).probability
    ahead = np.arange(8) >= 4
    np.testing.assert_array_equal(front_only[ahead], both[ahead])
    assert (both[~ahead] > 0).any()
    assert (front_only[~ahead] == 0).all()
    np.testing.assert_array_equal(engine.infer(images(1), None).probability, both)


def test_a_missing_camera_that_does_not_exist(engine):
    with pytest.raises(EngineError, match=r"missing_cameras is \[2\]; indices run to 1"):
        engine.infer(images(1), None, missing_cameras=[2])


def test_cameras_are_found_by_name_whatever_their_order_and_company(bundle, engine):
    expected = engine.infer(images(1), None, missing_cameras=[1]).probability
    mixed = rig("back_left", "back", "front", "other")  # "front" is the third: it looks forward, "back" backward
    other = OnnxEngine(bundle)
    other.calibrate(mixed)
    np.testing.assert_array_equal(other.infer(images(1), None, missing_cameras=[1]).probability, expected)


def test_cameras_of_other_names_are_taken_in_order(bundle, engine):
    other = OnnxEngine(bundle)
    other.calibrate(rig("a", "b"))
    np.testing.assert_array_equal(other.infer(images(1), None).probability, engine.infer(images(1), None).probability)


def test_images_are_prepared_before_tables_are_built(engine):
    """A camera of twice the resolution gives the tables of the network's own."""
    tables = build_lift_tables(rig("front", "back", width_px=16, height_px=8), SPEC)
    np.testing.assert_array_equal(engine._tables.pixel_index, tables.pixel_index)
    np.testing.assert_allclose(engine._tables.depth_weight, tables.depth_weight, atol=1e-6)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
def test_another_number_of_cameras(bundle, names):
    with pytest.raises(CalibrationError, match=f"takes 2 cameras \\(front, back\\), the vehicle has {len(names)}"):
        OnnxEngine(bundle).calibrate(rig(*names))


def test_a_camera_that_the_vehicle_lacks(bundle):
    with pytest.raises(CalibrationError, match="no calibration for back; the rig has front, left"):
        OnnxEngine(bundle).calibrate(rig("front", "left"))


def test_no_calibration(bundle):
    with pytest.raises(EngineError, match=r"call calibrate\(rig\) before infer"):
        OnnxEngine(bundle).infer(images(1), None)


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 8, 16, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 16, 3), np.float32)]
)
def test_images_of_another_shape(engine, wrong):
    with pytest.raises(EngineError, match=r"takes uint8 \(2, 8, 16, 3\)"):
        engine.infer(wrong, None)


def test_images_need_not_be_contiguous(engine):
    wide = np.full((2, 8, 32, 3), 200, np.uint8)
    wide[:, :, ::2] = 6
    assert occupied_label(engine.infer(wide[:, :, ::2], None)) == 6


def test_a_file_that_is_no_graph(tmp_path):
    with pytest.raises(EngineError, match=r"ONNX Runtime .* refuses .*model\.onnx"):
        OnnxEngine(write(tmp_path, b"no graph"))


@pytest.mark.parametrize(("changes", "kind"), [({"outputs": ("labels",)}, "outputs"), ({"recurrent": ()}, "inputs")])
def test_a_graph_that_is_not_as_described(tmp_path, changes, kind):
    with pytest.raises(BundleError, match=f"has the {kind} .* where the bundle describes"):
        OnnxEngine(write(tmp_path, hand_made_graph().SerializeToString(), **changes))


def test_the_engine_leaves_the_callers_arithmetic_alone(engine):
    """ONNX Runtime can make its caller flush denormal numbers to zero; NumPy code in the same thread would notice."""
    engine.infer(images(1), None)
    assert np.float32(1e-40) * np.float32(1) > 0


def test_auto_takes_onnx_runtime_and_says_why(bundle, caplog):
    with caplog.at_level(logging.INFO):
        engine = create_engine(bundle)
    assert engine.name == "onnxruntime"
    assert (
        "engine: onnxruntime-cpu (ONNX Runtime is installed and runs every bundle on the CPU; TensorRT" in caplog.text
    )


def test_backends_that_cannot_be_had(bundle):
    with pytest.raises(EngineError, match="there is no backend 'tensorflow'; use one of auto, tensorrt, onnxruntime, "):
        create_engine(bundle, "tensorflow")
    with pytest.raises(EngineError, match="threads is 0; give 1 or more"):
        create_engine(bundle, threads=0)
    with pytest.raises(EngineError, match="carries no weights for the backend 'torch'"):
        create_engine(bundle, "torch")
