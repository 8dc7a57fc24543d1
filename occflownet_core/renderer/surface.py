# SPDX-License-Identifier: Apache-2.0
"""Surface rendering: a ray ends where the field first becomes occupied, and learns through that point alone.

Differentiable volumetric rendering (DVR; Niemeyer et al., CVPR 2020, arXiv 1912.07372, section 3). Free and occupied
are the two sides of f = tau, f(p) being the probability that a short length of the density at p is opaque. Three steps,
the first two without gradient: ``march`` finds the first step from free to occupied, ``refine`` where f = tau within it,
and the range d gets its gradient from f(o + d w) = tau: dd/dtheta = -(df/dtheta) / (df/dd). No step of the march is
stored, so memory does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from occflownet_core.errors import ConfigError
from occflownet_core.grid import VoxelGrid
from occflownet_core.motion import StaticWorld
from occflownet_core.renderer.rays import Rays
from occflownet_core.renderer.samplers import grid_segment
from occflownet_core.renderer.volume import RenderConfig, RenderedRays, RenderSamples, alpha, ask, content_at
from occflownet_core.voxel_field import Field

Excess = Callable[[Tensor, Tensor], Tensor]
"""(ray [n], t_m [n, S]) -> f - tau [n, S] at distances along rays; at least 0 is occupied."""

_POINTS_AT_A_TIME = 32_768
_LEAST_SLOPE_PER_M = 0.01
_SLOPE_REACH_M = 0.01


@dataclass(frozen=True)
class Brackets:
    """Stretches that surfaces lie in, of the rays that meet one.

    Attributes:
        ray: [H] int64.
        free_m, occupied_m: [H] the last free and the first occupied step.
        free_excess, occupied_excess: [H] f - tau there, below 0 and not below 0.
    """

    ray: Tensor
    free_m: Tensor
    occupied_m: Tensor
    free_excess: Tensor
    occupied_excess: Tensor


@torch.no_grad()
def march(
    excess: Excess, near_m: Tensor, far_m: Tensor, steps: int, late: Tensor | None = None
) -> tuple[Brackets, Tensor]:
    """The first step from free to occupied of every ray that has one; leaving something is never such a step.

    Args:
        excess: the field along the rays.
        near_m, far_m: [R] where to march; rays with far <= near are left out.
        steps: equal ones, from near.
        late: [R] in [0, 1), by which share of a step the whole march is drawn back; None: not at all.

    Returns:
        brackets, their rays in no order; and the rays [n] that begin occupied.
    """
    ray = (far_m > near_m).nonzero()[:, 0]
    step_m = (far_m - near_m) / steps
    first_m = near_m if late is None else near_m - late * step_m
    t_m, value = near_m[ray, None], excess(ray, near_m[ray, None])  # [n, 1]: where each stands
    inside = value[:, 0] >= 0
    began_inside, parts, taken = ray[inside], [], 0
    ray, t_m, value = ray[~inside], t_m[~inside], value[~inside]
    while len(ray) and taken < steps:
        count = min(max(_POINTS_AT_A_TIME // len(ray), 1), steps - taken)
        number = torch.arange(taken + 1, taken + count + 1, device=near_m.device)
        t_m = torch.cat([t_m, first_m[ray, None] + step_m[ray, None] * number], dim=1)  # [n, 1 + S]
        value = torch.cat([value, excess(ray, t_m[:, 1:])], dim=1)
        occupied = value[:, 1:] >= 0
        met = occupied.any(dim=1)
        row, column = met.nonzero()[:, 0], occupied[met].int().argmax(dim=1)  # the first of several
        between = (t_m[row, column], t_m[row, column + 1], value[row, column], value[row, column + 1])
        parts.append(Brackets(ray[row], *between))
        ray, t_m, value = ray[~met], t_m[~met, -1:], value[~met, -1:]
        taken += count
    columns = ((getattr(part, name) for part in parts) for name in Brackets.__dataclass_fields__)
    none = Brackets(ray[:0], *[near_m[:0]] * 4)
    return Brackets(*(torch.cat(list(column)) for column in columns)) if parts else none, began_inside


@torch.no_grad()
def refine(excess: Excess, brackets: Brackets, steps: int) -> Tensor:
    """Where f = tau within brackets, [H]: false position, an end that stays twice counting half (Illinois method).

    Plain false position, as DVR has it, creeps where f bends: one end never moves.
    """
    free_m, occupied_m = brackets.free_m, brackets.occupied_m
    free, occupied = brackets.free_excess, brackets.occupied_excess
    side = torch.zeros_like(free)
    t_m = free_m - free * (occupied_m - free_m) / (occupied - free)
    for _ in range(steps):
        value = excess(brackets.ray, t_m[:, None])[:, 0]
        behind = value >= 0
        free = torch.where(behind, torch.where(side > 0, 0.5 * free, free), value)
        occupied = torch.where(behind, value, torch.where(side < 0, 0.5 * occupied, occupied))
        free_m, occupied_m = torch.where(behind, free_m, t_m), torch.where(behind, t_m, occupied_m)
        side = torch.where(behind, 1.0, -1.0).to(side)
        t_m = free_m - free * (occupied_m - free_m) / (occupied - free)
    return t_m


class ImplicitRange(torch.autograd.Function):
    """A range d [H] whose gradient is that of f(d; theta) = tau: dd/dtheta = -(df/dtheta) / (df/dd) (DVR, section 3).

    ``apply(range_m, value, slope_per_m)``: the range found without gradient, f there, and df/dd. Where a ray grazes, the
    slope is taken as ``_LEAST_SLOPE_PER_M``, its sign kept: a bound that lost it would push surfaces the wrong way.
    """

    @staticmethod
    def forward(ctx, range_m: Tensor, value: Tensor, slope_per_m: Tensor) -> Tensor:
        ctx.save_for_backward(slope_per_m)
        return range_m.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor, None]:
        (slope_per_m,) = ctx.saved_tensors
        return None, -gradient / bounded_slope(slope_per_m), None


def bounded_slope(slope_per_m: Tensor) -> Tensor:
    """Slopes [H] no nearer to zero than ``_LEAST_SLOPE_PER_M``, of the same sign; zero itself counts as rising.

    >>> bounded_slope(torch.tensor([2.0, 0.0, -0.001]))
    tensor([ 2.0000,  0.0100, -0.0100])
    """
    return torch.copysign(slope_per_m.abs().clamp(min=_LEAST_SLOPE_PER_M), slope_per_m)


def render_surface(
    field: Field,
    rays: Rays,
    grid: VoxelGrid,
    motion: StaticWorld,
    config: RenderConfig,
    generator: torch.Generator | None = None,
) -> RenderedRays:
    """Render surfaces; arguments as for ``renderer.render``.

    A ray ends at the first surface that it enters: opacity 1, the logits there (whose gradient moves the surface too),
    one entry of length 0 and weight 1 in ``samples``. A miss has range +inf, opacity and logits 0. A ray that begins
    occupied ends where it begins: range 0 (or where it enters the grid), nothing in ``samples``, no gradient.

    Content that moved is asked for at every step; there the slope along the ray is a difference over 2 cm, and logits
    move the surface only where the motion itself is differentiable.

    Raises:
        ConfigError: gradients are wanted, and the field is constant within its cells.
    """
    near_m, far_m = grid_segment(rays, grid)
    concerned = motion.concerns(rays)  # [R]

    def probability(ray: Tensor, t_m: Tensor) -> Tensor:
        density = ask(field, rays[ray], motion, t_m, concerned[ray].nonzero()[:, 0])[0]
        return alpha(density, config.surface_length_m)

    def excess(ray: Tensor, t_m: Tensor) -> Tensor:
        return probability(ray, t_m) - config.surface_threshold

    late = torch.rand(far_m.shape, generator=generator).to(far_m) if config.stratified else None
    brackets, inside = march(excess, near_m, far_m, config.surface_steps, late)
    hit, order = brackets.ray.sort()
    hit_m = refine(excess, brackets, config.secant_steps)[order]
    if torch.is_grad_enabled():
        hit_m = implicit_range(probability, hit, hit_m, concerned[hit].nonzero()[:, 0])
    ended, end_m = torch.cat([hit, inside]), torch.cat([hit_m, near_m[inside]])
    points_m, batch_index, _ = content_at(field, rays[ended], motion, end_m[:, None], concerned[ended].nonzero()[:, 0])
    logits = field.semantics(points_m, batch_index)  # [n, K]
    return RenderedRays(
        torch.full_like(far_m, torch.inf).index_copy(0, ended, end_m),
        logits.new_zeros(len(rays), logits.shape[1]).index_copy(0, ended, logits),
        torch.zeros_like(far_m).index_fill(0, ended, 1.0),
        far_m,
        RenderSamples(hit, hit_m.detach(), torch.zeros_like(hit_m), torch.ones_like(hit_m)),
    )


def implicit_range(
    probability: Callable[[Tensor, Tensor], Tensor], ray: Tensor, range_m: Tensor, moved: Tensor
) -> Tensor:
    """The same ranges [H], with the gradient of the surface that they end at.

    Args:
        probability: (ray [n], t_m [n, S]) -> f [n, S], differentiable in the field.
        ray, range_m: [H] where surfaces were found.
        moved: [m] places in them where the motion is asked, whose slope autograd does not know: rigid motions move
            points without a graph.

    Raises:
        ConfigError: f does not depend on the distance.
    """
    t_m = range_m.detach().requires_grad_()
    value = probability(ray, t_m[:, None])[:, 0]
    slope_per_m = None
    if value.requires_grad:
        (slope_per_m,) = torch.autograd.grad(value.sum(), t_m, retain_graph=True, allow_unused=True)
    if slope_per_m is None:
        raise ConfigError(
            "surfaces learn from the field's slope, and this field is constant within its cells; interpolate it"
        )
    if len(moved):
        with torch.no_grad():
            reach_m = range_m.new_tensor([-_SLOPE_REACH_M, _SLOPE_REACH_M])
            around = probability(ray[moved], range_m[moved, None] + reach_m)  # [m, 2]
            slope_per_m = slope_per_m.index_copy(0, moved, around.diff(dim=1)[:, 0] / (2 * _SLOPE_REACH_M))
    return ImplicitRange.apply(range_m.detach(), value, slope_per_m)
