# SPDX-License-Identifier: Apache-2.0
"""Camera and rig: projection by hand, round trips by property, and nuscenes-devkit's own projection on real data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError, GeometryError

# Looking along ego x: camera x = -ego y, camera y = -ego z, camera z = ego x.
EGO_FROM_FORWARD_CAMERA = np.array([[0, 0, 1, 1.5], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]], dtype=float)


def forward_camera(name="CAM_FRONT", focal=1000.0, width=1600, height=900):
    intrinsic = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(name, width, height, intrinsic, EGO_FROM_FORWARD_CAMERA)


pixels = st.tuples(st.floats(0, 1599), st.floats(0, 899))


def test_projection_by_hand():
    # 10 m ahead of the camera, 1 m left, 0.5 m down: u = 800 - 1000 * 0.1, v = 450 + 1000 * 0.05.
    uv, depth_m = forward_camera().project(np.array([11.5, 1.0, 1.1]))
    np.testing.assert_allclose(uv, (700, 500))
    assert depth_m == pytest.approx(10)


@given(pixels, st.floats(0.1, 200))
def test_unprojecting_and_projecting_returns_the_pixel(pixel, depth_m):
    camera = forward_camera()
    uv, depth_back_m = camera.project(camera.unproject(np.array(pixel), np.array(depth_m)))
    np.testing.assert_allclose(uv, pixel, atol=1e-6)
    assert depth_back_m == pytest.approx(depth_m)


def test_behind_and_beside_is_not_seen():
    camera = forward_camera()
    uv, depth_m = camera.project(np.array([[11.5, 0, 1.6], [-10.0, 0, 1.6], [11.5, 9.0, 1.6], [1.5, 3.0, 1.6]]))
    assert camera.sees(uv, depth_m).tolist() == [True, False, False, False]


@given(pixels, st.floats(1, 50))
def test_resize_and_crop_move_pixels_as_they_move_intrinsics(pixel, depth_m):
    camera = forward_camera()
    point = camera.unproject(np.array(pixel), np.array(depth_m))
    uv, _ = camera.resized(400, 225).cropped(10, 97, 352, 128).project(point)
    np.testing.assert_allclose(uv, np.array(pixel) / 4 - (10, 97), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"intrinsic": np.diag([0.0, 1000, 1])}, "fx = 0"),
        ({"intrinsic": np.diag([1000, -1.0, 1])}, "fy = -1"),
        ({"intrinsic": np.eye(4)}, "3 x 3"),
        ({"intrinsic": np.array([[1000, 0, 800], [0, 1000, 450], [0, 1, 1.0]])}, r"\[\[fx, s, cx\]"),
        ({"width_px": 0}, "0 x 900"),
    ],
)
def test_impossible_cameras_are_refused(change, says):
    values = {
        "name": "CAM_BACK",
        "width_px": 1600,
        "height_px": 900,
        "intrinsic": np.diag([1000, 1000, 1.0]),
        "ego_from_camera": np.eye(4),
    }
    with pytest.raises(CalibrationError, match=f"CAM_BACK.*{says}"):
        Camera(**{**values, **change})


def test_an_extrinsic_that_is_not_rigid_is_refused():
    with pytest.raises(GeometryError, match="CAM_FRONT: ego_from_camera is not a rigid"):
        Camera("CAM_FRONT", 1600, 900, np.diag([1000, 1000, 1.0]), np.diag([2.0, 1, 1, 1]))


def test_a_rig_gives_its_cameras_by_name():
    rig = CameraRig((forward_camera("A"), forward_camera("B")))
    assert rig.ordered(["B", "A"]).names == ("B", "A")
    with pytest.raises(CalibrationError, match="no calibration for C; the rig has A, B"):
        rig.ordered(["A", "C"])
    with pytest.raises(CalibrationError, match="share a name"):
        CameraRig((forward_camera("A"), forward_camera("A")))
    with pytest.raises(CalibrationError, match="at least one camera"):
        CameraRig(())


def test_lidar_in_images_equals_nuscenes_devkit(nuscenes_real_root, monkeypatch):
    """Through the ego poses of both sensors, against NuScenesExplorer.map_pointcloud_to_image, to 1e-3 px.

    The devkit stores points as float32 while it carries them through global coordinates of about 1 km, which costs
    it up to 0.02 px; here its own steps run on float64 storage.
    """
    nuscenes = pytest.importorskip("nuscenes.nuscenes")
    from nuscenes.utils.data_classes import LidarPointCloud

    read_single = LidarPointCloud.from_file.__func__

    def read_double(cls, path):
        cloud = read_single(cls, path)
        cloud.points = cloud.points.astype(np.float64)
        return cloud

    monkeypatch.setattr(LidarPointCloud, "from_file", classmethod(read_double))
    data = nuscenes.NuScenes("v1.0-mini", dataroot=str(nuscenes_real_root), verbose=False)
    sample = data.get("sample", "ca9a282c9e77460f8360f564131a8af5")
    lidar_token = sample["data"]["LIDAR_TOP"]
    points_lidar_m = np.fromfile(data.get_sample_data_path(lidar_token), dtype=np.float32).reshape(-1, 5)[:, :3]

    def sensor_poses(token):
        record = data.get("sample_data", token)
        ego = data.get("ego_pose", record["ego_pose_token"])
        sensor = data.get("calibrated_sensor", record["calibrated_sensor_token"])
        global_from_ego = poses.pose(ego["translation"], ego["rotation"])
        return record, sensor, global_from_ego, poses.pose(sensor["translation"], sensor["rotation"])

    _, _, global_from_ego_at_lidar, ego_from_lidar = sensor_poses(lidar_token)
    points_global_m = poses.transform_points(global_from_ego_at_lidar @ ego_from_lidar, points_lidar_m)
    compared = 0
    for channel in (name for name in sample["data"] if name.startswith("CAM_")):
        record, sensor, global_from_ego, ego_from_camera = sensor_poses(sample["data"][channel])
        camera = Camera(
            channel, record["width"], record["height"], np.array(sensor["camera_intrinsic"]), ego_from_camera
        )
        uv, depth_m = camera.project(poses.transform_points(poses.inverse(global_from_ego), points_global_m))
        # The devkit keeps points at least 1 m away and 1 px inside; its own filter is applied to ours.
        kept = (
            (depth_m > 1.0)
            & (uv > 1).all(axis=1)
            & (uv[:, 0] < record["width"] - 1)
            & (uv[:, 1] < record["height"] - 1)
        )
        theirs, their_depth_m, _ = data.explorer.map_pointcloud_to_image(lidar_token, record["token"])
        assert theirs.shape[1] == kept.sum() > 1000
        np.testing.assert_allclose(uv[kept], theirs[:2].T, atol=1e-3)
        np.testing.assert_allclose(depth_m[kept], their_depth_m, atol=1e-4)
        compared += int(kept.sum())
    assert compared > 15_000
