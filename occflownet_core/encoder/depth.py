# SPDX-License-Identifier: Apache-2.0
"""Per-pixel depth distribution and context features (Lift-Splat-Shoot, arXiv 2008.05711)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from occflownet_core.encoder.backbone import ConvBlock
from occflownet_core.errors import ConfigError
from occflownet_core.lift_tables import DepthBins


@dataclass(frozen=True)
class DepthConfig:
    """The depth distribution and what it carries into the volume.

    Attributes:
        bins: equal bins of depth, metres at ``reference_focal_px``.
        reference_focal_px: focal length, in pixels of the network's images, that the bins' depths are stated for; see
            ``LiftSpec.reference_focal_px``.
        context_channels: features per pixel that are lifted.
    """

    bins: DepthBins = field(default_factory=lambda: DepthBins(1.0, 45.0, 0.5))
    reference_focal_px: float | None = None
    context_channels: int = 32


class DepthNet(nn.Module):
    """One 3 x 3 block, then depth logits and context side by side.

    Raises:
        ConfigError: the depth bins are fewer than two.
    """

    def __init__(self, channels: int, config: DepthConfig) -> None:
        super().__init__()
        self.bins = config.bins.count
        if self.bins < 2:
            raise ConfigError(f"depth: {config.bins} gives {self.bins} bins; raise max_m or lower step_m")
        self.block = ConvBlock(channels, channels)
        self.head = nn.Conv2d(channels, self.bins + config.context_channels, 1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Depth logits [I, D, h, w] and context [I, C, h, w] of features [I, F, h, w]."""
        both = self.head(self.block(features))
        return both[:, : self.bins], both[:, self.bins :]
