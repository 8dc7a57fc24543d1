# SPDX-License-Identifier: Apache-2.0
"""Objective: what a field is compared with in one training step. Rays through motion and renderer, voxels, LiDAR depth."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from occflownet_core.errors import DatasetError
from occflownet_core.losses import depth_distribution_loss, ray_losses, voxel_losses
from occflownet_core.model import ModelOutput
from occflownet_core.motion import BoxFlow, DynamicFilter, StaticWorld
from occflownet_core.renderer import Rays, render
from training.data.batch import OccupancyBatch
from training.settings import MotionSettings, TrainingConfig


class Objective:
    """The weighted loss terms of a batch.

    Args:
        config: the run.

    Attributes:
        motion_s: seconds that the last call spent on motion (of the host; a GPU may still be at work).
        rays: number of rays that the last call rendered.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.render_grid = config.model.grid.coarsened(config.supervision.render_coarsening)
        self.motion_s = 0.0
        self.rays = 0

    def __call__(self, output: ModelOutput, batch: OccupancyBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted terms by name; their sum is the loss.

        Args:
            output: of the network.
            batch: its labels.
            generator: of the drawn rays (on the CPU).
        """
        kind, weight = self.config.supervision.kind, self.config.losses.depth_weight
        self.motion_s, self.rays = 0.0, 0
        terms: dict[str, Tensor] = {}
        if kind != "3d":
            terms |= self.ray_terms(output, batch, generator)
        if kind != "2d":
            terms |= self.voxel_terms(output, batch)
        if weight and batch.depth_m is not None:
            terms["depth"] = weight * self.depth_term(output.depth_logits, batch.depth_m)
        return terms

    def ray_terms(self, output: ModelOutput, batch: OccupancyBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """2D supervision: rays of several keyframes, rendered in the current field through the motion."""
        if batch.rays is None:
            raise DatasetError(f"samples {', '.join(batch.tokens)} came without rays; give the loader a source of rays")
        settings, grid = self.config.supervision, self.render_grid
        motion = TimedMotion(make_motion(self.config.motion, batch))
        rays = draw_rays(batch.rays, settings.rays_per_step, settings.current_share, generator)
        rays = rays[motion.keeps(rays, grid)]
        rendered = render(output.field, rays, grid, motion, self.config.rendering, generator)
        self.motion_s, self.rays = motion.seconds, len(rays)
        return ray_losses(rendered, rays, self.config.losses, self.config.rendering)

    def voxel_terms(self, output: ModelOutput, batch: OccupancyBatch) -> dict[str, Tensor]:
        """3D supervision: ground-truth voxels."""
        grid = self.config.model.grid
        density, logits = output.field.lattice(grid)
        return voxel_losses(density, logits, batch.labels, grid.voxel_size_m, batch.camera_mask, self.config.losses)

    def depth_term(self, depth_logits: Tensor, depth_m: Tensor) -> Tensor:
        """LiDAR depth [B, N, h, w] against the distributions [B, N, D, h, w]; cells without a return do not count."""
        return depth_distribution_loss(depth_logits.flatten(0, 1), depth_m.flatten(0, 1), self.config.model.depth.bins)


def make_motion(settings: MotionSettings, batch: OccupancyBatch) -> StaticWorld:
    """The motion that the settings ask for, over a batch's boxes."""
    if settings.kind == "static":
        return StaticWorld()
    if settings.kind == "filter":
        return DynamicFilter()
    if batch.boxes is None:
        raise DatasetError(f"samples {', '.join(batch.tokens)} came without boxes, which motion.kind 'box_flow' needs")
    return BoxFlow(batch.boxes, settings.box_scale, settings.require_class)


def draw_rays(rays: Rays, count: int, current_share: float | None, generator: torch.Generator) -> Rays:
    """At most ``count`` rays at random; of them, if asked for, a given share from the current keyframe."""
    if current_share is None or len(rays) <= count:
        return rays.sample(count, generator)
    now = rays.time_index == 0
    current = rays[now].sample(round(count * current_share), generator)
    return Rays.cat([current, rays[~now].sample(count - len(current), generator)])


class TimedMotion(StaticWorld):
    """Another motion, with a stopwatch.

    Attributes:
        seconds: spent in the motion so far.
    """

    def __init__(self, motion: StaticWorld) -> None:
        self.motion, self.continuous, self.seconds = motion, motion.continuous, 0.0

    def _timed(self, method, *arguments):
        began = time.perf_counter()
        result = method(*arguments)
        self.seconds += time.perf_counter() - began
        return result

    def keeps(self, rays, grid):
        return self._timed(self.motion.keeps, rays, grid)

    def content(self, points_m, time_index, batch_index, field):
        return self._timed(self.motion.content, points_m, time_index, batch_index, field)

    def pieces(self, rays):
        return self._timed(self.motion.pieces, rays)

    def asks_points(self, rays):
        return self._timed(self.motion.asks_points, rays)

    def neighbour_presence(self, logits):
        return self._timed(self.motion.neighbour_presence, logits)
