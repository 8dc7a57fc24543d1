# SPDX-License-Identifier: Apache-2.0
"""Image features: any timm backbone, and a light feature pyramid down to one map per image."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import nn

from occflownet_core.errors import ConfigError

_MEAN_RGB = (123.675, 116.28, 103.53)
_STD_RGB = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class BackboneConfig:
    """The image network.

    Attributes:
        name: a timm model with ``features_only`` support.
        pretrained: start from timm's weights (downloads them).
        out_indices: timm's feature levels, finest first; each must halve the one before.
        channels: width of the map that comes out.
    """

    name: str = "mobilenetv4_conv_small"
    pretrained: bool = True
    out_indices: tuple[int, ...] = (2, 3, 4)
    channels: int = 64


class ConvBlock(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class ImageEncoder(nn.Module):
    """uint8 images to feature maps.

    Attributes:
        stride: pixels per feature, the finest level's.

    Raises:
        ConfigError: timm has no such model, or its levels do not halve one another.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        try:
            self.backbone = timm.create_model(
                config.name, pretrained=config.pretrained, features_only=True, out_indices=config.out_indices
            )
        except OSError as error:
            raise ConfigError(
                f"weights of backbone '{config.name}' cannot be downloaded ({str(error).splitlines()[0]}); "
                "set pretrained: false, or run once with a connection"
            ) from None
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"backbone '{config.name}' with levels {config.out_indices} cannot be made ({reason}); "
                "choose a name from timm.list_models() and levels that it has"
            ) from None
        strides = self.backbone.feature_info.reduction()
        if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
            raise ConfigError(
                f"backbone '{config.name}' has strides {strides} at levels {config.out_indices}; "
                "choose levels that each halve the one before"
            )
        self.stride: int = strides[0]
        self.coarsest_stride: int = strides[-1]
        self.lateral = nn.ModuleList(
            nn.Conv2d(width, config.channels, 1) for width in self.backbone.feature_info.channels()
        )
        self.smooth = ConvBlock(config.channels, config.channels)
        self.register_buffer("mean_rgb", torch.tensor(_MEAN_RGB).view(3, 1, 1), persistent=False)
        self.register_buffer("std_rgb", torch.tensor(_STD_RGB).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [I, C, H / stride, W / stride] of uint8 RGB images [I, H, W, 3]; normalised as ImageNet's are."""
        x = images.to(self.mean_rgb.dtype).permute(0, 3, 1, 2)  # [I, 3, H, W]
        levels = self.backbone((x - self.mean_rgb) / self.std_rgb)
        maps = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        merged = maps.pop()
        while maps:
            merged = maps.pop() + F.interpolate(merged, scale_factor=2.0, mode="nearest")
        return self.smooth(merged)
