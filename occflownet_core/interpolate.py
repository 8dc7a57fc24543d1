# SPDX-License-Identifier: Apache-2.0
"""Trilinear and nearest lookups in volumes [B, C, Z, Y, X] at any metric point: zero outside, differentiable in both."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from occflownet_core.errors import GeometryError
from occflownet_core.grid import VoxelGrid

Alignment = Literal["centres", "edges"]
"""Where a volume's outermost values lie: at the centres of the outermost cells (right), or on the box's faces (the
published code's ``align_corners=True``, which stretches the volume by half a voxel)."""


def table_from_volume(volume: Tensor) -> Tensor:
    """Rows [B * Z * Y * X, C] of a volume [B, C, Z, Y, X], each in one stretch of memory; no copy if they are already."""
    return volume.movedim(1, -1).reshape(-1, volume.shape[1]).contiguous()


def require_volume(volume: Tensor, grid: VoxelGrid, name: str) -> None:
    """Check that the last three axes of ``volume`` are the grid's cells in (z, y, x).

    Raises:
        GeometryError: they are not.
    """
    if tuple(volume.shape[-3:]) != grid.shape[::-1]:
        raise GeometryError(
            f"{name} has shape {tuple(volume.shape)}; its last axes must be the grid's cells (z, y, x) = {grid.shape[::-1]}"
        )


def trilinear(
    volume: Tensor, grid: VoxelGrid, points_m: Tensor, batch_index: Tensor, alignment: Alignment = "centres"
) -> Tensor:
    """Values of a volume between the centres of its cells.

    Args:
        volume: [B, C, Z, Y, X].
        grid: its box and cells.
        points_m: [N, 3], ego frame.
        batch_index: [N] integer.

    Returns:
        [N, C]; corners outside the grid count as zero.
    """
    require_volume(volume, grid, "volume")
    if len(volume) == 1:
        return _sampled(volume, grid, points_m, alignment)
    values = volume.new_zeros(len(points_m), volume.shape[1])
    for sample in range(len(volume)):
        chosen = (batch_index == sample).nonzero()[:, 0]
        found = _sampled(volume[sample : sample + 1], grid, points_m[chosen], alignment)
        values = values.index_copy(0, chosen, found.to(values.dtype))
    return values


def _sampled(volume: Tensor, grid: VoxelGrid, points_m: Tensor, alignment: Alignment) -> Tensor:
    """Values [N, C] of one volume [1, C, Z, Y, X]; -1 and 1 are the box's faces for ``grid_sample``."""
    lower_m, upper_m = (points_m.new_tensor(corner) for corner in (grid.lower_m, grid.upper_m))
    normalised = (2 * (points_m - lower_m) / (upper_m - lower_m) - 1).to(volume.dtype)
    found = F.grid_sample(volume, normalised[None, None, None], align_corners=alignment == "edges")  # [1, C, 1, 1, N]
    return found[0, :, 0, 0].T


def corners(
    grid: VoxelGrid, points_m: Tensor, batch_index: Tensor, alignment: Alignment = "centres"
) -> tuple[Tensor, Tensor]:
    """The eight cells whose centres surround each point, and their trilinear weights.

    Args:
        points_m: [N, 3], ego frame.
        batch_index: [N] integer.

    Returns:
        row [N, 8] int64 in a table [B * Z * Y * X, ...], weight [N, 8] differentiable in the points; cells outside the
        grid weigh zero.
    """
    cells = torch.tensor(grid.shape, device=points_m.device)  # [3] x, y, z
    lower_m = torch.tensor(grid.lower_m, dtype=points_m.dtype, device=points_m.device)
    index = (points_m - lower_m) / grid.voxel_size_m  # [N, 3] continuous
    index = index - 0.5 if alignment == "centres" else index - index / cells
    # Beyond one cell outside every corner is outside; the clamp keeps far points and infinities convertible.
    base = index.detach().nan_to_num(-2.0).clamp(min=-2.0).minimum(cells + 1.0).floor()
    upper_weight = (index - base).clamp(0.0, 1.0)
    corner = base.long().unsqueeze(-1) + torch.tensor([0, 1], device=points_m.device)  # [N, 3, 2]
    inside = (corner >= 0) & (corner < cells[:, None])
    weight = torch.stack([1.0 - upper_weight, upper_weight], dim=-1) * inside  # [N, 3, 2]
    corner = corner.clamp(min=0).minimum(cells[:, None] - 1)
    x, y, z = grid.shape
    row = batch_index.long()[:, None] * (z * y * x) + corner[:, 0]  # [N, 2]
    row = row[:, None, :] + (corner[:, 1] * x)[:, :, None]  # [N, 2, 2]
    row = row[:, None] + (corner[:, 2] * (y * x))[:, :, None, None]  # [N, 2, 2, 2] z, y, x
    weight = weight[:, 2, :, None, None] * weight[:, 1, None, :, None] * weight[:, 0, None, None, :]
    return row.view(-1, 8), weight.view(-1, 8)


def cell_rows(grid: VoxelGrid, points_m: Tensor, batch_index: Tensor) -> tuple[Tensor, Tensor]:
    """Row of each point's cell in a table [B * Z * Y * X, ...].

    Args:
        points_m: [N, 3], ego frame.
        batch_index: [N] integer.

    Returns:
        row [N] int64 (of the nearest cell for points outside), inside [N] bool.
    """
    cells = torch.tensor(grid.shape, device=points_m.device)
    lower_m = torch.tensor(grid.lower_m, dtype=points_m.dtype, device=points_m.device)
    index = (points_m.detach() - lower_m) / grid.voxel_size_m
    inside = ((index >= 0) & (index < cells)).all(dim=-1)
    cell = index.nan_to_num(0.0).clamp(min=0.0).minimum(cells - 1.0).floor().long()
    x, y, z = grid.shape
    return ((batch_index.long() * z + cell[:, 2]) * y + cell[:, 1]) * x + cell[:, 0], inside


def nearest(volume: Tensor, grid: VoxelGrid, points_m: Tensor, batch_index: Tensor) -> Tensor:
    """Values [N, C] of the cells that points [N, 3] lie in; zero outside. Arguments as for ``trilinear``."""
    require_volume(volume, grid, "volume")
    row, inside = cell_rows(grid, points_m, batch_index)
    x, y, z = grid.shape
    cells = x * y * z
    return volume.flatten(2)[row // cells, :, row % cells] * inside[:, None]
