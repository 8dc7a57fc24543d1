# SPDX-License-Identifier: Apache-2.0
"""Volume rendering by samples, as published: alpha, transmittance, weights, and what they add up to along a ray."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from occflownet_core.errors import ConfigError
from occflownet_core.grid import VoxelGrid
from occflownet_core.interpolate import Alignment
from occflownet_core.motion import StaticWorld
from occflownet_core.renderer.rays import Rays
from occflownet_core.renderer.samplers import grid_segment, intervals, merged, resampled, uniform
from occflownet_core.voxel_field import Field


@dataclass(frozen=True)
class RenderConfig:
    """How rays are rendered. The six points in which the published code can be bettered are all switches; four are
    here, the density's activation is ``FieldConfig.density``, and the half pixel that the published code adds to LiDAR
    projections belongs to whoever makes rays: ``half_pixel_offset`` is for it to read.

    Attributes:
        method: ``traversal`` of every crossed voxel, exact; ``sampled`` as published; or ``surface``, where the field
            first becomes occupied (``renderer.surface``).
        range_target: what a rendered range is compared with: the ray's own ``range``, or the return's z in its camera
            (``camera_z``), as published.
        remainder: what becomes of 1 - sum w, the chance of passing through everything: its share of the range is the
            ``far_end`` of the segment; or it is ``dropped`` as published, and rays that are not opaque come out short.
        sampled_field: what samples and surfaces read: the ``lattice``, decoded once per cell and then interpolated (as
            published), or the ``continuous`` field, decoded at every sample.
        alignment: where a lattice's values lie for the sampled and the surface renderer: cell ``centres``, or ``edges`` as published.
        half_pixel_offset: add half a pixel to projections that are already continuous, as published.
        proposal_samples: uniform samples of the first pass (published: 50).
        importance_samples: samples drawn from the first pass's weights (published: 100).
        keep_proposal_samples: the second pass also uses the first one's positions.
        stratified: draw positions at random within their bins rather than at the middle (training with samples).
        min_transmittance: traversal stops where less than this is left; ranges are then off by at most this share of
            the segment, logits by this share of the largest. 0 traverses everything.
        min_weight: voxels of smaller weight get no gradient in their logits from that ray; 0 keeps all. Rendered
            values and the gradient in density do not depend on it.
        surface_threshold: occupied is where a piece of ``surface_length_m`` is opaque with more than this probability.
        surface_length_m: that length; the edge of a label voxel makes surfaces those of thresholded labels.
        surface_steps: the march from the grid's near to its far side, in equal steps; what is thinner may be missed.
        surface_first_steps: of a training run's start (DVR begins coarse): doubled at equal shares of the run until it
            is ``surface_steps``. At least as many leaves nothing to double.
        secant_steps: of the refinement between the last free and the first occupied step (DVR: 8).
    """

    method: Literal["traversal", "sampled", "surface"] = "traversal"
    range_target: Literal["range", "camera_z"] = "range"
    remainder: Literal["far_end", "dropped"] = "far_end"
    sampled_field: Literal["lattice", "continuous"] = "lattice"
    alignment: Alignment = "centres"
    half_pixel_offset: bool = False
    proposal_samples: int = 50
    importance_samples: int = 100
    keep_proposal_samples: bool = True
    stratified: bool = False
    min_transmittance: float = 1e-4
    min_weight: float = 1e-5
    surface_threshold: float = 0.5
    surface_length_m: float = 0.4
    surface_steps: int = 256
    surface_first_steps: int = 256
    secant_steps: int = 8

    def __post_init__(self) -> None:
        choices = {
            "method": ("traversal", "sampled", "surface"),
            "range_target": ("range", "camera_z"),
            "remainder": ("far_end", "dropped"),
            "sampled_field": ("lattice", "continuous"),
            "alignment": ("centres", "edges"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"render.{name} is '{getattr(self, name)}'; choose {', '.join(allowed[:-1])} or {allowed[-1]}"
                )
        if self.proposal_samples < 2 or self.importance_samples < 0:
            raise ConfigError(
                f"render: {self.proposal_samples} proposal and {self.importance_samples} importance samples; "
                "give at least 2 and 0"
            )
        for name in ("min_transmittance", "min_weight"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"render.{name} is {getattr(self, name)}; give a value in [0, 1)")
        if not 0 < self.surface_threshold < 1:
            raise ConfigError(f"render.surface_threshold is {self.surface_threshold}; give a probability inside (0, 1)")
        if not 0 < self.surface_length_m < float("inf"):
            raise ConfigError(f"render.surface_length_m is {self.surface_length_m}; give positive metres")
        for name, least in (("surface_steps", 1), ("surface_first_steps", 1), ("secant_steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"render.{name} is {getattr(self, name)}; give at least {least}")

    def at(self, done: float) -> RenderConfig:
        """The config at a share ``done`` (0 to 1) of a training run: see ``surface_first_steps``.

        >>> [RenderConfig(surface_first_steps=64).at(done).surface_steps for done in (0, 0.5, 1)]
        [64, 128, 256]
        """
        doublings = max(math.ceil(math.log2(self.surface_steps / self.surface_first_steps)), 0)
        passed = min(int(done * (doublings + 1)), doublings)
        return replace(self, surface_steps=min(self.surface_first_steps << passed, self.surface_steps))


@dataclass(frozen=True)
class RenderSamples:
    """What a ray's values were added up from, packed ray after ray: for losses on the weights' distribution.

    Attributes:
        ray: [M] integer, ascending.
        start_m, length_m: [M], the sample's interval on its ray, in order.
        weight: [M], differentiable.
    """

    ray: Tensor
    start_m: Tensor
    length_m: Tensor
    weight: Tensor


@dataclass(frozen=True)
class RenderedRays:
    """What rays see.

    Attributes:
        range_m: [R] expected range; see ``RenderConfig.remainder``.
        logits: [R, K], sum of w L; the chance of passing through adds nothing.
        opacity: [R] sum of w, 0..1.
        far_m: [R] where the ray leaves the grid; 0 where it misses it (range, logits and opacity are 0 there too).
        samples: what they were added up from.
    """

    range_m: Tensor
    logits: Tensor
    opacity: Tensor
    far_m: Tensor
    samples: RenderSamples


def alpha(density: Tensor, length_m: Tensor) -> Tensor:
    """Opacity of intervals: 1 - exp(-s d) (Max 1995, eq. 3), any shape.

    >>> alpha(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.6931472]))
    tensor([0.0000, 0.5000])
    """
    return -torch.expm1(-density * length_m)


def transmittance(density: Tensor, length_m: Tensor) -> Tensor:
    """Chance of reaching each interval's start: T_i = prod_{j<i} (1 - alpha_j) = exp(-sum_{j<i} s_j d_j); [..., S]."""
    optical_depth = (density * length_m).cumsum(dim=-1)
    return torch.exp(-torch.cat([torch.zeros_like(optical_depth[..., :1]), optical_depth[..., :-1]], dim=-1))


