# SPDX-License-Identifier: Apache-2.0
"""Where the sampled renderer looks: the ray's segment in the grid, uniform bins in it, importance samples from them."""

from __future__ import annotations

import torch
from torch import Tensor

from occflownet_core.boxes import slab
from occflownet_core.grid import VoxelGrid
from occflownet_core.renderer.rays import Rays

_PADDING = 1e-5
"""Weight that every proposal bin gets in addition, so that a ray through nothing is sampled evenly (NeRF's code)."""


@torch.no_grad()
def grid_segment(rays: Rays, grid: VoxelGrid) -> tuple[Tensor, Tensor]:
    """Distances near_m [R], far_m [R] between which rays are in the grid's box; both 0 for rays that miss it."""
    origin, direction = rays.origin_m.double(), rays.direction.double()
    near_m, far_m = slab(origin, direction, origin.new_tensor(grid.lower_m), origin.new_tensor(grid.upper_m))
    near_m = near_m.clamp(min=0.0)
    hit = far_m > near_m
    dtype = rays.range_m.dtype
    return torch.where(hit, near_m, 0.0).to(dtype), torch.where(hit, far_m, 0.0).to(dtype)


def uniform(near_m: Tensor, far_m: Tensor, count: int) -> Tensor:
    """Edges [R, count + 1] of equal bins between near [R] and far [R]."""
    fraction = torch.linspace(0, 1, count + 1, dtype=near_m.dtype, device=near_m.device)
    return near_m[:, None] + (far_m - near_m)[:, None] * fraction


@torch.no_grad()
def resampled(
    edges_m: Tensor, weight: Tensor, count: int, stratified: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Positions [R, count] distributed as a histogram, by inverting its cumulative sum (NeRF, arXiv 2003.08934, 5.2).

    Args:
        edges_m: [R, S + 1], ascending.
        weight: [R, S], not negative.
        stratified: draw at random within ``count`` equal shares of probability, rather than at their middles.

    Returns:
        ascending positions, without gradient.
    """
    padded = weight + _PADDING
    share = padded / padded.sum(dim=-1, keepdim=True)
    cumulative = torch.cat([torch.zeros_like(share[:, :1]), share.cumsum(dim=-1)], dim=-1)  # [R, S + 1]
    quantile = torch.arange(count, dtype=weight.dtype, device=weight.device).expand(len(weight), count)
    within = (
        torch.rand(quantile.shape, generator=generator, dtype=weight.dtype, device=weight.device) if stratified else 0.5
    )
    quantile = ((quantile + within) / max(count, 1)).contiguous()
    bin_index = (torch.searchsorted(cumulative, quantile, right=True) - 1).clamp(0, weight.shape[1] - 1)
    into = (quantile - cumulative.gather(1, bin_index)) / share.gather(1, bin_index)
    low = edges_m.gather(1, bin_index)
    return low + into.clamp(0, 1) * (edges_m.gather(1, bin_index + 1) - low)


def merged(first_m: Tensor, second_m: Tensor) -> Tensor:
    """Positions of both sets [R, S1], [R, S2] in order along the ray, [R, S1 + S2]."""
    return torch.cat([first_m, second_m], dim=-1).sort(dim=-1).values


def intervals(t_m: Tensor, near_m: Tensor, far_m: Tensor) -> tuple[Tensor, Tensor]:
    """The stretch that each position [R, S] stands for: up to halfway to its neighbours; start [R, S], length [R, S]."""
    halfway = 0.5 * (t_m[:, 1:] + t_m[:, :-1])
    edges = torch.cat([near_m[:, None], halfway, far_m[:, None]], dim=-1)
    return edges[:, :-1], edges.diff(dim=-1)
