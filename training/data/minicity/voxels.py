# SPDX-License-Identifier: Apache-2.0
"""Occ3D ground truth: the true occupancy around the vehicle at a moment, and what LiDAR and cameras could see of it.

Definition, after Occ3D-nuScenes (Tian et al., NeurIPS 2023): a voxel is occupied when it holds a surface - the ground, the
hull of a static structure or of a moving object at that moment - and takes the class with the most surface in it,
upright things counting more than the ground they stand on. ``mask_lidar``: voxels that a returned pulse of this sweep
passed or ended in. ``mask_camera``: voxels that a ray from a camera, at its own moment, reaches before or at the first
occupied voxel. Interiors of closed solids stay free in ``semantics`` and unobserved in both masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occflownet_core import poses
from occflownet_core.camera import Camera
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.labels import FREE, LABEL_FROM_LIDARSEG, OCCUPIED_CLASSES
from occflownet_core.occupancy_frame import surface_voxels
from training.data.minicity.lidar import Sweep
from training.data.minicity.raycast import FAR_M
from training.data.minicity.world import World

_GROUND_PER_EDGE = 3  # ground samples per voxel edge, 56 per square metre
# Upright things count twice and three times their area against the ground.
_STATIC_WEIGHT, _ACTOR_WEIGHT = 2.0, 3.0
_ABOVE_GROUND_M = 0.6
_COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class Occupancy:
    """Occ3D's three arrays, uint8 [200, 200, 16] indexed [x, y, z] in the ego frame of LIDAR_TOP's timestamp."""

    semantics: np.ndarray
    mask_lidar: np.ndarray
    mask_camera: np.ndarray


def occupancy(world: World, timestamp_s: float, scan: Sweep, cameras: list[tuple[Camera, np.ndarray]]) -> Occupancy:
    """Ground truth of one keyframe.

    Args:
        scan: the keyframe's sweep.
        cameras: (camera, global_from_camera [4, 4] at its own moment) of each camera.
    """
    grid = OCC3D_GRID
    ego_from_global = poses.inverse(world.global_from_ego(timestamp_s))
    semantics = semantic_voxels(world, timestamp_s, grid)
    seen_by_lidar = traverse(grid, scan.origin_ego_m, scan.point_ego_m)
    occupied = semantics != FREE
    targets = _targets(grid, occupied)
    seen_by_camera = np.zeros(grid.shape, dtype=bool)
    for camera, global_from_camera in cameras:
        placed = Camera(
            camera.name, camera.width_px, camera.height_px, camera.intrinsic, ego_from_global @ global_from_camera
        )
        aimed = targets[placed.sees(*placed.project(targets))]
        origin = np.broadcast_to(placed.ego_from_camera[:3, 3], aimed.shape)
        seen_by_camera |= traverse(grid, origin, aimed, occupied)
    return Occupancy(semantics, seen_by_lidar.astype(np.uint8), seen_by_camera.astype(np.uint8))


def semantic_voxels(world: World, timestamp_s: float, grid: VoxelGrid = OCC3D_GRID) -> np.ndarray:
    """uint8 [X, Y, Z]: the class with the most surface in each voxel, ``FREE`` where there is none."""
    global_from_ego = world.global_from_ego(timestamp_s)
    ego_from_global = poses.inverse(global_from_ego)
    ballots = [_ballots(grid, *_ground_samples(world, global_from_ego, grid), 1.0)]
    points, category = world.static_samples
    reach = np.linalg.norm([grid.upper_m[0], grid.upper_m[1]]) + 1
    near = ((points[:, :2] - global_from_ego[:2, 3]) ** 2).sum(axis=1) < reach**2
    ballots.append(_ballots(grid, _moved(ego_from_global, points[near]), category[near], _STATIC_WEIGHT))
    for index in world.nearby(timestamp_s, reach + 10):
        points, category = world.actor_samples(index)
        ego_from_box = ego_from_global @ world.actors[index].global_from_box(timestamp_s)
        ballots.append(_ballots(grid, _moved(ego_from_box, points), category, _ACTOR_WEIGHT))
    choice, weight = (np.concatenate(columns) for columns in zip(*ballots, strict=True))
    votes = np.bincount(choice, weight, minlength=grid.size * OCCUPIED_CLASSES)
    votes = votes.reshape(*grid.shape, OCCUPIED_CLASSES)
    return np.where(votes.max(axis=-1) > 0, votes.argmax(axis=-1), FREE).astype(np.uint8)


def _moved(target_from_source: np.ndarray, points_m: np.ndarray) -> np.ndarray:
    return poses.transform_points(target_from_source, points_m)


def _ballots(
    grid: VoxelGrid, points_ego_m: np.ndarray, category: np.ndarray, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """What samples [N, 3] of raw categories [N] vote for (cell * classes + class), and with which weight."""
    cell, inside = grid.cells(points_ego_m)
    choice = np.ravel_multi_index(cell[inside].T, grid.shape) * OCCUPIED_CLASSES + LABEL_FROM_LIDARSEG[category[inside]]
    return choice, np.full(len(choice), weight)


def _ground_samples(world: World, global_from_ego: np.ndarray, grid: VoxelGrid) -> tuple[np.ndarray, np.ndarray]:
    """The topmost ground under a fine lattice of the grid's footprint: points [N, 3] in the ego frame and categories."""
    nx, ny = (n * _GROUND_PER_EDGE for n in grid.shape[:2])
    step = grid.voxel_size_m / _GROUND_PER_EDGE
    x = grid.lower_m[0] + (np.arange(nx) + 0.5) * step
    y = grid.lower_m[1] + (np.arange(ny) + 0.5) * step
    lattice = np.stack([*np.meshgrid(x, y, indexing="ij"), np.full((nx, ny), _ABOVE_GROUND_M)], axis=-1).reshape(-1, 3)
    origins = poses.transform_points(global_from_ego, lattice)
    hits = world.ground_tracer.first_hits(origins, np.broadcast_to(np.float32([0, 0, -1]), origins.shape))
    found = hits.hit & (hits.range_m < FAR_M)
    lattice[found, 2] -= hits.range_m[found]
    return lattice[found], world.ground.category[hits.face[found]]


