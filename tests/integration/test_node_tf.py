# SPDX-License-Identifier: Apache-2.0
"""Extrinsics from /tf_static and ego motion from /tf, by a real process over DDS: what is missing is named, what changes
takes effect. Needs tf2_msgs, which PyPI does not carry."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("tf2_msgs.msg", reason="tf2_msgs comes with a ROS installation and is not installed here")

from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import TransformStamped
from rclpy.qos import DurabilityPolicy, QoSProfile
from ros_processes import CAMERAS, ROOT, NodeProcess, Vehicle, jpeg, ring_rig
from std_msgs.msg import UInt8MultiArray
from tf2_msgs.msg import TFMessage

from occflownet_core import poses
from occflownet_ros import conversions
from occflownet_ros.lifecycle_client import ACTIVATE, CONFIGURE, change_state

pytestmark = pytest.mark.integration

START_NS = 1_532_402_927_612_460_000
SWEEP_NS, MS = 500_000_000, 1_000_000
JPEG = jpeg()
PATIENT_S = 60.0
FRAMES = dict(zip(CAMERAS, (camera.ego_from_camera for camera in ring_rig()), strict=True))


def transform(parent: str, child: str, parent_from_child, stamp_ns: int = 0) -> TransformStamped:
    message = TransformStamped(child_frame_id=child)
    message.header.frame_id = parent
    message.header.stamp = conversions.time_message(stamp_ns)
    t, q = message.transform.translation, message.transform.rotation
    t.x, t.y, t.z = parent_from_child[:3, 3].tolist()
    q.w, q.x, q.y, q.z = poses.quaternion_from_rotation(parent_from_child).tolist()
    return message


class TfVehicle(Vehicle):
    """A vehicle that tells its frames as a robot_state_publisher and a localisation would."""

    def __init__(self) -> None:
        super().__init__()
        latched = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._static = self.node.create_publisher(TFMessage, "/tf_static", latched)
        self._moving = self.node.create_publisher(TFMessage, "/tf", QoSProfile(depth=100))

    def fix(self, *transforms: TransformStamped) -> None:
        self._static.publish(TFMessage(transforms=transforms))

    def at(self, stamp_ns: int, x_m: float) -> None:
        pose = poses.pose((x_m, 0, 0), (1, 0, 0, 0))
        self._moving.publish(TFMessage(transforms=[transform("odom", "base_footprint", pose, stamp_ns)]))

    def is_heard(self) -> bool:
        publishers = (*self._images, *self._infos, self._static, self._moving)
        return all(publisher.get_subscription_count() for publisher in publishers)

    def sweep(self, k: int, x_m: float, labels: list) -> None:
        """Poses around a sweep, the sweep, and the wait for its labels."""
        stamp_ns, before = START_NS + k * SWEEP_NS, len(labels)
        for offset_ms in (-40, 0, 40):
            self.at(stamp_ns + offset_ms * MS, x_m + offset_ms * 0.004)
        self.send_images(stamp_ns, JPEG)
        assert self.wait(lambda: len(labels) > before, PATIENT_S)


@pytest.fixture(scope="module")
def vehicle():
    vehicle = TfVehicle()
    yield vehicle
    vehicle.close()


@pytest.fixture(scope="module")
def running(vehicle, tmp_path_factory):
    """An active node; the tests below share it, in order."""
    node = NodeProcess(
        tmp_path_factory.mktemp("node") / "log.txt",
        bundle=ROOT / "demo" / "bundle",
        anchor_camera="CAM_FRONT",
        ego_motion="tf",
        calibration_timeout_s=0.5,
        deadline_ms=5000.0,
        image_reliability="reliable",
        odom_reliability="reliable",
    )
    try:
        change_state(vehicle.node, "occflownet", CONFIGURE, 2 * PATIENT_S)
        change_state(vehicle.node, "occflownet", ACTIVATE, PATIENT_S)
        assert vehicle.wait(vehicle.is_heard, PATIENT_S)
        yield node
    finally:
        node.close()


def says(vehicle: TfVehicle, name: str, sentence: str) -> bool:
    return vehicle.wait(lambda: sentence in vehicle.status(name).get("message", ""), 20)


def test_missing_frames_are_named_after_the_time_out(running, vehicle):
    until_s = time.monotonic() + PATIENT_S
    nothing = "no transform from base_link to CAM_FRONT_LEFT, CAM_FRONT, CAM_FRONT_RIGHT, CAM_BACK_LEFT, CAM_BACK, "
    while nothing not in vehicle.status("calibration").get("message", "") and time.monotonic() < until_s:
        vehicle.send_calibration(START_NS)  # heard by best effort; a vehicle repeats it
        vehicle.wait(lambda: False, 0.5)
    assert says(vehicle, "calibration", "nothing has been published on /tf or /tf_static; publish it, or")
    assert vehicle.status("calibration")["level"] == DiagnosticStatus.ERROR
    assert vehicle.wait(lambda: "no calibration for " in running.log and nothing in running.log, 20)
    assert says(vehicle, "ego motion", "no tf from odom to base_link yet: nothing has been published on /tf or /tf_")

    vehicle.fix(*(transform("base_lnk", name, FRAMES[name]) for name in CAMERAS))
    assert says(vehicle, "calibration", "has no frame 'base_link' (did you mean 'base_lnk'?)")
    vehicle.fix(*(transform("base_link", name, FRAMES[name]) for name in CAMERAS[1:]))
    left = "no transform on /tf or /tf_static connects 'CAM_FRONT_LEFT' (below 'base_lnk') with 'base_link' (below 'bas"
    assert says(vehicle, "calibration", left)
    assert says(vehicle, "ego motion", "has no frame 'odom'")


def test_sets_follow_the_transforms(running, vehicle):
    vehicle.fix(
        transform("base_link", CAMERAS[0], FRAMES[CAMERAS[0]]),
        transform("base_footprint", "base_link", poses.pose((0, 0, 0.3), (1, 0, 0, 0))),
    )
    assert says(vehicle, "calibration", "complete")
    labels = vehicle.hear(UInt8MultiArray, "/occflownet/labels")
    for k in range(3):
        vehicle.sweep(k, 5.0 * k, labels)
    assert vehicle.wait(lambda: vehicle.status("engine").get("sets processed") == "3", 20)
    status = vehicle.status("ego motion")
    # Nine poses, each once: the chain's other link does not move.
    assert status["received"] == "9" and status["reset first_set"] == "1"
    assert not {"reset no_odometry", "reset pose_jump", "out_of_order"} & set(status)
    assert vehicle.status("calibration")["tables built"] == "1"
    assert vehicle.status("calibration")["extrinsics"].startswith("/tf_static, kept by ")


def test_a_jump_of_the_frame_is_noticed(running, vehicle):
    labels = vehicle.hear(UInt8MultiArray, "/occflownet/labels")
    vehicle.sweep(3, 400.0, labels)
    assert vehicle.wait(lambda: vehicle.status("ego motion").get("reset pose_jump") == "1", 20)
    vehicle.sweep(4, 403.0, labels)
    assert vehicle.status("ego motion")["reset pose_jump"] == "1"


def test_recalibration_rebuilds_the_tables_once(running, vehicle):
    raised = FRAMES["CAM_BACK"].copy()
    raised[2, 3] += 0.5
    vehicle.fix(transform("base_link", "CAM_BACK", raised))
    assert vehicle.wait(lambda: vehicle.status("calibration").get("tables built") == "2", 20)
    vehicle.fix(transform("base_link", "CAM_BACK", raised))  # the same again: nothing to do
    broken = transform("base_link", "CAM_BACK", raised)
    broken.transform.translation.x = float("nan")
    vehicle.fix(broken)
    assert vehicle.wait(lambda: "the transform of 'CAM_BACK' in 'base_link' is refused: translation" in running.log, 20)
    labels = vehicle.hear(UInt8MultiArray, "/occflownet/labels")
    vehicle.sweep(5, 406.0, labels)
    assert vehicle.status("calibration")["tables built"] == "2"
    assert vehicle.status("calibration")["level"] == DiagnosticStatus.OK


def test_transforms_that_stop_are_noticed(running, vehicle):
    assert says(vehicle, "ego motion", "no tf from odom to base_link for ")
    assert vehicle.status("ego motion")["level"] == DiagnosticStatus.WARN
    assert running.interrupt() < 2 and running.process.returncode == 0 and "Traceback" not in running.log
