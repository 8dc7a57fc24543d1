# SPDX-License-Identifier: Apache-2.0
"""DeployedField: an occupancy field as the second graph of a bundle, for queries on a vehicle without PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occflownet_core.field import FieldDecoder, occupancy_probability
from occflownet_core.grid import VoxelGrid


class DeployedField(nn.Module):
    """A field's probability at many points, and all it knows at fewer, of the features that the deployment graph hands out.

    A search for a surface asks for the probability alone, at millions of points; runtimes compute all outputs of a graph.
    Each of the two kinds of points may therefore be none at all.

    The gradient is written out, because a deployment graph has no automatic differentiation: back through the decoder to
    the features, and from them through the trilinear weights to the point.

    Args:
        decoder: of the field.
        grid: of its features.
        length_m: what the probability is of (see ``OccupancyField.query``).
    """

    INPUTS = ("features", "points_m", "detailed_points_m")
    OUTPUTS = ("probability", "detailed_probability", "logits", "gradient_per_m")

    def __init__(self, decoder: FieldDecoder, grid: VoxelGrid, length_m: float) -> None:
        super().__init__()
        self.decoder, self.grid, self.length_m = decoder, grid, length_m

    def forward(self, features: Tensor, points_m: Tensor, detailed_points_m: Tensor) -> tuple[Tensor, ...]:
        """The field inside its box; beyond the outermost centres it stays what it is there.

        Args:
            features: [1, Z, Y, X, C].
            points_m: [N, 3].
            detailed_points_m: [M, 3].

        Returns:
            probability [N]; probability [M], logits [M, 17], and the probability's gradient [M, 3] in 1/m.
        """
        table = features.flatten(0, 3)  # [Z * Y * X, C]
        corner, (weight, _) = self._corners(points_m)
        at = (self._rows(table, corner) * weight[..., None]).sum(dim=1)  # [N, C]
        probability = occupancy_probability(self.decoder.density(self.decoder.pre_density(at)), self.length_m)
        return probability, *self._detailed(table, detailed_points_m)

    def _detailed(self, table: Tensor, points_m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        corner, (weight, slope) = self._corners(points_m)
        rows = self._rows(table, corner)  # [M, 8, C]
        at = (rows * weight[..., None]).sum(dim=1)  # [M, C]
        pre_density, by_feature = self._pre_density(at)
        density, by_pre_density = self._density(pre_density)
        by_weight = (rows * by_feature[:, None]).sum(dim=2)  # [M, 8]
        chain = self.length_m * torch.exp(-density * self.length_m) * by_pre_density  # [M]
        gradient_per_m = chain[:, None] * (slope * by_weight[:, None]).sum(dim=2)
        return occupancy_probability(density, self.length_m), self.decoder.logits(at), gradient_per_m

    @staticmethod
    def _rows(table: Tensor, corner: Tensor) -> Tensor:
        return table.index_select(0, corner.flatten()).unflatten(0, (-1, 8))

    def _corners(self, points_m: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Rows [N, 8] of the cells around points, their trilinear weights [N, 8] and the weights' gradient [N, 3, 8]."""
        cells = torch.tensor(self.grid.shape, dtype=torch.float32)
        index = (points_m - torch.tensor(self.grid.lower_m)) / self.grid.voxel_size_m - 0.5
        bounded = index.clamp(min=0.0).minimum(cells - 1)
        base = bounded.floor().minimum(cells - 2).clamp(min=0.0)
        upper = bounded - base  # [N, 3]
        # Beyond the outermost centres the field is flat.
        rise = ((index > 0) & (index < cells - 1)).float() / self.grid.voxel_size_m
        share = torch.stack([1 - upper, upper], dim=-1)  # [N, 3, 2]
        slope = torch.stack([-rise, rise], dim=-1)
        slopes = [self._product(*(slope[:, a] if a == axis else share[:, a] for a in range(3))) for axis in (0, 1, 2)]
        corner = torch.stack([base, (base + 1).minimum(cells - 1)], dim=-1).int()  # [N, 3, 2]
        columns, rows, _ = self.grid.shape
        row = (corner[:, 2, :, None, None] * rows + corner[:, 1, None, :, None]) * columns + corner[:, 0, None, None, :]
        weight = self._product(share[:, 0], share[:, 1], share[:, 2])
        return row.flatten(1), (weight, torch.stack(slopes, dim=1))

    @staticmethod
    def _product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """[N, 8] of factors [N, 2] along each axis, in (z, y, x) order."""
        return (z[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]).flatten(1)

    def _pre_density(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The density head's output [N] of features [N, C], and its gradient [N, C]."""
        linear = [layer for layer in self.decoder.density_head if isinstance(layer, nn.Linear)]
        hidden, active = features, []
        for layer in linear[:-1]:
            hidden = layer(hidden)
            active.append((hidden > 0).float())
            hidden = F.relu(hidden)
        gradient = linear[-1].weight  # [1, H]
        for layer, is_active in zip(reversed(linear[:-1]), reversed(active), strict=True):
            gradient = (gradient * is_active) @ layer.weight
        return linear[-1](hidden)[:, 0], gradient.expand_as(features)

    def _density(self, pre_density: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] in 1/m, and its derivative by what the activation takes."""
        config, sigmoid = self.decoder.config, torch.sigmoid(pre_density)
        slope = sigmoid if config.density == "softplus" else sigmoid * (1 - sigmoid)
        return self.decoder.density(pre_density), config.density_scale_per_m * slope
