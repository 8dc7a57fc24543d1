# SPDX-License-Identifier: Apache-2.0
"""Make outputs.jpg: what the node published for the demo drive, as its messages say, drawn by PyVista (pip install pyvista).

It plays the bag through the real node twice, markers by class and by height, reads all outputs as any subscriber would,
and draws those of one set.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pyvista
import rclpy
from nav_msgs.msg import OccupancyGrid
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image
from visualization_msgs.msg import Marker, MarkerArray

from occflownet_core import picture
from occflownet_ros.conversions import nanoseconds
from occflownet_ros.parameters import EVERY_SET
from occflownet_ros.replay import NodeProcess, activate, process_environment
from occflownet_ros.share import share_path

CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
WIDTH_PX, FAR_M = 1614, 40.0
SET = 8  # of the drive: a street with vehicles


def topics() -> dict[str, type]:
    depth = {f"/occflownet/depth/{camera}/image": Image for camera in CAMERAS}
    images = {f"/{camera}/image_rect_compressed": CompressedImage for camera in CAMERAS}
    return {"/occflownet/voxels": MarkerArray, "/occflownet/costmap": OccupancyGrid, **depth, **images}


def heard(coloring: str, folder: Path) -> dict[str, list]:
    """Every message of the topics while the demo bag plays through the node."""
    parameters = {
        **EVERY_SET,
        "bundle": str(share_path("demo", "bundle")),
        "calibration_file": str(share_path("demo", "bag", "calibration.yaml")),
        "anchor_camera": "CAM_FRONT",
        "voxel_coloring": coloring,
        "voxels_max_rate_hz": 0.0,
        "depth_max_rate_hz": 0.0,
        "depth_width_px": 528,
    }
    node = NodeProcess(parameters, folder / f"node_{coloring}.log")
    messages: dict[str, list] = {topic: [] for topic in topics()}
    rclpy.init()
    listener, executor = Node("picture"), SingleThreadedExecutor()
    for topic, kind in topics().items():
        listener.create_subscription(kind, topic, messages[topic].append, 50)
    executor.add_node(listener)

    def spin() -> None:
        with contextlib.suppress(ExternalShutdownException):
            executor.spin()

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        activate(node)
        player = [sys.executable, "-m", "occflownet_ros.bag_player", str(share_path("demo", "bag")), "--no-progress"]
        for _ in range(2):  # depth images begin once their tables are made
            subprocess.run([*player, "--rate", "0.5"], check=False)
            time.sleep(2)
    finally:
        node.stop()
        executor.shutdown()
        thread.join()
        listener.destroy_node()
        rclpy.shutdown()
    return messages


def stamp_of(message) -> int:
    header = message.markers[-1].header if isinstance(message, MarkerArray) else message.header
    return nanoseconds(header.stamp)


def nearest(messages: list, stamp_ns: int):
    return min(reversed(messages), key=lambda message: abs(stamp_of(message) - stamp_ns))


def scene(markers: MarkerArray, size_px: tuple[int, int]) -> np.ndarray:
    """The cube lists as they stand in the message, seen from behind; uint8 RGB."""
    plotter = pyvista.Plotter(off_screen=True, window_size=size_px, lighting="light kit")
    plotter.set_background((0.98, 0.98, 0.97))
    for marker in markers.markers:
        if marker.action != Marker.ADD:
            continue
        points = pyvista.PolyData(np.array([(p.x, p.y, p.z) for p in marker.points]))
        colors = marker.colors or [marker.color] * len(marker.points)
        points["rgb"] = (255 * np.array([(c.r, c.g, c.b) for c in colors])).round().astype(np.uint8)
        edge_m = marker.scale.x
        cubes = points.glyph(
            geom=pyvista.Cube(x_length=edge_m, y_length=edge_m, z_length=edge_m), scale=False, orient=False
        )
        plotter.add_mesh(cubes, scalars="rgb", rgb=True, ambient=0.25)
    plotter.camera_position = [(-25, 0, 17), (5, 0, 0), (0, 0, 1)]
    plotter.camera.view_angle = 50
    plotter.enable_anti_aliasing("ssaa")
    drawn = plotter.screenshot(return_img=True)
    plotter.close()
    return np.ascontiguousarray(drawn[..., :3])


def depth_rgb(message: Image) -> np.ndarray:
    """Near red, far blue, grey where no voxel stops the ray."""
    depth_m = np.frombuffer(message.data, "<f4").reshape(message.height, message.width)
    near = 1 - np.clip(depth_m / FAR_M, 0, 1)
    rgb = (255 * matplotlib.colormaps["turbo"](near)[..., :3]).astype(np.uint8)
    rgb[np.isposinf(depth_m)] = (205, 205, 203)
    return rgb


def costmap_rgb(message: OccupancyGrid, size_px: int) -> np.ndarray:
    """Blocked black, passable white, unknown grey; ahead is up."""
    cells = np.array(message.data, dtype=np.int8).reshape(message.info.height, message.info.width)  # [Y, X]
    grey = np.select([cells == 100, cells == 0], [30, 245], 175).astype(np.uint8)
    ahead_up = grey.T[::-1, ::-1]
    return cv2.resize(ahead_up, (size_px, size_px), interpolation=cv2.INTER_NEAREST)[..., None].repeat(3, axis=2)


def main(out: Path) -> None:
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("ROS_DOMAIN_ID", str(random.randrange(120, 200)))
    os.environ.update(process_environment())
    by_class, by_height = heard("class", out.parent), heard("height", out.parent)
    stamps = sorted({stamp_of(message) for message in by_class["/occflownet/voxels"]})
    stamp_ns = stamps[min(SET, len(stamps) - 1)]

    def at(topic: str, messages: dict = by_class):
        return nearest(messages[topic], stamp_ns)

    images = {}
    for camera in CAMERAS:
        data = np.frombuffer(at(f"/{camera}/image_rect_compressed").data, np.uint8)
        images[camera] = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    depths = {camera: depth_rgb(at(f"/occflownet/depth/{camera}/image")) for camera in CAMERAS}
    side_px = 416
    wide_px = (WIDTH_PX - side_px - 28) // 2
    row = picture.side_by_side(
        [
            picture.titled(scene(at("/occflownet/voxels"), (wide_px, side_px)), "~/voxels, by class"),
            picture.titled(scene(at("/occflownet/voxels", by_height), (wide_px, side_px)), "~/voxels, by height"),
            picture.titled(costmap_rgb(at("/occflownet/costmap"), side_px), "~/costmap", "ahead is up"),
        ]
    )
    note = "messages of the node, drawn by PyVista: neither RViz nor Foxglove"
    drawn = picture.stacked(
        [
            picture.titled(picture.mosaic(images, WIDTH_PX), "Camera images of one set of the demo drive", note),
            row,
            picture.titled(
                picture.mosaic(depths, WIDTH_PX), "~/depth/<camera>/image", f"red 0 m, blue {FAR_M:g} m, grey: no voxel"
            ),
        ]
    )
    cv2.imwrite(str(out), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs.jpg"))
