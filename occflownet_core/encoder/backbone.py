# SPDX-License-Identifier: Apache-2.0
"""Image features: any timm backbone, and a feature pyramid down to one map per image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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
        neck: how levels meet: ``add``, each narrowed to ``channels`` and added to the coarser one (FPN,
            arXiv 1612.03144); or ``concatenate``, as Lift-Splat-Shoot has it (arXiv 2008.05711), as they are.
        options: of the timm model, by name, e.g. ``drop_path_rate``.
    """

    name: str = "mobilenetv4_conv_small"
    pretrained: bool = True
    out_indices: tuple[int, ...] = (2, 3, 4)
    channels: int = 64
    neck: Literal["add", "concatenate"] = "add"
    options: dict[str, Any] = field(default_factory=dict)


class ConvBlock(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class ImageFeatures(NamedTuple):
    """What is seen in I images.

    Attributes:
        pyramid: [I, C, H / stride, W / stride].
        fine: [I, F, H / fine_stride, W / fine_stride], a level of the backbone itself; None where none was asked for.
    """

    pyramid: torch.Tensor
    fine: torch.Tensor | None


class ImageEncoder(nn.Module):
    """uint8 images to feature maps.

    Args:
        config: backbone and pyramid.
        image_size: height and width of the images, for backbones that are made for one size (as Swin is).
        fine_level: timm's index of a finer level that is wanted too, or None.

    Attributes:
        stride: pixels per feature, the finest level's.
        fine_stride, fine_channels: of the finer level, if one is wanted.

    Raises:
        ConfigError: timm has no such model, its levels do not halve one another, or it cannot take the images.
    """

    def __init__(
        self, config: BackboneConfig, image_size: tuple[int, int] | None = None, fine_level: int | None = None
    ) -> None:
        super().__init__()
        if fine_level is not None and fine_level >= config.out_indices[0]:
            raise ConfigError(
                f"stereo: level {fine_level} is not finer than the pyramid's {config.out_indices}; choose a lower one"
            )
        levels = config.out_indices if fine_level is None else (fine_level, *config.out_indices)
        options = dict(config.options)
        if image_size and _made_for_one_size(config.name):
            options["img_size"] = image_size
        try:
            self.backbone = timm.create_model(
                config.name, pretrained=config.pretrained, features_only=True, out_indices=levels, **options
            )
        except OSError as error:
            raise ConfigError(
                f"weights of backbone '{config.name}' cannot be downloaded ({str(error).splitlines()[0]}); "
                "set pretrained: false, or run once with a connection"
            ) from None
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"backbone '{config.name}' with levels {levels} cannot be made ({reason}); "
                "choose a name from timm.list_models() and levels that it has"
            ) from None
        strides, widths = self.backbone.feature_info.reduction(), self.backbone.feature_info.channels()
        self.has_fine = fine_level is not None
        if self.has_fine:
            self.fine_stride, self.fine_channels = strides.pop(0), widths.pop(0)
        if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
            raise ConfigError(
                f"backbone '{config.name}' has strides {strides} at levels {config.out_indices}; "
                "choose levels that each halve the one before"
            )
        self.stride: int = strides[0]
        self.coarsest_stride: int = strides[-1]
        # Swin and its like put channels last.
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
        if config.neck == "add":
            self.lateral = nn.ModuleList(nn.Conv2d(width, config.channels, 1) for width in widths)
            self.smooth = ConvBlock(config.channels, config.channels)
        else:
            self.neck = ConcatenatingNeck(widths, config.channels)
        self.register_buffer("mean_rgb", torch.tensor(_MEAN_RGB).view(3, 1, 1), persistent=False)
        self.register_buffer("std_rgb", torch.tensor(_STD_RGB).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [I, C, H / stride, W / stride] of uint8 RGB images [I, H, W, 3]; normalised as ImageNet's are."""
        return self.features(images).pyramid

    def features(self, images: torch.Tensor) -> ImageFeatures:
        """The pyramid's map, and the finer level if one was asked for, of uint8 RGB images [I, H, W, 3]."""
        x = images.to(self.mean_rgb.dtype).permute(0, 3, 1, 2)  # [I, 3, H, W]
        levels = self.backbone((x - self.mean_rgb) / self.std_rgb)
        if self.channels_last:
            levels = [level.permute(0, 3, 1, 2) for level in levels]
        fine = levels.pop(0) if self.has_fine else None
        if hasattr(self, "neck"):
            return ImageFeatures(self.neck(levels), fine)
        maps = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        merged = maps.pop()
        while maps:
            merged = maps.pop() + F.interpolate(merged, scale_factor=2.0, mode="nearest")
        return ImageFeatures(self.smooth(merged), fine)

    def set_checkpointing(self, enabled: bool) -> None:
        """Let the backbone keep less for backward and compute it again, where timm can."""
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enabled)


class ConcatenatingNeck(nn.Module):
    """From the coarsest level up: enlarge, put beside the finer one, two 3 x 3 blocks (LSS's ``Up``).

    Args:
        widths: channels of the levels, finest first.
        channels: of what comes out.
    """

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        coarser = [*[channels] * (len(widths) - 2), widths[-1]] if len(widths) > 1 else []
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvBlock(fine + coarse, channels), ConvBlock(channels, channels))
            for fine, coarse in zip(widths, coarser, strict=False)
        )
        self.single = None if self.blocks else ConvBlock(widths[0], channels)

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """[I, channels, h, w] of levels [I, C_l, h / 2^l, w / 2^l], finest first."""
        if self.single is not None:
            return self.single(levels[0])
        merged = levels[-1]
        for block, finer in zip(reversed(self.blocks), reversed(levels[:-1]), strict=True):
            larger = F.interpolate(merged, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            merged = block(torch.cat([finer, larger], dim=1))
        return merged


def _made_for_one_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(config and config.fixed_input_size)
