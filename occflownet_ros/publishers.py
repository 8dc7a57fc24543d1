# SPDX-License-Identifier: Apache-2.0
"""The node's outputs: each built only while someone subscribes, and no more often than its limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nav_msgs.msg import OccupancyGrid
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Float64, UInt8MultiArray
from visualization_msgs.msg import MarkerArray

from occflownet_core.camera import CameraRig
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_core.runtime.bundle import Bundle
from occflownet_ros import conversions
from occflownet_ros.depth_images import DepthImages
from occflownet_ros.diagnostics import Complaints, MeshReport
from occflownet_ros.mesh_output import MeshOutput
from occflownet_ros.parameters import Settings

STAGES = ("receive", "busy", "decode", "wait", "engine", "publish", "total")
"""Stages of ~/latency: busy + decode + wait + engine + publish = total, from the set's last image to the last publication;
receive runs before them, from the set's first image to its last."""

_QUEUE = QoSProfile(depth=2)
_LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class RateLimit:
    """Lets events through at a mean rate of at most ``max_rate_hz``; 0 lets all through."""

    def __init__(self) -> None:
        self._due_s = float("-inf")

    def allows(self, now_s: float, max_rate_hz: float) -> bool:
        if max_rate_hz <= 0:
            return True
        if now_s < self._due_s:
            return False
        period_s = 1 / max_rate_hz
        # Counted on from when it was due: a 5 Hz limit on a 12 Hz stream then gives 5 Hz and not 4.
        is_steady = now_s - self._due_s < period_s
        self._due_s = (self._due_s if is_steady else now_s) + period_s
        return True


@dataclass
class _Output:
    name: str
    publisher: object
    build: Callable[[OccupancyFrame], object]
    limit: RateLimit


class Outputs:
    """The publishers of a configured node.

    Args:
        node: whose lifecycle publishers they are.
        settings: rates, cost map band, looks of the markers, size of the depth images, time and cells of meshes.
        bundle: whose predictions are published.
        complain: takes (subject, sentence) about trouble.

    Attributes:
        settings: may be replaced while running.
    """

    def __init__(self, node: LifecycleNode, settings: Settings, bundle: Bundle, complain: Complaints) -> None:
        self.settings = settings
        self._node = node
        self._shown_classes: frozenset[str] | None = None
        self._outputs = [
            self._output("occupancy", PointCloud2, _QUEUE, conversions.cloud_message),
            self._output("labels", UInt8MultiArray, _QUEUE, conversions.labels_message),
            self._output("costmap", OccupancyGrid, _LATCHED, self._costmap),
            self._output("voxels", MarkerArray, _QUEUE, self._markers),
        ]
        self._latency = {
            stage: node.create_lifecycle_publisher(Float64, f"~/latency/{stage}", _QUEUE) for stage in STAGES
        }
        self._depth = DepthImages(node, bundle.cameras)
        self._depth_limit = RateLimit()
        self._mesh = MeshOutput(node, bundle, complain)
        self._mesh_limit = RateLimit()

    @property
    def is_alive(self) -> bool:
        """False once the process was told to end: nothing can be published any more."""
        return self._node.context.ok()

    def wants_field(self) -> bool:
        """Whether the set that the engine takes next is to become a mesh; asked once for each."""
        return self._mesh.is_wanted() and self._mesh_limit.allows(time.monotonic(), self.settings.mesh_max_rate_hz)

    def publish(self, frame: OccupancyFrame) -> None:
        """Publish a frame on every output that has subscribers and is due; its mesh, if it has its field's features, later."""
        now_s = time.monotonic()
        for output in self._outputs:
            max_rate_hz = getattr(self.settings, f"{output.name}_max_rate_hz")
            if output.publisher.get_subscription_count() and output.limit.allows(now_s, max_rate_hz):
                output.publisher.publish(output.build(frame))
        if self._depth.has_subscribers() and self._depth_limit.allows(now_s, self.settings.depth_max_rate_hz):
            self._depth.publish(frame, self.settings.depth_width_px)
        if frame.field_features is not None:
            self._mesh.submit(frame, self.settings)

    def set_cameras(self, rig: CameraRig | None, frame_ids: Sequence[str]) -> None:
        """Calibration became known, changed, or was lost (None): the depth images are to be seen by these cameras.

        Args:
            rig: of rectified images, in the bundle's order.
            frame_ids: optical frame of each camera.
        """
        self._depth.set_cameras(rig, frame_ids)

    def publish_latency(self, latency_ms: Mapping[str, float]) -> None:
        for stage, publisher in self._latency.items():
            if publisher.get_subscription_count():
                publisher.publish(Float64(data=latency_ms[stage]))

    def mesh_report(self) -> MeshReport:
        return self._mesh.report()

    def stop(self) -> None:
        """End what is still being built; ``publish`` may follow."""
        self._mesh.stop()

    def restart(self) -> None:
        """Forget what subscribers were shown: the next markers begin by deleting those of an earlier run."""
        self._shown_classes = None

    def close(self) -> None:
        for publisher in (*(output.publisher for output in self._outputs), *self._latency.values()):
            self._node.destroy_lifecycle_publisher(publisher)
        # They hold bound methods of this object; without them it is freed here and now.
        self._outputs, self._latency = [], {}
        self._depth.close()
        self._mesh.close()

    def _output(self, name: str, kind: type, qos: QoSProfile, build: Callable) -> _Output:
        return _Output(name, self._node.create_lifecycle_publisher(kind, f"~/{name}", qos), build, RateLimit())

    def _costmap(self, frame: OccupancyFrame) -> OccupancyGrid:
        settings = self.settings
        blocking = settings.costmap_blocking_classes or conversions.BLOCKING_CLASSES
        return conversions.costmap_message(
            frame, settings.costmap_min_height_m, settings.costmap_max_height_m, blocking
        )

    def _markers(self, frame: OccupancyFrame) -> bytes:
        cubes = conversions.class_cubes(frame, self.settings.voxel_alpha, self.settings.voxel_coloring)
        classes = frozenset(c.namespace for c in cubes)
        shrinks = self._shown_classes is None or not self._shown_classes <= classes
        self._shown_classes = classes
        return conversions.marker_bytes(frame, cubes, delete_all=shrinks)
