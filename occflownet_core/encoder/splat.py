# SPDX-License-Identifier: Apache-2.0
"""Lifting by splatting (Lift-Splat-Shoot, arXiv 2008.05711): every pixel's context, shared out over its depth bins,
is added to the voxels that the bins fall into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_POINTS_AT_ONCE = 1 << 17
_ROW = 256


def splat(context: Tensor, depth: Tensor, voxel_index: Tensor, shape_zyx: tuple[int, int, int]) -> Tensor:
    """Sum over a voxel's points of (probability of the point's depth) x (its pixel's context).

    A point's product is made, added and forgotten, forward and backward: memory does not grow with bins x channels.

    Args:
        context: [B, N, C, h, w].
        depth: [B, N, D, h, w], probabilities over depth bins.
        voxel_index: [B, N, D, h, w] integer, Z * Y * X for points outside the grid.
        shape_zyx: cells of the volume along z, y, x.

    Returns:
        [B, C, Z, Y, X].
    """
    z, y, x = shape_zyx
    volumes = [_Splat.apply(c, d, v, z * y * x) for c, d, v in zip(context, depth, voxel_index, strict=True)]
    return torch.stack(volumes).transpose(1, 2).reshape(len(context), -1, z, y, x)


class _Splat(torch.autograd.Function):
    """[V, C] of context [N, C, h, w], depth and voxel_index [N, D, h, w]. Backward, every point reads its voxel."""

    @staticmethod
    def forward(ctx: Any, context: Tensor, depth: Tensor, voxel_index: Tensor, cells: int) -> Tensor:
        pixels = _rows(context)
        flat_depth, voxel = depth.reshape(-1), voxel_index.reshape(-1)
        # One row more takes what falls outside; in float32, because near voxels add thousands of points.
        volume = torch.zeros(cells + 1, pixels.shape[1], device=context.device, dtype=torch.float32)
        for points, pixel in _chunks(depth):
            volume.index_add_(0, voxel[points].long(), (pixels[pixel] * flat_depth[points, None]).float())
        ctx.save_for_backward(context, depth, voxel_index)
        return volume[:-1].to(context.dtype)

    @staticmethod
    def backward(ctx: Any, grad_volume: Tensor) -> tuple[Tensor, Tensor, None, None]:
        context, depth, voxel_index = ctx.saved_tensors
        pixels, flat_depth, voxel = _rows(context), depth.reshape(-1), voxel_index.reshape(-1)
        grad_volume = F.pad(grad_volume, (0, 0, 0, 1))
        grad_pixels = torch.zeros_like(pixels, dtype=torch.float32)
        grad_depth = torch.empty_like(flat_depth)
        for points, pixel in _chunks(depth):
            at_voxel = grad_volume[voxel[points].long()]  # [P, C]
            grad_depth[points] = (at_voxel * pixels[pixel]).sum(-1).to(grad_depth.dtype)
            grad_pixels.index_add_(0, pixel, (at_voxel * flat_depth[points, None]).float())
        cameras, channels, height, width = context.shape
        grad_context = grad_pixels.view(cameras, height, width, channels).permute(0, 3, 1, 2).to(context.dtype)
        return grad_context, grad_depth.view_as(depth), None, None


def _rows(context: Tensor) -> Tensor:
    """[N * h * w, C] of [N, C, h, w]."""
    return context.permute(0, 2, 3, 1).reshape(-1, context.shape[1])


def _chunks(depth: Tensor):
    """Slices of the points of [N, D, h, w], and the pixel [P] of each point."""
    _, bins, height, width = depth.shape
    area = height * width
    for start in range(0, depth.numel(), _POINTS_AT_ONCE):
        points = torch.arange(start, min(start + _POINTS_AT_ONCE, depth.numel()), device=depth.device)
        yield slice(start, start + len(points)), points // (bins * area) * area + points % area


@dataclass(frozen=True)
class SortedSplat:
    """The same sum of one sample without scattering, for graphs: points sorted by voxel, and running sums over them.

    Attributes:
        pixel_index, depth_index: [P] int32.
        voxel_first: [V + 1] int32, see ``SplatTables.arrays``.
    """

    pixel_index: Tensor
    depth_index: Tensor
    voxel_first: Tensor
    cameras: Any = None

    def lift(self, context: Tensor, depth: Tensor, shape_zyx: tuple[int, int, int]) -> Tensor:
        """The volume [1, C, Z, Y, X] of context [1, N, C, h, w] and depth [1, N, D, h, w].

        A running sum over a million points would leave few digits for a voxel's few. Therefore the points are laid
        out in rows, with running sums within rows, which serve a voxel whose points lie in one row or in two, and
        over whole rows, which only add what a voxel of hundreds of points has between them.
        """
        pixels = _rows(context[0])
        values = pixels.index_select(0, self.pixel_index) * depth.reshape(-1).index_select(0, self.depth_index)[:, None]
        count, channels = values.shape
        rows = count // _ROW + 1  # at least one place more than points: sums are of what lies *before* a place
        padded = F.pad(values, (0, 0, 1, rows * _ROW - count - 1)).view(rows, _ROW, channels)
        within = padded.cumsum(1)  # [R, K, C]
        totals = within[:, -1]
        before = totals.cumsum(0) - totals  # [R, C]
        first, last = self.voxel_first[:-1], self.voxel_first[1:]
        row, last_row = (torch.div(place, _ROW, rounding_mode="floor") for place in (first, last))
        places = within.reshape(-1, channels)
        between = before.index_select(0, last_row) - before.index_select(0, (row + 1).clamp(max=rows - 1))  # [V, C]
        crossing = (last_row > row).to(values.dtype)[:, None]
        volume = places.index_select(0, last) - places.index_select(0, first)
        volume = volume + crossing * (totals.index_select(0, row) + between)
        return volume.t().reshape(1, channels, *shape_zyx)
