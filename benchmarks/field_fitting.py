# SPDX-License-Identifier: Apache-2.0
"""Field fitting: the voxel field that one keyframe's rays ask for, without a network, held against ground truth.

Every voxel has a free density and free logits. Adam fits them to rays of the keyframe's window through the project's
own renderer, motion and losses; what comes out shows what the labels say and how they are read, not what a network
can see. A ``Row`` is one way to read them; all rows see the same keyframes, the same seeds and the same number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from occflownet_core.boxes import BoxIndex, MovingBoxes
from occflownet_core.errors import DatasetError
from occflownet_core.field import FieldConfig, FieldDecoder, occupancy_probability
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.labels import FREE, OCCUPIED_CLASSES
from occflownet_core.losses import LossConfig, ray_losses
from occflownet_core.metrics import ThresholdSweep
from occflownet_core.renderer import Rays, RenderConfig, render
from occflownet_core.voxel_field import VoxelField
from training.data.dataset import moving_boxes
from training.data.nuscenes import KeyframeIndex, load_occupancy
from training.data.rays import LidarRays, RayLimits, temporal_rays
from training.objective import draw_rays, make_motion
from training.settings import MotionSettings

THRESHOLDS = (0.01, 0.02, *np.round(np.arange(0.05, 0.96, 0.05), 2).tolist())
MAX_HORIZON = 4
RECIPE = LossConfig(return_weight=1.0, range_error="huber", range_weight=0.05, opacity_weight=0.2, semantic_weight=1.0)
"""The ray losses that ``training/configs/minicity_tiny.yaml`` trains with."""


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
class FitSettings:
    """How fields are fitted, alike for all rows.

    Attributes:
        steps: of Adam, the learning rate falling to zero along a cosine.
        rays_per_step: drawn at random from the window.
        current_share: of them from the current keyframe, as ``minicity_tiny.yaml`` draws them.
        density_rate, logit_rate: learning rates of what the density's activation takes, and of logits.
        initial_density_per_m: where every voxel starts, so low that what no ray crosses stays free at any threshold.
        forgetting: how fast a voxel for which nothing speaks any more returns there: before surfaces have formed, rays
            pull at everything behind them as well (AdamW's weight decay).
        least_share: density gradients far below this share of the first step's root mean square move nothing (Adam's
            epsilon): relative, because rows differ in what their losses weigh.
        least_logit_gradient: the same for logits, whose loss all rows share.
        reach_m: fields end at this distance from the ego origin in x and y, a whole number of voxels.
        seed: of the drawn rays.
    """

    steps: int = 32
    rays_per_step: int = 8192
    current_share: float = 0.3
    density_rate: float = 0.6
    logit_rate: float = 0.6
    initial_density_per_m: float = 0.02
    forgetting: float = 0.1
    least_share: float = 0.2
    least_logit_gradient: float = 1e-5
    reach_m: float = 16.0
    seed: int = 0

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


@dataclass(frozen=True, eq=False)
class FittedField:
    """A fitted field on its grid.

    Attributes:
        probability: float32 [X, Y, Z] of being occupied.
        label: uint8 [X, Y, Z], the class that a voxel has if it is occupied.
        terms: the last step's loss terms.
    """

    probability: np.ndarray
    label: np.ndarray
    terms: dict[str, float]

    def labels_at(self, threshold: float) -> np.ndarray:
        """uint8 [X, Y, Z]: the class, or FREE where the probability is not above the threshold."""
        return np.where(self.probability > threshold, self.label, FREE).astype(np.uint8)


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


def fit(window: Window, row: Row, settings: FitSettings, on_step: Callable[[], object] = lambda: None) -> FittedField:
    """The field that a window's rays ask for.

    Args:
        window: what is known; the row takes its part.
        row: how rays are read.
        settings: of the fit.
        on_step: called after each step.
    """
    grid, activation = settings.grid, _activation(row, settings)
    window = window.seen_by(row)
    motion = make_motion(row.motion, window.boxes, grid)
    rays = window.rays[motion.keeps(window.rays, grid)]
    current_share = settings.current_share if row.horizon else None
    generator = torch.Generator().manual_seed(settings.seed)
    start = activation.density_head[-1].bias.detach()
    evidence = torch.zeros((1, *grid.shape[::-1]), requires_grad=True)  # for a voxel being occupied, [1, Z, Y, X]
    table = torch.zeros((1, *grid.shape[::-1], OCCUPIED_CLASSES), requires_grad=True)  # [1, Z, Y, X, 17]
    optimizer = torch.optim.AdamW(
        [
            {"params": [evidence], "lr": settings.density_rate, "weight_decay": settings.forgetting},
            {"params": [table], "lr": settings.logit_rate, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        eps=settings.least_logit_gradient,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    for step in range(settings.steps):
        drawn = draw_rays(rays, settings.rays_per_step, current_share, generator)
        seen_field = VoxelField(activation.density(start + evidence), table.movedim(-1, 1), grid)
        rendered = render(seen_field, drawn, grid, motion, row.render, generator)
        terms = ray_losses(rendered, drawn, row.losses, row.render)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        if step == 0:
            optimizer.param_groups[0]["eps"] = settings.least_share * _typical(evidence.grad)
        optimizer.step()
        schedule.step()
        on_step()
    with torch.no_grad():
        probability = occupancy_probability(activation.density(start + evidence[0]), grid.voxel_size_m)
        label = table[0].argmax(dim=-1).to(torch.uint8)  # [Z, Y, X]
    return FittedField(
        probability.permute(2, 1, 0).numpy(),
        label.permute(2, 1, 0).numpy(),
        {name: term.item() for name, term in terms.items()},
    )


def _typical(gradient: Tensor) -> float:
    """Root mean square of what is not zero."""
    return gradient[gradient != 0].square().mean().sqrt().item()


def _activation(row: Row, settings: FitSettings) -> FieldDecoder:
    """A decoder of which only the activation and its start are used: here voxels take the place of perceptrons."""
    scale_per_m = 1.0 if row.density == "sigmoid" else FieldConfig.density_scale_per_m
    return FieldDecoder(
        FieldConfig(1, 1, 1, row.density, scale_per_m, initial_density_per_m=settings.initial_density_per_m)
    )


def confusion_matrices(fitted: FittedField, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
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
