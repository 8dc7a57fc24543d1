# SPDX-License-Identifier: Apache-2.0
"""Parameters of an active node through its own service: each is checked, each that may change takes effect, others refuse.

Node and service are real and in this process; images and poses are handed to its pipeline, and an engine that takes no
time stands in for the network.
"""

from __future__ import annotations

import array
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pytest
import rclpy
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from ros_processes import ROOT, Vehicle, jpeg, ring_rig, ros_environment
from sensor_msgs.msg import CompressedImage

from occflownet_core.camera import CameraRig
from occflownet_core.labels import FREE
from occflownet_core.rig_file import save_rig
from occflownet_core.runtime.engine import Engine, Prediction
from occflownet_ros import parameters
from occflownet_ros.node import OccflownetNode
from occflownet_ros.parameters import Settings

pytestmark = pytest.mark.integration

MS = 1_000_000
PATIENT_S = 60.0
WIDTH_PX, HEIGHT_PX = 352, 198
JPEG = array.array("B", jpeg(0, WIDTH_PX, HEIGHT_PX))
LIVE_OUTPUTS = {name for name in parameters.LIVE if name.endswith("_max_rate_hz")} | {
    name for name in parameters.LIVE if name.startswith(("costmap_", "voxel_", "depth_", "mesh_"))
}
"""Live parameters that the outputs alone read; what they do is tested with the outputs."""


class RampEngine(Engine):
    """Probability rises along x from 0 to 1, whatever the images show: the share that is free is the threshold."""

    name = "ramp"

    def calibrate(self, rig):
        pass

    def infer(self, images, previous_from_current, missing_cameras=()):
        shape = self.bundle.grid.shape
        probability = np.broadcast_to(np.linspace(0, 1, shape[0])[:, None, None], shape)
        return Prediction(np.where(probability > self.occupancy_threshold, 4, FREE).astype(np.uint8))

    def reset(self):
        pass

    _load_tables = _forward = None  # calibrate and infer, which would ask them, are replaced whole


class ActiveNode:
    """An active node that is fed by hand and whose parameters are set through its service."""

    def __init__(self, calibration_file) -> None:
        ros_environment()
        self._context = Context()
        rclpy.init(context=self._context)
        values = {
            "bundle": str(ROOT / "demo" / "bundle"),
            "calibration_file": str(calibration_file),
            "intrinsics_source": "calibration_file",
            "threads": 1,
            "odom_topic": "/nobody/odom",
        }
        overrides = [Parameter(name, value=value) for name, value in values.items()]
        self.node = OccflownetNode(context=self._context, parameter_overrides=overrides)
        assert self.node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        self.node._engine = RampEngine(self.node._bundle)
        assert self.node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        self.frames: list = []
        self.node._outputs.publish = self.frames.append
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()
        self._client = Vehicle()
        self._service = self._client.node.create_client(SetParameters, "/occflownet/set_parameters")
        assert self._service.wait_for_service(PATIENT_S)
        self.pipeline = self.node._pipeline
        self.stamp_ms = 1_000_000

    def set(self, name: str, value: object) -> str:
        """What ``ros2 param set`` does; the reason if it was refused, empty if not."""
        kind = Parameter.Type.STRING_ARRAY if isinstance(value, (list, tuple)) else None
        message = Parameter(name, kind, value).to_parameter_msg()
        future = self._service.call_async(SetParameters.Request(parameters=[message]))
        assert self._client.wait(future.done, PATIENT_S)
        result = future.result().results[0]
        assert result.successful != bool(result.reason)
        return result.reason

    def counts(self) -> Counter[str]:
        report = self.pipeline.report()
        resets = Counter({f"reset {cause}": count for cause, count in report.resets.items()})
        return report.sets + resets

    def sweep(
        self,
        after_ms: int = 500,
        without: Sequence[int] = (),
        late_ms: Mapping[int, int] | None = None,
        poses: Mapping[int, tuple[float, float]] | None = None,
        settle_s: float = PATIENT_S,
    ) -> Counter[str]:
        """One image per camera; what it changed in the counters.

        Args:
            after_ms: since the sweep before.
            without: cameras that send none.
            late_ms: by how much a camera's stamp is later than the anchor's.
            poses: x [m] and yaw [rad] by time since the sweep's stamp, ms.
            settle_s: how long to wait for the set to be used or dropped.
        """
        before = self.counts()
        self.stamp_ms += after_ms
        for offset_ms, (x_m, yaw_rad) in sorted((poses or {}).items()):
            turn_wxyz = (np.cos(yaw_rad / 2), 0, 0, np.sin(yaw_rad / 2))
            self.pipeline.add_pose((self.stamp_ms + offset_ms) * MS, (x_m, 0, 0), turn_wxyz)
        self.begun_s = time.monotonic()
        for camera in range(6):
            if camera not in without:
                stamp_ns = (self.stamp_ms + (late_ms or {}).get(camera, 0)) * MS
                self.pipeline.add_image(camera, stamp_ns, CompressedImage(format="jpeg", data=JPEG))
        until_s = time.monotonic() + settle_s
        while time.monotonic() < until_s:
            changed = self.counts() - before
            if changed["processed"] + changed["dropped"]:
                break
            time.sleep(0.005)
        return changed

    def close(self) -> None:
        self._client.close()
        self._executor.shutdown()
        self._thread.join(10)
        self.node.release()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)


