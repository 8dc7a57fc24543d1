# SPDX-License-Identifier: Apache-2.0
"""Slow, obvious twins of the renderers, in float64, one ray at a time; and small scenes to compare on."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from occflownet_core.grid import VoxelGrid
from occflownet_core.renderer import Rays
from occflownet_core.voxel_field import VoxelField

SMALL_GRID = VoxelGrid((-2.0, -1.5, -1.0), (2.0, 1.5, 1.0), 0.5)
"""8 x 6 x 4 cells."""


def random_field(grid: VoxelGrid = SMALL_GRID, batch: int = 1, classes: int = 3, seed: int = 0, **kwargs) -> VoxelField:
    """A field of thin and thick voxels, float64, wanting gradients."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *grid.shape[::-1])
    # Never below 0.01: the sorting twin divides by it.
    density = 0.01 + torch.rand(shape, generator=generator, dtype=torch.float64).pow(4) * 6
    logits = torch.randn((batch, classes, *grid.shape[::-1]), generator=generator, dtype=torch.float64)
    return VoxelField(density.requires_grad_(), logits.requires_grad_(), grid, **kwargs)


def random_rays(count: int, seed: int = 0, reach_m: float = 3.0, batch: int = 1, times: tuple[int, ...] = (0,)) -> Rays:
    """Rays from in and around the small grid, into all directions, float64."""
    random = np.random.default_rng(seed)
    direction = random.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return Rays.from_numpy(
        random.uniform(-reach_m, reach_m, (count, 3)),
        direction,
        np.ones(count),
        np.zeros(count),
        time_index=random.choice(times, count),
        batch_index=random.integers(0, batch, count),
        dtype=torch.float64,
    )


def crossings_by_sorting(
    origin: np.ndarray, direction: np.ndarray, grid: VoxelGrid
) -> list[tuple[tuple, float, float]]:
    """(cell, start, end) of one ray: every face plane's distance, sorted, and the cell that each gap's middle is in."""
    cuts = [0.0]
    for axis in range(3):
        if direction[axis] != 0:
            planes = grid.lower_m[axis] + grid.voxel_size_m * np.arange(grid.shape[axis] + 1)
            cuts += ((planes - origin[axis]) / direction[axis]).tolist()
    cuts = sorted(t for t in cuts if t >= 0)
    found = []
    for start, end in pairwise(cuts):
        cell, inside = grid.cells(origin + 0.5 * (start + end) * direction)
        if inside and end - start > 1e-9:
            found.append((tuple(cell.tolist()), start, end))
    return found


def render_by_sorting(field: VoxelField, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
    """Range with the remainder at the far end [R], logits [R, K], opacity [R]: closed form per cell, plain loops."""
    ranges, logits, opacities = [], [], []
    for origin, direction, batch in zip(rays.origin_m, rays.direction, rays.batch_index, strict=True):
        reach, mean, row, far = torch.ones(()).double(), torch.zeros(()).double(), 0.0, 0.0
        for (x, y, z), start, end in crossings_by_sorting(origin.numpy(), direction.numpy(), field.grid):
            density, length, far = field.density_lattice[batch, z, y, x], end - start, end
            ends_here = 1 - torch.exp(-density * length)
            # Mean of an exponential distribution cut off at the cell's end.
            inside = 1 / density - length * torch.exp(-density * length) / ends_here
            mean = mean + reach * ends_here * (start + inside)
            row = row + reach * ends_here * field.logits_lattice[batch, :, z, y, x]
            reach = reach * (1 - ends_here)
        ranges.append(mean + reach * far)
        logits.append(row + torch.zeros(field.logits_lattice.shape[1]).double())
        opacities.append(1 - reach)
    return torch.stack(ranges), torch.stack(logits), torch.stack(opacities)


def render_by_tiny_steps(
    density_at: Callable[[Tensor], Tensor],
    logits_at: Callable[[Tensor], Tensor],
    origin: Tensor,
    direction: Tensor,
    far_m: float,
    steps: int = 20_000,
) -> tuple[Tensor, Tensor, Tensor]:
    """Range with the remainder at the far end, logits [K], opacity of one ray: alpha compositing of many short steps."""
    step = far_m / steps
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) * step
    points = origin + t[:, None] * direction
    density = density_at(points)
    reach = torch.exp(-(density.cumsum(0) - density) * step)
    weight = reach * (1 - torch.exp(-density * step))
    opacity = weight.sum()
    return (weight * t).sum() + (1 - opacity) * far_m, weight @ logits_at(points), opacity


def exit_m(origin: Tensor, direction: Tensor, grid: VoxelGrid) -> float:
    """Where a ray leaves the grid; 0 if it never was in it."""
    found = crossings_by_sorting(origin.numpy(), direction.numpy(), grid)
    return found[-1][2] if found else 0.0


def yaw_pose(x: float, y: float, z: float, yaw: float = 0.0) -> np.ndarray:
    """ego_from_box [4, 4] of a box at a place, turned about z."""
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])
