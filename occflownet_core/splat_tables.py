# SPDX-License-Identifier: Apache-2.0
"""Calibration as tables for lifting by splatting: the voxel that every pixel at every depth falls into. NumPy only.

(Lift-Splat-Shoot, arXiv 2008.05711; sorting the points once per calibration is BEVPoolv2's, arXiv 2211.17111.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from occflownet_core.camera_matrices import CameraTables
from occflownet_core.grid import VoxelGrid


@dataclass(frozen=True, eq=False)
class SplatTables:
    """Where the points of all pixels and depth bins lie; P = N * D * h * w points.

    Attributes:
        voxel_index: [N, D, h, w] int32, voxels in z, y, x order (x fastest); ``cells`` for points outside the grid.
        cells: number of voxels.
        cameras: what else the graph is told about the cameras, or None.
    """

    voxel_index: np.ndarray
    cells: int
    cameras: CameraTables | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names of the graph's inputs, which take the points sorted by voxel.

        Returns:
            pixel_index [P] int32, of the point in context features flattened as (camera, row, column);
            depth_index [P] int32, of the point in depth probabilities flattened as (camera, bin, row, column);
            voxel_first [V + 1] int32, where each voxel's points begin, and the last one's end.
        """
        bins, height, width = self.voxel_index.shape[1:]
        voxel = self.voxel_index.reshape(-1)
        order = np.argsort(voxel, kind="stable")
        first = np.searchsorted(voxel[order], np.arange(self.cells + 1))
        area = height * width
        arrays = {
            "pixel_index": (order // (bins * area) * area + order % area).astype(np.int32),
            "depth_index": order.astype(np.int32),
            "voxel_first": first.astype(np.int32),
        }
        return arrays | (self.cameras.arrays() if self.cameras else {})

    def without(self, cameras: Collection[int]) -> SplatTables:
        """The tables when images of the given camera indices are missing: their points fall nowhere."""
        voxel_index = self.voxel_index.copy()
        voxel_index[list(cameras)] = self.cells
        return replace(self, voxel_index=voxel_index, cameras=self.cameras.without(cameras) if self.cameras else None)


def build_splat_tables(
    ego_from_image: np.ndarray,
    grid: VoxelGrid,
    depths_m: np.ndarray,
    feature_height: int,
    feature_width: int,
    stride_px: float,
    cameras: CameraTables | None = None,
) -> SplatTables:
    """Place the middle of every feature cell at the middle of every depth bin.

    Args:
        ego_from_image: [N, 4, 4], see ``CameraMatrices``.
        grid: the working volume.
        depths_m: [D], as the network counts depth.
        feature_height, feature_width: h and w.
        stride_px: pixels per feature cell.
        cameras: kept with the tables.
    """
    v, u = np.meshgrid(
        (np.arange(feature_height) + 0.5) * stride_px, (np.arange(feature_width) + 0.5) * stride_px, indexing="ij"
    )
    pixel = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)  # [h * w, 3]
    voxel_index = np.empty((len(ego_from_image), len(depths_m), len(pixel)), dtype=np.int32)
    x, y, _ = grid.shape
    for c, matrix in enumerate(ego_from_image):
        ray, origin_m = pixel @ matrix[:3, :3].T, matrix[:3, 3]
        for b, depth_m in enumerate(depths_m):
            cell, inside = grid.cells(ray * depth_m + origin_m)
            voxel_index[c, b] = np.where(inside, (cell[:, 2] * y + cell[:, 1]) * x + cell[:, 0], grid.size)
    shape = (*voxel_index.shape[:2], feature_height, feature_width)
    return SplatTables(voxel_index.reshape(shape), grid.size, cameras)
