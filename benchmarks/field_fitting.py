# SPDX-License-Identifier: Apache-2.0
"""Field fitting: the voxel field that one keyframe's rays ask for, without a network, held against ground truth.

``training.voxel_fitting`` fits it to rays of the keyframe's window through the project's own renderer, motion and
losses; what comes out shows what the labels say and how they are read, not what a network can see. A ``Row`` is one way to read them; all rows see the same keyframes, the same seeds and the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from occflownet_core.boxes import BoxIndex, MovingBoxes
from occflownet_core.errors import DatasetError
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.losses import LossConfig
from occflownet_core.metrics import ThresholdSweep
from occflownet_core.renderer import Rays, RenderConfig
from training.data.dataset import moving_boxes
from training.data.nuscenes import KeyframeIndex, load_occupancy
from training.data.rays import LidarRays, RayLimits, temporal_rays
from training.objective import make_motion
from training.settings import MotionSettings
from training.voxel_fitting import RECIPE, FitSettings, FittedVoxels, fit_voxels, voxel_activation

THRESHOLDS = (0.01, 0.02, *np.round(np.arange(0.05, 0.96, 0.05), 2).tolist())
MAX_HORIZON = 4


@dataclass(frozen=True)
class Row:
    """One way to turn a window's rays into a field.

    Attributes:
        title: for the table.
        reference: key of the row that this one is compared with; None for the first of all.
        horizon: keyframes before and after the current one whose rays count.
        motion: how those rays meet what moved.
        no_return_rays: whether directions without an echo are rays too.
        render: the renderer's switches.
        losses: the terms.
        density: activation, as in ``FieldConfig``; the scale is that of its published or default setting.
    """

    title: str
    reference: str | None
    horizon: int = 3
    motion: MotionSettings = field(default_factory=MotionSettings)
    no_return_rays: bool = True
    render: RenderConfig = field(default_factory=RenderConfig)
    losses: LossConfig = RECIPE
    density: Literal["softplus", "sigmoid"] = "softplus"


@dataclass(frozen=True)
class WindowSettings(FitSettings):
    """How fields are fitted, alike for all rows.

    Attributes:
        reach_m: fields end at this distance from the ego origin in x and y, a whole number of voxels.
    """

    reach_m: float = 16.0

    @property
    def grid(self) -> VoxelGrid:
        """The box of the fields, in Occ3D's voxels."""
        low, high, size = OCC3D_GRID.lower_m[2], OCC3D_GRID.upper_m[2], OCC3D_GRID.voxel_size_m
        return VoxelGrid((-self.reach_m, -self.reach_m, low), (self.reach_m, self.reach_m, high), size)


@dataclass(frozen=True, eq=False)
class Window:
    """What is known around one keyframe, in its ego frame.

    Attributes:
        rays: of all its keyframes.
        boxes: how annotated objects move in them.
    """

    rays: Rays
    boxes: MovingBoxes

    def seen_by(self, row: Row) -> Window:
        """What of it a row may use."""
        kept = self.rays.time_index.abs() <= row.horizon
        if not row.no_return_rays:
            kept &= self.rays.returned
        return Window(self.rays[kept], self.boxes[self.boxes.time_index.abs() <= row.horizon])


@dataclass(frozen=True, eq=False)
class Truth:
    """What a field is held against, [X, Y, Z] each.

    Attributes:
        labels: uint8.
        camera_mask: bool, voxels that a camera could see.
        swept: bool, voxels that lie in a moving object's box now or at a keyframe of the default window.
    """

    labels: np.ndarray
    camera_mask: np.ndarray
    swept: np.ndarray


def busiest_keyframes(index: KeyframeIndex, count: int, grid: VoxelGrid) -> list[int]:
    """The keyframes with most points on moving objects, at most one per scene, the busiest first.

    Only keyframes with ``MAX_HORIZON`` neighbours on both sides are considered. A point counts where a camera sees it,
    in the grid, and in a box that is somewhere else half a second later.

    Raises:
        DatasetError: fewer scenes than asked for have such a keyframe with such a point.
    """
    best = []
    for scene in index.scenes.values():
        inner = range(scene.start + MAX_HORIZON, scene.stop - MAX_HORIZON)
        counts = [(_moving_points(index, i, grid), i) for i in inner]
        best += [max(counts)] if counts else []
    chosen = [i for points, i in sorted(best, reverse=True) if points][:count]
    if len(chosen) < count:
        raise DatasetError(
            f"{len(chosen)} scenes of {index.dataroot} have a keyframe with {MAX_HORIZON} neighbours on both sides and "
            f"something moving in view; {count} are needed: make more scenes, of {2 * MAX_HORIZON + 1} keyframes or more"
        )
    return chosen


def _moving_points(index: KeyframeIndex, i: int, grid: VoxelGrid) -> int:
    rays = temporal_rays({0: (index[i], LidarRays().frame_rays(index[i]))}, RayLimits(grid))
    boxes = moving_boxes(index, i, 1).moving(still_m=0.2)
    later = torch.ones_like(rays.time_index)
    point, _, now = BoxIndex(boxes).inside(rays.end_m, later, rays.batch_index)
    return len(point[now].unique())


