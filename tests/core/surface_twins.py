# SPDX-License-Identifier: Apache-2.0
"""Fields whose surface is known in closed form, and the whole lattice that MISE is held against."""

import numpy as np

from occflownet_core.grid import VoxelGrid
from occflownet_core.query import FieldSamples

BOX = VoxelGrid((-4, -4, -4), (4, 4, 4), 1.0)
CAR, VEGETATION = 4, 16
WIDTH_M = 0.25


class DistanceField:
    """Occupied within a signed distance (negative inside): probability sigmoid(-distance / WIDTH_M), so 0.5 on the surface.

    To the left (y > 0) everything is a car, to the right vegetation.
    """

    def __init__(self, distance_m) -> None:
        self._distance_m = distance_m
        self.calls = []

    def probability(self, points_m):
        self.calls.append(len(points_m))
        return 1 / (1 + np.exp(np.clip(self._distance_m(points_m.astype(np.float64)) / WIDTH_M, -60, 60)))

    def samples(self, points_m, gradient=False):
        probability = self.probability(points_m)
        logits = np.zeros((len(points_m), 17))
        logits[np.arange(len(points_m)), np.where(points_m[:, 1] > 0, CAR, VEGETATION)] = 1
        if not gradient:
            return FieldSamples(probability, logits, probability >= 0)
        ahead, behind = (
            np.stack([self.probability(points_m + sign * step) for step in 1e-5 * np.eye(3)], axis=1)
            for sign in (1, -1)
        )
        return FieldSamples(probability, logits, probability >= 0, (ahead - behind) / 2e-5)


def ball(radius_m: float, centre_m=(0.0, 0.0, 0.0)) -> DistanceField:
    return union((radius_m, centre_m))


def union(*balls) -> DistanceField:
    return DistanceField(
        lambda p: np.min([np.linalg.norm(p - np.array(c), axis=1) - r for r, c in balls], axis=0, initial=99.0)
    )


def everything(field, grid: VoxelGrid) -> np.ndarray:
    """The field at every lattice point of a grid, [X + 1, Y + 1, Z + 1]."""
    axes = [np.arange(n + 1) for n in grid.shape]
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    points_m = np.minimum(grid.metric_from_index(nodes), np.array(grid.upper_m) - 1e-6)
    return field.probability(points_m.reshape(-1, 3)).reshape(nodes.shape[:3]).astype(np.float32)


def cut_cells(occupied: np.ndarray) -> set[tuple[int, int, int]]:
    """Cells whose corners disagree, of lattice points [X + 1, Y + 1, Z + 1]."""
    windows = np.lib.stride_tricks.sliding_window_view(occupied, (2, 2, 2)).reshape(*[n - 1 for n in occupied.shape], 8)
    return set(map(tuple, np.argwhere(windows.any(axis=-1) & ~windows.all(axis=-1)).tolist()))


def finer(grid: VoxelGrid, levels: int) -> VoxelGrid:
    return VoxelGrid(grid.lower_m, grid.upper_m, grid.voxel_size_m / 2**levels)
