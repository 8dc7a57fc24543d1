# SPDX-License-Identifier: Apache-2.0
"""Depth images of voxels: cases worked out by hand, tiny steps, every voxel against every ray, and torch's traversal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from occflownet_core import poses
from occflownet_core.camera import Camera
from occflownet_core.depth_tables import DepthTable, cells_crossed, depth_camera
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE
from occflownet_core.motion import StaticWorld
from occflownet_core.renderer import Rays
from occflownet_core.renderer.traversal import traverse

GRID = VoxelGrid((0, 0, 0), (10, 5, 5), 1.0)
SMALL = VoxelGrid((-1.0, -1.5, 0.0), (1.5, 1.0, 2.0), 0.5)  # 5 x 5 x 4 cells
FORWARD = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # optical axis along x
INF = np.inf
CAR = 4


def camera(position_m=(0.5, 2.5, 2.5), quaternion_wxyz=(1, 0, 0, 0), size_px=(3, 3), focal_px=3.0) -> Camera:
    width_px, height_px = size_px
    intrinsic = np.array([[focal_px, 0, width_px / 2], [0, focal_px, height_px / 2], [0, 0, 1]])
    pose = poses.pose(np.array(position_m, dtype=float), np.array(quaternion_wxyz, dtype=float)) @ FORWARD
    return Camera("FRONT", width_px, height_px, intrinsic, pose)


def voxels(*cells, grid: VoxelGrid = GRID) -> np.ndarray:
    labels = np.full(grid.shape, FREE, dtype=np.uint8)
    for cell in cells:
        labels[cell] = CAR
    return labels


def depth_m(labels: np.ndarray, seen_by: Camera, grid: VoxelGrid = GRID) -> np.ndarray:
    return DepthTable.build(seen_by, grid).render(labels)


def test_one_voxel_ahead_is_as_far_as_its_front_face():
    """The camera stands at x = 0.5, the voxel begins at x = 6; rays beside the axis leave it by a third per metre."""
    seen = depth_m(voxels((6, 2, 2)), camera())
    assert seen.dtype == np.float32
    assert seen.tolist() == [[INF, INF, INF], [INF, 5.5, INF], [INF, INF, INF]]


def test_depth_is_along_the_optical_axis_and_the_nearest_voxel_hides_others():
    """The left pixel's ray goes left by a third of a metre per metre: it passes y = 3 at depth 1.5, in cell x = 1."""
    seen = depth_m(voxels((1, 3, 2), (2, 3, 2), (6, 2, 2)), camera((0.25, 2.5, 2.5)))
    assert seen.tolist() == [[INF, INF, INF], [1.5, 5.75, INF], [INF, INF, INF]]


def test_a_wall_ahead_is_equally_deep_everywhere():
    labels = voxels()
    labels[4] = CAR
    np.testing.assert_array_equal(depth_m(labels, camera(focal_px=30.0, size_px=(8, 6))), np.full((6, 8), 3.5))


def test_flat_ground_lies_where_the_pinhole_says():
    """Camera 1.5 m above the ground: row v below the horizon meets it at 1.5 * focal / (v + 0.5 - horizon)."""
    grid = VoxelGrid((0, -20, 0), (40, 20, 5), 1.0)
    labels = voxels(grid=grid)
    labels[:, :, 0] = CAR
    column = depth_m(labels, camera((0.5, 0.5, 2.5), size_px=(3, 8), focal_px=10.0), grid)[:, 1]
    assert column.tolist() == pytest.approx([INF] * 4 + [15 / 0.5, 15 / 1.5, 15 / 2.5, 15 / 3.5])


def test_inside_of_a_voxel_is_too_near_to_tell():
    assert (depth_m(voxels((0, 2, 2)), camera()) == -INF).all()


def test_cameras_outside_of_the_grid_look_in_or_see_nothing():
    labels = np.zeros(GRID.shape, dtype=np.uint8)
    assert depth_m(labels, camera((-2.0, 2.5, 2.5)))[1, 1] == 2.0
    turned = camera((-2.0, 2.5, 2.5), (0, 0, 0, 1))  # about z by half a turn
    assert (depth_m(labels, turned) == INF).all()


@pytest.mark.parametrize(
    ("size_px", "width_px", "expected"),
    [((1600, 900), 176, (176, 99)), ((3, 3), 176, (3, 3)), ((100, 2), 16, (16, 1))],
)
def test_size_follows_the_camera_s_aspect_and_never_exceeds_it(size_px, width_px, expected):
    small = depth_camera(camera(size_px=size_px, focal_px=100.0), width_px)
    assert (small.width_px, small.height_px) == expected
    assert DepthTable.build(small, GRID).render(voxels()).shape == expected[::-1]
    assert small.intrinsic[0, 0] == pytest.approx(100.0 * expected[0] / size_px[0])


