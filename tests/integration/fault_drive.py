# SPDX-License-Identifier: Apache-2.0
"""A drive in real time past a running node, in which single cameras, the odometry or the clock misbehave.

A fault says what a camera sends instead of one healthy image: a function of the sweep's number and the image's stamp
that returns pairs of stamp and data. What is healthy needs no fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
from counting_bundle import HEIGHT_PX, WIDTH_PX
from nav_msgs.msg import Odometry
from ros_processes import NodeProcess, Vehicle
from std_msgs.msg import UInt8MultiArray

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.labels import FREE
from occflownet_core.rig_file import save_rig
from occflownet_ros import conversions
from occflownet_ros.lifecycle_client import ACTIVATE, CONFIGURE, change_state

Fault = Callable[[int, int], list[tuple[int, bytes]]]

START_NS = 1_532_402_927_000_000_000
PERIOD_NS = 100_000_000
PATIENT_S = 25.0
_LAST_ANSWERS_S = 0.2
IMAGE_SIZE_PX = (4 * WIDTH_PX, 4 * HEIGHT_PX)


def jpeg_of(grey: int) -> bytes:
    image = np.full((IMAGE_SIZE_PX[1], IMAGE_SIZE_PX[0], 3), grey, dtype=np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


IMAGE = jpeg_of(100)


def rig_of(cameras: tuple[str, ...]) -> CameraRig:
    """Cameras that look around from 1.5 m above the ego frame."""
    width_px, height_px = IMAGE_SIZE_PX
    intrinsic = np.array([[width_px / 2, 0, width_px / 2], [0, width_px / 2, height_px / 2], [0, 0, 1]])
    forward = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    turns = [np.pi * k / len(cameras) for k in range(len(cameras))]
    turned = [poses.pose(np.zeros(3), np.array([np.cos(half), 0, 0, np.sin(half)])) for half in turns]
    return CameraRig(
        tuple(Camera(n, width_px, height_px, intrinsic, t @ forward) for n, t in zip(cameras, turned, strict=True))
    )


def active_node(vehicle: Vehicle, folder: Path, bundle: Path, **values: object) -> NodeProcess:
    """A node of this bundle that listens to the vehicle."""
    save_rig(rig_of(vehicle.cameras), folder / "rig.yaml")
    reliable = {"image_reliability": "reliable", "odom_reliability": "reliable"}
    defaults = {"calibration_file": folder / "rig.yaml", "threads": 1, **reliable}
    node = NodeProcess(folder / "log.txt", bundle=bundle, **{**defaults, **values})
    try:
        change_state(vehicle.node, "occflownet", CONFIGURE, PATIENT_S)
        change_state(vehicle.node, "occflownet", ACTIVATE, PATIENT_S)
        assert vehicle.wait(vehicle.is_heard, PATIENT_S)
    except BaseException:
        node.close()  # or the next test would find two of them
        raise
    return node


class FaultDrive:
    """Sweeps at 10 Hz, straight ahead at 10 m/s; every camera of a sweep has the anchor's stamp but a millisecond each.

    Attributes:
        frames: what the node published, as (stamp_ns, sets since the memory was forgotten).
    """

    def __init__(self, vehicle: Vehicle) -> None:
        self.vehicle = vehicle
        self.frames: list[tuple[int, int]] = []
        self._sweep = 0
        self._clock_ns = START_NS
        self._due_s = time.monotonic()
        self._labels = vehicle.hear(UInt8MultiArray, "/occflownet/labels")

    def drive(
        self,
        sweeps: int,
        faults: Mapping[str, Fault] | None = None,
        odometry: Callable[[int, Odometry], Odometry | None] = lambda sweep, message: message,
        fx_px: float = 128.0,
    ) -> list[int]:
        """Send sweeps; the anchor's stamps."""
        stamps = []
        self._due_s = max(self._due_s, time.monotonic())
        for _ in range(sweeps):
            stamps.append(self._clock_ns)
            if self._sweep % 5 == 0:
                self.vehicle.send_calibration(self._clock_ns, fx_px)
            if (pose := odometry(self._sweep, self._pose())) is not None:
                self.vehicle.publish_odometry(pose)
            for camera, name in enumerate(self.vehicle.cameras):
                healthy = (self._clock_ns + camera * 1_000_000, IMAGE)
                fault = (faults or {}).get(name)
                for stamp_ns, data in fault(self._sweep, healthy[0]) if fault else [healthy]:
                    self.vehicle.send_image(camera, stamp_ns, data)
            self._sweep += 1
            self._clock_ns += PERIOD_NS
            # A busy machine may fall behind; there must be time left to hear the answers all the same.
            self._due_s = max(self._due_s + PERIOD_NS / 1e9, time.monotonic() + 0.5 * PERIOD_NS / 1e9)
            self.vehicle.wait(lambda: False, self._due_s - time.monotonic())
        if sweeps > 1:
            self.vehicle.wait(lambda: False, _LAST_ANSWERS_S)
        self._collect()
        return stamps

    def jump_clock(self, seconds: float) -> None:
        """Every stamp from now on."""
        self._clock_ns += int(seconds * 1e9)

    def recovers(self, sweeps: int = 60) -> bool:
        """Whether healthy sweeps bring output back, and make every diagnostic good again, within so many sweeps."""
        begun = len(self.vehicle.diagnostics)
        for _ in range(sweeps):
            stamps, reports = self.drive(1), self.vehicle.diagnostics[begun:]
            is_heard = self.frames and self.frames[-1][0] >= stamps[-1] - 3 * PERIOD_NS
            if is_heard and reports and all(status.level == status.OK for status in reports[-1].status):
                return True
        return False

    def stamps_of_output(self, stamps: list[int]) -> list[int]:
        """Those of the given stamps for which the node published."""
        published = {stamp_ns for stamp_ns, _ in self.frames}
        return [stamp_ns for stamp_ns in stamps if stamp_ns in published]

    def memory_after(self, stamp_ns: int) -> list[int]:
        """Sets since the memory was forgotten, of each frame from this stamp on."""
        return [count for frame_ns, count in self.frames if frame_ns >= stamp_ns]

    def _pose(self) -> Odometry:
        message = Odometry(child_frame_id="base_link")
        message.header.stamp = conversions.time_message(self._clock_ns)
        message.header.frame_id = "odom"
        message.pose.pose.position.x = 1.0 * self._sweep
        message.pose.pose.orientation.w = 1.0
        return message

    def _collect(self) -> None:
        for message in self._labels:
            frame = conversions.labels_from_message(message)
            seen = frame.labels[frame.labels != FREE]
            self.frames.append((frame.stamp_ns, int(seen.max()) if seen.size else 0))
        self._labels.clear()
