# SPDX-License-Identifier: Apache-2.0
"""nuscenes_to_bag: a tiny data set whose motion is known by hand, and real keyframes where they are at hand."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from occflownet_core import poses
from occflownet_core.rig_file import load_rig
from occflownet_ros import nuscenes_messages as messages
from occflownet_ros import nuscenes_to_bag
from occflownet_ros.bag import Bag

pytest.importorskip("nuscenes")

START_US = 1_532_402_927_000_000
SPEED_MPS, YAW_RATE_RADPS = 8.0, 0.3
CAMERAS = ("CAM_FRONT", "CAM_BACK")


def circling_pose(time_us: int) -> tuple[list[float], list[float]]:
    """Translation and quaternion (wxyz) of a car driving a circle of radius v / w from the origin, heading +x."""
    t = (time_us - START_US) / 1e6
    yaw, radius = YAW_RATE_RADPS * t, SPEED_MPS / YAW_RATE_RADPS
    return [radius * np.sin(yaw), radius * (1 - np.cos(yaw)), 0.0], [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]


@pytest.fixture
def tiny_root(tmp_path) -> Path:
    """One scene of 2 keyframes 0.5 s apart, and a sweep of each sensor every 50 ms between them; two cameras, LiDAR."""
    root = tmp_path / "tiny"
    rng = np.random.default_rng(3)
    offsets_us = {"CAM_FRONT": 10_000, "CAM_BACK": 25_000, "LIDAR_TOP": 40_000}
    tables: dict[str, list] = {name: [] for name in ("attribute", "category", "instance", "sample_annotation")}
    tables |= {"visibility": [], "ego_pose": [], "sample_data": []}
    tables["log"] = [{"token": "log", "logfile": "", "vehicle": "", "date_captured": "", "location": "x"}]
    tables["map"] = [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/m.png"}]
    tables["scene"] = [
        {"token": "s", "name": "scene-1", "description": "", "log_token": "log", "nbr_samples": 2}
        | {"first_sample_token": "k0", "last_sample_token": "k1"}
    ]
    tables["sample"] = [
        {"token": f"k{i}", "timestamp": START_US + 500_000 * i + 40_000, "scene_token": "s"}
        | {"prev": "k0" if i else "", "next": "" if i else "k1"}
        for i in range(2)
    ]
    tables["sensor"], tables["calibrated_sensor"] = [], []
    for i, channel in enumerate(offsets_us):
        camera = channel != "LIDAR_TOP"
        modality = "camera" if camera else "lidar"
        tables["sensor"].append({"token": f"sensor-{channel}", "channel": channel, "modality": modality})
        tables["calibrated_sensor"].append(
            {"token": f"mount-{channel}", "sensor_token": f"sensor-{channel}", "translation": [1.0 + i, 0.5, 1.6]}
            | {"rotation": [0.5, -0.5, 0.5, -0.5] if camera else [1.0, 0.0, 0.0, 0.0]}
            | {"camera_intrinsic": [[50.0, 0.0, 32.5], [0.0, 51.0, 24.5], [0.0, 0.0, 1.0]] if camera else []}
        )
        for step in range(11):
            time_us = START_US + 50_000 * step + offsets_us[channel]
            key = step % 10 == 0
            suffix = ".jpg" if camera else ".pcd.bin"
            filename = f"{'samples' if key else 'sweeps'}/{channel}/{time_us}{suffix}"
            (root / filename).parent.mkdir(parents=True, exist_ok=True)
            if camera:
                cv2.imwrite(str(root / filename), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
            else:
                rng.normal(size=(100, 5)).astype("<f4").tofile(root / filename)
            translation, rotation = circling_pose(time_us)
            token = f"{channel}-{step}"
            tables["ego_pose"].append(
                {"token": token, "timestamp": time_us, "translation": translation, "rotation": rotation}
            )
            tables["sample_data"].append(
                {"token": token, "sample_token": "k1" if step > 5 else "k0", "ego_pose_token": token}
                | {"calibrated_sensor_token": f"mount-{channel}", "timestamp": time_us, "fileformat": suffix[1:]}
                | {"is_key_frame": key, "height": 48 if camera else 0, "width": 64 if camera else 0}
                | {"filename": filename, "prev": "", "next": ""}
            )
    (root / "maps").mkdir()
    cv2.imwrite(str(root / "maps/m.png"), np.zeros((2, 2), np.uint8))
    write_tables(root, tables)
    labels = root / "gts/scene-1/k1/labels.npz"
    labels.parent.mkdir(parents=True)
    semantics = rng.integers(0, 18, (4, 5, 6), dtype=np.uint8)
    np.savez_compressed(labels, semantics=semantics, mask_camera=semantics % 2, mask_lidar=semantics % 2)
    return root


def write_tables(root: Path, tables: dict[str, list]) -> None:
    (root / "v1.0-mini").mkdir(exist_ok=True)
    for name, rows in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))


def edit_table(root: Path, name: str, keep) -> None:
    path = root / "v1.0-mini" / f"{name}.json"
    path.write_text(json.dumps([row for row in json.loads(path.read_text()) if keep(row)]))


def run(root: Path, scene: str, out: Path, *options: str) -> int:
    return nuscenes_to_bag.main(["--dataroot", str(root), "--scene", scene, "--out", str(out), *options])


def decode(message):
    return messages.typestore().deserialize_cdr(message.data, message.msgtype)


def stamp_ns(header) -> int:
    return header.stamp.sec * 1_000_000_000 + header.stamp.nanosec


def by_topic(path: Path) -> dict[str, list]:
    result: dict[str, list] = {}
    with Bag(path) as bag:
        for message in bag.messages():
            result.setdefault(message.topic, []).append(message)
        assert bag.damage == []
    return result


@pytest.mark.parametrize(("storage", "compression"), [("mcap", "none"), ("mcap", "zstd"), ("sqlite3", "zstd")])
def test_tiny_scene_round_trip(tiny_root, tmp_path, capsys, storage, compression):
    out = tmp_path / "bag"
    assert run(tiny_root, "scene-1", out, "--storage", storage, "--compression", compression) == 0
    topics = by_topic(out)
    assert {name: len(sent) for name, sent in topics.items()} == {
        "/CAM_BACK/camera_info": 11,
        "/CAM_BACK/image_rect_compressed": 11,
        "/CAM_FRONT/camera_info": 11,
        "/CAM_FRONT/image_rect_compressed": 11,
        "/LIDAR_TOP": 11,
        "/ground_truth/labels": 1,
        "/ground_truth/mask_camera": 1,
        "/keyframe": 2,
        "/odom": 33,
        "/tf": 33,
        "/tf_static": 1,
    }
    report = capsys.readouterr()
    assert "1 of 2 keyframes have Occ3D labels" in report.err
    assert "126" in report.out  # messages in all
    information = yaml.safe_load((out / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert information["version"] == 8
    assert information["storage_identifier"] == storage
    qos = {
        entry["topic_metadata"]["name"]: yaml.safe_load(entry["topic_metadata"]["offered_qos_profiles"])[0]
        for entry in information["topics_with_message_count"]
    }
    transient_local, volatile, reliable = 1, 2, 1  # rmw's own numbers
    assert (qos["/tf_static"]["durability"], qos["/odom"]["durability"]) == (transient_local, volatile)
    assert {profile["reliability"] for profile in qos.values()} == {reliable}


def test_messages_say_what_the_tables_say(tiny_root, tmp_path):
    assert run(tiny_root, "scene-1", tmp_path / "bag") == 0
    topics = by_topic(tmp_path / "bag")

    for message in topics["/CAM_FRONT/image_rect_compressed"]:
        image = decode(message)
        time_us = message.time_ns // 1000
        key = (time_us - START_US - 10_000) % 500_000 == 0
        path = tiny_root / ("samples" if key else "sweeps") / f"CAM_FRONT/{time_us}.jpg"
        assert (image.header.frame_id, image.format) == ("CAM_FRONT", "jpeg")
        assert stamp_ns(image.header) == message.time_ns
        assert bytes(image.data) == path.read_bytes()

    info = decode(topics["/CAM_BACK/camera_info"][0])
    assert (info.width, info.height, info.distortion_model) == (64, 48, "plumb_bob")
    assert list(info.k) == [50, 0, 32.5, 0, 51, 24.5, 0, 0, 1]
    assert list(info.p) == [50, 0, 32.5, 0, 0, 51, 24.5, 0, 0, 0, 1, 0]
    assert list(info.r) == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert list(info.d) == [0] * 5

    cloud = decode(topics["/LIDAR_TOP"][0])
    path = tiny_root / f"samples/LIDAR_TOP/{START_US + 40_000}.pcd.bin"
    assert bytes(cloud.data) == path.read_bytes()
    assert [(f.name, f.offset, f.datatype, f.count) for f in cloud.fields] == [
        ("x", 0, 7, 1),
        ("y", 4, 7, 1),
        ("z", 8, 7, 1),
        ("intensity", 12, 7, 1),
        ("ring", 16, 7, 1),
    ]
    assert (cloud.width, cloud.height, cloud.point_step, cloud.row_step) == (100, 1, 20, 2000)

    (static,) = topics["/tf_static"]
    mounts = {t.child_frame_id: t for t in decode(static).transforms}
    assert set(mounts) == {*CAMERAS, "LIDAR_TOP"}
    front = mounts["CAM_FRONT"]
    assert front.header.frame_id == "base_link"
    assert (front.transform.translation.x, front.transform.translation.y) == (1.0, 0.5)
    rotation = front.transform.rotation
    assert [rotation.x, rotation.y, rotation.z, rotation.w] == [-0.5, 0.5, -0.5, 0.5]

    # Quaternions go out as the tables have them, to the last digit.
    for message in topics["/odom"]:
        w, _, _, z = circling_pose(message.time_ns // 1000)[1]
        pose = decode(message).pose.pose
        assert (pose.orientation.z, pose.orientation.w) == (z, w)
        assert [pose.position.x, pose.position.y] == circling_pose(message.time_ns // 1000)[0][:2]

    rig = load_rig(tmp_path / "bag/calibration.yaml")
    assert set(rig.names) == set(CAMERAS)
    np.testing.assert_allclose(rig.ordered(["CAM_FRONT"])[0].ego_from_camera[:3, 2], [1, 0, 0], atol=1e-12)


def test_odometry_has_every_stamp_and_the_velocity_of_the_circle(tiny_root, tmp_path):
    assert run(tiny_root, "scene-1", tmp_path / "bag") == 0
    topics = by_topic(tmp_path / "bag")
    sensors = ("/LIDAR_TOP", "/CAM_FRONT/camera_info", "/CAM_BACK/camera_info")
    stamps = sorted(message.time_ns for name in sensors for message in topics[name])
    odometry = [decode(message) for message in topics["/odom"]]
    assert [stamp_ns(o.header) for o in odometry] == stamps == [m.time_ns for m in topics["/tf"]]
    for o, tf in zip(odometry, map(decode, topics["/tf"]), strict=True):
        assert (o.header.frame_id, o.child_frame_id) == ("map", "base_link")
        translation, (w, _, _, z) = circling_pose(stamp_ns(o.header) // 1000)
        p, q, transform = o.pose.pose.position, o.pose.pose.orientation, tf.transforms[0].transform
        np.testing.assert_allclose([p.x, p.y, p.z, q.w, q.z], [*translation, w, z], atol=1e-9)
        assert (transform.translation.x, transform.rotation.z) == (p.x, q.z)
        v, turn = o.twist.twist.linear, o.twist.twist.angular
        # Straight ahead in the car's own axes; at the scene's ends the difference is one-sided: v * w * 25 ms aside.
        np.testing.assert_allclose([v.x, v.y, v.z], [SPEED_MPS, 0, 0], atol=0.1)
        np.testing.assert_allclose([turn.x, turn.y, turn.z], [0, 0, YAW_RATE_RADPS], atol=1e-6)


def test_twist_is_central_and_zero_for_a_lone_pose():
    stamps = np.arange(0, 1_000_000_000, 10_000_000)
    path = np.stack([poses.pose([0.5 * 3.0 * (t / 1e9) ** 2, 0, 0], [1, 0, 0, 0]) for t in stamps])  # 3 m/s^2
    linear, angular = messages.twists(stamps, path)
    middle = slice(5, -5)
    np.testing.assert_allclose(linear[middle, 0], 3.0 * stamps[middle] / 1e9, atol=1e-9)
    assert not angular.any()
    linear, angular = messages.twists(np.array([5]), np.eye(4)[None])
    assert not linear.any()
    assert not angular.any()


def test_ground_truth_follows_the_keyframe_it_belongs_to(tiny_root, tmp_path):
    assert run(tiny_root, "scene-1", tmp_path / "bag") == 0
    with Bag(tmp_path / "bag") as bag:
        wanted = {"/keyframe", "/ground_truth/labels", "/ground_truth/mask_camera"}
        received = list(bag.messages(wanted))
    first, second, labels, mask = received
    expected = {"k0": START_US + 40_000, "k1": START_US + 540_000}
    for keyframe in (first, second):
        header = decode(keyframe)
        assert stamp_ns(header) == keyframe.time_ns == expected[header.frame_id] * 1000
    assert labels.time_ns == mask.time_ns == second.time_ns
    with np.load(tiny_root / "gts/scene-1/k1/labels.npz") as file:
        for message, array in ((labels, file["semantics"]), (mask, file["mask_camera"])):
            decoded = decode(message)
            dims = [(d.label, d.size, d.stride) for d in decoded.layout.dim]
            assert dims == [("x", 4, 120), ("y", 5, 30), ("z", 6, 6)]
            np.testing.assert_array_equal(np.asarray(decoded.data).reshape(4, 5, 6), array)


def test_options_leave_out_what_they_name(tiny_root, tmp_path):
    assert run(tiny_root, "scene-1", tmp_path / "bag", "--no-lidar", "--keyframes-only") == 0
    topics = by_topic(tmp_path / "bag")
    assert "/LIDAR_TOP" not in topics
    assert len(topics["/CAM_FRONT/image_rect_compressed"]) == 2
    assert len(topics["/odom"]) == 6  # LiDAR's stamps still have poses


def test_force_replaces_a_bag_and_nothing_else(tiny_root, tmp_path, capsys):
    out = tmp_path / "bag"
    assert run(tiny_root, "scene-1", out) == 0
    assert run(tiny_root, "scene-1", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(tiny_root, "scene-1", out, "--force", "--no-lidar") == 0
    assert "/LIDAR_TOP" not in by_topic(out)
    image = sorted((tiny_root / "samples/CAM_BACK").iterdir())[-1]
    whole, before = image.read_bytes(), by_topic(out)
    cut_in_half(image)
    assert run(tiny_root, "scene-1", out, "--force") == 2  # a failure loses no older bag
    assert by_topic(out) == before
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    image.write_bytes(whole)
    capsys.readouterr()
    (out / "thesis.tex").write_text("do not lose me")
    assert run(tiny_root, "scene-1", out, "--force") == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (out / "thesis.tex").exists()


def test_sweeps_that_are_not_on_the_disk_are_noted(tiny_root, tmp_path, capsys):
    for path in (tiny_root / "sweeps/CAM_FRONT").iterdir():
        path.unlink()
    assert run(tiny_root, "scene-1", tmp_path / "bag") == 0
    assert "9 of CAM_FRONT" in capsys.readouterr().err
    assert len(by_topic(tmp_path / "bag")["/CAM_FRONT/image_rect_compressed"]) == 2


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 1])


BROKEN = {
    "points": ("samples/LIDAR_TOP", cut_in_half, "not a multiple of 20"),
    "empty points": ("samples/LIDAR_TOP", lambda path: path.write_bytes(b""), "has 0 bytes"),
    "no points": ("samples/LIDAR_TOP", Path.unlink, "is missing"),
    "jpeg": ("samples/CAM_BACK", cut_in_half, "cut short"),
    "empty jpeg": ("samples/CAM_BACK", lambda path: path.write_bytes(b""), "is not a JPEG"),
    "no jpeg": ("samples/CAM_BACK", Path.unlink, "is missing"),
    "labels": ("gts/scene-1/k1", cut_in_half, "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_in_one_sentence_and_no_bag_is_left(tiny_root, tmp_path, capsys, case):
    folder, damage, sentence = BROKEN[case]
    path = sorted((tiny_root / folder).iterdir())[-1]
    damage(path)
    assert run(tiny_root, "scene-1", tmp_path / "bag") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("nuscenes_to_bag: ")
    assert str(path) in error
    assert sentence in error
    assert not (tmp_path / "bag").exists()


def test_bad_roots_and_scenes_get_one_sentence(tiny_root, tmp_path, capsys):
    assert run(tmp_path, "scene-1", tmp_path / "bag") == 2
    assert "lacks the nuScenes tables attribute, calibrated_sensor" in capsys.readouterr().err
    assert run(tiny_root, "scene-2", tmp_path / "bag") == 2
    assert "scene scene-2 is not in" in (error := capsys.readouterr().err)
    assert "it has scene-1" in error
    edit_table(tiny_root, "calibrated_sensor", lambda row: row["token"] != "mount-CAM_BACK")
    assert run(tiny_root, "scene-1", tmp_path / "bag") == 2
    assert "mount-CAM_BACK" in capsys.readouterr().err
    (tiny_root / "v1.0-mini/scene.json").write_text("[{")
    assert run(tiny_root, "scene-1", tmp_path / "bag") == 2
    assert "cannot be read" in capsys.readouterr().err


# Real keyframes


def test_real_keyframe_round_trip(nuscenes_real_root, tmp_path):
    assert run(nuscenes_real_root, "scene-0061", tmp_path / "bag") == 0
    topics = by_topic(tmp_path / "bag")
    images = [name for name in topics if name.endswith("image_rect_compressed")]
    assert len(images) == 6
    for name in images:
        (message,) = topics[name]
        channel = name.split("/")[1]
        (path,) = (nuscenes_real_root / "samples" / channel).glob("n015*.jpg")
        assert bytes(decode(message).data) == path.read_bytes()
        assert message.time_ns == int(path.stem.split("__")[-1]) * 1000
        assert stamp_ns(decode(message).header) == message.time_ns
    (cloud,) = topics["/LIDAR_TOP"]
    (path,) = (nuscenes_real_root / "samples/LIDAR_TOP").iterdir()
    assert bytes(decode(cloud).data) == path.read_bytes()
    assert decode(cloud).width == 34_688
    assert len(topics["/odom"]) == 7
    (keyframe,) = topics["/keyframe"]
    assert decode(keyframe).frame_id == "ca9a282c9e77460f8360f564131a8af5"
    assert keyframe.time_ns == cloud.time_ns
    tables = json.loads((nuscenes_real_root / "v1.0-mini/calibrated_sensor.json").read_text())
    k = decode(topics["/CAM_FRONT/camera_info"][0]).k.reshape(3, 3)
    assert any(row["camera_intrinsic"] and np.array_equal(row["camera_intrinsic"], k) for row in tables)


def test_real_scene_without_lidar_works_and_says_so(nuscenes_real_root, tmp_path, capsys):
    assert run(nuscenes_real_root, "scene-0103", tmp_path / "bag") == 0
    assert "scene-0103 has no LIDAR_TOP data" in capsys.readouterr().err
    topics = by_topic(tmp_path / "bag")
    assert "/LIDAR_TOP" not in topics
    assert len(topics["/keyframe"]) == 2
    speeds = [decode(message).twist.twist.linear.x for message in topics["/odom"]]
    # 4.26 m in 0.5 s, as the data set's README says.
    np.testing.assert_allclose(speeds, 4.26 / 0.5, rtol=0.02)
