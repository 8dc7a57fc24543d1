# SPDX-License-Identifier: Apache-2.0
"""~/depth/<camera>: what each camera would measure in the predicted voxels, as depth images (REP 118) with camera_info."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.depth_tables import DepthTable, depth_camera
from occflownet_core.grid import VoxelGrid
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_ros import conversions

_QUEUE = QoSProfile(depth=2)


class DepthImages:
    """Publishers of all cameras' depth images; each image is rendered only while someone subscribes to it.

    A camera that a set lacked gets its image like the others: it shows what the voxels, known from the other cameras
    and from memory, look like from there.

    Args:
        node: whose lifecycle publishers they are.
        cameras: names of the bundle's cameras.
    """

    def __init__(self, node: LifecycleNode, cameras: Sequence[str]) -> None:
        self._node = node
        self._images = [node.create_lifecycle_publisher(Image, f"{topic(c)}/image", _QUEUE) for c in cameras]
        self._infos = [node.create_lifecycle_publisher(CameraInfo, f"{topic(c)}/camera_info", _QUEUE) for c in cameras]
        self._calibrated: tuple[tuple[Camera, str], ...] = ()
        self._tables = BackgroundTables()

    def set_cameras(self, rig: CameraRig | None, frame_ids: Sequence[str]) -> None:
        """Where the cameras stand from now on, and their optical frames; without a rig nothing is published."""
        self._calibrated = () if rig is None else tuple(zip(rig, frame_ids, strict=True))

    def has_subscribers(self) -> bool:
        return any(publisher.get_subscription_count() for publisher in (*self._images, *self._infos))

    def publish(self, frame: OccupancyFrame, width_px: int) -> None:
        """Publish a frame's images and camera_infos for those who listen; images begin once their table is made."""
        for k, (calibrated, frame_id) in enumerate(self._calibrated):
            camera = depth_camera(calibrated, width_px)
            if self._infos[k].get_subscription_count():
                self._infos[k].publish(conversions.info_message(frame, frame_id, camera))
            if self._images[k].get_subscription_count():
                table = self._tables.get(k, camera, frame.grid)
                if table is not None:
                    image = conversions.depth_message(frame, frame_id, table.render(frame.labels))
                    self._images[k].publish(image)

    def close(self) -> None:
        self._tables.close()
        for publisher in (*self._images, *self._infos):
            self._node.destroy_lifecycle_publisher(publisher)
        self._images, self._infos = [], []


@dataclass(eq=False)
class _Kept:
    wanted: tuple[Camera, VoxelGrid]
    table: DepthTable | None = None


class BackgroundTables:
    """The depth table of each camera, kept until its calibration or size changes.

    A table takes a tenth of a second and more to make, so it is made in a thread of its own and no set waits for it.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._one_at_a_time = threading.Lock()  # other cores belong to the engine

    def get(self, index: int, camera: Camera, grid: VoxelGrid) -> DepthTable | None:
        """The table of the camera at an index, None while it is being made."""
        kept, wanted = self._kept.get(index), (camera, grid)
        if kept is None or kept.wanted != wanted:
            kept = self._kept[index] = _Kept(wanted)
            # A daemon, so that a node told to end does not wait for it.
            threading.Thread(target=self._make, args=(index, kept), name="depth table", daemon=True).start()
        return kept.table

    def close(self) -> None:
        """Give up what is kept; tables that were not begun are not made any more."""
        self._kept.clear()

    def _make(self, index: int, kept: _Kept) -> None:
        with self._one_at_a_time:
            if self._kept.get(index) is kept:  # else calibration has changed again
                kept.table = DepthTable.build(*kept.wanted)


def topic(camera: str) -> str:
    """Where a camera's depth is published; what a topic's name may not hold becomes an underscore."""
    token = re.sub(r"\W", "_", camera, flags=re.ASCII)
    return f"~/depth/{'_' if token[:1].isdigit() else ''}{token}"
