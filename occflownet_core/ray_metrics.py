# SPDX-License-Identifier: Apache-2.0
"""RayIoU: occupancy judged along a simulated LiDAR's rays, so that thick surfaces win nothing (SparseOcc, Liu et al.,
arXiv 2312.17118, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from occflownet_core import poses
from occflownet_core.errors import GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE, OCCUPIED_CLASSES
from occflownet_core.metrics import mean_known

THRESHOLDS_M = (1.0, 2.0, 4.0)
AZIMUTHS = 360
MAX_ORIGINS = 8
MAX_ORIGIN_OFFSET_M = 39.0
_MOST_LAYERS = 52  # the bits of a column go through float64
_MOST_LAYERS_32 = 30
_COLUMNS_AT_A_TIME = 32


def pitches_rad() -> np.ndarray:
    """Elevations of the simulated LiDAR's 39 rings, ascending: ten that meet flat ground at equal steps, then equal
    angles up to nuScenes' uppermost beam."""
    pitch = [-(np.pi / 2 - np.arctan(k + 1)) for k in range(10)]
    while pitch[-1] < 0.21:
        pitch.append(pitch[-1] + (pitch[-1] - pitch[-2]))
    return np.array(pitch)


def azimuths_rad() -> np.ndarray:
    """[360] azimuths, one per degree."""
    return np.radians(np.arange(AZIMUTHS))


def ray_directions() -> np.ndarray:
    """Unit vectors [39 * 360, 3] of one origin's rays, azimuth running fastest."""
    pitch, azimuth = (a.ravel() for a in np.meshgrid(pitches_rad(), azimuths_rad(), indexing="ij"))
    return np.stack([np.cos(pitch) * np.cos(azimuth), np.cos(pitch) * np.sin(azimuth), np.sin(pitch)], axis=1)


def ray_origins_m(global_from_lidar: np.ndarray, global_from_ego: np.ndarray) -> np.ndarray:
    """The origins from which a sample is judged: where the LiDAR was in the scene, near the current ego frame.

    Args:
        global_from_lidar: [K, 4, 4], the LiDAR's pose at every keyframe of the scene, in order of time.
        global_from_ego: [4, 4], the sample's ego frame.

    Returns:
        [O, 3] in that ego frame, O <= 8: those with |x| and |y| below 39 m, evenly thinned out.
    """
    origins_m = (poses.inverse(global_from_ego) @ global_from_lidar)[:, :3, 3]
    origins_m = origins_m[(np.abs(origins_m[:, :2]) < MAX_ORIGIN_OFFSET_M).all(axis=1)]
    if len(origins_m) > MAX_ORIGINS:
        origins_m = origins_m[np.round(np.linspace(0, len(origins_m) - 1, MAX_ORIGINS)).astype(int)]
    return origins_m


@dataclass(frozen=True, eq=False)
class RayHits:
    """What rays meet first.

    Attributes:
        label: [O, 39, 360] uint8, ``FREE`` where a ray leaves the grid without meeting anything.
        depth_m: [O, 39, 360] float32, distance to where the ray enters the voxel that it meets; +inf without one.
    """

    label: np.ndarray
    depth_m: np.ndarray


