# SPDX-License-Identifier: Apache-2.0
"""OccupancyFrame: what the runtime knows about the space around the vehicle at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from occflownet_core.errors import GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE


@dataclass(frozen=True)
class OccupancyFrame:
    """Labelled voxels in the ego frame.

    Attributes:
        stamp_ns: time that the voxels hold for, nanoseconds since the epoch (the anchor camera's stamp).
        frame_id: name of the ego frame, e.g. ``base_link``.
        grid: where the voxels lie.
        labels: uint8 [X, Y, Z], see ``labels.CLASSES``.
        probability: optional float [X, Y, Z], probability that the voxel is occupied, 0..1.
        velocity_mps: optional float [X, Y, Z, 3], velocity of the voxel's content in the ego frame.
        field_features: optional float [1, Z, Y, X, C], what ``FieldQuery.field`` reads: the field between the voxels.
        latency_ms: time spent per stage, e.g. ``{"decode": 12.1, "engine": 80.2}``.

    Raises:
        GeometryError: an array's shape is not the grid's.
    """

    stamp_ns: int
    frame_id: str
    grid: VoxelGrid
    labels: np.ndarray
    probability: np.ndarray | None = None
    velocity_mps: np.ndarray | None = None
    field_features: np.ndarray | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("labels", "probability", "velocity_mps"):
            array = getattr(self, name)
            if array is not None and array.shape[:3] != self.grid.shape:
                raise GeometryError(f"{name} has shape {array.shape}; the grid has {self.grid.shape} cells (x, y, z)")


def surface_voxels(labels: np.ndarray) -> np.ndarray:
    """True [X, Y, Z] for occupied voxels with a free face neighbour or at the grid's border: all that can be seen.

    Args:
        labels: uint8 [X, Y, Z].
    """
    occupied = labels != FREE
    solid, buried = occupied.ravel(), occupied.flatten()
    _, y, z = labels.shape
    # Neighbours along an axis lie one stride apart; what wraps around at a border is overwritten below.
    for stride in (y * z, z, 1):
        buried[stride:] &= solid[:-stride]
        buried[:-stride] &= solid[stride:]
    buried = buried.reshape(labels.shape)
    for axis in range(3):
        across = np.moveaxis(buried, axis, 0)
        across[0] = across[-1] = False
    return occupied > buried
