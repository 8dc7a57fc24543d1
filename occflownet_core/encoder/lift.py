# SPDX-License-Identifier: Apache-2.0
"""Lifting image features into the volume by gathering: every voxel reads the pixels it projects to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from occflownet_core.lift_tables import LiftTables


@dataclass(frozen=True)
class LiftTensors:
    """``LiftTables`` of a batch as tensors.

    Attributes:
        pixel_index: [B, V, S] int32.
        depth_index: [B, V, S, 2] int32.
        depth_weight: [B, V, S, 2] float32.
    """

    pixel_index: torch.Tensor
    depth_index: torch.Tensor
    depth_weight: torch.Tensor

    @classmethod
    def from_tables(cls, tables: Sequence[LiftTables], device: torch.device | str = "cpu") -> LiftTensors:
        """Stack one table per sample of a batch."""
        names = ("pixel_index", "depth_index", "depth_weight")
        return cls(*(torch.from_numpy(np.stack([getattr(t, name) for t in tables])).to(device) for name in names))


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
