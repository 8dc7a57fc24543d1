# SPDX-License-Identifier: Apache-2.0
"""Voxel fitting: the voxel field that rays ask for, without a network. Every voxel has a free density and free logits.

A field may have several *levels*: coarser lattices, interpolated and added to the finest. What lies between two lines of a
LiDAR, where no ray says anything, then takes after its neighbours; a flat level (coarse in x and y, fine in z) does that for
the ground, a tall one for walls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from occflownet_core.field import FieldConfig, FieldDecoder, occupancy_probability
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import OCCUPIED_CLASSES, labels_above
from occflownet_core.losses import LossConfig
from occflownet_core.motion import StaticWorld
from occflownet_core.point_losses import supervised_rays
from occflownet_core.renderer import Rays, RenderConfig
from occflownet_core.voxel_field import VoxelField
from training.objective import draw_rays

RECIPE = LossConfig(return_weight=1.0, range_error="huber", range_weight=0.05, opacity_weight=0.2, semantic_weight=1.0)
"""The ray losses that ``training/configs/minicity_tiny.yaml`` trains with."""

SURFACE_RECIPE = LossConfig(
    range_error="huber",
    range_weight=3.0,
    semantic_weight=1.0,
    free_point_weight=1.0,
    occupied_point_weight=1.0,
    free_space_margin_m=0.4,
    point_semantic_weight=1.0,
)
"""Those of ``training/configs/minicity_tiny_surface.yaml``, which renders surfaces."""

Level = tuple[int, int, int]
"""How many of the grid's cells one cell of a level covers along x, y and z."""

FINEST: Level = (1, 1, 1)


LOG_LEVELS: dict[str, tuple[Level, ...]] = {
    "density_levels": (FINEST, (4, 4, 1), (8, 8, 1), (1, 1, 4)),
    "logit_levels": (FINEST, (4, 4, 1)),
}
"""Those of fields of whole logs (``FitSettings``): between two lines of a LiDAR, and on ground without texture, nothing is
known of single voxels."""


@dataclass(frozen=True)
class FitSettings:
    """How fields are fitted.

    Attributes:
        steps: of Adam, the learning rate falling to zero along a cosine.
        rays_per_step: drawn at random.
        current_share: of them from the current keyframe (time index 0), as ``minicity_tiny.yaml`` draws them; None: all alike.
        density_rate, logit_rate: learning rates of what the density's activation takes, and of logits.
        initial_density_per_m: where every voxel starts, so low that what no ray crosses stays free at any threshold.
        forgetting: how fast a voxel for which nothing speaks any more returns there: before surfaces have formed, rays
            pull at everything behind them as well (AdamW's weight decay).
        least_share: density gradients far below this share of the first step's root mean square move nothing (Adam's
            epsilon): relative, because losses differ in what they weigh.
        least_logit_gradient: the same for logits.
        seed: of the drawn rays.
        density_levels, logit_levels: see the module.
    """

    steps: int = 32
    rays_per_step: int = 8192
    current_share: float | None = 0.3
    density_rate: float = 0.6
    logit_rate: float = 0.6
    initial_density_per_m: float = 0.02
    forgetting: float = 0.1
    least_share: float = 0.2
    least_logit_gradient: float = 1e-5
    seed: int = 0
    density_levels: tuple[Level, ...] = (FINEST,)
    logit_levels: tuple[Level, ...] = (FINEST,)


@dataclass(frozen=True, eq=False)
class FittedVoxels:
    """A fitted field.

    Attributes:
        grid: its cells.
        pre_density: [1, Z, Y, X], what the density's activation takes.
        logits: [1, 17, Z, Y, X].
        seen: bool [1, Z, Y, X], cells that some ray asked anything of.
        activation: from ``pre_density`` to density.
        terms: the last step's loss terms.
    """

    grid: VoxelGrid
    pre_density: Tensor
    logits: Tensor
    seen: Tensor
    activation: FieldDecoder
    terms: dict[str, float]

    @cached_property
    def field(self) -> VoxelField:
        """The field as the renderer takes it."""
        return VoxelField(self.activation.density(self.pre_density), self.logits, self.grid)

    @property
    def probability(self) -> np.ndarray:
        """float32 [X, Y, Z] of each cell being occupied."""
        return occupancy_probability(self.field.density_lattice[0], self.grid.voxel_size_m).permute(2, 1, 0).numpy()

    @property
    def label(self) -> np.ndarray:
        """uint8 [X, Y, Z], the class that a cell has if it is occupied."""
        return self.logits[0].argmax(dim=0).to(torch.uint8).permute(2, 1, 0).numpy()

    def labels_at(self, threshold: float) -> np.ndarray:
        """uint8 [X, Y, Z]: the class, or FREE where the probability is not above the threshold."""
        return labels_above(threshold, self.probability, self.label)


