# SPDX-License-Identifier: Apache-2.0
"""Objective: what a field is compared with in one training step. Rays through motion and renderer, voxels, LiDAR depth."""

from __future__ import annotations

import time
from typing import TypeVar

import torch
from torch import Tensor

from occflownet_core.boxes import MovingBoxes
from occflownet_core.errors import DatasetError
from occflownet_core.field import OccupancyField
from occflownet_core.grid import VoxelGrid
from occflownet_core.interpolate import trilinear
from occflownet_core.labels import FREE
from occflownet_core.losses import (
    class_weights,
    depth_distribution_loss,
    flow_smoothness_loss,
    semantic_loss,
    static_flow_loss,
    velocity_loss,
    voxel_losses,
)
from occflownet_core.model import ModelOutput, ObservedImages
from occflownet_core.motion import BoxFlow, DynamicFilter, LearnedFlow, StaticWorld, StillWorld, box_velocities
from occflownet_core.photometric import (
    PatchMatcher,
    depth_matching_loss,
    draw_encoder_pixels,
    draw_pixels,
    photometric_losses,
)
from occflownet_core.point_losses import supervised_rays
from occflownet_core.renderer import Rays
from occflownet_core.views import Views
from training.data.batch import OccupancyBatch
from training.settings import MotionSettings, TrainingConfig

T = TypeVar("T")


