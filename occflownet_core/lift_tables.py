# SPDX-License-Identifier: Apache-2.0
"""Calibration as tables: which pixels and depth bins every voxel reads. NumPy only; rebuilt when calibration changes.

The graph itself knows no calibration: it gathers by these tables, so one engine serves every vehicle
(the lookup idea is Fast-BEV's, arXiv 2301.12511; the depth weighting is LSS's, arXiv 2008.05711).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from occflownet_core.camera import CameraRig
from occflownet_core.camera_matrices import CameraMatrices, CameraTables
from occflownet_core.errors import CalibrationError
from occflownet_core.grid import VoxelGrid
from occflownet_core.splat_tables import SplatTables, build_splat_tables

GATHER_INPUTS = ("pixel_index", "depth_index", "depth_weight")
SPLAT_INPUTS = ("pixel_index", "depth_index", "voxel_first")
CAMERA_INPUTS = ("image_from_ego", "ego_from_image", "camera_parameters")


@dataclass(frozen=True)
class DepthBins:
    """Equal bins of depth along the optical axis; bin b covers [min + b * step, min + (b + 1) * step), metres."""

    min_m: float
    max_m: float
    step_m: float

    @property
    def count(self) -> int:
        return round((self.max_m - self.min_m) / self.step_m)

    def index(self, depth_m: np.ndarray) -> np.ndarray:
        """Continuous bin index [...]: the centre of bin b is at b + 0.5."""
        return (np.asarray(depth_m) - self.min_m) / self.step_m

    def centres_m(self) -> np.ndarray:
        """Depth of every bin's centre, [count]."""
        return self.min_m + (np.arange(self.count) + 0.5) * self.step_m


@dataclass(frozen=True)
class LiftSpec:
    """The shapes that a graph's lift was built for.

    Attributes:
        grid: the working volume.
        depth_bins: the depth distribution's bins.
        feature_height, feature_width: size of one camera's feature map.
        slots: most cameras that one voxel reads.
        reference_focal_px: focal length that the bins' depths are stated for, or None for true metres. An image shows
            only the ratio of size to depth times focal length, so a network that does not know the camera can tell
            depth as a camera of one reference focal length would see it, and no other (Metric3D, arXiv 2307.10984).
        method: ``gather``, every voxel reads the pixels it projects to; or ``splat``, every pixel at every depth adds
            to the voxel it falls into.
        knows_cameras: whether the graph takes the cameras' matrices and parameters too.
    """

    grid: VoxelGrid
    depth_bins: DepthBins
    feature_height: int
    feature_width: int
    slots: int = 2
    reference_focal_px: float | None = None
    method: Literal["gather", "splat"] = "gather"
    knows_cameras: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs that depend on calibration alone."""
        lifting = GATHER_INPUTS if self.method == "gather" else SPLAT_INPUTS
        return lifting + (CAMERA_INPUTS if self.knows_cameras else ())

    def network_depth_m(self, depth_m: np.ndarray, focal_px: float) -> np.ndarray:
        """Depth as the network's bins count it, of true depth [...] seen by a camera of the given focal length."""
        return np.asarray(depth_m) * (self.reference_focal_px / focal_px if self.reference_focal_px else 1.0)

    def bin_depths_m(self, focal_px: float) -> np.ndarray:
        """True depth [D] of the bins' centres for a camera of the given focal length."""
        return self.depth_bins.centres_m() / self.network_depth_m(1.0, focal_px)


@dataclass(frozen=True)
class LiftTables:
    """What every voxel reads; voxels are in z, y, x order (x fastest), V = Z * Y * X.

    Attributes:
        pixel_index: [V, S] int32, position in context features flattened as (camera, row, column).
        depth_index: [V, S, 2] int32, positions in depth probabilities flattened as (camera, bin, row, column).
        depth_weight: [V, S, 2] float32, linear interpolation between the two bins times the slot's share; all zero
            where a slot is unused. A voxel that two cameras see takes the mean of both.
        camera_index: [V, S] int32, the camera of each slot, -1 where unused.
        cameras: what else the graph is told about the cameras, or None.
    """

    pixel_index: np.ndarray
    depth_index: np.ndarray
    depth_weight: np.ndarray
    camera_index: np.ndarray
    cameras: CameraTables | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names of the graph's inputs."""
        lifting = {name: getattr(self, name) for name in GATHER_INPUTS}
        return lifting | (self.cameras.arrays() if self.cameras else {})

    def without(self, cameras: Collection[int]) -> LiftTables:
        """The tables when images of the given camera indices are missing: their voxels read the others alone."""
        lost = np.isin(self.camera_index, list(cameras))
        used = np.where(lost, -1, self.camera_index)
        before = (self.camera_index >= 0).sum(axis=1, keepdims=True)
        after = np.maximum((used >= 0).sum(axis=1, keepdims=True), 1)
        weight = np.where(lost[..., None], 0, self.depth_weight * (before / after)[..., None])
        known = self.cameras.without(cameras) if self.cameras else None
        return LiftTables(self.pixel_index, self.depth_index, weight.astype(np.float32), used, known)