@pytest.fixture(scope="module")
def active(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "rig.yaml"
    save_rig(CameraRig(tuple(camera.resized(WIDTH_PX, HEIGHT_PX) for camera in ring_rig())), path)
    node = ActiveNode(path)
    yield node
    node.close()


def fate(**sweep) -> Callable[[ActiveNode], str]:
    """What becomes of a sweep within half a second."""

    def look(active: ActiveNode) -> str:
        changed = active.sweep(settle_s=0.5, **sweep)
        return next((what for what in ("processed", "dropped") if changed[what]), "waits")

    return look


def resets(after_ms: int = 500, **sweep) -> Callable[[ActiveNode], list[str]]:
    """Why the memory was reset at a sweep that came so long after one at x = 0 (both with poses)."""

    def look(active: ActiveNode) -> list[str]:
        active.sweep(poses={-10: (0, 0), 10: (0, 0)})
        changed = active.sweep(after_ms, **{"poses": {-10: (0, 0), 10: (0, 0)}, **sweep})
        return [name for name in changed if name.startswith("reset ")]

    return look


def waits_long(active: ActiveNode) -> bool:
    """Whether a set whose pose has not come yet (but one did 50 ms before it) takes half a second and more."""
    active.sweep(poses={-70: (0, 0), -50: (0, 0)})
    return time.monotonic() - active.begun_s > 0.5


def free_share(active: ActiveNode) -> float:
    active.sweep()
    return float((active.frames[-1].labels == FREE).mean())


@dataclass(frozen=True)
class Effect:
    """How a parameter shows: what is seen with one value and, set while the node runs, with another."""

    look: Callable[[ActiveNode], object]
    first: tuple[object, object]
    then: tuple[object, object]


EFFECTS = {
    "max_camera_time_diff_ms": Effect(fate(late_ms={3: 30}), (60.0, "processed"), (20.0, "dropped")),
    "deadline_ms": Effect(fate(without=[2]), (60000.0, "waits"), (50.0, "dropped")),
    "missing_cameras": Effect(fate(without=[2]), ("drop", "dropped"), ("mask", "processed")),
    # Poses 300 ms apart, the set between them.
    "odom_max_gap_ms": Effect(resets(poses={-150: (0, 0), 150: (0, 0)}), (200.0, ["reset no_odometry"]), (400.0, [])),
    "odom_wait_ms": Effect(waits_long, (0.0, False), (600.0, True)),
    "memory_max_gap_s": Effect(resets(1500), (2.0, []), (1.0, ["reset gap"])),
    # 10 m in half a second: 20 m/s.
    "max_speed_mps": Effect(resets(poses={-10: (10, 0), 10: (10, 0)}), (60.0, []), (15.0, ["reset pose_jump"])),
    # 1 rad in half a second: 2 rad/s.
    "max_yaw_rate_rps": Effect(resets(poses={-10: (0, 1), 10: (0, 1)}), (3.0, []), (1.5, ["reset pose_jump"])),
    # 200 cells along x: those whose probability k / 199 is at most the threshold are free.
    "occupancy_threshold": Effect(free_share, (0.25, 0.25), (0.75, 0.75)),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_what_may_change_takes_effect_while_running(active, name):
    effect = EFFECTS[name]
    try:
        for value, expected in (effect.first, effect.then):
            assert active.set(name, value) == ""
            assert effect.look(active) == expected
    finally:
        assert active.set(name, parameters.defaults()[name]) == ""
        active.sweep()


def test_the_table_of_effects_is_complete():
    assert set(EFFECTS) | LIVE_OUTPUTS == parameters.LIVE


def wrong_value(row) -> tuple[object, str]:
    """A value that a parameter cannot have, and what is said about it."""
    limits, default = row.metadata, row.metadata["default"]
    if isinstance(default, tuple):
        return 7, f"{row.name} is 7; give a list of strings"
    if limits["choices"]:
        return "nothing of the kind", f"{row.name} is 'nothing of the kind'; choose {' or '.join(limits['choices'])}"
    if limits["high"] is not None:
        what = limits["unit"] or "a value"
        return type(default)(limits["high"] + 1), f"; give {what} from {limits['low']:g} to {limits['high']:g}"
    if isinstance(default, bool):
        return "yes", f"{row.name} is 'yes'; give true or false"
    return 7, f"{row.name} is 7; give a string"


def other_value(row, now: object) -> object:
    """A value that a parameter may have, besides the one it has now."""
    limits, default = row.metadata, row.metadata["default"]
    if isinstance(default, tuple):
        return [limits["choices"][0] if limits["choices"] else "/other"]
    if limits["choices"]:
        return next(choice for choice in limits["choices"] if choice != now)
    if isinstance(default, bool):
        return not now
    if isinstance(default, str):
        return "other"
    return now + 1 if now + 1 <= limits["high"] else (now + limits["low"]) / 2


@pytest.mark.parametrize("row", [row for row in fields(Settings) if row.metadata["live"]], ids=lambda row: row.name)
def test_what_may_change_is_checked_and_reaches_every_reader(active, row):
    in_force = getattr(active.node._settings, row.name)
    wrong, reason = wrong_value(row)
    assert reason in active.set(row.name, wrong)
    assert getattr(active.node._settings, row.name) == in_force
    value = other_value(row, in_force)
    assert active.set(row.name, value) == ""
    for settings in (active.node._settings, active.node._outputs.settings, active.pipeline._settings):
        assert getattr(settings, row.name) == (tuple(value) if isinstance(value, list) else value)
    assert active.node.get_parameter(row.name).value == value
    assert active.set(row.name, in_force) == ""


@pytest.mark.parametrize("row", [row for row in fields(Settings) if not row.metadata["live"]], ids=lambda row: row.name)
def test_what_is_fixed_refuses_and_says_when_it_may_change(active, row):
    in_force = active.node.get_parameter(row.name).value
    refusal = f"{row.name} is fixed while the node is configured; clean it up, change it, configure again"
    assert active.set(row.name, other_value(row, in_force)) == refusal
    assert active.node.get_parameter(row.name).value == in_force
    assert active.set(row.name, in_force) == ""  # a file of parameters may be loaded again


def test_values_that_do_not_go_together_are_refused_while_running(active):
    assert active.set("costmap_min_height_m", 50.0) == (
        "costmap_min_height_m is 50 and costmap_max_height_m 2.2; the first must be lower"
    )
    assert active.node._outputs.settings.costmap_min_height_m == 0.2


def test_before_configure_each_value_is_checked_by_itself_and_any_may_change(active):
    """Last: this cleans the node up."""
    assert active.node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
    assert active.node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
    before = {name: active.node.get_parameter(name).value for name in parameters.NAMES}
    for row in fields(Settings):
        wrong, reason = wrong_value(row)
        assert reason in active.set(row.name, wrong)
        assert active.set(row.name, other_value(row, before[row.name])) == ""
    for topic in ("/front//left", "/front/", "/2nd", "front left"):
        assert f"camera_namespaces has '{topic}', which is no ROS name" in active.set("camera_namespaces", [topic])
    assert active.set("camera_namespaces", ["/robot/front", "~/rear", "left"]) == ""
    assert active.set("costmap_min_height_m", 50.0) == ""  # together with the others it is checked at configure
    assert active.node.trigger_configure() == TransitionCallbackReturn.FAILURE
    for name, value in before.items():
        assert active.set(name, value) == ""
    assert active.node.trigger_configure() == TransitionCallbackReturn.SUCCESS
