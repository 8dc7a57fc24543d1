# SPDX-License-Identifier: Apache-2.0
"""Outputs of the node as a real process: depth images that agree with its voxels, and what changes while it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from ros_processes import CAMERAS, NodeProcess, Vehicle, jpeg, ring_rig
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import UInt8MultiArray
from visualization_msgs.msg import Marker, MarkerArray

from occflownet_core.depth_tables import DepthTable, depth_camera
from occflownet_core.labels import COLORS_RGB
from occflownet_core.rig_file import save_rig
from occflownet_ros import conversions
from occflownet_ros.lifecycle_client import ACTIVATE, CONFIGURE, change_state
from occflownet_ros.share import share_path

pytestmark = pytest.mark.integration

START_NS = 1_532_402_927_612_460_000
SWEEP_NS = 500_000_000
JPEG = jpeg()
PATIENT_MS, PATIENT_S = 5000.0, 60.0
CAMERA = 2


@pytest.fixture(scope="module")
def running(vehicle, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("node")
    save_rig(ring_rig(), folder / "rig.yaml")
    node = NodeProcess(
        folder / "log.txt",
        bundle=share_path("demo", "bundle"),
        calibration_file=folder / "rig.yaml",
        anchor_camera="CAM_FRONT",
        deadline_ms=PATIENT_MS,
        image_reliability="reliable",
        depth_max_rate_hz=0.0,
        voxels_max_rate_hz=0.0,
        depth_width_px=80,
        mesh_max_rate_hz=0.0,
        mesh_cell_m=0.4,
        mesh_budget_ms=20_000.0,
    )
    try:
        change_state(vehicle.node, "occflownet", CONFIGURE, 2 * PATIENT_S)
        change_state(vehicle.node, "occflownet", ACTIVATE, PATIENT_S)
        assert vehicle.wait(vehicle.is_heard, PATIENT_S)
        yield node
    finally:
        node.close()


class Drive:
    """Sweeps with increasing stamps until something is seen."""

    def __init__(self, vehicle: Vehicle) -> None:
        self._vehicle = vehicle
        self._sweep = 0

    def until(self, condition, fx_px: float = 1260.0) -> None:
        for _ in range(20):
            stamp_ns = START_NS + self._sweep * SWEEP_NS
            self._sweep += 1
            self._vehicle.send_calibration(stamp_ns, fx_px=fx_px)
            self._vehicle.send_odometry(stamp_ns + 8_000_000, 0.0)
            self._vehicle.send_images(stamp_ns, JPEG)
            if self._vehicle.wait(condition, 2.0):
                return
        raise AssertionError("it was not seen in 20 sweeps")


def test_depth_images_agree_with_labels_and_follow_parameters_and_calibration(running, vehicle):
    drive, name = Drive(vehicle), CAMERAS[CAMERA]
    labels = vehicle.hear(UInt8MultiArray, "/occflownet/labels")
    markers = vehicle.hear(MarkerArray, "/occflownet/voxels")
    images = vehicle.hear(Image, f"/occflownet/depth/{name}/image")
    infos = vehicle.hear(CameraInfo, f"/occflownet/depth/{name}/camera_info")
    parameters = vehicle.node.create_client(SetParameters, "/occflownet/set_parameters")

    def pair() -> tuple[Image, UInt8MultiArray] | None:
        """The newest depth image, and the labels of its stamp."""
        stamps = {conversions.labels_from_message(message).stamp_ns: message for message in labels}
        found = [m for m in images if conversions.nanoseconds(m.header.stamp) in stamps]
        return (found[-1], stamps[conversions.nanoseconds(found[-1].header.stamp)]) if found else None

    def check(width_px: int, fx_px: float) -> None:
        image, frame = pair()[0], conversions.labels_from_message(pair()[1])
        camera = ring_rig()[CAMERA]
        intrinsic = camera.intrinsic.copy()
        intrinsic[[0, 1], [0, 1]] = fx_px
        camera = type(camera)(name, camera.width_px, camera.height_px, intrinsic, camera.ego_from_camera)
        expected = DepthTable.build(depth_camera(camera, width_px), frame.grid).render(frame.labels)
        seen = np.frombuffer(image.data, "<f4").reshape(image.height, image.width)
        assert image.header.frame_id == name and np.array_equal(seen, expected)
        assert len(np.unique(seen)) > 2
        assert (infos[-1].width, infos[-1].height) == (image.width, image.height)
        assert infos[-1].k[0] == pytest.approx(fx_px * width_px / 1600)

    drive.until(pair)
    check(80, 1260.0)
    assert not any(marker.colors for marker in markers[-1].markers)

    changes = {"depth_width_px": 48, "voxel_coloring": "height"}
    request = [Parameter(name, value=value).to_parameter_msg() for name, value in changes.items()]
    future = parameters.call_async(SetParameters.Request(parameters=request))
    assert vehicle.wait(future.done, PATIENT_S) and all(result.successful for result in future.result().results)
    drive.until(lambda: images[-1].width == infos[-1].width == 48 and pair()[0].width == 48)
    check(48, 1260.0)
    assert all(len(m.colors) == len(m.points) > 0 for m in markers[-1].markers if m.action == m.ADD)

    # Another focal length: tables are made anew, in the background, so that the first sets may pass without an image.
    images.clear()
    drive.until(lambda: images and pair() and infos[-1].k[0] == pytest.approx(900 * 48 / 1600), fx_px=900.0)
    images.clear()
    drive.until(lambda: images and pair() and pair()[0] is images[-1], fx_px=900.0)
    check(48, 900.0)


def test_a_mesh_of_a_set_comes_beside_its_labels(running, vehicle):
    pytest.importorskip("skimage", reason="meshes need the mesh extra")
    drive = Drive(vehicle)
    labels = vehicle.hear(UInt8MultiArray, "/occflownet/labels")
    meshes = vehicle.hear(Marker, "/occflownet/mesh")

    def frame():
        """The labels of the newest mesh's stamp."""
        frames = {frame.stamp_ns: frame for frame in map(conversions.labels_from_message, labels)}
        return frames.get(conversions.nanoseconds(meshes[-1].header.stamp)) if meshes else None

    drive.until(frame)
    mesh, frame = meshes[-1], frame()
    assert (mesh.type, mesh.action, mesh.header.frame_id) == (Marker.TRIANGLE_LIST, Marker.ADD, "base_link")
    assert len(mesh.points) == len(mesh.colors) > 0 and len(mesh.points) % 3 == 0
    assert vehicle.wait(lambda: "cells of 0.4 m" in vehicle.status("mesh").get("message", ""), PATIENT_S)
    assert {(c.r, c.g, c.b) for c in mesh.colors} <= {tuple(c) for c in (COLORS_RGB / 255).astype(np.float32).tolist()}
    # That they lie on the field's surface is tests/ros/test_mesh_output.py's matter, which knows the field.
    points_m = np.array([(p.x, p.y, p.z) for p in mesh.points])
    lower_m, upper_m = (np.array(corner) for corner in (frame.grid.lower_m, frame.grid.upper_m))
    assert ((points_m >= lower_m - 1e-3) & (points_m <= upper_m + 1e-3)).all() and np.ptp(points_m, axis=0).min() > 1