def _targets(grid: VoxelGrid, occupied: np.ndarray) -> np.ndarray:
    """Points [N, 3] to aim camera rays at: occupied voxels (centre and top) and the cells of the grid's own hull.

    Every voxel in view is nearer than a hull cell and so subtends at least its angle; occupied ones get rays of their
    own because the flat ones are seen at grazing angles.
    """
    cells = np.argwhere(surface_voxels(np.where(occupied, 0, FREE))) + 0.5
    hull = np.ones(grid.shape, dtype=bool)
    hull[1:-1, 1:-1, 1:-1] = False
    return grid.metric_from_index(np.concatenate([cells, cells + np.array([0, 0, 0.49]), np.argwhere(hull) + 0.5]))


def traverse(
    grid: VoxelGrid, origins_m: np.ndarray, ends_m: np.ndarray, stop_at: np.ndarray | None = None
) -> np.ndarray:
    """Voxels that segments pass, ends included (Amanatides and Woo, 1987).

    Args:
        origins_m, ends_m: [N, 3] in the grid's frame; origins lie in the grid, ends need not.
        stop_at: [X, Y, Z] bool; a segment ends in the first such voxel.

    Returns:
        [X, Y, Z] bool.
    """
    shape = np.array(grid.shape)
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    seen = np.zeros(grid.size, dtype=bool)
    stop = np.zeros(grid.size, dtype=bool) if stop_at is None else stop_at.ravel()
    start = grid.index_from_metric(origins_m)
    delta = grid.index_from_metric(ends_m) - start
    cell = np.floor(start).astype(np.int64)
    inside = ((cell >= 0) & (cell < shape)).all(axis=1)
    start, delta, cell = start[inside], delta[inside], cell[inside]
    sign = np.where(delta > 0, 1, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = np.where(delta != 0, (cell + (delta > 0) - start) / delta, np.inf)
        every = np.where(delta != 0, 1 / np.abs(delta), np.inf)
    # Steps left along each axis before the ray leaves the grid.
    room = np.where(sign > 0, shape - 1 - cell, cell)
    next_at, every = list(crossing.T.copy()), list(every.T.copy())
    room, jump = list(room.T.astype(np.int32)), list((sign * strides).T.astype(np.int32))
    flat, going = (cell @ strides).astype(np.int32), np.ones(len(cell), dtype=bool)
    while len(flat):
        seen[flat] = True
        x, y, z = next_at
        x_first, y_first = (x < y) & (x < z), (y <= x) & (y < z)
        going &= ~stop[flat] & (np.minimum(np.minimum(x, y), z) <= 1)
        for axis, turn in enumerate((x_first, y_first, ~(x_first | y_first))):
            turn = turn & going
            np.add(next_at[axis], every[axis], out=next_at[axis], where=turn)
            room[axis] -= turn
            going &= room[axis] >= 0
            np.add(flat, jump[axis], out=flat, where=turn & going)
        # Rays that have ended wait where they are until enough of them are worth taking out.
        if np.count_nonzero(going) < _COMPACT_BELOW * len(flat):
            flat = flat[going]
            next_at, every, room, jump = ([c[going] for c in columns] for columns in (next_at, every, room, jump))
            going = np.ones(len(flat), dtype=bool)
    return seen.reshape(grid.shape)
