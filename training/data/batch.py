# SPDX-License-Identifier: Apache-2.0
"""Samples and batches: one keyframe's inputs and supervision, stacked over the samples of a training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from occflownet_core.boxes import MovingBoxes
from occflownet_core.encoder.lift import LiftTensors, SplatTensors, stacked_tables
from occflownet_core.errors import DatasetError
from occflownet_core.lift_tables import LiftTables
from occflownet_core.renderer.rays import Rays
from occflownet_core.splat_tables import SplatTables
from occflownet_core.views import EncoderPixels, Views


@dataclass(frozen=True, eq=False)
class Occupancy:
    """Occ3D's 3D labels of one keyframe, [X, Y, Z] each.

    Attributes:
        labels: uint8.
        camera_mask, lidar_mask: bool, voxels that a camera or the LiDAR could see.
    """

    labels: np.ndarray
    camera_mask: np.ndarray
    lidar_mask: np.ndarray


@dataclass(frozen=True, eq=False)
class OccupancySample:
    """One keyframe: what the network takes and what supervises it. All geometry is in its (maybe flipped) ego frame.

    Attributes:
        token, scene: where it comes from.
        stamp_us: time of the ego frame.
        images: uint8 RGB [N, H, W, 3].
        tables: how they are lifted: what every voxel reads, or where every pixel goes.
        previous_from_current: [4, 4], this ego frame in the previous keyframe's; None at a window's or scene's start.
        rays: 2D supervision, or None where it was not asked for.
        views: images of the keyframes around this one, or None where they were not asked for.
        encoder_pixels: where the pixels of ``images`` lie in the views of this keyframe; None without views.
        boxes: how annotated objects move between this keyframe and its neighbours, or None.
        depth_m: float32 [N, h, w], depth of the nearest return in each feature cell as the depth bins count it
            (``LiftSpec.network_depth_m``), 0 where there is none; or None.
        depth_label: uint8 [N, h, w], class of that return, ``UNLABELLED`` where nobody knows it; or None.
        occupancy: 3D labels, or None.
        frame_time_s: float32 [2 * horizon + 1], stamps of keyframes -horizon..horizon relative to this one's; NaN
            where the scene has none.
    """

    token: str
    scene: str
    stamp_us: int
    images: np.ndarray
    tables: LiftTables | SplatTables
    previous_from_current: np.ndarray | None
    rays: Rays | None
    views: Views | None
    encoder_pixels: EncoderPixels | None
    boxes: MovingBoxes | None
    depth_m: np.ndarray | None
    depth_label: np.ndarray | None
    occupancy: Occupancy | None
    frame_time_s: np.ndarray


@dataclass(frozen=True, eq=False)
class OccupancyBatch:
    """Samples of one moment, stacked: B samples, N cameras.

    Attributes:
        tokens, scenes: B names.
        images: uint8 [B, N, H, W, 3].
        tables: lift tables.
        previous_from_current: [B, 4, 4] float32; the identity where there is no previous frame.
        has_previous: [B] bool; where False the network's memory must be cleared.
        rays, views, boxes: of all samples, told apart by their ``batch_index``; None where a sample has none.
        encoder_pixels: where the pixels of ``images`` lie in views; None without views.
        depth_m, depth_label: [B, N, h, w] float32 and uint8, or None.
        labels: uint8 [B, X, Y, Z] or None, with camera_mask and lidar_mask, bool.
        frame_time_s: [B, 2 * horizon + 1] float32.
    """

    tokens: tuple[str, ...]
    scenes: tuple[str, ...]
    images: Tensor
    tables: LiftTensors | SplatTensors
    previous_from_current: Tensor
    has_previous: Tensor
    rays: Rays | None
    views: Views | None
    encoder_pixels: EncoderPixels | None
    boxes: MovingBoxes | None
    depth_m: Tensor | None
    depth_label: Tensor | None
    labels: Tensor | None
    camera_mask: Tensor | None
    lidar_mask: Tensor | None
    frame_time_s: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> OccupancyBatch:
        """The same batch on another device."""

        def move(value):
            return value.to(device) if hasattr(value, "to") else value

        return replace(self, **{name: move(getattr(self, name)) for name in self.__dataclass_fields__})


def collate(windows: Sequence[Sequence[OccupancySample]]) -> list[OccupancyBatch]:
    """Windows of consecutive keyframes, all of one length T, as T batches in order of time.

    Raises:
        DatasetError: the windows differ in length.
    """
    lengths = {len(window) for window in windows}
    if len(lengths) != 1:
        raise DatasetError(f"windows of {sorted(lengths)} keyframes cannot be stacked; use one window length")
    return [_stack(moment) for moment in zip(*windows, strict=True)]


def _stack(samples: Sequence[OccupancySample]) -> OccupancyBatch:
    motions = [np.eye(4) if s.previous_from_current is None else s.previous_from_current for s in samples]
    occupancy, pixels = [s.occupancy for s in samples], [s.encoder_pixels for s in samples]
    labelled = all(o is not None for o in occupancy)

    def stacked(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
        return None if any(array is None for array in arrays) else torch.from_numpy(np.stack(arrays))

    return OccupancyBatch(
        tokens=tuple(s.token for s in samples),
        scenes=tuple(s.scene for s in samples),
        images=stacked([s.images for s in samples]),
        tables=stacked_tables([s.tables for s in samples]),
        previous_from_current=stacked(motions).float(),
        has_previous=torch.tensor([s.previous_from_current is not None for s in samples]),
        rays=_joined([s.rays for s in samples], Rays),
        views=_joined([s.views for s in samples], Views),
        encoder_pixels=None if any(p is None for p in pixels) else EncoderPixels.cat(pixels),
        boxes=_joined([s.boxes for s in samples], MovingBoxes),
        depth_m=stacked([s.depth_m for s in samples]),
        depth_label=stacked([s.depth_label for s in samples]),
        labels=stacked([o.labels for o in occupancy]) if labelled else None,
        camera_mask=stacked([o.camera_mask for o in occupancy]) if labelled else None,
        lidar_mask=stacked([o.lidar_mask for o in occupancy]) if labelled else None,
        frame_time_s=stacked([s.frame_time_s for s in samples]),
    )


def _joined(parts: Sequence[Rays | Views | MovingBoxes | None], kind: type) -> Rays | Views | MovingBoxes | None:
    if any(part is None for part in parts):
        return None
    return kind.cat([replace(p, batch_index=torch.full_like(p.batch_index, i)) for i, p in enumerate(parts)])


class EpochSampler(Sampler):
    """Items ``(index, epoch)`` in an order that depends on seed and epoch alone, so that a resumed run repeats itself.

    ``NuScenesOccupancy`` seeds an item's random choices from both numbers. Lightning calls ``set_epoch``. With several
    processes each takes every ``ranks``-th item; the order is cut to a whole number of rounds.

    Args:
        count: length of the data set.
        seed: of the order.
        shuffle: False keeps the data set's order.
        rank, ranks: this process and the number of processes.
    """

    def __init__(self, count: int, seed: int = 0, shuffle: bool = True, rank: int = 0, ranks: int = 1) -> None:
        self.count, self.seed, self.shuffle, self.rank, self.ranks = count, seed, shuffle, rank, ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        mine = order[self.rank : len(self) * self.ranks : self.ranks]
        return ((int(index), self.epoch) for index in mine)