def load_window(index: KeyframeIndex, i: int, grid: VoxelGrid, half_pixel_offset: bool = False) -> Window:
    """All rays and boxes within ``MAX_HORIZON`` of keyframe ``i``.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    source = LidarRays(no_return=True, half_pixel_offset=half_pixel_offset)
    offsets = range(-MAX_HORIZON, MAX_HORIZON + 1)
    neighbours = {offset: j for offset in offsets if (j := index.neighbour(i, offset)) is not None}
    frames = {offset: (index[j], source.frame_rays(index[j])) for offset, j in neighbours.items()}
    return Window(temporal_rays(frames, RayLimits(grid)), moving_boxes(index, i, MAX_HORIZON))


def load_truth(index: KeyframeIndex, i: int, grid: VoxelGrid) -> Truth:
    """Ground truth of keyframe ``i`` in the grid, a part of Occ3D's.

    Raises:
        DatasetError: its file is missing or damaged.
    """
    labels, camera_mask, _ = load_occupancy(index[i], OCC3D_GRID)
    first = OCC3D_GRID.cells(np.array(grid.lower_m) + grid.voxel_size_m / 2)[0]
    part = tuple(slice(start, start + count) for start, count in zip(first, grid.shape, strict=True))
    return Truth(labels[part], camera_mask[part], swept_by_moving_boxes(moving_boxes(index, i, 3), grid))


def swept_by_moving_boxes(boxes: MovingBoxes, grid: VoxelGrid) -> np.ndarray:
    """True [X, Y, Z] where a voxel's centre lies in a moving object's box, now or at any neighbour keyframe."""
    index = BoxIndex(boxes.moving(still_m=0.2))
    centres_m = torch.from_numpy(grid.centres().reshape(-1, 3))
    batch = torch.zeros(len(centres_m), dtype=torch.int64)
    swept = torch.zeros(len(centres_m), dtype=torch.bool)
    for t in boxes.time_index.unique().tolist():
        swept[index.inside(centres_m, torch.full_like(batch, t), batch)[0]] = True
    return swept.view(grid.shape).numpy()


def fit(
    window: Window, row: Row, settings: WindowSettings, on_step: Callable[[], object] = lambda: None
) -> FittedVoxels:
    """The field that a window's rays ask for.

    Args:
        window: what is known; the row takes its part.
        row: how rays are read.
        settings: of the fit.
        on_step: called after each step.
    """
    window = window.seen_by(row)
    motion = make_motion(row.motion, window.boxes, settings.grid)
    rays = window.rays[motion.keeps(window.rays, settings.grid)]
    settings = settings if row.horizon else replace(settings, current_share=None)
    activation = voxel_activation(settings, row.density)
    return fit_voxels(
        rays, motion, settings.grid, settings, row.losses, row.render, activation, lambda terms: on_step()
    )


def confusion_matrices(fitted: FittedVoxels, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """[T, 18, 18] of a field at all ``THRESHOLDS``, both in the camera mask: everywhere, and only where ``swept``."""
    matrices = []
    for mask in (truth.camera_mask, truth.camera_mask & truth.swept):
        sweep = ThresholdSweep(THRESHOLDS)
        sweep.add(fitted.probability, fitted.label, truth.labels, mask)
        matrices.append(sweep.confusion_matrices())
    return matrices[0], matrices[1]


_STATIC, _FILTER, _FLOW = (MotionSettings(kind) for kind in ("static", "filter", "box_flow"))
_PUBLISHED_LOSSES = replace(RECIPE, range_error="squared", return_weight=0.0, opacity_weight=0.0)
_PUBLISHED_RENDERING = RenderConfig(
    method="sampled",
    range_target="camera_z",
    remainder="dropped",
    alignment="edges",
    half_pixel_offset=True,
    keep_proposal_samples=False,
)

ROWS = {
    "single": Row("single frame", None, horizon=0, motion=_STATIC),
    "static": Row("7 keyframes, static world", "single", motion=_STATIC),
    "filter": Row("7 keyframes, dynamic filter", "static", motion=_FILTER),
    "flow": Row("7 keyframes, box flow (the default)", "filter"),
    "flow_own_class": Row("box flow of the box's own class only", "flow", motion=replace(_FLOW, require_class=True)),
    "horizon_1": Row("box flow, horizon 1", "single", horizon=1),
    "horizon_2": Row("box flow, horizon 2", "horizon_1", horizon=2),
    "horizon_4": Row("box flow, horizon 4", "flow", horizon=4),
    "camera_z": Row("range against camera z", "flow", render=RenderConfig(range_target="camera_z")),
    "dropped": Row("remainder dropped", "flow", render=RenderConfig(remainder="dropped")),
    "sigmoid": Row("density capped at 1/m", "flow", density="sigmoid"),
    "half_pixel": Row("half a pixel added", "flow", render=RenderConfig(half_pixel_offset=True)),
    "sampled": Row("50 + 100 samples", "flow", render=RenderConfig(method="sampled")),
    "edges": Row(
        "50 + 100 samples, values on edges", "sampled", render=RenderConfig(method="sampled", alignment="edges")
    ),
    "no_holes": Row("without rays without return", "flow", no_return_rays=False),
    "no_return_loss": Row("without loss on the place of return", "flow", losses=replace(RECIPE, return_weight=0.0)),
    "plain": Row("published losses", "flow", losses=_PUBLISHED_LOSSES),
    "plain_camera_z": Row(
        "published losses, camera z",
        "plain",
        losses=_PUBLISHED_LOSSES,
        render=RenderConfig(range_target="camera_z"),
    ),
    "plain_dropped": Row(
        "published losses, remainder dropped",
        "plain",
        losses=_PUBLISHED_LOSSES,
        render=RenderConfig(remainder="dropped"),
    ),
    "published": Row(
        "as published: losses, rays and all six switches",
        "flow",
        no_return_rays=False,
        losses=_PUBLISHED_LOSSES,
        render=_PUBLISHED_RENDERING,
        density="sigmoid",
    ),
}
