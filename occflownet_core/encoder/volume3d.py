# SPDX-License-Identifier: Apache-2.0
"""The volume's network in 3D convolutions, as BEVStereo's descendants and OccFlowNet (arXiv 2402.12792) have it.

It takes and gives volumes with heights folded into channels, [B, C * Z, Y, X], as its planar twin does: the memory is
warped in that form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from occflownet_core.encoder.volume import VolumeConfig, require_levels


class ConvBlock3d(nn.Sequential):
    """3D convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm3d(outputs),
            nn.ReLU(inplace=True),
        )


class ResidualBlock3d(nn.Module):
    """Two 3 x 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvBlock3d(inputs, outputs, stride=stride)
        self.second = nn.Sequential(nn.Conv3d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs))
        self.shortcut = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class FrameBlock3d(nn.Module):
    """The light block that one frame's volume goes through by itself.

    Args:
        inputs, outputs: channels per voxel.
        heights: voxels along z.
    """

    def __init__(self, inputs: int, outputs: int, heights: int) -> None:
        super().__init__()
        self.heights = heights
        self.block = ResidualBlock3d(inputs, outputs)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """[B, outputs * Z, Y, X] of [B, inputs * Z, Y, X]."""
        return self.block(volume.unflatten(1, (-1, self.heights))).flatten(1, 2)


class VolumeEncoder3d(nn.Module):
    """A residual network at full, half, quarter, ... resolution; the levels meet enlarged and side by side.

    Args:
        inputs, outputs: channels per voxel.
        heights: voxels along z.
        config: widths and blocks.

    Raises:
        ConfigError: there are not as many widths as blocks.
    """

    def __init__(self, inputs: int, outputs: int, heights: int, config: VolumeConfig) -> None:
        super().__init__()
        require_levels(config)
        self.heights = heights
        self.levels = nn.ModuleList()
        for level, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
            first = ResidualBlock3d(inputs, width, stride=2 if level else 1)
            self.levels.append(nn.Sequential(first, *(ResidualBlock3d(width, width) for _ in range(blocks - 1))))
            inputs = width
        self.head = ConvBlock3d(sum(config.widths), outputs, kernel=1)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """[B, outputs * Z, Y, X] of [B, inputs * Z, Y, X]."""
        volume = volume.unflatten(1, (-1, self.heights))  # [B, C, Z, Y, X]
        maps = []
        for level in self.levels:
            volume = level(volume)
            maps.append(volume)
        size = maps[0].shape[-3:]
        maps[1:] = [enlarged(coarse, size) for coarse in maps[1:]]
        return self.head(torch.cat(maps, dim=1)).flatten(1, 2)


def enlarged(volume: torch.Tensor, size_zyx: tuple[int, int, int]) -> torch.Tensor:
    """Volume [B, C, Z, Y, X] interpolated to another size: trilinear, in two steps that are 2D for every runtime.

    Over the ground plane with heights folded into channels, then over heights with the plane unrolled into a row.
    """
    z, y, x = size_zyx
    plane = F.interpolate(volume.flatten(1, 2), size=(y, x), mode="bilinear", align_corners=False)
    columns = plane.unflatten(1, volume.shape[1:3]).flatten(3)  # [B, C, Z, Y * X]
    return F.interpolate(columns, size=(z, y * x), mode="bilinear", align_corners=False).unflatten(3, (y, x))
