# SPDX-License-Identifier: Apache-2.0
"""Lift tables against an obvious loop over voxels and cameras."""

import numpy as np
import pytest

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec, build_lift_tables

GRID = VoxelGrid((-8, -8, -1), (8, 8, 3), 2.0)
SPEC = LiftSpec(GRID, DepthBins(1, 9, 0.5), feature_height=8, feature_width=12, slots=2)


def looking(name, yaw_rad):
    """A wide camera 1.5 m above the ego origin, turned by yaw from straight ahead."""
    optical = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]], dtype=float)
    turned = poses.pose(np.zeros(3), np.array([np.cos(yaw_rad / 2), 0, 0, np.sin(yaw_rad / 2)]))
    return Camera(name, 48, 32, np.array([[20.0, 0, 24], [0, 20.0, 16], [0, 0, 1]]), turned @ optical)


RIG = CameraRig((looking("FRONT", 0.0), looking("LEFT", 1.0), looking("BACK", np.pi)))


def slow_reads(rig, spec, voxel_m):
    """What one voxel should read: {camera: (feature pixel, {bin: weight})}, from the definition."""
    seen = {}
    for c, camera in enumerate(rig):
        in_camera = np.linalg.inv(camera.ego_from_camera) @ [*voxel_m, 1]
        depth = in_camera[2]
        if not spec.depth_bins.min_m <= depth < spec.depth_bins.max_m:
            continue
        u, v = (camera.intrinsic @ in_camera[:3])[:2] / depth
        if not (0 <= u < camera.width_px and 0 <= v < camera.height_px):
            continue
        position = (depth - spec.depth_bins.min_m) / spec.depth_bins.step_m - 0.5
        lower = int(np.floor(position))
        bins = {}
        for index, weight in ((lower, lower + 1 - position), (lower + 1, position - lower)):
            index = min(max(index, 0), spec.depth_bins.count - 1)
            bins[index] = bins.get(index, 0) + weight
        seen[c] = (abs(u - camera.width_px / 2), int(v // 4) * spec.feature_width + int(u // 4), bins)
    best = sorted(seen, key=lambda c: seen[c][0])[: spec.slots]
    return {c: (seen[c][1], {b: w / len(best) for b, w in seen[c][2].items()}) for c in best}


def test_every_voxel_reads_what_the_definition_says():
    tables = build_lift_tables(RIG, SPEC)
    plane = SPEC.feature_height * SPEC.feature_width
    used = 0
    for v, (z, y, x) in enumerate(np.ndindex(*GRID.shape[::-1])):
        expected = slow_reads(RIG, SPEC, GRID.centres()[x, y, z])
        actual = {}
        for slot in np.flatnonzero(tables.camera_index[v] >= 0):
            camera, pixel = divmod(int(tables.pixel_index[v, slot]), plane)
            bins = {}
            for index, weight in zip(tables.depth_index[v, slot], tables.depth_weight[v, slot], strict=True):
                (depth_camera, depth_bin), depth_pixel = (
                    divmod(int(index) // plane, SPEC.depth_bins.count),
                    int(index) % plane,
                )
                assert (depth_camera, depth_pixel) == (camera, pixel)
                bins[depth_bin] = bins.get(depth_bin, 0) + float(weight)
            assert camera == tables.camera_index[v, slot]
            actual[camera] = (pixel, bins)
        assert actual.keys() == expected.keys()
        for camera, (pixel, bins) in expected.items():
            assert actual[camera][0] == pixel
            assert actual[camera][1] == pytest.approx(bins, abs=1e-6)
            used += 1
    assert used > 50


def test_a_missing_camera_leaves_its_voxels_to_the_others():
    whole = build_lift_tables(RIG, SPEC)
    without_left = whole.without([1])
    np.testing.assert_array_equal(
        without_left.depth_weight.sum(axis=(1, 2)),
        build_lift_tables(CameraRig((RIG[0], RIG[2])), SPEC).depth_weight.sum(axis=(1, 2)),
    )
    assert (whole.camera_index == 1).any()
    assert not (without_left.camera_index == 1).any()


def test_fewer_cameras_than_slots_leave_slots_empty():
    tables = build_lift_tables(CameraRig((RIG[0],)), SPEC)
    assert tables.depth_weight.shape == (GRID.size, 2, 2)
    assert not tables.depth_weight[:, 1].any()


def test_an_image_that_does_not_fit_the_feature_map_is_refused():
    with pytest.raises(CalibrationError, match="FRONT: 48 x 32 px do not fit a feature map of 10 x 8"):
        build_lift_tables(RIG, LiftSpec(GRID, DepthBins(1, 9, 0.5), feature_height=8, feature_width=10))
