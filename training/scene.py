# SPDX-License-Identifier: Apache-2.0
"""Scene: all rays of a log in one frame, and a place of its own for everything that moves.

Moving objects are taken out by their boxes: each has a *bay*, beside the scene, where its content lies in its box's own
frame. A ray that crosses its box at some keyframe goes on in the bay, by the same ``BoxFlow`` that training uses: a
field over scene and bays explains all keyframes at once, and every object is seen from all sides that any keyframe saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from occflownet_core import poses
from occflownet_core.boxes import MovingBoxes
from occflownet_core.errors import DatasetError
from occflownet_core.field import occupancy_probability
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.interpolate import nearest
from occflownet_core.labels import BOXED_CLASSES, labels_above
from occflownet_core.motion import BoxFlow
from occflownet_core.renderer import Rays, render
from occflownet_core.renderer.volume import RenderedRays
from training.data.nuscenes import Keyframe, KeyframeIndex
from training.data.rays import RayLimits, RaySource, temporal_rays
from training.voxel_fitting import FittedVoxels

BOX_SCALE = 1.15
STILL_M = 0.3
"""An object none of whose corners moves further than this in the whole log is part of the static scene."""
_MARGIN_M = 0.8  # around a bay
_FAR_M = 80.0


@dataclass(frozen=True, eq=False)
class Scene:
    """A log in the ego frame of its first keyframe.

    Attributes:
        keyframes: in order of time; keyframe k is observed at time index k + 1 (0 is "in the bays", never observed).
        scene_from_global: [4, 4].
        grid: around what all keyframes' label boxes hold, and the bays.
        rays: of all keyframes.
        boxes: moving objects, ``now`` in their bays.
        static: the grid without bays; it has the same lower corner.
    """

    keyframes: tuple[Keyframe, ...]
    scene_from_global: np.ndarray
    grid: VoxelGrid
    rays: Rays
    boxes: MovingBoxes
    static: VoxelGrid

    @cached_property
    def motion(self) -> BoxFlow:
        """From what rays meet to where it lies in the field."""
        return BoxFlow(self.boxes, BOX_SCALE, still_m=0.0)


def load_scene(
    index: KeyframeIndex,
    name: str,
    source: RaySource,
    voxel_size_m: float = 0.4,
    on_keyframe: Callable[[], object] = lambda: None,
) -> Scene:
    """Read one scene of a data root.

    Args:
        index: that has it.
        name: of the scene.
        source: of its rays.
        voxel_size_m: of the grid.
        on_keyframe: called after each keyframe.

    Raises:
        DatasetError: there is no such scene, a keyframe has no LiDAR sweep, or a file is missing or damaged.
    """
    keyframes, scene_from_global = scene_keyframes(index, name)
    for keyframe in keyframes:
        if keyframe.lidar is None:
            raise DatasetError(
                f"keyframe {keyframe.token} of {name} has no LiDAR sweep, and a scene is fitted to those; "
                "fit it to its images (--from images)"
            )
    static = grid_around(keyframes, scene_from_global, voxel_size_m)
    grid, boxes = with_bays(static, moving_objects(keyframes, scene_from_global))
    rays = scene_rays(keyframes, source, static, on_keyframe)
    return Scene(keyframes, scene_from_global, grid, rays, boxes, static)


def scene_keyframes(index: KeyframeIndex, name: str) -> tuple[tuple[Keyframe, ...], np.ndarray]:
    """The keyframes of a scene, and ``scene_from_global`` [4, 4].

    Raises:
        DatasetError: there is no such scene.
    """
    if name not in index.scenes:
        raise DatasetError(f"{index.dataroot} has no scene '{name}'; it has {', '.join(list(index.scenes)[:5])}")
    keyframes = tuple(index[i] for i in index.scenes[name])
    return keyframes, poses.inverse(keyframes[0].global_from_ego)


def scene_rays(
    keyframes: Sequence[Keyframe],
    source: RaySource,
    static: VoxelGrid,
    on_keyframe: Callable[[], object] = lambda: None,
) -> Rays:
    """All keyframes' rays in the first one's ego frame; time index k + 1 for keyframe k.

    Args:
        keyframes, source, on_keyframe: as for ``load_scene``.
        static: the scene proper, which rays are limited to: a return beside it may lie in somebody's bay.
    """
    frames = {}
    for k, keyframe in enumerate(keyframes):
        frames[k] = (keyframe, source.frame_rays(keyframe))
        on_keyframe()
    rays = temporal_rays(frames, RayLimits(static, far_m=_FAR_M, beyond_is_free=True))
    return replace(rays, time_index=rays.time_index + 1, axis_cosine=None)


def grid_around(keyframes: Sequence[Keyframe], scene_from_global: np.ndarray, voxel_size_m: float) -> VoxelGrid:
    """The box around the label boxes of all keyframes, its cells aligned with the first one's.

    Raises:
        DatasetError: the voxel size does not divide the label box.
    """
    corners_m = np.array(np.meshgrid(*zip(OCC3D_GRID.lower_m, OCC3D_GRID.upper_m, strict=True))).reshape(3, -1).T
    moved_m = [poses.transform_points(scene_from_global @ k.global_from_ego, corners_m) for k in keyframes]
    lower_m, upper_m = np.min(moved_m, axis=(0, 1)), np.max(moved_m, axis=(0, 1))
    cells = np.array([lower_m, upper_m]) - OCC3D_GRID.lower_m
    first, last = np.floor(cells[0] / voxel_size_m + 1e-6), np.ceil(cells[1] / voxel_size_m - 1e-6)
    origin_m = np.array(OCC3D_GRID.lower_m)
    return VoxelGrid(tuple(origin_m + first * voxel_size_m), tuple(origin_m + last * voxel_size_m), voxel_size_m)


@dataclass(frozen=True, eq=False)
class Track:
    """A moving object.

    Attributes:
        poses: time index -> scene_from_box [4, 4].
        size_m: [3].
        label: its class.
    """

    poses: dict[int, np.ndarray]
    size_m: np.ndarray
    label: int


def moving_objects(keyframes: Sequence[Keyframe], scene_from_global: np.ndarray) -> list[Track]:
    """The annotated objects that move at some time of the log."""
    tracks: dict[int, Track] = {}
    for k, keyframe in enumerate(keyframes):
        boxes = keyframe.boxes
        for b in np.flatnonzero(np.isin(boxes.label, BOXED_CLASSES) & (boxes.size_m > 0).all(axis=1)):
            fresh = Track({}, boxes.size_m[b], int(boxes.label[b]))
            track = tracks.setdefault(int(boxes.instance[b]), fresh)
            track.poses[k + 1] = scene_from_global @ boxes.global_from_box[b]
    return [track for track in tracks.values() if _travel_m(track) > STILL_M]


def _travel_m(track: Track) -> float:
    """The longest way that a corner of the box moves from where it is first."""
    signs = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T
    corners_m = np.array([poses.transform_points(pose, signs * track.size_m) for pose in track.poses.values()])
    return float(np.linalg.norm(corners_m - corners_m[0], axis=-1).max())


def with_bays(static: VoxelGrid, tracks: Sequence[Track]) -> tuple[VoxelGrid, MovingBoxes]:
    """The grid grown in x by a strip of bays, and the boxes, parked there."""
    if not tracks:
        return static, MovingBoxes.empty()
    size_m, width_m = static.voxel_size_m, static.upper_m[1] - static.lower_m[1]
    parked, x_m, y_m, row_m = [], static.upper_m[0], static.lower_m[1], 0.0
    for track in tracks:
        length_m, breadth_m, height_m = BOX_SCALE * track.size_m + _MARGIN_M
        if y_m + breadth_m > static.lower_m[1] + width_m:  # this row is full
            x_m, y_m, row_m = x_m + row_m, static.lower_m[1], 0.0
        centre_m = (x_m + length_m / 2, y_m + breadth_m / 2, static.lower_m[2] + height_m / 2)
        parked.append(poses.pose(centre_m, (1.0, 0.0, 0.0, 0.0)))
        y_m, row_m = y_m + breadth_m, max(row_m, length_m)
    tallest_m = max(BOX_SCALE * track.size_m[2] + _MARGIN_M for track in tracks)
    grown_m = np.array([x_m + row_m, static.upper_m[1], max(static.upper_m[2], static.lower_m[2] + tallest_m)])
    cells = np.ceil((grown_m - static.lower_m) / size_m - 1e-6)
    grid = VoxelGrid(static.lower_m, tuple(np.array(static.lower_m) + cells * size_m), size_m)
    rows = [
        (bay, pose, track.size_m, track.label, time)
        for bay, track in zip(parked, tracks, strict=True)
        for time, pose in track.poses.items()
    ]
    return grid, MovingBoxes.from_numpy(*(np.array(column) for column in zip(*rows, strict=True)))


@dataclass(frozen=True, eq=False)
class KeyframeLabels:
    """What a fitted scene says about one keyframe's label box, [X, Y, Z] each.

    Attributes:
        probability: float32 of being occupied.
        label: uint8, the class if it is occupied.
        seen: bool, whether any ray of the log asked anything of it.
    """

    probability: np.ndarray
    label: np.ndarray
    seen: np.ndarray

    def labels_at(self, threshold: float) -> np.ndarray:
        """uint8: the class, or FREE where the probability is not above the threshold."""
        return labels_above(threshold, self.probability, self.label)


def keyframe_labels(scene: Scene, fitted: FittedVoxels, k: int, grid: VoxelGrid = OCC3D_GRID) -> KeyframeLabels:
    """The fitted field around keyframe ``k``, moving objects where they are then."""
    scene_from_ego = scene.scene_from_global @ scene.keyframes[k].global_from_ego
    centres_m = poses.transform_points(scene_from_ego, grid.centres().reshape(-1, 3))
    points_m = torch.from_numpy(centres_m).float()
    batch = torch.zeros(len(points_m), dtype=torch.int64)
    points_m, present = scene.motion.content(points_m, torch.full_like(batch, k + 1), batch, fitted.field)
    probability = occupancy_probability(fitted.field.density(points_m, batch), grid.voxel_size_m)
    logits = fitted.field.semantics(points_m, batch)
    seen = nearest(fitted.seen[:, None].float(), scene.grid, points_m, batch)[:, 0] > 0
    return KeyframeLabels(
        torch.where(present, probability, 0.0).view(grid.shape).numpy(),
        logits.argmax(dim=1).to(torch.uint8).view(grid.shape).numpy(),
        (seen | ~present).view(grid.shape).numpy(),
    )


def predicted_range_m(scene: Scene, fitted: FittedVoxels, rays: Rays, chunk: int = 16384) -> np.ndarray:
    """Where rays [R] more likely end than not, metres; infinite where they more likely leave the grid."""
    found, motion = [], scene.motion
    for start in range(0, len(rays), chunk):
        part = rays[slice(start, start + chunk)]
        with torch.no_grad():
            found.append(median_range_m(render(fitted.field, part, scene.grid, motion), len(part)))
    return torch.cat(found).numpy() if found else np.zeros(0)


def median_range_m(rendered: RenderedRays, rays: int) -> torch.Tensor:
    """The distance [R] within which half of a ray ends; infinite where less than half does within the grid."""
    samples = rendered.samples
    total = samples.weight.cumsum(0, dtype=torch.float64)
    first = torch.searchsorted(samples.ray, torch.arange(rays))
    before = torch.cat([total.new_zeros(1), total])[first]  # what earlier rays add up to
    at = (total - before[samples.ray] >= 0.5).nonzero()[:, 0]
    share = ((0.5 - (total - before[samples.ray] - samples.weight)[at]) / samples.weight[at]).clamp(0, 1)
    candidate_m = samples.start_m[at] + (share * samples.length_m[at]).to(samples.start_m.dtype)
    # Of the samples beyond the half, the first one's place is the least.
    range_m = candidate_m.new_full((rays,), torch.inf)
    return range_m.scatter_reduce(0, samples.ray[at], candidate_m, "amin")