def build_lift_tables(
    rig: CameraRig, spec: LiftSpec, matrices: CameraMatrices | None = None
) -> LiftTables | SplatTables:
    """The tables of a calibration, by the method that the graph was built for.

    Args:
        rig: cameras *of the images that the network sees* (after resizing and cropping).
        spec: shapes of the lift.
        matrices: of the rig; None takes the rig's own (training gives those of mirrored images and worlds).

    Raises:
        CalibrationError: the cameras' image size is no whole multiple of the feature map's.
    """
    stride_px = _stride_px(rig, spec)
    matrices = matrices or CameraMatrices.of(rig, spec.reference_focal_px)
    cameras = matrices.tables() if spec.knows_cameras else None
    if spec.method == "gather":
        return _gather_tables(rig, spec, stride_px, cameras)
    depths_m = spec.depth_bins.centres_m()
    return build_splat_tables(
        matrices.ego_from_image, spec.grid, depths_m, spec.feature_height, spec.feature_width, stride_px, cameras
    )


def _stride_px(rig: CameraRig, spec: LiftSpec) -> int:
    for camera in rig:
        stride_x, stride_y = camera.width_px / spec.feature_width, camera.height_px / spec.feature_height
        if stride_x != int(stride_x) or stride_x != stride_y:
            raise CalibrationError(
                f"{camera.name}: {camera.width_px} x {camera.height_px} px do not fit a feature map of "
                f"{spec.feature_width} x {spec.feature_height}; prepare the camera with the bundle's image size"
            )
    return int(stride_x)


def _gather_tables(rig: CameraRig, spec: LiftSpec, stride_px: int, known: CameraTables | None) -> LiftTables:
    """Project every voxel centre into every camera and note where it lands.

    A voxel reads the nearest feature pixel, and its depth linearly between the two nearest bin centres. Of more
    cameras than slots, those win that see the voxel closest to their image's middle column.
    """
    height, width, bins = spec.feature_height, spec.feature_width, spec.depth_bins.count
    voxels_m = spec.grid.centres().transpose(2, 1, 0, 3).reshape(-1, 3)  # [V, 3], x fastest
    cameras = len(rig)
    pixel = np.zeros((cameras, len(voxels_m)), dtype=np.int64)
    depth_bin = np.zeros((cameras, len(voxels_m)))
    off_centre = np.full((cameras, len(voxels_m)), np.inf)
    for c, camera in enumerate(rig):
        uv, depth_m = camera.project(voxels_m)
        depth_m = spec.network_depth_m(depth_m, camera.intrinsic[0, 0])
        seen = camera.sees(uv, depth_m) & (depth_m >= spec.depth_bins.min_m) & (depth_m < spec.depth_bins.max_m)
        column, row = (uv[seen] / stride_px).astype(np.int64).T
        pixel[c, seen] = row * width + column
        depth_bin[c, seen] = spec.depth_bins.index(depth_m[seen])
        off_centre[c, seen] = np.abs(uv[seen, 0] - camera.width_px / 2)

    slots = min(spec.slots, cameras)
    best = np.argsort(off_centre, axis=0, kind="stable")[:slots].T  # [V, S]
    take = (best, np.arange(len(voxels_m))[:, None])
    used = np.isfinite(off_centre[take])
    share = used / np.maximum(used.sum(axis=1, keepdims=True), 1)  # [V, S]

    below = np.floor(depth_bin[take] - 0.5)
    toward_upper = depth_bin[take] - 0.5 - below
    two_bins = np.clip(np.stack([below, below + 1], axis=-1), 0, bins - 1).astype(np.int64)  # [V, S, 2]
    weight = np.stack([1 - toward_upper, toward_upper], axis=-1) * share[..., None]
    depth_index = (best[..., None] * bins + two_bins) * (height * width) + pixel[take][..., None]
    return _padded(
        LiftTables(
            pixel_index=(best * (height * width) + pixel[take]).astype(np.int32),
            depth_index=depth_index.astype(np.int32),
            depth_weight=weight.astype(np.float32),
            camera_index=np.where(used, best, -1).astype(np.int32),
            cameras=known,
        ),
        spec.slots,
    )


def _padded(tables: LiftTables, slots: int) -> LiftTables:
    """Tables with unused slots appended, for rigs of fewer cameras than slots."""
    missing = slots - tables.pixel_index.shape[1]
    if missing <= 0:
        return tables
    two, three = ((0, 0), (0, missing)), ((0, 0), (0, missing), (0, 0))
    return LiftTables(
        np.pad(tables.pixel_index, two),
        np.pad(tables.depth_index, three),
        np.pad(tables.depth_weight, three),
        np.pad(tables.camera_index, two, constant_values=-1),
        tables.cameras,
    )