def test_tiny_steps_agree():
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(GRID.shape) < 0.03, CAR, FREE).astype(np.uint8)
    seen_by, step_m = camera((1.3, 2.4, 2.2), (0.97, 0.05, -0.1, 0.2), (12, 9), 7.0), 1e-3
    seen = depth_m(labels, seen_by)
    pixels = np.stack(np.meshgrid(np.arange(12) + 0.5, np.arange(9) + 0.5), axis=-1)
    twin = np.full((9, 12), INF)
    for depth in np.arange(12.0, 0.0, -step_m):  # from far to near: what is met last is what is seen
        cell, inside = GRID.cells(seen_by.unproject(pixels, np.full((9, 12), depth)))
        twin[inside & (labels[tuple(np.moveaxis(cell, -1, 0))] != FREE)] = depth
    met = np.isfinite(seen)
    assert 0.3 < met.mean() < 1
    np.testing.assert_array_equal(met, np.isfinite(twin))
    np.testing.assert_allclose(seen[met], twin[met], atol=1.1 * step_m)


def entries_m(labels: np.ndarray, seen_by: Camera, grid: VoxelGrid, least_chord_m: float) -> np.ndarray:
    """The slow, obvious twin: every occupied voxel against every ray, and the nearest entry of those that it meets."""
    nearest = np.full((seen_by.height_px, seen_by.width_px), INF)
    for v, u in np.ndindex(nearest.shape):
        near_m, far_m = (seen_by.unproject(np.array([u + 0.5, v + 0.5]), np.array(d)) for d in (0.0, 1.0))
        for cell in np.argwhere(labels != FREE):
            low_m = np.array(grid.lower_m) + cell * grid.voxel_size_m
            enter, leave = 0.0, INF
            for axis in range(3):
                towards = far_m[axis] - near_m[axis]
                faces = [low_m[axis] - near_m[axis], low_m[axis] + grid.voxel_size_m - near_m[axis]]
                if towards == 0:
                    leave = leave if faces[0] <= 0 < faces[1] else -INF
                else:
                    a, b = sorted(face / towards for face in faces)
                    enter, leave = max(enter, a), min(leave, b)
            if leave - enter > least_chord_m:
                nearest[v, u] = min(nearest[v, u], enter)
    return nearest


unit = st.floats(-1, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.floats(-2, 2)] * 3), st.tuples(*[unit] * 4), st.floats(0.5, 20))
def test_every_voxel_against_every_ray_agrees(seed, position_m, quaternion_wxyz, focal_px):
    assume(np.linalg.norm(quaternion_wxyz) > 0.1)
    rotation = np.array(quaternion_wxyz) / np.linalg.norm(quaternion_wxyz)
    labels = np.where(np.random.default_rng(seed).random(SMALL.shape) < 0.15, CAR, FREE).astype(np.uint8)
    seen_by = camera(position_m, rotation, (4, 3), focal_px)
    seen = depth_m(labels, seen_by, SMALL)
    inside = seen == -INF
    seen = np.where(inside, 0.0, seen)
    # A voxel that is grazed over a nanometre may be met or not; one crossed over a micrometre is.
    nearest, nearest_solid = (entries_m(labels, seen_by, SMALL, least_m) for least_m in (-1e-9, 1e-6))
    assert (seen <= nearest_solid * (1 + 1e-6) + 1e-6).all() and (seen >= nearest * (1 - 1e-6) - 1e-6).all()


coordinate = st.one_of(st.floats(-3, 8), st.sampled_from([0.0, 1.0, 2.5, 5.0]))
slope = st.one_of(st.floats(-1, 1), st.sampled_from([0.0, 1.0, -1.0, 0.5])).map(lambda s: s if abs(s) > 1e-7 else 0.0)


@settings(max_examples=150, deadline=None)
@given(st.tuples(*[coordinate] * 3), st.lists(st.tuples(*[slope] * 3), min_size=1, max_size=6))
def test_cells_are_those_of_torch_s_traversal(origin, directions):
    lengths = np.linalg.norm(directions, axis=1)
    assume((lengths > 1e-3).all())
    directions = np.array(directions) / lengths[:, None]
    n = len(directions)
    rays = Rays.from_numpy([origin] * n, directions, [1.0] * n, [0] * n, dtype=torch.float64)
    theirs = traverse(StaticWorld().pieces(rays), rays.batch_index, GRID, torch.float64)
    x, y, _ = GRID.shape
    expected: list[list] = [[] for _ in directions]
    for ray, cell, length in zip(theirs.ray.tolist(), theirs.cell.tolist(), theirs.length_m.tolist(), strict=True):
        if length > 1e-9:
            expected[ray].append(np.ravel_multi_index((cell % x, cell // x % y, cell // (x * y)), GRID.shape))
    cell, count = cells_crossed(GRID.shape, np.array(origin, dtype=float), directions.T)
    found = np.split(cell, count.cumsum()[:-1])
    assert [f.tolist() for f in found] == expected
