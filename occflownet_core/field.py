# SPDX-License-Identifier: Apache-2.0
"""OccupancyField: a continuous function of space, density and class logits at any point, decoded from voxel features.

Density is per metre: a length l of constant density s is opaque with probability 1 - exp(-s l).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occflownet_core.errors import ConfigError, GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.interpolate import require_volume, trilinear
from occflownet_core.labels import FREE
from occflownet_core.query import POINTS_AT_A_TIME, FieldSamples, batches, require_points


@dataclass(frozen=True)
class FieldConfig:
    """The field's decoders.

    Attributes:
        channels: features per voxel.
        hidden: width of both decoders' hidden layers.
        layers: hidden layers of each decoder.
        density: ``softplus``, unbounded above; or ``sigmoid`` as published, which caps one 0.4 m voxel at a
            probability of 0.33.
        density_scale_per_m: what the activation is multiplied with, 1/m (1 for the published sigmoid).
        initial_density_per_m: density of the untrained field, 1/m; low, so that rays see far from the first step on.
        velocity: whether there is a third decoder, for the velocity of what is there.
        color: whether there is one for its colour, which photometric supervision compares with images.
    """

    channels: int = 32
    hidden: int = 48
    layers: int = 2
    density: Literal["softplus", "sigmoid"] = "softplus"
    density_scale_per_m: float = 5.0
    initial_density_per_m: float = 0.1
    velocity: bool = False
    color: bool = False


class FieldDecoder(nn.Module):
    """Small perceptrons over voxel features: density, class logits and, where configured, velocity and colour.

    Raises:
        ConfigError: a density setting is out of range, or the activation is unknown.
    """

    def __init__(self, config: FieldConfig) -> None:
        super().__init__()
        self.config = config
        self.density_head = _perceptron(config.channels, config.hidden, config.layers, 1)
        self.semantic_head = _perceptron(config.channels, config.hidden, config.layers, FREE)
        nn.init.constant_(self.density_head[-1].bias, _initial_bias(config))
        if config.velocity:
            self.velocity_head = _perceptron(config.channels, config.hidden, config.layers, 3)
            # A world that stands still is the best first guess; rays of neighbour keyframes are right for most of it.
            nn.init.zeros_(self.velocity_head[-1].weight)
            nn.init.zeros_(self.velocity_head[-1].bias)
        if config.color:
            self.color_head = _perceptron(config.channels, config.hidden, config.layers, 3)

    def pre_density(self, features: Tensor) -> Tensor:
        """What the density activation takes, [...], of features [..., C]."""
        return self.density_head(features).squeeze(-1)

    def density(self, pre_density: Tensor) -> Tensor:
        """Density [...] in 1/m of the decoder's output [...] (METHOD section 3, point 3)."""
        activation = F.softplus if self.config.density == "softplus" else torch.sigmoid
        return self.config.density_scale_per_m * activation(pre_density)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [..., 17] of the occupied classes, of features [..., C]."""
        return self.semantic_head(features)

    def velocity(self, features: Tensor) -> Tensor:
        """Velocity [..., 3] in m/s, ego frame, of what is there, of features [..., C].

        Raises:
            ConfigError: the field was configured without velocity.
        """
        if not self.config.velocity:
            raise ConfigError("this field predicts no velocity; set model.field.velocity: true and train it")
        return self.velocity_head(features)

    def color(self, features: Tensor) -> Tensor:
        """RGB [..., 3], 0 to 1, of what is there, of features [..., C].

        Raises:
            ConfigError: the field was configured without colour.
        """
        if not self.config.color:
            raise ConfigError("this field predicts no colour; set model.field.color: true and train it")
        return self.color_head(features).sigmoid()


@dataclass(frozen=True)
class OccupancyField:
    """Features in a box and the decoder that reads them.

    Attributes:
        features: [B, C, Z, Y, X].
        grid: the box and its working cells.
        decoder: reads density and logits from features.

    Raises:
        GeometryError: the features are not those of the grid.
    """

    features: Tensor
    grid: VoxelGrid
    decoder: FieldDecoder

    def __post_init__(self) -> None:
        if self.features.dim() != 5:
            raise GeometryError(f"field features have shape {tuple(self.features.shape)}; give [B, C, Z, Y, X]")
        require_volume(self.features, self.grid, "field features")

    def density(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        """Density [N] in 1/m: interpolated features, decoded; zero outside the box.

        Args:
            points_m: [N, 3], ego frame; differentiable.
            batch_index: [N] integer, the sample that each point belongs to.
        """
        features, inside = self._at(points_m, batch_index)
        return self.decoder.density(self.decoder.pre_density(features)) * inside

    def semantics(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        """Logits [N, 17] of the occupied classes; zero outside the box. Arguments as for ``density``."""
        features, inside = self._at(points_m, batch_index)
        return self.decoder.logits(features) * inside[:, None]

    def query(
        self,
        points_m: Tensor,
        length_m: float,
        sample: int = 0,
        gradient: bool = False,
        points_at_a_time: int = POINTS_AT_A_TIME,
    ) -> FieldSamples:
        """The field of one sample at any number of points, in bounded memory and without a graph for training
        (which samples ``density`` and ``semantics``, or the ``lattice``: all agree at the working cells' centres).

        Args:
            points_m: [N, 3], ego frame.
            length_m: what the probability is of: that so long a piece of the density is opaque. The edge of a label
                voxel gives what labels are thresholded by.
            sample: which of the batch.
            gradient: whether the probability's gradient is wanted.
            points_at_a_time: bounds the memory.

        Raises:
            GeometryError: the points are not [N, 3], or one is NaN.
        """
        require_points(points_m)
        one = OccupancyField(self.features[sample : sample + 1], self.grid, self.decoder)
        parts = [one._query(points_m[part], length_m, gradient) for part in batches(len(points_m), points_at_a_time)]
        return FieldSamples(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))

    def _query(self, points_m: Tensor, length_m: float, gradient: bool) -> FieldSamples:
        points_m = points_m.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            features, inside = self._at(points_m, points_m.new_zeros(len(points_m), dtype=torch.long))
            density = self.decoder.density(self.decoder.pre_density(features)) * inside
            probability = occupancy_probability(density, length_m)
            slope_per_m = torch.autograd.grad(probability.sum(), points_m)[0] if gradient else None
        with torch.no_grad():
            logits = self.decoder.logits(features) * inside[:, None]
        return FieldSamples(probability.detach(), logits, inside, slope_per_m)

    def lattice(self, grid: VoxelGrid | None = None) -> tuple[Tensor, Tensor]:
        """Density [B, Z, Y, X] and logits [B, 17, Z, Y, X] at a grid's cell centres: decoded, then interpolated.

        Decoding on the working cells and interpolating what the activation takes costs a fraction of decoding at
        every fine cell; on the working grid itself it is ``density`` and ``semantics`` at the centres.

        Args:
            grid: the field's own box in cells that divide its working cells; None is the working grid.

        Raises:
            GeometryError: the grid is another box, or its cells do not divide the working ones.
        """
        return self._on(grid or self.grid, self.decoder.logits)

    def velocity_lattice(self, grid: VoxelGrid | None = None) -> Tensor:
        """Velocity [B, 3, Z, Y, X] in m/s at a grid's cell centres; argument and errors as for ``lattice``.

        Raises:
            ConfigError: the field was configured without velocity.
        """
        velocity_mps = self.decoder.velocity(self.features.movedim(1, -1)).movedim(-1, 1)
        return refine(velocity_mps, self._refinement(grid or self.grid))

    def colored(self) -> ColoredField:
        """The same density with colour where class logits are: what renders as the colour that a ray ends at.

        Raises:
            ConfigError: see ``FieldDecoder.color``; raised when it is read.
        """
        return ColoredField(self)

    def _at(self, points_m: Tensor, batch_index: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, C] at points, the outermost half cells flat; and which points [N] lie in the box."""
        lower_m, upper_m = (points_m.new_tensor(corner) for corner in (self.grid.lower_m, self.grid.upper_m))
        inside = ((points_m >= lower_m) & (points_m < upper_m)).all(dim=-1)
        half_cell_m = self.grid.voxel_size_m / 2
        bounded_m = points_m.maximum(lower_m + half_cell_m).minimum(upper_m - half_cell_m)
        return trilinear(self.features, self.grid, bounded_m, batch_index), inside

    def _on(self, grid: VoxelGrid, decode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Density [B, Z, Y, X], and what else is decoded [B, K, Z, Y, X], at a grid's cell centres."""
        factor = self._refinement(grid)
        features = self.features.movedim(1, -1)  # [B, Z, Y, X, C]
        pre_density = refine(self.decoder.pre_density(features)[:, None], factor)[:, 0]  # [B, Z', Y', X']
        decoded = refine(decode(features).movedim(-1, 1), factor)  # [B, K, Z', Y', X']
        return self.decoder.density(pre_density), decoded

    def _refinement(self, grid: VoxelGrid) -> int:
        factor = round(self.grid.voxel_size_m / grid.voxel_size_m)
        if factor < 1 or tuple(n * factor for n in self.grid.shape) != grid.shape or grid.lower_m != self.grid.lower_m:
            raise GeometryError(
                f"the field's box from {self.grid.lower_m} in cells of {self.grid.voxel_size_m} m cannot be read on a "
                f"grid from {grid.lower_m} in cells of {grid.voxel_size_m} m; give the same box in cells that divide its own"
            )
        return factor


@dataclass(frozen=True)
class ColoredField:
    """An occupancy field whose "semantics" are RGB, 0 to 1 (``voxel_field.Field``): renderers add up either alike.

    Attributes:
        field: with a colour decoder.
    """

    field: OccupancyField

    def density(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        return self.field.density(points_m, batch_index)

    def semantics(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        """RGB [N, 3]; black outside the box."""
        features, inside = self.field._at(points_m, batch_index)
        return self.field.decoder.color(features) * inside[:, None]

    def lattice(self, grid: VoxelGrid | None = None) -> tuple[Tensor, Tensor]:
        """Density [B, Z, Y, X] and RGB [B, 3, Z, Y, X]; argument and errors as for ``OccupancyField.lattice``."""
        return self.field._on(grid or self.field.grid, self.field.decoder.color)


@dataclass(frozen=True)
class TorchField:
    """An occupancy field that answers in NumPy (``query.QueryableField``).

    Attributes:
        field: what is queried.
        length_m: what the probability is of (see ``OccupancyField.query``).
        sample: which of the batch.
    """

    field: OccupancyField
    length_m: float
    sample: int = 0

    def probability(self, points_m: np.ndarray) -> np.ndarray:
        return self.samples(points_m).probability

    def samples(self, points_m: np.ndarray, gradient: bool = False) -> FieldSamples:
        points = torch.from_numpy(points_m).to(self.field.features)
        answer = self.field.query(points, self.length_m, self.sample, gradient)
        return FieldSamples(*(None if part is None else part.cpu().numpy() for part in answer))


def refine(volume: Tensor, factor: int) -> Tensor:
    """Trilinear interpolation at the centres of cells ``factor`` times as small; the outermost half cells are flat.

    Two bilinear steps, over z and then over the ground plane: runtimes resize 4D tensors faster than 5D ones.

    Args:
        volume: [B, C, Z, Y, X].

    Returns:
        [B, C, Z * factor, Y * factor, X * factor].
    """
    if factor == 1:
        return volume
    f, (z, y, x) = float(factor), volume.shape[2:]
    tall = F.interpolate(volume.flatten(3), scale_factor=(f, 1.0), mode="bilinear", align_corners=False)
    wide = F.interpolate(
        tall.reshape(-1, volume.shape[1] * z * factor, y, x), scale_factor=f, mode="bilinear", align_corners=False
    )
    return wide.reshape(-1, volume.shape[1], z * factor, y * factor, x * factor)


def occupancy_probability(density: Tensor, length_m: float) -> Tensor:
    """Probability [...] that a length of constant density [...] in 1/m is opaque (Max 1995): 1 - exp(-s l)."""
    return 1 - torch.exp(-density * length_m)


def _perceptron(inputs: int, hidden: int, layers: int, outputs: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(inputs, hidden), nn.ReLU(inplace=True)]
        nn.init.kaiming_normal_(modules[-2].weight, nonlinearity="relu")
        inputs = hidden
    return nn.Sequential(*modules, nn.Linear(inputs, outputs))


def _initial_bias(config: FieldConfig) -> float:
    """What the activation must take to give the initial density."""
    ratio = config.initial_density_per_m / config.density_scale_per_m if config.density_scale_per_m > 0 else -1.0
    if config.density not in ("softplus", "sigmoid") or ratio <= 0 or (config.density == "sigmoid" and ratio >= 1):
        raise ConfigError(
            f"field: density '{config.density}' of scale {config.density_scale_per_m:g}/m cannot start at "
            f"{config.initial_density_per_m:g}/m; use softplus or sigmoid, positive values, and a sigmoid's start below its scale"
        )
    return math.log(math.expm1(ratio)) if config.density == "softplus" else math.log(ratio / (1 - ratio))
