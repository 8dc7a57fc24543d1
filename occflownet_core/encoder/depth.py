# SPDX-License-Identifier: Apache-2.0
"""Per-pixel depth distribution and context features (Lift-Splat-Shoot, arXiv 2008.05711).

Two nets: a light one for cameras of one kind, and one that is told the camera, looks around, and may be helped by
stereo (BEVDepth, arXiv 2206.10092, without its deformable convolution, which inference runtimes lack).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from occflownet_core.camera_matrices import PARAMETERS
from occflownet_core.encoder.backbone import ConvBlock
from occflownet_core.encoder.stereo import StereoConfig
from occflownet_core.encoder.volume import ResidualBlock
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
        knows_camera: whether the net is told each camera's intrinsics and pose; it then has ``hidden_channels``, three
            residual blocks and an ASPP.
        hidden_channels: width of that net.
        stereo: matching against the previous frame, which such a net may take too; null for none.

    Raises:
        ConfigError: the depth bins are fewer than two, or stereo is to help a net that takes none.
    """

    bins: DepthBins = field(default_factory=lambda: DepthBins(1.0, 45.0, 0.5))
    reference_focal_px: float | None = None
    context_channels: int = 32
    knows_camera: bool = False
    hidden_channels: int = 256
    stereo: StereoConfig | None = None

    def __post_init__(self) -> None:
        if self.bins.count < 2:
            raise ConfigError(f"depth: {self.bins} gives {self.bins.count} bins; raise max_m or lower step_m")
        if self.stereo and not self.knows_camera:
            raise ConfigError("depth: stereo needs the net that knows its cameras; set model.depth.knows_camera: true")


class DepthNet(nn.Module):
    """One 3 x 3 block, then depth logits and context side by side."""

    def __init__(self, channels: int, config: DepthConfig) -> None:
        super().__init__()
        self.bins = config.bins.count
        self.block = ConvBlock(channels, channels)
        self.head = nn.Conv2d(channels, self.bins + config.context_channels, 1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Depth logits [I, D, h, w] and context [I, C, h, w] of features [I, F, h, w]."""
        both = self.head(self.block(features))
        return both[:, : self.bins], both[:, self.bins :]


class CameraAwareDepthNet(nn.Module):
    """Depth logits and context, each by channels that the camera's parameters open and close.

    Args:
        channels: of the features.
        config: bins and widths.
    """

    def __init__(self, channels: int, config: DepthConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels
        self.reduce = ConvBlock(channels, hidden)
        self.context_gate = CameraGate(hidden)
        self.context = nn.Conv2d(hidden, config.context_channels, 1)
        self.depth_gate = CameraGate(hidden)
        self.depth = nn.Sequential(
            ResidualBlock(2 * hidden if config.stereo else hidden, hidden),
            ResidualBlock(hidden, hidden),
            ResidualBlock(hidden, hidden),
            Surroundings(hidden),
            nn.Conv2d(hidden, config.bins.count, 1),
        )

    def forward(
        self, features: torch.Tensor, parameters: torch.Tensor, matched: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Depth logits [I, D, h, w] and context [I, C, h, w].

        Args:
            features: [I, F, h, w].
            parameters: [I, 17], ``CameraTables.camera_parameters``.
            matched: [I, hidden_channels, h, w] from the ``StereoMatcher``, where the config has stereo.
        """
        features = self.reduce(features)
        context = self.context(self.context_gate(features, parameters))
        depth = self.depth_gate(features, parameters)
        return self.depth(depth if matched is None else torch.cat([depth, matched], dim=1)), context


class CameraGate(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507) whose squeeze is the camera instead of the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(PARAMETERS, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels), nn.Sigmoid()
        )

    def forward(self, features: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """[I, C, h, w] of features [I, C, h, w] and camera parameters [I, 17]."""
        return features * self.gate(parameters.to(self.gate[0].weight.dtype))[:, :, None, None]


class Surroundings(nn.Module):
    """Atrous spatial pyramid pooling (ASPP, arXiv 1706.05587): the same features at four reaches, and of the whole image."""

    def __init__(self, channels: int, dilations: tuple[int, ...] = (6, 12, 18)) -> None:
        super().__init__()
        self.reaches = nn.ModuleList(
            [ConvBlock(channels, channels, kernel=1), *(ConvBlock(channels, channels, dilation=d) for d in dilations)]
        )
        # No batch norm on single numbers: of one image there would be nothing to norm by.
        self.whole = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True))
        self.merge = ConvBlock((len(dilations) + 2) * channels, channels, kernel=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[I, C, h, w] of [I, C, h, w]."""
        whole = self.whole(features.mean((2, 3), keepdim=True)).expand_as(features)
        return self.merge(torch.cat([*(reach(features) for reach in self.reaches), whole], dim=1))
