# SPDX-License-Identifier: Apache-2.0
"""Depth images of labelled voxels: per camera a table of the cells that each pixel's ray crosses. NumPy only; rebuilt
when the calibration or the image's size changes.

With the table at hand an image costs one read per crossing: which of them is occupied, and the first of those per ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occflownet_core.camera import Camera
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE

_LEAST_LENGTH_M = 1e-9
_TURNS_BETWEEN_CHECKS = 4
# What is read and written at a time then stays in the second-level cache.
_RAYS_AT_A_TIME = 1 << 12
_CELLS_AT_A_TIME = 1 << 16


@dataclass(frozen=True, eq=False)
class DepthTable:
    """What every pixel of one camera looks through.

    Attributes:
        camera: whose pixels they are.
        grid: the voxels.
        cell: [M] int32, C-order index into [X, Y, Z] of the cells crossed, ray after ray (row by row) and in order
            along each.
        first: [R + 1] int64, where each ray's cells begin in ``cell``.
        origin: [3], the camera's centre, in cells from the grid's lower corner.
        direction: [3, R], cells that each ray passes per metre of depth.
    """

    camera: Camera
    grid: VoxelGrid
    cell: np.ndarray
    first: np.ndarray
    origin: np.ndarray
    direction: np.ndarray

    @classmethod
    def build(cls, camera: Camera, grid: VoxelGrid) -> DepthTable:
        """The table for a depth image of the camera's size; its rays run through the pixels' centres."""
        u, v = np.meshgrid(np.arange(camera.width_px) + 0.5, np.arange(camera.height_px) + 0.5)
        # With z = 1 in the camera's frame, distance along the ray is depth along the optical axis.
        ray = np.linalg.inv(camera.intrinsic) @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])  # [3, R]
        direction = camera.ego_from_camera[:3, :3] @ ray / grid.voxel_size_m  # [3, R]
        origin = grid.index_from_metric(camera.ego_from_camera[:3, 3])
        bands = [
            cells_crossed(grid.shape, origin, direction[:, start : start + _RAYS_AT_A_TIME])
            for start in range(0, direction.shape[1], _RAYS_AT_A_TIME)
        ]
        cell = np.concatenate([cell for cell, _ in bands])
        first = np.concatenate([[0], *(count for _, count in bands)]).cumsum()
        return cls(camera, grid, cell, first, origin, direction)

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in (self.cell, self.first, self.direction))

    def render(self, labels: np.ndarray) -> np.ndarray:
        """Depth of what every pixel shows.

        Args:
            labels: uint8 [X, Y, Z].

        Returns:
            float32 [height, width]: metres along the camera's optical axis to the face through which the ray enters the
            first occupied voxel; as REP 117 has it, +inf where it meets none, and -inf where the camera is inside of
            one.
        """
        crossing = self._first_occupied(labels != FREE)  # [R], M where there is none
        met = np.flatnonzero(crossing < self.first[1:])
        depth_m = np.full(len(crossing), np.inf)
        depth_m[met] = self._entry_m(met, self.cell[crossing[met]])
        return depth_m.astype(np.float32).reshape(self.camera.height_px, self.camera.width_px)

    def _first_occupied(self, occupied: np.ndarray) -> np.ndarray:
        """Per ray [R] the place in ``cell`` of the first occupied cell from its first one on, perhaps a later ray's."""
        flat, found = occupied.ravel(), []
        index, hit = np.empty(_CELLS_AT_A_TIME, dtype=np.intp), np.empty(_CELLS_AT_A_TIME, dtype=bool)
        for start in range(0, len(self.cell), _CELLS_AT_A_TIME):
            cells = self.cell[start : start + _CELLS_AT_A_TIME]
            n = len(cells)
            index[:n] = cells
            np.take(flat, index[:n], out=hit[:n], mode="clip")  # clip: the mode that neither checks nor copies
            found.append(np.flatnonzero(hit[:n]) + start)
        hits = np.concatenate([*found, [len(self.cell)]])
        return hits[np.searchsorted(hits, self.first[:-1])]

    def _entry_m(self, ray: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Depth [n] at which rays [n] enter cells [n]: the last of the three faces they pass (Kay and Kajiya 1986)."""
        direction = self.direction[:, ray]  # [3, n]
        corner = np.stack(np.unravel_index(cell, self.grid.shape)) + (direction < 0)  # [3, n]
        with np.errstate(all="ignore"):
            face_m = np.where(direction == 0, -np.inf, (corner - self.origin[:, None]) / direction)
        entry_m = face_m.max(axis=0)
        return np.where(entry_m > 0, entry_m, -np.inf)


def depth_camera(camera: Camera, width_px: int) -> Camera:
    """The camera of a depth image of the given width (at most the camera's own); its aspect ratio is kept."""
    width_px = min(width_px, camera.width_px)
    return camera.resized(width_px, max(1, round(camera.height_px * width_px / camera.width_px)))


def cells_crossed(
    shape: tuple[int, int, int], origin: np.ndarray, direction: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All cells that rays from one origin cross, in order (Amanatides and Woo 1987), every ray one step per turn.

    Args:
        shape: cells of the grid along x, y, z.
        origin: [3], in cells from the grid's lower corner.
        direction: [3, R], cells per unit of length.

    Returns:
        cell [M] int32, C-order indices, ray after ray and in order along each; count [R] int64, how many each ray
        crosses. Cells that are touched at an edge or corner only are left out.
    """
    count, turns = np.zeros(direction.shape[1], dtype=np.int64), []
    ray, cell, t, t_exit, next_face, per_cell, stride = _enter(shape, origin, direction)
    while len(ray):
        out = np.minimum(next_face.min(axis=0), t_exit)
        alive, crossed = t_exit - out > _LEAST_LENGTH_M, out - t > _LEAST_LENGTH_M
        turns.append((ray[crossed], count[ray[crossed]], cell[crossed]))
        count[ray[crossed]] += 1
        step = (next_face <= out) & alive  # [3, n]; a corner is passed in one turn
        cell += (step * stride).sum(axis=0, dtype=np.int32)
        next_face = np.where(step, next_face + per_cell, next_face)
        # Who is done stays where it is with zero length, until it pays to close ranks.
        t, t_exit = out, np.where(alive, t_exit, out)
        if len(turns) % _TURNS_BETWEEN_CHECKS == 0:
            ray, cell, t, t_exit, next_face, per_cell, stride = (
                array[..., alive] for array in (ray, cell, t, t_exit, next_face, per_cell, stride)
            )
    first = count.cumsum() - count
    crossed_cells = np.empty(count.sum(), dtype=np.int32)
    for ray, rank, cell in turns:
        crossed_cells[first[ray] + rank] = cell
    return crossed_cells, count


def _enter(shape: tuple[int, int, int], origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, ...]:
    """The first cell of every ray that meets the grid: ray, cell, t, t_exit [n], next_face, per_cell, stride [3, n]."""
    cells, start = np.array(shape)[:, None], origin[:, None]
    t, t_exit = _slab(start, direction, cells)
    ray = np.flatnonzero(t_exit - t > _LEAST_LENGTH_M)
    t, t_exit, direction = t[ray], t_exit[ray], direction[:, ray]
    at = np.clip(np.floor(start + direction * t), 0, cells - 1)  # [3, n]
    with np.errstate(all="ignore"):  # rays along an axis divide by zero
        per_cell = 1 / np.abs(direction)
        next_face = np.where(direction == 0, np.inf, (at + (direction > 0) - start) / direction)
    strides = np.array([shape[1] * shape[2], shape[2], 1])[:, None]
    cell = (at * strides).sum(axis=0).astype(np.int32)
    return ray, cell, t, t_exit, next_face, per_cell, np.where(direction > 0, strides, -strides).astype(np.int32)


def _slab(start: np.ndarray, direction: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays [3, R] enter the grid (0 if they start inside) and leave it; a miss has ``exit <= enter``."""
    with np.errstate(all="ignore"):  # rays along an axis divide by zero
        a, b = -start / direction, (cells - start) / direction
    parallel, between = direction == 0, (start >= 0) & (start < cells)
    low = np.where(parallel, np.where(between, -np.inf, np.inf), np.minimum(a, b))
    high = np.where(parallel, np.where(between, np.inf, -np.inf), np.maximum(a, b))
    return np.maximum(low.max(axis=0), 0.0), high.min(axis=0)