class RayCaster:
    """Casts RayIoU's rays from given origins; made once for a sample, it serves prediction and truth.

    Rays of one azimuth cross the same columns of voxels, whatever their pitch. So the columns are found once per
    origin and azimuth, in order; a column's occupied cells are bits of one integer, and one AND with the bits of the
    cells that a ray passes there tells whether it meets something.

    Args:
        grid: of the labels.
        origins_m: [O, 3], inside the grid in x and y.

    Raises:
        GeometryError: an origin lies beside the grid, or the grid has more than 52 layers.
    """

    def __init__(self, grid: VoxelGrid, origins_m: np.ndarray) -> None:
        self.grid = grid
        self.origins_m = np.asarray(origins_m, dtype=np.float64).reshape(-1, 3)
        outside = ~((self.origins_m >= grid.lower_m) & (self.origins_m < grid.upper_m))[:, :2].all(axis=1)
        if outside.any():
            raise GeometryError(f"origin {self.origins_m[outside][0].tolist()} lies beside the grid; leave it out")
        if grid.shape[2] > _MOST_LAYERS:
            raise GeometryError(f"the grid has {grid.shape[2]} layers; rays are cast through {_MOST_LAYERS} at most")
        crossing_m, self._column = columns_crossed(grid, self.origins_m)
        # Single precision is good to some micrometres here, and halves the time.
        self._crossing_m = crossing_m.astype(np.float32)
        self._height_m = np.repeat(self.origins_m[:, 2], AZIMUTHS).astype(np.float32)

    def cast(self, labels: np.ndarray) -> RayHits:
        """First occupied voxel along every ray.

        Args:
            labels: uint8 [X, Y, Z].
        """
        bits = _occupied_bits(labels)[self._column]  # [O * 360, C]
        rings = [self._cast_ring(labels, bits, float(pitch)) for pitch in pitches_rad()]
        shape = (len(rings), len(self.origins_m), AZIMUTHS)
        label, depth_m = (np.array(part).reshape(shape).swapaxes(0, 1) for part in zip(*rings, strict=True))
        return RayHits(label, depth_m)

    def _cast_ring(self, labels: np.ndarray, bits: np.ndarray, pitch: float) -> tuple[np.ndarray, np.ndarray]:
        """Label and depth [O * 360] of all rays of one pitch, some columns at a time until every ray has met something."""
        slope = math.tan(pitch)
        label = np.full(len(bits), FREE, dtype=np.uint8)
        depth_m = np.full(len(bits), np.inf, dtype=np.float32)
        active = np.arange(len(bits))
        for first in range(0, self._columns_within(slope), _COLUMNS_AT_A_TIME):
            columns = slice(first, first + _COLUMNS_AT_A_TIME)
            crossing_m = self._crossing_m[active, first : first + _COLUMNS_AT_A_TIME + 1]
            level = self._levels(crossing_m, self._height_m[active], slope, bits.dtype)
            met = bits[active, columns] & _bits_between(level, rising=slope > 0)
            column = (met != 0).argmax(axis=1)
            row = np.arange(len(active))
            hit = met[row, column] != 0
            row, column, ray = row[hit], column[hit], active[hit]
            cell = _first_bit(met[row, column], rising=slope > 0)
            label[ray] = labels.reshape(-1, labels.shape[2])[self._column[ray, first + column], cell]
            # The ray enters the cell from the side, or from below (above) where that comes later.
            face_m = self.grid.lower_m[2] + (cell + (slope < 0)) * self.grid.voxel_size_m
            depth_m[ray] = np.maximum(crossing_m[row, column], (face_m - self._height_m[ray]) / slope) / math.cos(pitch)
            active = active[~hit]
            if not len(active):
                break
        return label, depth_m

    def _columns_within(self, slope: float) -> int:
        """How many columns any ray of this slope can cross before it leaves the grid upward or downward."""
        end_m = self.grid.upper_m[2] if slope > 0 else self.grid.lower_m[2]
        reach_m = ((end_m - self._height_m) / slope).max(initial=0)
        return int(np.searchsorted(self._crossing_m.min(axis=0, initial=np.inf)[:-1], reach_m))

    def _levels(self, crossing_m: np.ndarray, height_m: np.ndarray, slope: float, dtype: np.dtype) -> np.ndarray:
        """One more than the layer that a ray is in at each crossing: 0 below the grid, Z + 1 above."""
        layer = (crossing_m * slope + (height_m[:, None] - self.grid.lower_m[2])) / self.grid.voxel_size_m
        return np.clip(layer + 1, 0, self.grid.shape[2] + 1).astype(dtype)


