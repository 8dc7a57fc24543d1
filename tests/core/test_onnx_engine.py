# SPDX-License-Identifier: Apache-2.0
"""OnnxEngine and the factory, on a graph small enough to be worked out by hand (``graph_by_hand``)."""

import logging

import numpy as np
import pytest

from occflownet_core.errors import BundleError, CalibrationError, EngineError
from occflownet_core.lift_tables import build_lift_tables
from occflownet_core.runtime.factory import create_engine
from occflownet_core.runtime.onnx_engine import OnnxEngine
from tests.core.graph_by_hand import SPEC, forward, hand_made_graph, images, occupied_label, rig, write


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bundle"), hand_made_graph().SerializeToString())


@pytest.fixture
def engine(bundle):
    engine = OnnxEngine(bundle)
    engine.calibrate(rig("front", "back"))
    return engine


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