def voxel_activation(settings: FitSettings, density: str = "softplus") -> FieldDecoder:
    """A decoder of which only the activation and its start are used: here voxels take the place of perceptrons."""
    scale_per_m = 1.0 if density == "sigmoid" else FieldConfig.density_scale_per_m
    return FieldDecoder(
        FieldConfig(1, 1, 1, density, scale_per_m, initial_density_per_m=settings.initial_density_per_m)
    )


def fit_voxels(
    rays: Rays,
    motion: StaticWorld,
    grid: VoxelGrid,
    settings: FitSettings,
    losses: LossConfig = RECIPE,
    rendering: RenderConfig | None = None,
    activation: FieldDecoder | None = None,
    on_step: Callable[[dict[str, Tensor]], object] = lambda terms: None,
) -> FittedVoxels:
    """Fit a field to rays.

    Args:
        rays: what is known; those that the motion does not keep must be gone already.
        motion: where what they meet lies in the field.
        grid: of the field.
        settings, losses, rendering: of the fit.
        activation: of the density; None is ``voxel_activation(settings)``.
        on_step: called after each step with its terms.
    """
    rendering = rendering or RenderConfig()

    def terms(field: VoxelField, done: float, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = draw_rays(rays, settings.rays_per_step, settings.current_share, generator)
        return supervised_rays(field, drawn, grid, motion, losses, rendering.at(done), generator)

    return fit_lattice(terms, OCCUPIED_CLASSES, grid, settings, activation, on_step)


def fit_lattice(
    terms: Callable[[VoxelField, float, torch.Generator], dict[str, Tensor]],
    channels: int,
    grid: VoxelGrid,
    settings: FitSettings,
    activation: FieldDecoder | None = None,
    on_step: Callable[[dict[str, Tensor]], object] = lambda terms: None,
) -> FittedVoxels:
    """Fit a field to anything that can be asked of one.

    Args:
        terms: (field, share of the fit that is done, generator of random numbers) -> loss terms.
        channels: of each voxel beside its density.
        grid, settings, activation, on_step: as for ``fit_voxels``.
    """
    activation = activation or voxel_activation(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    start = activation.density_head[-1].bias.detach()
    evidence = [_lattice(1, level, grid) for level in settings.density_levels]  # for a cell being occupied
    table = [_lattice(channels, level, grid) for level in settings.logit_levels]
    seen = torch.zeros((1, *grid.shape[::-1]), dtype=torch.bool)
    slow = {"lr": settings.density_rate, "weight_decay": settings.forgetting}
    optimizer = torch.optim.AdamW(
        [
            *({"params": [part], **slow} for part in evidence),
            {"params": table, "lr": settings.logit_rate, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        eps=settings.least_logit_gradient,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    for step in range(settings.steps):
        pre_density, logits = start + _summed(evidence, grid)[:, 0], _summed(table, grid)
        pre_density.retain_grad()
        field = VoxelField(activation.density(pre_density), logits, grid)
        found = terms(field, step / settings.steps, generator)
        optimizer.zero_grad()
        torch.stack(list(found.values())).sum().backward()
        seen |= pre_density.grad != 0
        if step == 0:
            for group, part in zip(optimizer.param_groups, evidence, strict=False):
                group["eps"] = settings.least_share * _typical(part.grad)
        optimizer.step()
        schedule.step()
        on_step(found)
    with torch.no_grad():
        pre_density, logits = start + _summed(evidence, grid)[:, 0], _summed(table, grid)
    return FittedVoxels(
        grid,
        pre_density,
        logits,
        seen,
        activation.requires_grad_(False),
        {name: term.item() for name, term in found.items()},
    )


def _lattice(channels: int, level: Level, grid: VoxelGrid) -> Tensor:
    """Zeros [1, C, Z / fz, Y / fy, X / fx] to be learned, in memory order [..., C] where a cell's channels are used together."""
    z, y, x = (-(-cells // factor) for cells, factor in zip(grid.shape[::-1], level[::-1], strict=True))
    return torch.zeros((1, z, y, x, channels)).movedim(-1, 1).requires_grad_()


def _summed(levels: list[Tensor], grid: VoxelGrid) -> Tensor:
    """All levels on the grid, added: [1, C, Z, Y, X]."""
    shape = grid.shape[::-1]
    fine = [
        part if part.shape[2:] == shape else F.interpolate(part, size=shape, mode="trilinear", align_corners=False)
        for part in levels
    ]
    return sum(fine[1:], start=fine[0])


def _typical(gradient: Tensor) -> float:
    """Root mean square of what is not zero."""
    return gradient[gradient != 0].square().mean().sqrt().item()
