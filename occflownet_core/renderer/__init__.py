# SPDX-License-Identifier: Apache-2.0
"""Differentiable rendering of an occupancy field: ``render`` is the one way in."""

from __future__ import annotations

import torch

from occflownet_core.grid import VoxelGrid
from occflownet_core.motion import StaticWorld
from occflownet_core.renderer.rays import Rays
from occflownet_core.renderer.surface import render_surface
from occflownet_core.renderer.traversal import render_traversal
from occflownet_core.renderer.volume import (
    RenderConfig,
    RenderedRays,
    RenderSamples,
    range_target,
    render_sampled,
)
from occflownet_core.voxel_field import Field, VoxelField

__all__ = ["Rays", "RenderConfig", "RenderSamples", "RenderedRays", "as_rendered", "range_target", "render"]


def render(
    field: Field,
    rays: Rays,
    grid: VoxelGrid,
    motion: StaticWorld | None = None,
    config: RenderConfig | None = None,
    generator: torch.Generator | None = None,
) -> RenderedRays:
    """What rays see in a field: range, class logits, opacity; differentiable in the field and in a learned motion.

    Args:
        field: the current frame's field (``OccupancyField`` or ``VoxelField``).
        rays: lines of sight in the current ego frame. Pass ``rays[motion.keeps(rays, grid)]`` for supervision: what the
            motion knows to be wrong in neighbour frames is not rendered wrongly, but should not be learned from.
        grid: the box that rays are rendered in, and the cells that traversal crosses.
        motion: what moved between a ray's time and now; None is a static world.
        config: how to render; None is the default, exact voxel traversal.
        generator: for stratified samples and steps.

    Raises:
        GeometryError: the field does not fit the grid.
        ConfigError: the config contradicts itself, or a surface is wanted of a field that has no slope.

    >>> from occflownet_core.grid import VoxelGrid
    >>> grid = VoxelGrid((0, 0, 0), (4, 1, 1), 1.0)
    >>> density = torch.tensor([0.0, 0.0, 100.0, 0.0]).view(1, 1, 1, 4)
    >>> rays = Rays.from_numpy([[0.0, 0.5, 0.5]], [[1.0, 0, 0]], [2.0], [4])
    >>> render(VoxelField(density, torch.zeros(1, 17, 1, 1, 4), grid), rays, grid).range_m
    tensor([2.0100])
    """
    motion = motion or StaticWorld()
    config = config or RenderConfig()
    by_points = {"sampled": render_sampled, "surface": render_surface}
    if config.method in by_points and config.sampled_field == "continuous":
        return by_points[config.method](field, rays, grid, motion, config, generator)
    field = as_rendered(field, grid, config)
    with torch.autocast(rays.range_m.device.type, enabled=False):
        if config.method == "traversal":
            return render_traversal(field.density_lattice, field.logits_lattice, rays, grid, motion, config)
        return by_points[config.method](field, rays, grid, motion, config, generator)


def as_rendered(field: Field, grid: VoxelGrid, config: RenderConfig) -> Field:
    """The field that ``render`` reads, as a function of points: the given one where it is read continuously, or its
    lattice between cell centres. Arguments as for ``render``, which gives the same for either."""
    if config.method != "traversal" and config.sampled_field == "continuous":
        return field
    # Optical depths add up over hundreds of cells: half precision ends with the network's output.
    lattice = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in field.lattice(grid))
    return VoxelField(*lattice, grid, "trilinear", config.alignment)
