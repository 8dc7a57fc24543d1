# SPDX-License-Identifier: Apache-2.0
"""The node as a process of its own, and a test vehicle that feeds and hears it over DDS."""

from __future__ import annotations

import array
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_ros import conversions
from occflownet_ros.private_graph import use_private_graph

ROOT = Path(__file__).resolve().parents[2]
CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT")
YAW_DEG = (55, 0, -55, -110, 180, 110)
WIDTH_PX, HEIGHT_PX = 1600, 900


def ros_environment() -> dict[str, str]:
    """Set up this process for a private graph, the module's where it has one, and return the same for children."""
    use_private_graph()
    os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(ROOT / "config" / "fastdds.xml")
    return os.environ.copy()


def ring_rig() -> CameraRig:
    """Six cameras like nuScenes', looking around from 1.5 m above the ego frame."""
    intrinsic = np.array([[1260.0, 0, 800], [0, 1260, 480], [0, 0, 1]])
    forward = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    cameras = []
    for name, yaw_deg in zip(CAMERAS, YAW_DEG, strict=True):
        half_rad = np.radians(yaw_deg) / 2
        turned = poses.pose(np.array([1.0, 0, 1.5]), np.array([np.cos(half_rad), 0, 0, np.sin(half_rad)]))
        cameras.append(Camera(name, WIDTH_PX, HEIGHT_PX, intrinsic, turned @ forward))
    return CameraRig(tuple(cameras))


def jpeg(seed: int = 0, width_px: int = WIDTH_PX, height_px: int = HEIGHT_PX) -> bytes:
    """A picture with structure, about as large as a camera's."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (45, 80, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width_px, height_px), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


class NodeProcess:
    """``occflownet`` as a process; its log is in a file.

    Args:
        log: file for its output.
        values: parameters.

    Attributes:
        unclosed: all that were started and not closed, so that a failed test can say what they said.
    """

    unclosed: ClassVar[list[NodeProcess]] = []

    def __init__(self, log: Path, **values: object) -> None:
        arguments = [sys.executable, "-m", "occflownet_ros.node", "--ros-args"]
        for name, value in values.items():
            arguments += ["-p", f"{name}:={value}"]
        self.log_path = log
        self.started_s = time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                arguments, cwd=ROOT, env=ros_environment(), stdout=output, stderr=subprocess.STDOUT
            )
        self.unclosed.append(self)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def interrupt(self) -> float:
        """SIGINT; seconds until it has exited."""
        begun_s = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=30)
        return time.monotonic() - begun_s

    def close(self) -> None:
        if self in self.unclosed:
            self.unclosed.remove(self)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Vehicle:
    """Publishes what a vehicle's drivers would, and collects what the node says.

    Args:
        cameras: names; each has a namespace of its own.
        size_px: width and height of their images.
    """

    def __init__(self, cameras: Sequence[str] = CAMERAS, size_px: tuple[int, int] = (WIDTH_PX, HEIGHT_PX)) -> None:
        ros_environment()
        self.context = Context()
        rclpy.init(context=self.context)
        self.node = Node("test_vehicle", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.cameras, self._size_px = tuple(cameras), size_px
        qos = QoSProfile(depth=10)
        self._images = [
            self.node.create_publisher(CompressedImage, f"/{c}/image_rect_compressed", qos) for c in cameras
        ]
        self._infos = [self.node.create_publisher(CameraInfo, f"/{c}/camera_info", qos) for c in cameras]
        self._odometry = self.node.create_publisher(Odometry, "/odom", qos)
        self.diagnostics: list[DiagnosticArray] = []
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self.diagnostics.append, QoSProfile(depth=20))

    def hear(self, kind: type, topic: str) -> list:
        """Subscribe; messages will be appended to the list that is returned. The node's publisher has matched then."""
        heard: list = []
        subscription = self.node.create_subscription(kind, topic, heard.append, QoSProfile(depth=20))
        assert self.wait(subscription.get_publisher_count, 60)
        # The other side learns of the match on its own, a moment sooner or later.
        self.wait(lambda: False, 0.3)
        return heard

    def is_heard(self) -> bool:
        """True when the node's subscriptions have matched."""
        publishers = (*self._images, *self._infos, self._odometry)
        return all(p.get_subscription_count() for p in publishers)

    def wait(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Spin until the condition holds; False if it did not in time."""
        until_s = time.monotonic() + timeout_s
        self.executor.add_node(self.node)
        try:
            while not condition() and time.monotonic() < until_s:
                self.executor.spin_once(timeout_sec=0.02)
            return bool(condition())
        finally:
            self.executor.remove_node(self.node)

    def send_calibration(self, stamp_ns: int, fx_px: float = 1260.0) -> None:
        width_px, height_px = self._size_px
        cx_px, cy_px = width_px / 2, height_px * 480 / 900
        for name, publisher in zip(self.cameras, self._infos, strict=True):
            message = CameraInfo(width=width_px, height=height_px)
            message.header.stamp = conversions.time_message(stamp_ns)
            message.header.frame_id = name
            message.k = [fx_px, 0.0, cx_px, 0.0, fx_px, cy_px, 0.0, 0.0, 1.0]
            message.p = [fx_px, 0.0, cx_px, 0.0, 0.0, fx_px, cy_px, 0.0, 0.0, 0.0, 1.0, 0.0]
            publisher.publish(message)

    def send_odometry(self, stamp_ns: int, x_m: float) -> None:
        message = Odometry(child_frame_id="base_link")
        message.header.stamp = conversions.time_message(stamp_ns)
        message.header.frame_id = "odom"
        message.pose.pose.position.x = x_m
        self.publish_odometry(message)

    def publish_odometry(self, message: Odometry) -> None:
        self._odometry.publish(message)

    def send_image(self, camera: int, stamp_ns: int, data: bytes) -> None:
        message = CompressedImage(format="jpeg", data=array.array("B", data))
        message.header.stamp = conversions.time_message(stamp_ns)
        message.header.frame_id = self.cameras[camera]
        self._images[camera].publish(message)

    def send_bytes(self, camera: int, serialised: bytes) -> None:
        """On a camera's topics, whatever they are."""
        self._images[camera].publish(serialised)
        self._infos[camera].publish(serialised)

    def send_images(self, stamp_ns: int, data: bytes, but: dict[int, bytes] | None = None) -> None:
        """One sweep: every camera a few milliseconds after the one before; ``but`` replaces some cameras' data."""
        for camera in range(len(self.cameras)):
            self.send_image(camera, stamp_ns + camera * 8_000_000, (but or {}).get(camera, data))

    def status(self, name: str) -> dict[str, str]:
        """Values of the newest diagnostic status of a name, with ``level`` and ``message``."""
        for status in self.diagnostics[-1].status if self.diagnostics else ():
            if status.name == f"occflownet: {name}":
                values = {value.key: value.value for value in status.values}
                return {**values, "level": status.level, "message": status.message}
        return {}

    def diagnostics_text(self) -> str:
        """The newest diagnostics of the node, a line for each status."""
        newest = self.diagnostics[-1].status if self.diagnostics else ()
        return "\n".join(f"{s.name}: {s.message} { ({v.key: v.value for v in s.values}) }" for s in newest)

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)
