# SPDX-License-Identifier: Apache-2.0
"""Data loaders of a training run: an endless stream of batches that depends on seed and step alone, and validation."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

from occflownet_core.camera import CameraRig
from occflownet_core.errors import DatasetError
from occflownet_core.lift_tables import LiftSpec
from occflownet_core.preprocess import ImageTransform
from training.data.batch import EpochSampler, OccupancyBatch, OccupancySample, collate
from training.data.dataset import NuScenesOccupancy
from training.data.nuscenes import KeyframeIndex
from training.data.pseudo_labels import PseudoLabelRays
from training.data.rays import LidarRays, RaySource
from training.data.splits import only_version
from training.settings import TrainingConfig


class Roots(ConcatDataset):
    """Windows of several data roots, one after the other; items may be asked for as ``(index, epoch)``."""

    def __getitem__(self, item: tuple[int, int]) -> list[OccupancySample]:
        index, epoch = item
        root = bisect.bisect_right(self.cumulative_sizes, index)
        return self.datasets[root][index - (self.cumulative_sizes[root - 1] if root else 0), epoch]


class EndlessBatches:
    """Batches of items ``(index, epoch)``, epoch after epoch without end, from any batch on.

    A resumed run thereby sees the very items that the interrupted one would have seen. It has no length, so that
    nothing happens at the end of an epoch: length, validation and checkpoints are counted in steps.

    Args:
        sampler: order of one epoch.
        batch_size: items per batch; a batch may span two epochs.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self.first_batch = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, skipped = divmod(self.first_batch * self.batch_size, len(self.sampler))
        items = itertools.islice(self._items(epoch), skipped, None)
        while True:
            yield list(itertools.islice(items, self.batch_size))

    def _items(self, epoch: int) -> Iterator[tuple[int, int]]:
        for e in itertools.count(epoch):
            self.sampler.set_epoch(e)
            yield from self.sampler


class ResumableLoader(DataLoader):
    """A loader of ``EndlessBatches`` that Lightning asks for its state and starts in the middle of the stream."""

    def state_dict(self) -> dict:
        """Nothing: the trainer's own count of batches says all."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Nothing to load."""


def ray_source(config: TrainingConfig, root: str) -> RaySource | None:
    """The labelled rays that a run asks for, of one data root; None where it learns from images or voxels alone."""
    data, pseudo = config.data, config.data.pseudo
    if not (config.supervision.renders or config.reads_pixel_labels):
        return None
    if data.rays == "pseudo":
        return PseudoLabelRays(root, pseudo.depth, pseudo.label, pseudo.depth_unit_m, pseudo.stride)
    return LidarRays(data.rays, data.no_return_rays, half_pixel_offset=config.rendering.half_pixel_offset)


class OccupancyData(pl.LightningDataModule):
    """Training windows of a few keyframes (memory and present) and validation windows alike.

    Args:
        config: the run.
        lift: shapes of the network's lift.

    Raises:
        DatasetError: a root, table or split is missing.
    """

    def __init__(self, config: TrainingConfig, lift: LiftSpec) -> None:
        super().__init__()
        self.config, self.lift = config, lift
        data, supervision = config.data, config.supervision
        roots = [data.dataroot] if isinstance(data.dataroot, str) else data.dataroot
        if not any(roots):
            raise DatasetError("data.dataroot is not given; say --data.dataroot DIR, a data set in the nuScenes format")
        settings = {
            "horizon": data.horizon if supervision.renders or config.photometric.is_used else 0,
            "beyond_is_free": data.beyond_is_free,
            "sources": config.photometric.sources if config.photometric.is_used else 0,
            "boxes": config.needs_boxes,
            "depth": config.reads_pixel_labels,
            "occupancy": "required" if supervision.reads_voxels else "none",
            "augmentation": data.augmentation if data.augment else None,
        }
        self.train = Roots(
            [
                self._dataset(root, data.train_split, data.labels_folder, rays=ray_source(config, root), **settings)
                for root in roots
            ]
        )
        val_root = data.val_dataroot or roots[0]
        whole = self._dataset(val_root, data.val_split, "gts", occupancy="required", rays=None, horizon=0)
        count = min(config.trainer.val_samples or len(whole), len(whole))
        self.validation = Subset(whole, np.linspace(0, len(whole) - 1, count).round().astype(int).tolist())

    def _dataset(self, dataroot: str, split: str, labels_folder: str, **settings) -> NuScenesOccupancy:
        model = self.config.model
        version = self.config.data.version or only_version(Path(dataroot))
        return NuScenesOccupancy(
            KeyframeIndex(dataroot, version, split, cameras=model.cameras, labels_folder=labels_folder),
            model.image_width_px,
            model.image_height_px,
            self.lift,
            grid=model.grid,
            window=self.config.window,
            seed=self.config.trainer.seed,
            **settings,
        )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        t = self.config.trainer
        per_step = t.batch_size * t.accumulate * max(t.devices, 1) * t.nodes
        return t.max_steps or max(1, round(t.max_epochs * len(self.train) / per_step))

    def train_dataloader(self) -> DataLoader:
        """The stream, from the first batch that the trainer has not seen."""
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        if len(self.train) < ranks:
            raise DatasetError(f"{len(self.train)} training samples are too few for {ranks} processes; use fewer")
        sampler = EpochSampler(len(self.train), self.config.trainer.seed, rank=rank, ranks=ranks)
        batches = EndlessBatches(sampler, self.config.trainer.batch_size)
        batches.first_batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        return self._loader(ResumableLoader, self.train, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        """The validation windows; several processes share them out."""
        mine = Subset(self.validation, range(self.trainer.global_rank, len(self.validation), self.trainer.world_size))
        return self._loader(DataLoader, mine, batch_size=1)

    def _loader(self, kind: type[DataLoader], dataset, **settings) -> DataLoader:
        workers = self.config.data.workers
        return kind(
            dataset,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=3 if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            **settings,
        )

    def validation_rig(self, token: str) -> CameraRig:
        """The cameras of the network's images for a validation keyframe."""
        index, model = self.validation.dataset.index, self.config.model
        keyframe = next(k for k in index.keyframes if k.token == token)
        fit = (
            (camera, ImageTransform.fit(camera.width_px, camera.height_px, model.image_width_px, model.image_height_px))
            for camera in keyframe.rig()
        )
        return CameraRig(tuple(transform.camera(camera) for camera, transform in fit))

    def transfer_batch_to_device(
        self, batch: list[OccupancyBatch], device: torch.device, dataloader_idx: int
    ) -> list[OccupancyBatch]:
        """All moments of the windows."""
        return [moment.to(device) for moment in batch]