class Objective:
    """The weighted loss terms of a batch.

    Args:
        config: the run.

    Attributes:
        done: share of the run that is over, 0 to 1, for what changes in its course; whoever runs it sets it.
        motion_s: seconds that the last call spent on motion (of the host; a GPU may still be at work).
        rays: number of rays that the last call rendered.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.render_grid = config.model.grid.coarsened(config.supervision.render_coarsening)
        self.done = 0.0
        self.motion_s = 0.0
        self.rays = 0

    def __call__(self, output: ModelOutput, batch: OccupancyBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted terms by name; their sum is the loss.

        Args:
            output: of the network.
            batch: its labels.
            generator: of the drawn rays (on the CPU).
        """
        supervision = self.config.supervision
        self.motion_s, self.rays = 0.0, 0
        terms: dict[str, Tensor] = {}
        if supervision.renders:
            terms |= self.ray_terms(output, batch, generator)
        if supervision.reads_voxels:
            terms |= self.voxel_terms(output, batch)
        if self.config.photometric.asks_field:
            terms |= self.photometric_terms(output, batch, generator)
        return terms | self.image_terms(output.seen, batch, generator)

    def ray_terms(self, output: ModelOutput, batch: OccupancyBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """2D supervision: rays of several keyframes, rendered in the current field through the motion."""
        if batch.rays is None:
            raise DatasetError(f"samples {', '.join(batch.tokens)} came without rays; give the loader a source of rays")
        settings, grid = self.config.supervision, self.render_grid
        velocity_mps = output.field.velocity_lattice() if self.config.learns_velocity else None
        boxes = required_boxes(batch) if self.config.motion.kind == "box_flow" else None
        motion = TimedMotion(make_motion(self.config.motion, boxes, output.field.grid, velocity_mps))
        rays = draw_rays(batch.rays, settings.rays_per_step, settings.current_share, generator)
        rays = rays[motion.keeps(rays, grid)]
        rendering = self.config.rendering.at(self.done)
        terms = supervised_rays(output.field, rays, grid, motion, self.config.losses, rendering, generator)
        self.motion_s, self.rays = motion.seconds, len(rays)
        return terms if velocity_mps is None else terms | self.velocity_terms(velocity_mps, output.field, batch)

    def velocity_terms(self, velocity_mps: Tensor, field: OccupancyField, batch: OccupancyBatch) -> dict[str, Tensor]:
        """Priors on the field's velocity, and annotated boxes where they are asked for, on the working grid."""
        losses, terms = self.config.losses, {}
        if losses.flow_smoothness_weight:
            terms["flow_smoothness"] = losses.flow_smoothness_weight * flow_smoothness_loss(velocity_mps)
        if losses.static_flow_weight:
            logits = field.lattice()[1]
            terms["static_flow"] = losses.static_flow_weight * static_flow_loss(velocity_mps, logits)
        if losses.box_velocity_weight:
            sample, cell, wanted_mps = box_velocities(required_boxes(batch), field.grid)
            error = velocity_loss(velocity_mps.flatten(2).movedim(1, -1)[sample, cell], wanted_mps)
            terms["box_velocity"] = losses.box_velocity_weight * error
        return terms

    def photometric_terms(
        self, output: ModelOutput, batch: OccupancyBatch, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Supervision by images alone: pixels of several keyframes that see what stands still."""
        settings, rendering, views = self.config.photometric, self.config.rendering.at(self.done), required_views(batch)
        pixels = draw_pixels(views, settings.pixels_per_step, self.still(batch), self.render_grid, generator)
        self.rays += len(pixels)
        return photometric_losses(
            output.field.colored(), views, pixels, self.render_grid, settings, rendering, generator
        )

    def depth_matching(self, seen: ObservedImages, batch: OccupancyBatch, generator: torch.Generator) -> Tensor:
        """How far the image encoder's depths are from where its pixels match other views."""
        views, logits = required_views(batch), seen.depth_logits
        shape = (*logits.shape[:2], *logits.shape[3:])
        size_px = (batch.images.shape[3], batch.images.shape[2])
        count = self.config.photometric.pixels_per_step
        pixels, image, cell = draw_encoder_pixels(views, batch.encoder_pixels, shape, size_px, count, generator)
        still = self.still(batch).keeps(pixels.rays, self.render_grid)
        pixels, image, cell = pixels[still], image[still], cell[still]
        drawn = logits.flatten(0, 1).flatten(2)[image, :, cell]  # [R, D]
        depth_m = batch.encoder_pixels.bin_depth_m.flatten(0, 1)[image]
        return depth_matching_loss(drawn, depth_m, PatchMatcher(views, pixels), pixels)

    def still(self, batch: OccupancyBatch) -> StaticWorld:
        """What leaves out the pixels of what moves, where boxes say so."""
        if self.config.motion.kind != "box_flow":
            return StaticWorld()
        return StillWorld(required_boxes(batch), self.config.photometric.box_scale)

    def voxel_terms(self, output: ModelOutput, batch: OccupancyBatch) -> dict[str, Tensor]:
        """3D supervision: ground-truth voxels."""
        grid = self.config.model.grid
        density, logits = output.field.lattice(grid)
        return voxel_losses(density, logits, batch.labels, grid.voxel_size_m, batch.camera_mask, self.config.losses)

    def image_terms(self, seen: ObservedImages, batch: OccupancyBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """What supervises the image encoder by itself: LiDAR returns in the images, against depth distributions and classes
        (cells without a return do not count), and depths that match other views."""
        losses, terms = self.config.losses, {}
        if weight := self.config.photometric.depth_weight:
            terms["depth_matching"] = weight * self.depth_matching(seen, batch, generator)
        if batch.depth_m is None:
            return terms
        if losses.depth_weight:
            depth = depth_distribution_loss(
                seen.depth_logits.flatten(0, 1), batch.depth_m.flatten(0, 1), self.config.model.depth.bins
            )
            terms["depth"] = losses.depth_weight * depth
        if losses.image_semantic_weight:
            known = batch.depth_label < FREE
            label = batch.depth_label[known].long()
            weight = class_weights().to(seen.class_logits)[label] if losses.class_weighted else None
            error = semantic_loss(seen.class_logits.movedim(2, -1)[known], label, weight)
            terms["image_semantic"] = losses.image_semantic_weight * error
        return terms


def make_motion(
    settings: MotionSettings, boxes: MovingBoxes | None, grid: VoxelGrid, velocity_mps: Tensor | None = None
) -> StaticWorld:
    """The motion that the settings ask for, over annotated boxes or the field's own velocity [B, 3, Z, Y, X] on its grid."""
    if settings.kind == "static":
        return StaticWorld()
    if settings.kind == "filter":
        return DynamicFilter()
    if settings.kind == "learned":
        return LearnedFlow(lambda points_m, batch_index: trilinear(velocity_mps, grid, points_m, batch_index))
    return BoxFlow(boxes, settings.box_scale, settings.require_class)


def required_views(batch: OccupancyBatch) -> Views:
    """The batch's views.

    Raises:
        DatasetError: it has none.
    """
    return _required(batch.views, batch, "views, which photometric terms need")


def required_boxes(batch: OccupancyBatch) -> MovingBoxes:
    """The batch's boxes.

    Raises:
        DatasetError: it has none.
    """
    return _required(batch.boxes, batch, "boxes, which occupancy flow needs")


def _required(part: T | None, batch: OccupancyBatch, which: str) -> T:
    if part is None:
        raise DatasetError(f"samples {', '.join(batch.tokens)} came without {which}")
    return part


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

    def concerns(self, rays):
        return self._timed(self.motion.concerns, rays)

    def pieces(self, rays):
        return self._timed(self.motion.pieces, rays)

    def asks_points(self, rays):
        return self._timed(self.motion.asks_points, rays)

    def neighbour_presence(self, logits):
        return self._timed(self.motion.neighbour_presence, logits)
