# SPDX-License-Identifier: Apache-2.0
"""Lifting image features into the volume: by gathering, every voxel reads the pixels it projects to; by splatting (see
``splat``), every pixel at every depth adds to the voxel it falls into. Both are tables with one method, ``lift``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from occflownet_core.camera_matrices import CameraTables
from occflownet_core.encoder.splat import splat
from occflownet_core.lift_tables import CAMERA_INPUTS, GATHER_INPUTS, LiftTables
from occflownet_core.splat_tables import SplatTables


@dataclass(frozen=True)
class CameraTensors:
    """``CameraTables`` of a batch as tensors.

    Attributes:
        image_from_ego: [B, N, 4, 4] float32.
        ego_from_image: [B, N, 4, 4] float32.
        camera_parameters: [B, N, 17] float32.
    """

    image_from_ego: torch.Tensor
    ego_from_image: torch.Tensor
    camera_parameters: torch.Tensor

    @classmethod
    def from_tables(cls, tables: Sequence[CameraTables | None]) -> CameraTensors | None:
        """Stack one table per sample of a batch; None where there are none."""
        return None if any(t is None for t in tables) else cls(*_stacked(tables, CAMERA_INPUTS))

    def to(self, device: torch.device | str) -> CameraTensors:
        """The same on another device."""
        return CameraTensors(*(getattr(self, name).to(device) for name in CAMERA_INPUTS))


@dataclass(frozen=True)
class LiftTensors:
    """``LiftTables`` of a batch as tensors: lifting by gathering.

    Attributes:
        pixel_index: [B, V, S] int32.
        depth_index: [B, V, S, 2] int32.
        depth_weight: [B, V, S, 2] float32.
        cameras: what else the network is told about the cameras, or None.
    """

    pixel_index: torch.Tensor
    depth_index: torch.Tensor
    depth_weight: torch.Tensor
    cameras: CameraTensors | None = None

    @classmethod
    def from_tables(cls, tables: Sequence[LiftTables], device: torch.device | str = "cpu") -> LiftTensors:
        """Stack one table per sample of a batch."""
        cameras = CameraTensors.from_tables([t.cameras for t in tables])
        return cls(*_stacked(tables, GATHER_INPUTS), cameras).to(device)

    def to(self, device: torch.device | str) -> LiftTensors:
        """The same on another device."""
        moved = (getattr(self, name).to(device) for name in GATHER_INPUTS)
        return LiftTensors(*moved, self.cameras.to(device) if self.cameras else None)

    def lift(self, context: torch.Tensor, depth: torch.Tensor, shape_zyx: tuple[int, int, int]) -> torch.Tensor:
        """The volume [B, C, Z, Y, X]; arguments as for the function ``lift``."""
        return lift(context, depth, self, shape_zyx)


@dataclass(frozen=True)
class SplatTensors:
    """``SplatTables`` of a batch as tensors: lifting by splatting.

    Attributes:
        voxel_index: [B, N, D, h, w] int32, the number of voxels for points outside the grid.
        cameras: what else the network is told about the cameras, or None.
    """

    voxel_index: torch.Tensor
    cameras: CameraTensors | None = None

    @classmethod
    def from_tables(cls, tables: Sequence[SplatTables], device: torch.device | str = "cpu") -> SplatTensors:
        """Stack one table per sample of a batch."""
        cameras = CameraTensors.from_tables([t.cameras for t in tables])
        return cls(*_stacked(tables, ("voxel_index",)), cameras).to(device)

    def to(self, device: torch.device | str) -> SplatTensors:
        """The same on another device."""
        return SplatTensors(self.voxel_index.to(device), self.cameras.to(device) if self.cameras else None)

    def lift(self, context: torch.Tensor, depth: torch.Tensor, shape_zyx: tuple[int, int, int]) -> torch.Tensor:
        """The volume [B, C, Z, Y, X]; arguments as for ``splat``."""
        return splat(context, depth, self.voxel_index, shape_zyx)


def stacked_tables(
    tables: Sequence[LiftTables] | Sequence[SplatTables], device: torch.device | str = "cpu"
) -> LiftTensors | SplatTensors:
    """One table per sample of a batch as tensors, by their method of lifting."""
    kind = LiftTensors if isinstance(tables[0], LiftTables) else SplatTensors
    return kind.from_tables(tables, device)


def _stacked(tables: Sequence, names: Sequence[str]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.stack([getattr(t, name) for t in tables])) for name in names]


def lift(
    context: torch.Tensor, depth: torch.Tensor, tables: LiftTensors, shape_zyx: tuple[int, int, int]
) -> torch.Tensor:
    """Sum over a voxel's slots of (probability that the pixel's depth is the voxel's) x (the pixel's context).

    Args:
        context: [B, N, C, h, w].
        depth: [B, N, D, h, w], probabilities over depth bins.
        tables: what every voxel reads, V = Z * Y * X.
        shape_zyx: cells of the volume along z, y, x.

    Returns:
        [B, C, Z, Y, X].
    """
    batch, cameras, channels, height, width = context.shape
    pixels = context.permute(0, 1, 3, 4, 2).reshape(-1, channels)  # [B * N * h * w, C]
    at_bins = _gather(depth.reshape(-1), tables.depth_index, depth[0].numel())  # [B, V, S, 2]
    here = (at_bins * tables.depth_weight).sum(-1)  # [B, V, S]
    # Slot by slot: a sum over an axis of two costs more than an addition.
    volume = sum(
        _gather(pixels, index, cameras * height * width) * share[..., None]  # [B, V, C]
        for index, share in zip(tables.pixel_index.unbind(-1), here.unbind(-1), strict=True)
    )
    return volume.transpose(1, 2).reshape(batch, channels, *shape_zyx)


def _gather(rows: torch.Tensor, index: torch.Tensor, per_sample: int) -> torch.Tensor:
    """Rows [B * per_sample, ...] at per-sample indices [B, ...]."""
    if index.shape[0] > 1:
        first = torch.arange(index.shape[0], device=index.device, dtype=index.dtype) * per_sample
        index = index + first.view(-1, *([1] * (index.ndim - 1)))
    return rows.index_select(0, index.reshape(-1)).reshape(*index.shape, *rows.shape[1:])