def weights(density: Tensor, length_m: Tensor) -> Tensor:
    """Chance of ending in each interval: w_i = T_i alpha_i (NeRF, arXiv 2003.08934, eq. 3); [..., S]."""
    return transmittance(density, length_m) * alpha(density, length_m)


def with_remainder(range_m: Tensor, opacity: Tensor, far_m: Tensor, config: RenderConfig) -> Tensor:
    """Sum of w t [R], the remainder 1 - sum w treated as the config says."""
    return range_m + (1 - opacity) * far_m if config.remainder == "far_end" else range_m


def range_target(rays: Rays, config: RenderConfig) -> Tensor:
    """What rendered ranges are compared with, [R] metres.

    Raises:
        ConfigError: camera z is asked for and the rays do not carry ``axis_cosine``.
    """
    if config.range_target == "range":
        return rays.range_m
    if rays.axis_cosine is None:
        raise ConfigError("render.range_target is 'camera_z', but the rays have no axis_cosine; make rays with it")
    return rays.range_m * rays.axis_cosine


def content_at(
    field: Field, rays: Rays, motion: StaticWorld, t_m: Tensor, concerned: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where what rays meet at distances [R, S] lies in the field; the motion is asked along ``concerned`` rays [n] only.

    Returns:
        points [R * S, 3], batch [R * S], present [R, S] bool.
    """
    count = t_m.shape[1]
    points_m = rays.origin_m[:, None] + rays.direction[:, None] * t_m[..., None]  # [R, S, 3]
    present = torch.ones_like(t_m, dtype=torch.bool)
    if len(concerned):
        time_index, batch_index = (i[concerned].repeat_interleave(count) for i in (rays.time_index, rays.batch_index))
        moved_m, there = motion.content(points_m[concerned].view(-1, 3), time_index, batch_index, field)
        points_m = points_m.index_copy(0, concerned, moved_m.view(-1, count, 3))
        present[concerned] = there.view(-1, count)
    return points_m.view(-1, 3), rays.batch_index.repeat_interleave(count), present


def ask(field: Field, rays: Rays, motion: StaticWorld, t_m: Tensor, concerned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Density at distances [R, S], and where it was read; arguments as for ``content_at``.

    Returns:
        density [R, S], points [R * S, 3], batch [R * S].
    """
    points_m, batch_index, present = content_at(field, rays, motion, t_m, concerned)
    return field.density(points_m, batch_index).view_as(t_m) * present, points_m, batch_index


def render_sampled(
    field: Field,
    rays: Rays,
    grid: VoxelGrid,
    motion: StaticWorld,
    config: RenderConfig,
    generator: torch.Generator | None = None,
) -> RenderedRays:
    """Render by samples: uniform, then importance (METHOD: 50, then 100); arguments as for ``renderer.render``."""
    near_m, far_m = grid_segment(rays, grid)  # [R]
    concerned = motion.concerns(rays).nonzero()[:, 0]
    edges_m = uniform(near_m, far_m, config.proposal_samples)  # [R, S + 1]
    with torch.no_grad():
        t_m = positions(edges_m, config, generator)
        length_m = edges_m.diff(dim=-1)
        proposal = weights(ask(field, rays, motion, t_m, concerned)[0], length_m)
        drawn_m = resampled(edges_m, proposal, config.importance_samples, config.stratified, generator)
        t_m = merged(t_m, drawn_m) if config.keep_proposal_samples or not config.importance_samples else drawn_m
        start_m, length_m = intervals(t_m, near_m, far_m)
    density, points_m, batch_index = ask(field, rays, motion, t_m, concerned)
    weight = weights(density, length_m)  # [R, S]
    opacity = weight.sum(dim=-1)
    logits = field.semantics(points_m, batch_index)  # [R * S, K]
    return RenderedRays(
        with_remainder((weight * t_m).sum(dim=-1), opacity, far_m, config),
        (weight[:, None] @ logits.view(*t_m.shape, logits.shape[-1]))[:, 0],
        opacity,
        far_m,
        RenderSamples(
            torch.arange(len(rays), device=t_m.device).repeat_interleave(t_m.shape[1]),
            start_m.reshape(-1),
            length_m.reshape(-1),
            weight.reshape(-1),
        ),
    )


def positions(edges_m: Tensor, config: RenderConfig, generator: torch.Generator | None) -> Tensor:
    """One position [R, S] in each bin of edges [R, S + 1]: its middle, or stratified at random."""
    low, width = edges_m[:, :-1], edges_m.diff(dim=-1)
    if not config.stratified:
        return low + 0.5 * width
    return low + width * torch.rand(low.shape, generator=generator, dtype=low.dtype, device=low.device)
