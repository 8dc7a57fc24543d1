# SPDX-License-Identifier: Apache-2.0
"""Views: images of several cameras and moments with their projections, and rays through their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from occflownet_core.errors import GeometryError
from occflownet_core.labels import FREE
from occflownet_core.renderer import Rays


@dataclass(frozen=True, eq=False)
class Views:
    """Images of several cameras and moments, all seen from one frame.

    Attributes:
        images: uint8 RGB [V, H, W, 3].
        image_from_ego: [V, 3, 4] float64, from points to (u, v, 1) times depth; continuous pixels (``camera``).
        time_index: [V] int64, the keyframe (0: the current one).
        camera_index, batch_index: [V] int64.
        sources: [V, S] int64, the views in which to look for a view's pixels; -1: none.

    Raises:
        GeometryError: shapes disagree.
    """

    images: Tensor
    image_from_ego: Tensor
    time_index: Tensor
    camera_index: Tensor
    batch_index: Tensor
    sources: Tensor

    def __post_init__(self) -> None:
        count = len(self.images)
        if self.images.dim() != 4 or self.images.shape[3] != 3:
            raise GeometryError(f"views: images have shape {tuple(self.images.shape)}; give [V, H, W, 3]")
        for name in ("image_from_ego", "time_index", "camera_index", "batch_index", "sources"):
            if len(getattr(self, name)) != count:
                raise GeometryError(f"views: {count} images and {len(getattr(self, name))} of {name}; they must agree")

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def cat(parts: list[Views]) -> Views:
        """All views of the parts; their sources are counted on."""
        first = torch.tensor([0, *(len(part) for part in parts[:-1])]).cumsum(0).tolist()
        columns = {n: torch.cat([getattr(p, n) for p in parts]) for n in Views.__dataclass_fields__ if n != "sources"}
        sources = torch.cat(
            [torch.where(p.sources < 0, -1, p.sources + at) for p, at in zip(parts, first, strict=True)]
        )
        return Views(**columns, sources=sources)

    def to(self, device: torch.device | str) -> Views:
        """The same views on another device."""
        return Views(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})

    @cached_property
    def brightness(self) -> Tensor:
        """[V, H, W] float32, 0 to 1 (ITU-R BT.601)."""
        return self.images.float() @ self.images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32) / 255

    @cached_property
    def ego_from_pixel(self) -> Tensor:
        """[V, 3, 3] float64: from (u, v, 1) times depth to the vector from the camera's centre."""
        return torch.linalg.inv(self.image_from_ego[:, :, :3])

    @cached_property
    def centre_m(self) -> Tensor:
        """[V, 3] float64, the cameras' centres."""
        return -(self.ego_from_pixel @ self.image_from_ego[:, :, 3:])[..., 0]


@dataclass(frozen=True, eq=False)
class EncoderPixels:
    """Where the image encoder's pixels lie in the views of the same moment; B samples, N cameras.

    Attributes:
        view_from_image: [B, N, 2, 3] float64, from continuous pixels (u, v, 1) of the encoder's images, which may be
            augmented, to those of the views.
        bin_depth_m: [B, N, D] float32, depth along the camera's axis of each of its bins' centres.
    """

    view_from_image: Tensor
    bin_depth_m: Tensor

    @staticmethod
    def cat(parts: list[EncoderPixels]) -> EncoderPixels:
        """All samples of the parts."""
        return EncoderPixels(
            torch.cat([part.view_from_image for part in parts]), torch.cat([part.bin_depth_m for part in parts])
        )

    def to(self, device: torch.device | str) -> EncoderPixels:
        """The same on another device."""
        return EncoderPixels(self.view_from_image.to(device), self.bin_depth_m.to(device))


@dataclass(frozen=True, eq=False)
class PixelRays:
    """Rays through pixels of views.

    Attributes:
        rays: [R], without a known end; ``axis_cosine`` tells depth from range.
        view: [R] int64.
        pixel: [R, 2] float64, continuous.
    """

    rays: Rays
    view: Tensor
    pixel: Tensor

    @staticmethod
    def through(views: Views, view: Tensor, pixel: Tensor) -> PixelRays:
        """Rays through pixels [R, 2] of views [R]."""
        ends = torch.cat([pixel, torch.ones_like(pixel[:, :1])], dim=1)
        along = (views.ego_from_pixel[view] @ ends[..., None])[..., 0]  # a depth of 1 m
        length = along.norm(dim=1)
        rays = Rays(
            views.centre_m[view].float(),
            (along / length[:, None]).float(),
            torch.full_like(length, torch.inf, dtype=torch.float32),
            torch.full_like(view, FREE),
            views.time_index[view],
            views.camera_index[view],
            views.batch_index[view],
            axis_cosine=(1 / length).float(),
        )
        return PixelRays(rays, view, pixel)

    @staticmethod
    def draw(views: Views, count: int, margin_px: int, generator: torch.Generator | None = None) -> PixelRays:
        """Centres of random pixels (drawn on the CPU), at least so many pixels from the border."""
        height, width = views.images.shape[1:3]
        view = torch.randint(len(views), (count,), generator=generator)
        corner = [torch.randint(margin_px, size - margin_px, (count,), generator=generator) for size in (width, height)]
        device = views.images.device
        return PixelRays.through(views, view.to(device), (torch.stack(corner, dim=1) + 0.5).double().to(device))

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, which: Tensor) -> PixelRays:
        return PixelRays(self.rays[which], self.view[which], self.pixel[which])

    def color(self, views: Views) -> Tensor:
        """[R, 3] float32, 0 to 1, of the pixels that rays pass through."""
        column, row = self.pixel.long().unbind(dim=1)
        return views.images[self.view, row, column].float() / 255
