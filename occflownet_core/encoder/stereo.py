# SPDX-License-Identifier: Apache-2.0
"""Stereo in time: a plane-sweep cost volume of each camera's image against the same camera's previous one.

Every pixel is placed at the depth of every bin, moved by ego motion and looked up in the previous image's features;
where the two agree is its likely depth (MVSNet, arXiv 1804.02505; for driving BEVStereo, arXiv 2209.10248).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from occflownet_core.encoder.backbone import ConvBlock
from occflownet_core.errors import ConfigError

_NEAREST = 1e-3
_SHORT = 1e-2
_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class StereoConfig:
    """Matching against the previous frame.

    Attributes:
        level: timm's feature level that is matched, finer than those of the pyramid (1/4: Swin's 0, ResNet's 1).
        channels: width of the maps that are matched.
        groups: parts of the channels that are matched each by itself (group-wise correlation, arXiv 1903.04025).
        stride: pixels between the places that are matched, from the level's own stride to the pyramid's.
    """

    level: int = 0
    channels: int = 32
    groups: int = 1
    stride: int = 4


class StereoView(NamedTuple):
    """What the next frame matches against; zeros mean that there is nothing to match.

    Attributes:
        features: [B, N, C, h, w], of unit length in each group of channels.
        image_from_ego: [B, N, 4, 4], of the cameras at that time, into image coordinates (u d, v d, d, 1).
    """

    features: Tensor
    image_from_ego: Tensor


class StereoMatcher(nn.Module):
    """Features that are matched, and what the matching says to the depth net.

    Args:
        inputs: channels of the backbone's fine level.
        level_stride: pixels per feature of that level.
        stride: pixels per feature of the depth net.
        depths_m: [D] middles of the depth bins.
        outputs: channels that the depth net gets.
        config: the matching.

    Raises:
        ConfigError: the strides do not double one another from level over places to pyramid, or the groups do not
            divide the channels.
    """

    def __init__(
        self,
        inputs: int,
        level_stride: int,
        stride: int,
        depths_m: tuple[float, ...],
        outputs: int,
        config: StereoConfig,
    ) -> None:
        super().__init__()
        halvings = (stride // config.stride).bit_length() - 1
        if config.stride % level_stride or config.stride << halvings != stride:
            raise ConfigError(
                f"stereo: stride {config.stride} does not lie between the matched level's {level_stride} and the "
                f"pyramid's {stride} px; give one of them or a doubling in between"
            )
        if config.groups < 1 or config.channels % config.groups:
            raise ConfigError(
                f"stereo: {config.channels} channels cannot be matched in {config.groups} groups; choose a divisor"
            )
        self.config, self.level_stride = config, level_stride
        self.checkpointing = False
        self.features = nn.Sequential(
            ConvBlock(inputs, config.channels), nn.Conv2d(config.channels, config.channels, 1)
        )
        widths = [config.groups * len(depths_m), *[outputs] * max(halvings, 1)]
        self.reduce = nn.Sequential(
            *(ConvBlock(a, b, stride=2 if halvings else 1) for a, b in itertools.pairwise(widths))
        )
        self.register_buffer("depths_m", torch.tensor(depths_m), persistent=False)

    def view(self, level: Tensor, image_from_ego: Tensor) -> StereoView:
        """What the next frame matches against, of the fine level [B, N, F, h, w] of this one."""
        matched = unit_groups(self.features(level.flatten(0, 1)), self.config.groups)
        return StereoView(matched.unflatten(0, level.shape[:2]), image_from_ego)

    def forward(self, now: Tensor, ego_from_image: Tensor, previous_from_current: Tensor, then: StereoView) -> Tensor:
        """What the depth net gets, [B * N, outputs, h, w].

        Args:
            now: [B, N, C, h, w], the features of this frame's ``view``.
            ego_from_image: [B, N, 4, 4] of this frame's cameras.
            previous_from_current: [B, 4, 4], pose of the current ego frame in the previous one.
            then: the previous frame's view.
        """
        there = _product(then.image_from_ego, _product(previous_from_current[:, None], ego_from_image))  # [B, N, 4, 4]
        arguments = (
            now.flatten(0, 1),
            then.features.flatten(0, 1),
            there.flatten(0, 1),
            self.depths_m,
            self.level_stride,
            self.config.stride,
            self.config.groups,
        )
        if self.checkpointing and torch.is_grad_enabled():
            volume = checkpoint(cost_volume, *arguments, use_reentrant=False)
        else:
            volume = cost_volume(*arguments)
        return self.reduce(volume.flatten(1, 2).to(now.dtype))


def cost_volume(
    now: Tensor,
    then: Tensor,
    previous_from_current_image: Tensor,
    depths_m: Tensor,
    level_stride: int,
    stride: int,
    groups: int = 1,
) -> Tensor:
    """Agreement of every place of an image, at every depth, with what the previous image has there.

    Args:
        now, then: [M, C, h, w] features of M images now and before, of unit length in each group of channels.
        previous_from_current_image: [M, 4, 4], from image coordinates (u d, v d, d, 1) to the previous image's.
        depths_m: [D].
        level_stride: pixels per feature.
        stride: pixels between places, a multiple of ``level_stride``.
        groups: parts of the channels that are compared each by itself.

    Returns:
        [M, groups, D, h', w'], cosine of the angle between the features, -1 to 1; 0 where the place lies outside the
        previous image, or behind its camera.
    """
    if stride > level_stride:
        now = unit_groups(F.avg_pool2d(now, stride // level_stride), groups)
    height_px, width_px = then.shape[-2] * level_stride, then.shape[-1] * level_stride
    step = max(1, _AT_ONCE // now.numel())
    parts = []
    for first in range(0, len(depths_m), step):
        depths = depths_m[first : first + step]
        place = places_before(now.shape[-2:], stride, previous_from_current_image, depths, width_px, height_px)
        found = F.grid_sample(then.to(place.dtype), place.flatten(1, 2), align_corners=False)  # [M, C, D * h, w]
        found = found.unflatten(2, (len(depths), now.shape[-2]))  # [M, C, D, h, w]
        agreement = (now[:, :, None] * found).unflatten(1, (groups, -1)).sum(2)  # [M, G, D, h, w]
        # A lookup between cells is shorter than one at a cell; undivided, agreement would favour whole cells.
        length = (found.square().unflatten(1, (groups, -1)).sum(2) + _SHORT**2).sqrt()
        parts.append(agreement / length)
    return torch.cat(parts, dim=2)


def places_before(
    shape: tuple[int, int],
    stride: int,
    previous_from_current_image: Tensor,
    depths_m: Tensor,
    width_px: int,
    height_px: int,
) -> Tensor:
    """Where places of this image, put at depths, lie in the previous one, as ``grid_sample`` counts: -1 to 1 inside.

    Args:
        shape: h', w', number of places.
        stride: pixels between them.
        previous_from_current_image: [M, 4, 4].
        depths_m: [D].
        width_px, height_px: of the images.

    Returns:
        [M, D, h', w', 2] float32; far outside for places behind the previous camera.
    """
    matrix = previous_from_current_image.float()
    u, v = ((torch.arange(n, device=matrix.device, dtype=torch.float32) + 0.5) * stride for n in reversed(shape))
    pixel = torch.stack([u.expand(*shape), v[:, None].expand(*shape), torch.ones(*shape, device=matrix.device)])
    ray = (matrix[:, :3, :3, None, None] * pixel).sum(2)  # [M, 3, h, w]
    there = ray[:, :, None] * depths_m.float().view(1, 1, -1, 1, 1) + matrix[:, :3, 3].view(-1, 3, 1, 1, 1)
    depth_m = there[:, 2]  # [M, D, h, w]
    size_px = torch.tensor([width_px, height_px], device=matrix.device, dtype=torch.float32).view(1, 2, 1, 1, 1)
    normalised = 2 * there[:, :2] / (depth_m.clamp(min=_NEAREST)[:, None] * size_px) - 1
    inside = (depth_m > _NEAREST)[:, None]
    # Beyond 2 a bilinear lookup finds nothing but zeros, and numbers without bound would not survive half precision.
    return torch.where(inside, normalised.clamp(-3, 3), 3.0).movedim(1, -1)


def unit_groups(features: Tensor, groups: int) -> Tensor:
    """Features [M, C, h, w] scaled to unit length in each group of channels."""
    return F.normalize(features.unflatten(1, (groups, -1)), dim=2).flatten(1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrices a @ b, [..., 4, 4], never in half precision, which has no digits for pixels times metres."""
    return (a.float()[..., :, :, None] * b.float()[..., None, :, :]).sum(-2)
