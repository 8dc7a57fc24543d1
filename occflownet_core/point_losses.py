# SPDX-License-Identifier: Apache-2.0
"""What rays say about single points, whatever renders them: free before a return, occupied and of a class at it.

Occupancy Networks (Mescheder et al., CVPR 2019) learn from such points alone; DVR (arXiv 1912.07372) from them where
its surfaces are missing or wrong, since a ray that meets no surface has no depth to be corrected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from occflownet_core.grid import VoxelGrid
from occflownet_core.losses import LossConfig, class_weights, occupancy_loss, ray_losses, semantic_loss
from occflownet_core.motion import StaticWorld
from occflownet_core.renderer import Rays, RenderConfig, RenderedRays, as_rendered, render
from occflownet_core.renderer.samplers import grid_segment
from occflownet_core.renderer.volume import ask, content_at
from occflownet_core.voxel_field import Field


def supervised_rays(
    field: Field,
    rays: Rays,
    grid: VoxelGrid,
    motion: StaticWorld,
    losses: LossConfig,
    rendering: RenderConfig,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Weighted terms of rays, by name: what is rendered along them, and points on them.

    Args:
        field, rays, grid, motion: as for ``renderer.render``.
        losses: terms and weights.
        rendering: how; points are read of the very field that is rendered.
        generator: of samples and points (on the CPU).

    Raises:
        ConfigError: see ``LossConfig.check_method``.
    """
    field = as_rendered(field, grid, rendering) if losses.reads_points else field
    rendered = render(field, rays, grid, motion, rendering, generator)
    terms = ray_losses(rendered, rays, losses, rendering)
    if losses.reads_points:
        terms |= point_losses(field, rendered, rays, grid, motion, losses, rendering, generator)
    return terms


def point_losses(
    field: Field,
    rendered: RenderedRays,
    rays: Rays,
    grid: VoxelGrid,
    motion: StaticWorld,
    losses: LossConfig,
    rendering: RenderConfig,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Weighted terms of points on rays, by name; arguments as for ``supervised_rays``, and what was rendered."""
    length_m = rendering.surface_length_m
    terms: dict[str, Tensor] = {}
    if losses.free_point_weight:
        surface_m = rendered.range_m.detach() if rendering.method == "surface" else None
        ray, t_m = free_points(rays, grid, losses.free_space_margin_m, surface_m, generator)
        density = _density(field, rays[ray], motion, t_m)
        free = occupancy_loss(density, torch.zeros_like(density, dtype=torch.bool), length_m)
        terms["free_point"] = losses.free_point_weight * free
    returned = rays[rays.returned]
    if losses.occupied_point_weight:
        depth_m = losses.occupied_depth_m * _uniform(returned.range_m, generator)
        density = _density(field, returned, motion, returned.range_m + depth_m)
        occupied = occupancy_loss(density, torch.ones_like(density, dtype=torch.bool), length_m)
        terms["occupied_point"] = losses.occupied_point_weight * occupied
    if losses.point_semantic_weight:
        points_m, batch_index, _ = content_at(
            field, returned, motion, returned.range_m[:, None], _asked(returned, motion)
        )
        logits = field.semantics(points_m, batch_index)
        weight = class_weights().to(logits)[returned.label] if losses.class_weighted else None
        terms["point_semantic"] = losses.point_semantic_weight * semantic_loss(logits, returned.label, weight)
    return terms


def free_points(
    rays: Rays, grid: VoxelGrid, margin_m: float, surface_m: Tensor | None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Points that rays say are free: one at random on each, and rendered surfaces that lie among what is free.

    Args:
        rays: [R]; those without return are free to the grid's edge.
        grid: where points may lie.
        margin_m: how far before the return free ends.
        surface_m: [R] rendered ranges, or None.

    Returns:
        ray [n] int64, t_m [n] distance on it.
    """
    near_m, far_m = grid_segment(rays, grid)
    end_m = torch.minimum(rays.range_m - margin_m, far_m)
    ray = (end_m > near_m).nonzero()[:, 0]
    t_m = near_m[ray] + (end_m - near_m)[ray] * _uniform(near_m[ray], generator)
    if surface_m is None:
        return ray, t_m
    early = (surface_m < end_m).nonzero()[:, 0]
    return torch.cat([ray, early]), torch.cat([t_m, surface_m[early]])


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator).to(like)


def _asked(rays: Rays, motion: StaticWorld) -> Tensor:
    return motion.concerns(rays).nonzero()[:, 0]


def _density(field: Field, rays: Rays, motion: StaticWorld, t_m: Tensor) -> Tensor:
    """Density [R] of what rays meet at one distance [R] each."""
    return ask(field, rays, motion, t_m[:, None], _asked(rays, motion))[0][:, 0]
