# SPDX-License-Identifier: Apache-2.0
"""bag_to_nuscenes: nuScenes root -> bag -> nuScenes root gives the same data; a vehicle of one's own; bad bags."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from occflownet_core import poses
from occflownet_core.rig_file import load_rig, save_rig
from occflownet_ros.topic_map import load_topic_map
from tests.ros import own_vehicle as vehicle
from tests.ros.conversions import VERSION, convert, own_map, table, to_bag

# Round trips


def assert_same_measurements(first: Path, second: Path, samples: int, channels: int) -> None:
    """Every sample of the second root is the first's: files, stamps, sizes, calibration and ego poses, all exactly."""
    devkit = pytest.importorskip("nuscenes.nuscenes")
    one, two = (devkit.NuScenes(VERSION, str(root), verbose=False) for root in (first, second))
    assert len(two.sample) == samples
    for sample in two.sample:
        original = one.get("sample", sample["token"])
        assert sample["timestamp"] == original["timestamp"]
        assert len(sample["data"]) == channels
        for channel, token in sample["data"].items():
            mine, other = two.get("sample_data", token), one.get("sample_data", original["data"][channel])
            for key in ("timestamp", "width", "height", "is_key_frame", "channel", "sensor_modality"):
                assert mine[key] == other[key], (channel, key)
            assert (second / mine["filename"]).read_bytes() == (first / other["filename"]).read_bytes()
            for name in ("ego_pose", "calibrated_sensor"):
                row, same = two.get(name, mine[f"{name}_token"]), one.get(name, other[f"{name}_token"])
                for key in {"translation", "rotation", "camera_intrinsic", "timestamp"} & set(same):
                    assert row[key] == same[key], (channel, name, key)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_minicity_round_trip_is_exact_and_trains(minicity_root, tmp_path, capsys, storage):
    bag = to_bag(minicity_root, "minicity-5-0000", tmp_path, "--lidarseg", "--storage", storage)
    assert convert(bag, "--out", tmp_path / "root") == 0
    assert_same_measurements(minicity_root, tmp_path / "root", samples=3, channels=7)
    assert "left out" not in capsys.readouterr().out

    data = pytest.importorskip("training.data.nuscenes")
    rays = pytest.importorskip("training.data.rays")
    original, copy = (data.KeyframeIndex(root, VERSION) for root in (minicity_root, tmp_path / "root"))
    assert list(copy.scenes) == ["minicity-5-0000"]
    for one, two in zip(original, copy, strict=True):
        assert two.lidarseg_path.read_bytes() == one.lidarseg_path.read_bytes()
        first, second = (rays.LidarRays(no_return=True).frame_rays(keyframe) for keyframe in (one, two))
        assert len(second) > 10_000
        for name in ("camera_index", "direction", "range_m", "label", "pixel", "depth_m", "sensor_origin_m"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    # Ground truth belongs to sample tokens, and those are kept.
    assert copy[0].occupancy_path.relative_to(tmp_path / "root") == original[0].occupancy_path.relative_to(
        minicity_root
    )


def test_pseudo_labels_are_found_by_the_images_names(minicity_root, tmp_path):
    pseudo_labels = pytest.importorskip("training.data.pseudo_labels")
    from training.data.nuscenes import KeyframeIndex

    bag = to_bag(minicity_root, "minicity-5-0000", tmp_path)
    assert convert(bag, "--no-lidar", "--out", tmp_path / "root") == 0
    index = KeyframeIndex(tmp_path / "root", VERSION)
    assert index[0].lidar is None
    source = pseudo_labels.PseudoLabelRays(
        minicity_root, "semantics/{channel}/{stem}_depth.png", "semantics/{channel}/{stem}_label.png", depth_unit_m=0.01
    )
    assert len(source.frame_rays(index[0])) > 10_000


def test_several_bags_become_several_scenes_of_one_root(minicity_root, tmp_path, capsys):
    bag = to_bag(minicity_root, "minicity-5-0000", tmp_path)
    other = bag.rename(tmp_path / "again")
    to_bag(minicity_root, "minicity-5-0000", tmp_path, "--storage", "sqlite3")
    assert convert(bag, other, bag, "--out", tmp_path / "root") == 2
    assert "two bags are called minicity-5-0000" in capsys.readouterr().err
    assert convert(bag, other, "--out", tmp_path / "root") == 0
    assert [scene["name"] for scene in table(tmp_path / "root", "scene")] == ["minicity-5-0000", "again"]
    assert len(table(tmp_path / "root", "log")) == 2
    assert len(table(tmp_path / "root", "sensor")) == 7
    assert len(table(tmp_path / "root", "calibrated_sensor")) == 14
    assert all(len(row["log_tokens"]) == 2 for row in table(tmp_path / "root", "map"))


def test_real_keyframes_with_lidar(nuscenes_real_root, tmp_path):
    bag = to_bag(nuscenes_real_root, "scene-0061", tmp_path)
    assert convert(bag, "--out", tmp_path / "root") == 0
    assert_same_measurements(nuscenes_real_root, tmp_path / "root", samples=1, channels=7)


def test_real_keyframes_without_lidar(nuscenes_real_root, tmp_path, capsys):
    bag = to_bag(nuscenes_real_root, "scene-0103", tmp_path)
    assert convert(bag, "--out", tmp_path / "root") == 2
    assert "has no LiDAR (sensor_msgs/msg/PointCloud2)" in capsys.readouterr().err
    assert convert(bag, "--no-lidar", "--out", tmp_path / "root") == 0
    assert_same_measurements(nuscenes_real_root, tmp_path / "root", samples=2, channels=6)


# A vehicle of one's own


def test_own_vehicle_poses_calibration_and_keyframes(own_bag, tmp_path):
    data = pytest.importorskip("training.data.nuscenes")
    root = tmp_path / "root"
    assert convert(own_bag, "--map", own_bag.parent / "topics.yaml", "--out", root) == 0
    index = data.KeyframeIndex(root, VERSION, cameras=("CAM_FRONT", "CAM_BACK"))
    # 2 Hz out of a LiDAR at 10 Hz whose first cloud is 20 ms after the start.
    expected_us = [(vehicle.START_NS + 20_000_000) // 1000 + 500_000 * k for k in range(6)]
    assert [keyframe.stamp_us for keyframe in index] == expected_us
    frames = {"CAM_FRONT": "front_optical", "CAM_BACK": "rear_optical", "LIDAR_TOP": "velodyne"}
    for keyframe in index:
        for sensor in (*keyframe.cameras, keyframe.lidar):
            truth = vehicle.odom_from_base(sensor.stamp_us * 1000)
            # Odometry every 20 ms on a circle of 15 m: the chord is (v t)^2 / 8 r = 0.12 mm inside the arc.
            np.testing.assert_allclose(sensor.global_from_ego[:3, 3], truth[:3, 3], atol=2e-4)
            np.testing.assert_allclose(sensor.global_from_ego[:3, :3], truth[:3, :3], atol=1e-6)
            np.testing.assert_allclose(sensor.ego_from_sensor, vehicle.base_from(frames[sensor.channel]), atol=1e-12)
    for camera in load_rig(root / "calibration.yaml"):
        np.testing.assert_array_equal(camera.intrinsic, vehicle.MATRIX)
        np.testing.assert_allclose(camera.ego_from_camera, vehicle.base_from(frames[camera.name]), atol=1e-12)
    for keyframe in index:
        for camera in keyframe.cameras:
            np.testing.assert_array_equal(camera.intrinsic, vehicle.MATRIX)
            # 15 Hz: the nearest image is at most half of 66.7 ms away.
            assert abs(camera.stamp_us - keyframe.stamp_us) <= 33_400
            assert (camera.stamp_us * 1000 - vehicle.START_NS) % 66_666_000 < 12_000_000


def test_own_vehicle_images_are_rectified_and_points_labelled(own_bag, tmp_path):
    data = pytest.importorskip("training.data.nuscenes")
    root = tmp_path / "root"
    assert convert(own_bag, "--map", own_bag.parent / "topics.yaml", "--out", root, "--jpeg-quality", "100") == 0
    keyframe = data.KeyframeIndex(root, VERSION, cameras=("CAM_FRONT", "CAM_BACK"))[2]
    front, rear = keyframe.cameras
    # The rear camera's PNG has nothing to be rectified.
    difference = cv2.imread(str(rear.path)).astype(int) - vehicle.picture(rear.stamp_us * 1000)
    assert np.abs(difference).mean() < 2
    # In front: what the lens put at the distorted place of a pixel is now at the pixel.
    image, raw = cv2.imread(str(front.path)).astype(float), vehicle.picture(front.stamp_us * 1000).astype(np.float32)
    errors = []
    for u, v in [(31, 23), (10, 8), (50, 40), (5, 40), (58, 6)]:
        x, y = (u - 31.0) / 60.0, (v - 23.0) / 61.0
        k1, k2, p1, p2, _ = vehicle.DISTORTION  # Brown's model, as CameraInfo's D defines it
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2 * r2
        source = (
            60 * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + 31,
            61 * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + 23,
        )
        errors.append(np.abs(image[v, u] - cv2.getRectSubPix(raw, (1, 1), source)[0, 0]).max())
    assert max(errors) < 8
    # Points 5 and 6 of each of the four rows are no return; classes 0, 3, 7, 99 (without a name) and 3 repeat.
    points, truth = data.load_points(keyframe), vehicle.cloud_points(keyframe.stamp_us * 1000, moving=False)
    kept = np.delete(np.arange(vehicle.COLUMNS), [5, 6])
    for i, name in enumerate(("x", "y", "z", "intensity", "ring")):
        np.testing.assert_array_equal(points[:, i], truth[name][:, kept].ravel().astype(np.float32))
    by_class = np.array([0, 17, 24, 0, 17])  # noise, vehicle.car, flat.driveable_surface in nuScenes-lidarseg
    expected = np.tile(by_class[kept % 5], vehicle.ROWS)
    np.testing.assert_array_equal(np.fromfile(keyframe.lidarseg_path, np.uint8), expected)


def test_sweeps_are_freed_of_the_motion_within_them(tmp_path):
    """A world that stands still, seen column by column while the vehicle drives, looks as if seen all at once."""
    bag = vehicle.write_bag(tmp_path / "drive", vehicle.drive(moving_sweep=True))
    lidar = "{topic: /points, time_field: t, time_unit_s: 1.0e-9}"
    assert convert(bag, "--map", own_map(tmp_path, lidar=lidar), "--out", tmp_path / "root") == 0
    assert convert(bag, "--map", own_map(tmp_path, lidar="{topic: /points}"), "--out", tmp_path / "smeared") == 0
    rows = [row for row in table(tmp_path / "root", "sample_data") if "LIDAR" in row["filename"]]
    stamp_ns = rows[1]["timestamp"] * 1000
    truth = vehicle.cloud_points(stamp_ns, moving=False)[:, np.delete(np.arange(vehicle.COLUMNS), [5, 6])].ravel()
    expected = np.stack([truth[name] for name in "xyz"], axis=1)
    error = {}
    for name in ("root", "smeared"):
        points = np.fromfile(tmp_path / name / rows[1]["filename"], "<f4").reshape(-1, 5)
        error[name] = np.abs(points[:, :3] - expected).max()
    assert error["root"] < 1e-3
    assert error["smeared"] > 0.25  # 6 m/s and 0.4 rad/s at up to 50 m, for 48 ms


def test_ego_motion_from_tf_and_a_calibration_file(tmp_path):
    from occflownet_core.camera import Camera, CameraRig

    messages = [entry for entry in vehicle.drive() if entry[1] not in ("/odom", "/front/camera_info")]
    for step in range(151):
        stamp = vehicle.START_NS + step * 20_000_000
        moving = vehicle.transforms(stamp, {("odom", "base_footprint"): vehicle.odom_from_footprint(stamp)})
        messages.append((stamp, "/tf", moving))
    bag = vehicle.write_bag(tmp_path / "drive", messages)
    mount = poses.pose(np.array([1.5, 0.0, 1.4]), np.array([0.5, -0.5, 0.5, -0.5]))
    rig = CameraRig((Camera("CAM_FRONT", vehicle.WIDTH_PX, vehicle.HEIGHT_PX, vehicle.MATRIX, mount),))
    save_rig(rig, tmp_path / "rig.yaml")
    cameras = "{CAM_FRONT: {image: /front/image_raw}}"
    topics = own_map(tmp_path, cameras=cameras, ego_motion="{tf: odom}", calibration_file="rig.yaml")
    assert convert(bag, "--map", topics, "--out", tmp_path / "root") == 0
    root = tmp_path / "root"
    sensors = {row["token"]: row["channel"] for row in table(root, "sensor")}
    mounts = {sensors[row["sensor_token"]]: row for row in table(root, "calibrated_sensor")}
    assert mounts["CAM_FRONT"]["translation"] == [1.5, 0.0, 1.4]
    for row in table(root, "ego_pose"):
        truth = vehicle.odom_from_base(row["timestamp"] * 1000)
        np.testing.assert_allclose(row["translation"], truth[:3, 3], atol=2e-4)


def test_marked_keyframes_keep_their_own_images_though_others_are_nearer(tmp_path):
    """nuScenes' rule: the images of a keyframe come before its LiDAR's stamp."""
    messages = vehicle.drive()
    marked_ns = [vehicle.START_NS + 20_000_000 + step * 100_000_000 for step in (5, 12)]
    for i, stamp in enumerate(marked_ns):
        messages.append((stamp, "/keyframe", vehicle.header(stamp, f"token-{i}")))
    bag = vehicle.write_bag(tmp_path / "drive", messages)
    assert convert(bag, "--out", tmp_path / "root") == 0
    samples = table(tmp_path / "root", "sample")
    assert [(row["token"], row["timestamp"] * 1000) for row in samples] == list(
        zip(("token-0", "token-1"), marked_ns, strict=True)
    )
    # Front images come every 66.7 ms from 7 ms on: the last before 520 ms is at 473.667 ms, though 540.333 ms is nearer.
    front = [row for row in table(tmp_path / "root", "sample_data") if "CAM_FRONT" in row["filename"]]
    assert front[0]["timestamp"] * 1000 - vehicle.START_NS == 473_666_000


def test_gaps_and_lengths_cut_scenes_and_the_lost_is_counted(tmp_path, capsys):
    """Odometry is away from 1.0 to 1.9 s: the keyframes at 1.02 and 1.52 s have no pose."""
    first, last = vehicle.START_NS + 1_000_000_000, vehicle.START_NS + 1_900_000_000
    messages = [e for e in vehicle.drive() if e[1] != "/odom" or not first < e[0] < last]
    bag = vehicle.write_bag(tmp_path / "drive", messages)
    assert convert(bag, "--out", tmp_path / "root") == 0
    assert "left out of drive: 2 moments: no pose of the vehicle" in capsys.readouterr().out
    scenes = {row["name"]: row["nbr_samples"] for row in table(tmp_path / "root", "scene")}
    assert scenes == {"drive-0001": 2, "drive-0002": 2}
    assert convert(bag, "--scene-s", "0.4", "--rate-hz", "10", "--out", tmp_path / "short") == 0
    assert all(row["nbr_samples"] <= 5 for row in table(tmp_path / "short", "scene"))
    chained = {row["token"]: row for row in table(tmp_path / "short", "sample_data")}
    for row in chained.values():
        assert not row["next"] or chained[row["next"]]["prev"] == row["token"]


def test_a_broken_image_costs_its_keyframe_only(tmp_path, capsys):
    messages = vehicle.drive()
    broken = next(m for t, name, m in messages if name == "/front/image_raw" and t > vehicle.START_NS + 500_000_000)
    broken.data = broken.data[:-100]
    bag = vehicle.write_bag(tmp_path / "drive", messages)
    root = tmp_path / "root"
    assert convert(bag, "--map", own_map(tmp_path), "--out", root) == 0
    assert "left out of drive: 1 moments: CAM_FRONT: a raw bgr8 image of 64 x 48 px" in capsys.readouterr().out
    assert len(table(root, "sample")) == 5
    files = sorted(str(path.relative_to(root)) for path in (root / "samples").rglob("*") if path.is_file())
    assert files == sorted(row["filename"] for row in table(root, "sample_data"))
    assert len(list((root / "lidarseg" / VERSION).iterdir())) == len(table(root, "lidarseg")) == 5


# Looking into a bag


def test_list_names_roles_and_what_is_missing(own_bag, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert convert(own_bag, "--list", "--write-map", tmp_path / "topics.yaml") == 0
    lines = capsys.readouterr().out.splitlines()
    row = {line.split()[0]: line.split()[1:] for line in lines if line.strip().startswith("/")}
    assert row["/front/image_raw"] == ["Image", "45", "14.7", "CAM_FRONT"]  # 44 intervals in 3 s
    assert row["/points"] == ["PointCloud2", "30", "9.7", "LIDAR_TOP"]
    assert row["/odom"] == ["Odometry", "151", "50.0", "ego", "motion"]
    assert row["/tf_static"] == ["TFMessage", "1", "-", "transforms"]
    assert any("Nothing is missing" in line for line in lines)
    assert any("(t, x, y, z, intensity, ring, class) is known to hold classes" in line for line in lines)
    written = load_topic_map(tmp_path / "topics.yaml")
    assert written.cameras["CAM_BACK"].image == "/rear/image_raw/compressed"
    assert written.lidar.topic == "/points"
    assert convert(own_bag, "--list", "--write-map", tmp_path / "topics.yaml") == 2
    assert "exists already" in capsys.readouterr().err


def test_list_names_everything_that_is_missing(tmp_path, capsys):
    gone = ("/points", "/odom", "/rear/camera_info", "/tf_static")
    bag = vehicle.write_bag(tmp_path / "drive", vehicle.drive(), keep=lambda topic: topic not in gone)
    assert convert(bag, "--list") == 0
    report = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "camera CAM_BACK (/rear/image_raw/compressed) has no camera_info beside it",
        "no transform from base_link to 'front_optical', the frame of CAM_FRONT",
        "has no LiDAR",
        "has no odometry",
    ):
        assert sentence in report