def columns_crossed(grid: VoxelGrid, origins_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns of voxels that a ray passes over the x-y plane, in order.

    Args:
        grid: of the labels.
        origins_m: [O, 3], inside the grid in x and y.

    Returns:
        crossing_m [O * 360, C + 1]: horizontal distances at which it enters the c-th column and leaves it for the
        next; constant once it has left the grid. column [O * 360, C]: index x * Y + y, or X * Y beyond the grid.
    """
    azimuth = azimuths_rad()
    heading = np.tile(np.stack([np.cos(azimuth), np.sin(azimuth)], axis=1), (len(origins_m), 1))  # [R, 2]
    origin_m = np.repeat(origins_m[:, :2], AZIMUTHS, axis=0)  # [R, 2]
    to_planes = []
    for axis in (0, 1):
        plane_m = grid.lower_m[axis] + np.arange(grid.shape[axis] + 1) * grid.voxel_size_m
        with np.errstate(divide="ignore", invalid="ignore"):
            distance_m = (plane_m - origin_m[:, axis, None]) / heading[:, axis, None]
        to_planes.append(np.where(distance_m > 0, distance_m, np.inf))
    farthest = [np.where(np.isfinite(d), d, -np.inf).max(axis=1, initial=-np.inf) for d in to_planes]
    end_m = np.minimum(*(np.where(f > 0, f, np.inf) for f in farthest))[:, None]
    crossing_m = np.concatenate([np.zeros_like(end_m), *to_planes], axis=1)
    crossing_m.sort(axis=1)
    crossing_m = np.minimum(crossing_m, end_m)
    needed = int((crossing_m < end_m).sum(axis=1).max(initial=0))
    crossing_m = crossing_m[:, : needed + 1]

    middle_m = (crossing_m[:, 1:] + crossing_m[:, :-1]) / 2
    cell = [
        np.floor((origin_m[:, a, None] + middle_m * heading[:, a, None] - grid.lower_m[a]) / grid.voxel_size_m)
        for a in (0, 1)
    ]
    x, y, _ = grid.shape
    passed = np.diff(crossing_m, axis=1) > 0
    column = np.clip(cell[0], 0, x - 1) * y + np.clip(cell[1], 0, y - 1)
    return crossing_m, np.where(passed, column, x * y).astype(np.int64)


def _occupied_bits(labels: np.ndarray) -> np.ndarray:
    """Bit z of element x * Y + y is set where voxel (x, y, z) is occupied; one more element, 0, is beyond the grid."""
    dtype = np.uint32 if labels.shape[2] <= _MOST_LAYERS_32 else np.uint64
    weight = np.left_shift(dtype(1), np.arange(labels.shape[2], dtype=dtype))
    bits = np.where(labels != FREE, weight, dtype(0)).sum(axis=2, dtype=dtype)
    return np.append(bits.ravel(), dtype(0))


def _bits_between(level: np.ndarray, rising: bool) -> np.ndarray:
    """Bits [R, C] of the layers that a ray is in from one crossing's level [R, C + 1] to the next's, both included.

    Bits a..b are 2^(b + 1) - 2^a, and level is layer + 1; level 0 is below the grid, where there are no bits.
    """
    power = np.left_shift(level.dtype.type(1), level)
    lower, upper = (power[:, :-1], power[:, 1:]) if rising else (power[:, 1:], power[:, :-1])
    return upper - np.right_shift(np.maximum(lower, 2), 1)


def _first_bit(bits: np.ndarray, rising: bool) -> np.ndarray:
    """Index [n] of the lowest bit (rising rays meet it first) or the highest one."""
    if rising:
        bits = bits & (~bits + bits.dtype.type(1))
    return np.frexp(bits.astype(np.float64))[1] - 1


@dataclass(eq=False)
class RayScores:
    """Counts over rays whose truth meets something; they add up over samples.

    Attributes:
        there, predicted: int64 [17] rays per class.
        hits: int64 [3, 17], rays whose class agrees and whose depth does to 1, 2, 4 m.
    """

    there: np.ndarray = field(default_factory=lambda: np.zeros(OCCUPIED_CLASSES, dtype=np.int64))
    predicted: np.ndarray = field(default_factory=lambda: np.zeros(OCCUPIED_CLASSES, dtype=np.int64))
    hits: np.ndarray = field(default_factory=lambda: np.zeros((len(THRESHOLDS_M), OCCUPIED_CLASSES), dtype=np.int64))

    def add(self, prediction: RayHits, truth: RayHits) -> None:
        """Count one sample's rays, cast from the same origins."""
        counted = truth.label != FREE
        there, predicted = truth.label[counted], prediction.label[counted]
        error_m = np.abs(prediction.depth_m[counted] - truth.depth_m[counted])
        self.there += _count(there)
        self.predicted += _count(predicted)
        for row, threshold_m in zip(self.hits, THRESHOLDS_M, strict=True):
            row += _count(there[(there == predicted) & (error_m < threshold_m)])

    def include(self, other: RayScores) -> None:
        """Count another sample's rays too."""
        self.there += other.there
        self.predicted += other.predicted
        self.hits += other.hits

    @property
    def iou(self) -> np.ndarray:
        """[3, 17] IoU per threshold and class; NaN for a class that is neither there nor predicted."""
        union = self.there + self.predicted - self.hits
        with np.errstate(invalid="ignore"):
            return np.where(union > 0, self.hits / union, np.nan)

    @property
    def means(self) -> np.ndarray:
        """[3] RayIoU at each threshold: mean over the 17 classes, NaN classes left out."""
        return np.array([mean_known(row) for row in self.iou])

    @property
    def ray_iou(self) -> float:
        """RayIoU: mean over the three thresholds."""
        return float(self.means.mean())


def _count(labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, minlength=OCCUPIED_CLASSES + 1)[:OCCUPIED_CLASSES]
