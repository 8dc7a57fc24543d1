# SPDX-License-Identifier: Apache-2.0
"""Levels and sentences of the statuses, throttling, latency statistics, and the calibration that they report on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from geometry_msgs.msg import TransformStamped

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError
from occflownet_ros import diagnostics
from occflownet_ros.cadence import Cadence
from occflownet_ros.calibration_source import CalibrationSource, Intrinsics, cameras_of_file
from occflownet_ros.diagnostics import (
    ERROR,
    OK,
    WARN,
    CameraReport,
    Complaints,
    EgoMotionReport,
    LatencyWindow,
    MeshReport,
)
from occflownet_ros.live_transforms import PlainTransforms, TfExtrinsics

GOOD = (1260.0, 0.0, 800.0, 0.0, 1260.0, 450.0, 0.0, 0.0, 1.0)


def test_a_sentence_is_said_once_in_ten_seconds_per_subject():
    said, now = [], [0.0]
    complain = Complaints(said.append, lambda: now[0])
    for now[0], subject in ((0, "a"), (1, "a"), (2, "b"), (9.9, "a"), (10, "a"), (30, "a")):
        complain(subject, f"{subject} is wrong")
    assert said == ["a is wrong", "b is wrong", "a is wrong (2 more like this since)", "a is wrong"]


def test_latency_percentiles():
    window = LatencyWindow()
    for ms in range(101):
        window.add({"engine": float(ms)})
    assert window.summary() == {"latency engine p50 / p95 [ms]": "50.0 / 95.0"}
    for _ in range(200):
        window.add({"engine": 7.0})
    assert window.summary() == {"latency engine p50 / p95 [ms]": "7.0 / 7.0"}


@pytest.mark.parametrize(
    ("silent_s", "recent", "level", "message"),
    [
        (None, {}, ERROR, "no image yet on /C/image_rect"),
        (2.34, {}, ERROR, "no image for 2.3 s on /C/image_rect"),
        (0.1, {"received": 12, "used": 12}, OK, "12.0 Hz"),
        (0.1, {"undecodable": 2, "out_of_order": 1}, WARN, "2 undecodable, 1 out of order in the last second"),
        (0.1, {"superseded": 9, "unmatched": 1}, OK, "12.0 Hz"),  # a slow engine is no fault of the camera
        (0.1, {"late": 1, "absent": 4}, WARN, "1 late, absent from 4 sets in the last second"),
        (0.1, {"received": 9, "duplicate": 9}, ERROR, "frozen: 9 images of one and the same stamp in the last second"),
        (0.1, {"received": 9, "duplicate": 8}, WARN, "8 duplicate in the last second"),
    ],
)
def test_camera_status(silent_s, recent, level, message):
    status = diagnostics.camera_status(CameraReport("C", "/C/image_rect", silent_s, 12.0, {"received": 3}, recent))
    assert (status.name, status.level, status.message) == ("camera C", level, message)
    assert status.values == {"topic": "/C/image_rect", "received": 3}


def test_images_that_a_camera_missed_are_told_and_warned_of_above_two_percent():
    def status(missed: int, recent: dict) -> tuple[bytes, str]:
        cadence = Cadence(0.1, 100 - missed, missed, 0)
        told = diagnostics.camera_status(CameraReport("C", "/c", 0.1, 10.0, {}, recent, cadence))
        assert told.values["missed"] == f"about {missed} of the last 100 images (one every 100 ms)"
        return told.level, told.message

    assert status(2, {}) == (OK, "10.0 Hz")
    assert status(3, {}) == (WARN, "missed about 3 of the last 100 images (one every 100 ms)")
    assert status(3, {"late": 2})[1].startswith("2 late in the last second; missed about 3 of")


@pytest.mark.parametrize(
    ("ahead_s", "level", "message"),
    [
        (-3600.04, ERROR, "stamps are 3600.0 s behind the anchor camera's; set its clock"),
        (1.2, ERROR, "stamps are 1.2 s ahead of the anchor camera's; set its clock"),
        (-0.9, OK, "12.0 Hz"),
    ],
)
def test_a_camera_of_another_clock_is_named(ahead_s, level, message):
    status = diagnostics.camera_status(CameraReport("C", "/c", 0.1, 12.0, {}, {}, ahead_s=ahead_s))
    assert (status.level, status.message) == (level, message)
    slow = CameraReport("C", "/c", 0.1, 0.5, {}, {}, Cadence(2.0, 20, 0, 0), ahead_s=-2.0)
    assert diagnostics.camera_status(slow).level == OK  # one image in two seconds is never much newer


@pytest.mark.parametrize(
    ("recent", "level", "message"),
    [
        ({"processed": 4}, OK, "4 sets in the last second"),
        ({}, WARN, "no set in the last second"),
        ({"processed": 4, "dropped": 1, "undecodable": 2}, WARN, "3 sets dropped in the last second"),
        ({"processed": 4, "failed": 1}, ERROR, "failed on 1 sets in the last second"),
    ],
)
def test_engine_status(recent, level, message):
    status = diagnostics.engine_status("tiny on onnxruntime", {"processed": 9}, recent, LatencyWindow())
    assert (status.level, status.message) == (level, message)
    assert status.values == {"engine": "tiny on onnxruntime", "sets processed": 9}


def ego_motion(**changes) -> EgoMotionReport:
    values = {"source": "odometry on /odom", "trouble": "no odometry on /odom yet", "silent_s": 0.1}
    counts = {"counters": {"received": 3}, "recent": {}, "resets": {"gap": 2}, "recent_resets": {}, "reason": "why"}
    return EgoMotionReport(**{**values, **counts, **changes})


@pytest.mark.parametrize(
    ("changes", "level", "message"),
    [
        ({"source": ""}, OK, "off: ego_motion is none, or odom_topic is empty"),
        ({"silent_s": None}, WARN, "no odometry on /odom yet; the network runs without memory"),
        ({"silent_s": None, "recent": {"received": 2, "refused": 2}}, WARN, "2 poses refused in the last second"),
        ({"silent_s": 2.34}, WARN, "no odometry on /odom for 2.3 s; the network runs without memory"),
        ({"recent_resets": {"first_set": 1}}, OK, "following odometry on /odom"),
        ({"recent_resets": {"pose_jump": 1}}, WARN, "why"),
        ({"source": "tf from odom to base_link"}, OK, "following tf from odom to base_link"),
    ],
)
def test_ego_motion_status(changes, level, message):
    report = ego_motion(**changes)
    status = diagnostics.ego_motion_status(report)
    assert (status.name, status.level, status.message) == ("ego motion", level, message)
    assert status.values == {"source": report.source, "received": 3, "reset gap": 2}


LAST_MESH = {"took_ms": 231.4, "cell_m": 0.4, "triangles": 12000}


@pytest.mark.parametrize(
    ("report", "recent", "level", "message"),
    [
        (MeshReport(problem="export again"), {}, OK, "export again"),
        (MeshReport(problem="export again", is_heard=True), {}, WARN, "export again"),
        (MeshReport(), {}, OK, "nobody listens"),
        (MeshReport(is_heard=True), {}, OK, "no mesh yet"),
        (MeshReport(is_heard=True, counters=Counter(failed=3)), {"failed": 2}, WARN, "failed on 2 meshes in the last"),
        (MeshReport("", True, Counter(built=2), **LAST_MESH), {}, OK, "12000 triangles in cells of 0.4 m, 231 ms"),
    ],
)
def test_mesh_status(report, recent, level, message):
    status = diagnostics.mesh_status(report, recent)
    assert status.name == "mesh" and status.level == level and status.message.startswith(message)


def test_the_last_mesh_is_told_while_nobody_listens():
    status = diagnostics.mesh_status(MeshReport("", False, Counter(built=2, replaced=1), **LAST_MESH), {})
    assert status.values == {
        "meshes built": 2,
        "meshes replaced": 1,
        "last mesh": "12000 triangles in cells of 0.4 m, 231 ms",
    }


def test_message():
    statuses = [
        diagnostics.calibration_status("", 1, {"extrinsics": "calibration_file"}),
        diagnostics.calibration_status("no camera_info yet", 0, {}),
    ]
    message = diagnostics.diagnostic_array(Time(sec=5), "occflownet", "tiny", statuses)
    assert message.header.stamp.sec == 5
    assert [(s.name, s.level, s.message, s.hardware_id) for s in message.status] == [
        ("occflownet: calibration", OK, "complete", "tiny"),
        ("occflownet: calibration", ERROR, "no camera_info yet", "tiny"),
    ]
    assert [(v.key, v.value) for v in message.status[0].values] == [
        ("extrinsics", "calibration_file"),
        ("tables built", "1"),
    ]


def camera(name: str, x_m: float = 0.0) -> Camera:
    pose = np.eye(4)
    pose[0, 3] = x_m
    return Camera(name, 1600, 900, np.reshape(GOOD, (3, 3)), pose)


def intrinsics(frame: str, matrix: tuple[float, ...] = GOOD) -> Intrinsics:
    return Intrinsics(frame, 1600, 900, matrix)


def transform(parent: str, child: str, x_m: float) -> TransformStamped:
    message = TransformStamped(child_frame_id=child)
    message.header.frame_id = parent
    message.transform.translation.x = x_m
    message.transform.rotation.w = 1.0
    return message


def source(**changes) -> CalibrationSource:
    arguments = {
        "names": ("LEFT", "RIGHT"),
        "info_topics": ("/l/camera_info", "/r/camera_info"),
        "file_cameras": (camera("l", 1.0), camera("r", 2.0)),
        "tf": None,
        "use_file_intrinsics": False,
    }
    return CalibrationSource(**{**arguments, **changes})


def test_rig_is_whole_when_all_camera_info_came_and_changes_only_with_it():
    calibration = source()
    assert calibration.rig is None
    assert calibration.problem.startswith("no camera_info yet on /l/camera_info, /r/camera_info; ")
    assert not calibration.set_intrinsics(0, intrinsics("l_optical"))
    assert calibration.problem.startswith("no camera_info yet on /r/camera_info; ")
    assert calibration.set_intrinsics(1, intrinsics("r_optical"))
    rig = calibration.rig
    assert rig.names == ("LEFT", "RIGHT") and calibration.problem == ""
    assert [c.ego_from_camera[0, 3] for c in rig] == [1.0, 2.0]
    assert not calibration.set_intrinsics(1, intrinsics("r_optical"))
    assert not calibration.refresh() and calibration.rig is rig
    assert calibration.set_intrinsics(1, intrinsics("r_optical", (1000.0, *GOOD[1:])))
    assert calibration.rig[1].intrinsic[0, 0] == 1000 and calibration.changes == 2


def test_bad_camera_info_takes_the_rig_away_until_it_is_good_again():
    calibration = source(use_file_intrinsics=True)
    assert calibration.rig is not None
    assert calibration.set_intrinsics(0, intrinsics("l", (0.0, *GOOD[1:])))
    assert calibration.rig is None
    assert calibration.problem.startswith("LEFT: focal lengths are fx = 0, fy = 1260 px; both must be positive")
    assert calibration.set_intrinsics(0, intrinsics("l"))
    assert calibration.rig is not None and calibration.problem == ""


def test_missing_frames_are_named_and_found_later():
    transforms = PlainTransforms()
    calibration = source(file_cameras=None, tf=TfExtrinsics(transforms, "base_link", "/tf_static"))
    calibration.set_intrinsics(0, intrinsics("l_optical"))
    calibration.set_intrinsics(1, intrinsics("r_optical"))
    assert calibration.problem.startswith(
        "no transform from base_link to l_optical, r_optical: nothing has been published on /tf_static; "
    )
    transforms.add(transform("base_link", "l_optical", 1.0), is_static=True)
    assert not calibration.refresh()
    assert calibration.problem.startswith("no transform from base_link to r_optical: /tf_static has no frame 'r_opti")
    transforms.add(transform("base_link", "r_optical", 3.0), is_static=True)
    assert calibration.refresh()
    assert [c.ego_from_camera[0, 3] for c in calibration.rig] == [1.0, 3.0]


def test_a_refused_camera_info_takes_the_rig_away_until_there_is_a_better_one():
    calibration = source(use_file_intrinsics=True)
    good = intrinsics("l")
    calibration.set_intrinsics(0, good)
    assert calibration.rig is not None
    assert calibration.refuse_intrinsics(0, "binned") and calibration.rig is None
    assert calibration.problem == "binned"
    assert not calibration.refuse_intrinsics(0, "binned still") and calibration.problem == "binned still"
    assert calibration.set_intrinsics(0, good)  # the very one from before
    assert calibration.rig is not None and calibration.problem == ""


def test_cameras_of_a_file_by_namespace_or_by_name():
    rig = CameraRig((camera("front"), camera("RIGHT", 2.0)))
    found = cameras_of_file(rig, ("LEFT", "RIGHT"), ("/robot/front", "/robot/side"))
    assert [c.name for c in found] == ["front", "RIGHT"]
    with pytest.raises(CalibrationError, match=r"no camera for /robot/rear \(REAR\); it has front, RIGHT"):
        cameras_of_file(rig, ("REAR",), ("/robot/rear",))
