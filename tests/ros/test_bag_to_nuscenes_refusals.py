# SPDX-License-Identifier: Apache-2.0
"""bag_to_nuscenes with bad bags, mappings and arguments: one sentence, and nothing left behind."""

import errno
from pathlib import Path

import numpy as np
import pytest

from tests.ros import own_vehicle as vehicle
from tests.ros.conversions import convert, own_map, table


def without(*topics: str):
    return lambda messages: [entry for entry in messages if entry[1] not in topics]


def with_message(topic: str, message: object):
    return lambda messages: [*(e for e in messages if e[1] != topic), (vehicle.START_NS, topic, message)]


def later(topic: str, seconds: float):
    """The topic's messages stamped as if its clock ran ahead."""

    def change(messages):
        for _, name, message in messages:
            if name == topic:
                message.header.stamp.sec += int(seconds)
        return messages

    return change


def zero_stamps(messages):
    for _, name, message in messages:
        if name == "/points":
            message.header = vehicle.header(0, "velodyne")
    return messages


START = vehicle.START_NS
BAD_BAGS = {
    "no lidar": (without("/points"), "has no messages on /points, the LiDAR of the mapping"),
    "no odometry": (without("/odom"), "has no messages on /odom, the odometry of the mapping"),
    "no camera_info": (without("/rear/camera_info"), "no messages on /rear/camera_info, CAM_BACK's camera_info"),
    "no images": (without("/front/image_raw"), "has no messages on /front/image_raw, CAM_FRONT of the mapping"),
    "no extrinsics": (without("/tf_static"), "no transform from base_link to 'front_optical', the frame of CAM_FRONT"),
    "unconnected": (
        with_message("/tf_static", vehicle.transforms(START, {("base_link", "velodyne"): np.eye(4)})),
        "(tf has base_link, velodyne)",
    ),
    "other clock": (later("/odom", 500), "record all sensors at the same time with synchronised clocks"),
    "other camera clock": (later("/front/image_raw", 500), "there is no measurement of CAM_FRONT within 60 ms"),
    "no stamps": (zero_stamps, "the messages on /points have no stamp"),
    "wrong type": (with_message("/odom", vehicle.header(START, "odom")), "/odom is of type std_msgs/msg/Header"),
    "unknown lens": (
        with_message("/front/camera_info", vehicle.camera_info(START, "front_optical", "scaramuzza")),
        "distortion model 'scaramuzza'",
    ),
    "other size": (
        with_message("/front/camera_info", vehicle.camera_info(START, "front_optical", width_px=65)),
        "the image is 64 x 48 px and the camera_info of front_optical says 65 x 48",
    ),
    "unknown encoding": (
        lambda messages: [
            (t, n, vehicle.raw_image(t, "front_optical", "32FC1") if n == "/front/image_raw" else m)
            for t, n, m in messages
        ],
        "raw images of encoding '32FC1' are not supported",
    ),
}


def assert_refused(capsys, status: int, sentence: str, folder: Path, before: set) -> None:
    error = capsys.readouterr().err.strip()
    assert status == 2
    assert sentence in error
    assert error.startswith("bag_to_nuscenes: ")
    assert len(error.splitlines()) == 1
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("case", BAD_BAGS)
def test_bad_bags_get_one_sentence_and_leave_nothing(tmp_path, capsys, case):
    change, sentence = BAD_BAGS[case]
    bag = vehicle.write_bag(tmp_path / "drive", change(vehicle.drive()))
    topics = own_map(tmp_path)
    before = set(tmp_path.iterdir())
    status = convert(bag, "--map", topics, "--out", tmp_path / "root")
    assert_refused(capsys, status, sentence, tmp_path, before)


BAD_MAPS = {
    "unknown key": ({"lidar": "{topik: /points}"}, "unknown key lidar.topik; the keys there are topic, label_field"),
    "missing key": ({"cameras": "{CAM_FRONT: {camera_info: /x}}"}, "cameras.CAM_FRONT.image is missing"),
    "wrong type": ({"max_pose_gap_ms": "soon"}, "max_pose_gap_ms is 'soon'; give a number"),
    "no ego motion": ({"ego_motion": "{}"}, "ego_motion names neither or both"),
    "unknown class": ({"lidar": "{topic: /points, label_names: {1: dog}}"}, "'dog', which is no nuScenes-lidarseg"),
    "no such topic": ({"ego_motion": "{odometry: /wheel}"}, "has no messages on /wheel"),
    "no such field": ({"lidar": "{topic: /points, label_field: seg}"}, "have no field 'seg'; they have t, x, y, z"),
    "labels without names": (
        {"lidar": "{topic: /points, label_field: class}"},
        "holds 99, which is no nuScenes-lidarseg",
    ),
    "no such frame": ({"base_frame": "chassis"}, "no transform from chassis to 'front_optical'"),
    "no such file": ({"calibration_file": "rig.yaml"}, "calibration file"),
    "bad channel": ({"cameras": "{a/b: {image: /x}}"}, "camera 'a/b' becomes the name of a folder"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_mappings_get_one_sentence(own_bag, tmp_path, capsys, case):
    changes, sentence = BAD_MAPS[case]
    topics = own_map(tmp_path, **changes)
    before = set(tmp_path.iterdir())
    status = convert(own_bag, "--map", topics, "--out", tmp_path / "root")
    assert_refused(capsys, status, sentence, tmp_path, before)


def test_bad_arguments_get_one_sentence(own_bag, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "file").write_text("")
    before = set(tmp_path.iterdir())
    for options, sentence in (
        (("--out", tmp_path / "full"), "exists already; name another --out"),
        (("--out", tmp_path / "file" / "root"), "cannot be written"),
        ((), "--out is missing"),
        (("--out", tmp_path / "root", "--rate-hz", "0"), "--rate-hz is 0"),
        (("--out", tmp_path / "root", "--rate-hz", "nan"), "--rate-hz is nan"),
        (("--out", tmp_path / "root", "--jpeg-quality", "0"), "--jpeg-quality is 0"),
        (("--out", tmp_path / "root", "--scene-s", "-1"), "--scene-s is -1"),
        (("--out", tmp_path / "root", "--version", "a/b"), "--version is 'a/b'"),
        (("--out", tmp_path / "root", "--map", tmp_path / "none.yaml"), "none.yaml cannot be read"),
    ):
        assert_refused(capsys, convert(own_bag, *options), sentence, tmp_path, before)
    assert_refused(capsys, convert(tmp_path / "x", "--out", tmp_path / "r"), "there is no bag at", tmp_path, before)


def test_a_full_disk_leaves_nothing(own_bag, tmp_path, capsys, monkeypatch):
    written = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if path.suffix == ".bin":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    status = convert(own_bag, "--out", tmp_path / "root")
    assert_refused(capsys, status, "No space left on device", tmp_path, set())


def test_poses_that_are_none_are_ignored_and_counted(tmp_path, capsys):
    messages = vehicle.drive()
    for message in [message for _, topic, message in messages if topic == "/odom"][10:13]:
        message.pose.pose.position.x = float("nan")
    bag = vehicle.write_bag(tmp_path / "drive", messages)
    assert convert(bag, "--out", tmp_path / "root") == 0
    assert "3 poses on /odom are no poses" in capsys.readouterr().err
    assert len(table(tmp_path / "root", "sample")) == 6
