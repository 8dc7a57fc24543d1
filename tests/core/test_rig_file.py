# SPDX-License-Identifier: Apache-2.0
"""A rig on disk: round trip, and every way to get the file wrong."""

import numpy as np
import pytest

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError
from occflownet_core.rig_file import load_rig, save_rig

GOOD = """
cameras:
  CAM_FRONT:
    width_px: 1600
    height_px: 900
    intrinsic: [[1000, 0, 800], [0, 1000, 450], [0, 0, 1]]
    translation_m: [1.5, 0, 1.6]
    quaternion_xyzw: [-0.5, 0.5, -0.5, 0.5]
"""


def test_round_trip(tmp_path):
    ego_from_camera = poses.pose(np.array([1.7, 0.1, 1.5]), np.array([0.5, -0.5, 0.5, -0.5]))
    intrinsic = np.array([[1266.4172, 0, 816.267], [0, 1266.4172, 491.507], [0, 0, 1]])
    rig = CameraRig((Camera("B", 1600, 900, intrinsic, ego_from_camera), Camera("A", 8, 6, np.eye(3), np.eye(4))))
    save_rig(rig, tmp_path / "rig.yaml", comment="a test rig")
    back = load_rig(tmp_path / "rig.yaml")
    assert back.names == ("B", "A")
    np.testing.assert_allclose(back[0].ego_from_camera, ego_from_camera, atol=1e-12)
    np.testing.assert_array_equal(back[0].intrinsic, intrinsic)


def test_recorded_poses_come_back_bit_for_bit(tmp_path):
    # nuScenes' CAM_FRONT: its quaternion, made back from the matrix, differs in the last digits.
    recorded = poses.RecordedPose(
        (1.70079118954, 0.0159456324149, 1.51095763913),
        (0.4998015430569128, -0.5030316162024876, 0.4997798114386805, -0.49737083824542755),
    )
    assert tuple(poses.quaternion_from_rotation(recorded.matrix)) != recorded.quaternion_wxyz
    rig = CameraRig((Camera("A", 8, 6, np.eye(3), recorded.matrix),))
    save_rig(rig, tmp_path / "rig.yaml", recorded_poses={"A": recorded})
    np.testing.assert_array_equal(load_rig(tmp_path / "rig.yaml")[0].ego_from_camera, recorded.matrix)


def test_a_hand_written_file_looks_forward(tmp_path):
    (tmp_path / "rig.yaml").write_text(GOOD)
    camera = load_rig(tmp_path / "rig.yaml")[0]
    # (-0.5, 0.5, -0.5, 0.5) is ROS's optical rotation: the camera's z axis is the vehicle's x axis.
    np.testing.assert_allclose(camera.ego_from_camera[:3, 2], (1, 0, 0), atol=1e-12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("cameras: [", "cannot be read"),
        ("", "has no 'cameras:' table"),
        ("cameras: {CAM_FRONT: 3}", "CAM_FRONT lacks width_px"),
        (GOOD.replace("translation_m: [1.5, 0, 1.6]", ""), "CAM_FRONT lacks translation_m"),
        (GOOD.replace("[[1000,", "[[0,"), "fx = 0"),
        (GOOD.replace("[-0.5, 0.5, -0.5, 0.5]", "[0, 0, 0, 0]"), "gives no rotation"),
        (GOOD.replace("[1.5, 0, 1.6]", "[a, b, c]"), "CAM_FRONT"),
        (GOOD.replace("[1.5, 0, 1.6]", "[1, 2]"), "CAM_FRONT"),
    ],
)
def test_wrong_files_get_one_sentence(tmp_path, text, says):
    path = tmp_path / "rig.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CalibrationError, match=says) as caught:
        load_rig(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
