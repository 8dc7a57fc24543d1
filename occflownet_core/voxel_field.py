# SPDX-License-Identifier: Apache-2.0
"""What a renderer asks of an occupancy field, and VoxelField: a field given by its values on a lattice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from occflownet_core.errors import GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.interpolate import Alignment, nearest, require_volume, trilinear


class Field(Protocol):
    """Density and class logits at any point, and on a lattice."""

    def density(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        """Density [N] in 1/m, not negative, at points [N, 3] of the ego frame; zero outside the field's box."""

    def semantics(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        """Class logits [N, K] at points [N, 3]."""

    def lattice(self, grid: VoxelGrid) -> tuple[Tensor, Tensor]:
        """Density [B, Z, Y, X] and logits [B, K, Z, Y, X] at the centres of the grid's cells."""


@dataclass(frozen=True)
class VoxelField:
    """A field that is its own lattice: constant per cell, or trilinear between cell centres.

    Attributes:
        density_lattice: [B, Z, Y, X], 1/m.
        logits_lattice: [B, K, Z, Y, X].
        grid: where the cells lie.
        interpolation: ``trilinear`` as published, or ``nearest``: the very field that voxel traversal integrates.
        alignment: ``centres``, or the published ``edges`` (see ``interpolate.Alignment``).

    Raises:
        GeometryError: a lattice does not fit the grid, or the two disagree about the batch.
    """

    density_lattice: Tensor
    logits_lattice: Tensor
    grid: VoxelGrid
    interpolation: Literal["trilinear", "nearest"] = "trilinear"
    alignment: Alignment = "centres"

    def __post_init__(self) -> None:
        require_volume(self.density_lattice, self.grid, "density")
        require_volume(self.logits_lattice, self.grid, "logits")
        if self.density_lattice.dim() != 4 or self.logits_lattice.dim() != 5:
            raise GeometryError(
                f"density has {self.density_lattice.dim()} axes and logits {self.logits_lattice.dim()}; "
                "give [B, Z, Y, X] and [B, K, Z, Y, X]"
            )
        if len(self.density_lattice) != len(self.logits_lattice):
            raise GeometryError(
                f"density has batch {len(self.density_lattice)} and logits {len(self.logits_lattice)}; they must agree"
            )

    def _lookup(self, volume: Tensor, points_m: Tensor, batch_index: Tensor) -> Tensor:
        if self.interpolation == "nearest":
            return nearest(volume, self.grid, points_m, batch_index)
        return trilinear(volume, self.grid, points_m, batch_index, self.alignment)

    def density(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        return self._lookup(self.density_lattice[:, None], points_m, batch_index)[:, 0]

    def semantics(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        return self._lookup(self.logits_lattice, points_m, batch_index)

    def lattice(self, grid: VoxelGrid) -> tuple[Tensor, Tensor]:
        """Its own tensors for its own grid; another grid is looked up at its cell centres."""
        if grid == self.grid:
            return self.density_lattice, self.logits_lattice
        batch, classes = self.logits_lattice.shape[:2]
        x, y, z = grid.shape
        centres = torch.as_tensor(grid.centres().transpose(2, 1, 0, 3).reshape(-1, 3))
        centres_m = centres.to(self.density_lattice).repeat(batch, 1)  # [B * Z * Y * X, 3]
        batch_index = torch.arange(batch, device=centres_m.device).repeat_interleave(x * y * z)
        density = self.density(centres_m, batch_index).view(batch, z, y, x)
        logits = self.semantics(centres_m, batch_index).view(batch, z, y, x, classes)
        return density, logits.movedim(-1, 1)
