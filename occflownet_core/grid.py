# SPDX-License-Identifier: Apache-2.0
"""VoxelGrid: a box of cubic cells in the ego frame, and the only place that knows where cell centres lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occflownet_core.errors import GeometryError

_WHOLE_CELLS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class VoxelGrid:
    """An axis-aligned box in the ego frame, cut into cubic cells.

    Cell ``(i, j, k)`` covers ``[lower + i * size, lower + (i + 1) * size)`` on each axis; its centre is at
    ``lower + (i + 0.5) * size``. A *continuous index* counts cells from the box's lower corner, so the centre of
    cell ``i`` has continuous index ``i + 0.5`` and its floor is the cell.

    Attributes:
        lower_m: the box's lower corner (x, y, z), metres in the ego frame.
        upper_m: the box's upper corner, metres.
        voxel_size_m: edge of a cell, metres.

    Raises:
        GeometryError: a corner or size is not finite or not positive, or the box does not hold a whole number of cells.
    """

    lower_m: tuple[float, float, float]
    upper_m: tuple[float, float, float]
    voxel_size_m: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "lower_m", tuple(float(v) for v in self.lower_m))
        object.__setattr__(self, "upper_m", tuple(float(v) for v in self.upper_m))
        object.__setattr__(self, "voxel_size_m", float(self.voxel_size_m))
        if len(self.lower_m) != 3 or len(self.upper_m) != 3:
            raise GeometryError(f"a grid has three axes, got corners {self.lower_m} and {self.upper_m}; give x, y, z")
        if not np.isfinite(self.voxel_size_m) or self.voxel_size_m <= 0:
            raise GeometryError(f"voxel_size_m is {self.voxel_size_m}; give a positive length in metres")
        cells = (np.array(self.upper_m) - np.array(self.lower_m)) / self.voxel_size_m
        if not np.isfinite(cells).all() or (cells < 0.5).any():
            raise GeometryError(f"the box from {self.lower_m} to {self.upper_m} is empty; upper_m must exceed lower_m")
        if (np.abs(cells - np.round(cells)) > _WHOLE_CELLS_TOLERANCE * np.maximum(cells, 1)).any():
            raise GeometryError(
                f"the box from {self.lower_m} to {self.upper_m} holds {tuple(cells.tolist())} cells of "
                f"{self.voxel_size_m} m; choose a size that divides each edge"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of cells along (x, y, z)."""
        cells = (np.array(self.upper_m) - np.array(self.lower_m)) / self.voxel_size_m
        x, y, z = np.round(cells).astype(int).tolist()
        return x, y, z

    @property
    def size(self) -> int:
        """Number of cells in all."""
        x, y, z = self.shape
        return x * y * z

    def index_from_metric(self, points_m: np.ndarray) -> np.ndarray:
        """Continuous index [..., 3] of points [..., 3] (ego frame, metres); inside the box it lies in [0, shape)."""
        return (np.asarray(points_m, dtype=np.float64) - self.lower_m) / self.voxel_size_m

    def metric_from_index(self, index: np.ndarray) -> np.ndarray:
        """Points [..., 3] (ego frame, metres) of continuous indices [..., 3]; the centre of cell i is at i + 0.5."""
        return np.asarray(index, dtype=np.float64) * self.voxel_size_m + self.lower_m

    def cells(self, points_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cell that each point lies in.

        Args:
            points_m: [..., 3], ego frame, metres.

        Returns:
            cell [..., 3] int64 (clipped into the grid), inside [...] bool; NaN points are outside.
        """
        index = self.index_from_metric(points_m)
        inside = ((index >= 0) & (index < self.shape)).all(axis=-1)
        bounded = np.clip(np.nan_to_num(index), 0, np.array(self.shape) - 1)
        return np.floor(bounded).astype(np.int64), inside

    def contains(self, points_m: np.ndarray) -> np.ndarray:
        """True [...] where points [..., 3] lie in the box (lower faces included, upper ones not)."""
        return self.cells(points_m)[1]

    def centres(self) -> np.ndarray:
        """Centres of all cells, [X, Y, Z, 3], ego frame, metres."""
        axes = [self.axis_centres_m(axis) for axis in range(3)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)

    def axis_centres_m(self, axis: int) -> np.ndarray:
        """Where the cells' centres lie on one axis, [X], [Y] or [Z], metres."""
        return (np.arange(self.shape[axis]) + 0.5) * self.voxel_size_m + self.lower_m[axis]

    def coarsened(self, factor: int) -> VoxelGrid:
        """The same box in cells ``factor`` times as long.

        Raises:
            GeometryError: the number of cells along an axis is no multiple of ``factor``.
        """
        if factor < 1 or any(n % factor for n in self.shape):
            raise GeometryError(
                f"a grid of {self.shape} cells cannot be coarsened by {factor}; choose a common divisor"
            )
        return VoxelGrid(self.lower_m, self.upper_m, self.voxel_size_m * factor)

    def to_dict(self) -> dict:
        """Plain values for YAML or JSON; ``VoxelGrid(**d)`` reads them back."""
        return {"lower_m": list(self.lower_m), "upper_m": list(self.upper_m), "voxel_size_m": self.voxel_size_m}


OCC3D_GRID = VoxelGrid((-40.0, -40.0, -1.0), (40.0, 40.0, 5.4), 0.4)
"""The Occ3D-nuScenes benchmark's grid: 200 x 200 x 16 cells of 0.4 m around the ego vehicle."""
