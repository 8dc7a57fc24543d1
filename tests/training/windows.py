# SPDX-License-Identifier: Apache-2.0
"""A world small enough to learn in seconds: a coloured wall at a distance that the images' brightness tells."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from occflownet_core.boxes import MovingBoxes
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.labels import FREE
from occflownet_core.lift_tables import LiftSpec, build_lift_tables
from occflownet_core.renderer import Rays
from training.data.batch import EpochSampler, Occupancy, OccupancySample, collate
from training.loaders import EndlessBatches, ResumableLoader
from training.settings import TrainingConfig

WALL, FAR_WALL = 15, 16
NEAR_M, FAR_M = 3.0, 6.0
"""Where the walls' near faces are, in front of the camera at the origin; each wall is one metre thick."""


def small_config(out: Path, **sections: dict) -> TrainingConfig:
    """Two cameras of 64 x 32 px (forward, backward), 16 x 8 x 4 cells of one metre."""
    values = {
        "model": {
            "cameras": ["FRONT", "BACK"],
            "image_width_px": 64,
            "image_height_px": 32,
            "grid": {"lower_m": [-8, -4, -2], "upper_m": [8, 4, 2], "voxel_size_m": 1.0},
            "working_coarsening": 1,
            "backbone": {"name": "test_efficientnet", "pretrained": False, "out_indices": [2, 3], "channels": 16},
            "depth": {"bins": {"min_m": 1.0, "max_m": 9.0, "step_m": 1.0}, "context_channels": 8},
            "volume": {"memory_channels": 4, "widths": [32, 32], "blocks": [1, 1]},
            "field": {"channels": 8, "hidden": 16, "layers": 1},
        },
        "data": {"dataroot": "made-up", "workers": 0},
        "supervision": {"rays_per_step": 256},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5, "ema_decay": 0.9},
        "trainer": {
            "out": str(out),
            "max_steps": 4,
            "batch_size": 2,
            "accelerator": "cpu",
            "threads": 1,
            "val_steps": 10**6,
            "val_samples": 2,
            "picture_steps": 0,
            "log_steps": 1,
        },
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if name in values else section
    return TrainingConfig.from_dict(values)


def rig() -> CameraRig:
    intrinsic = np.array([[32.0, 0, 32], [0, 32.0, 16], [0, 0, 1]])
    forward, backward = np.eye(4), np.eye(4)
    forward[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    backward[:3, :3] = [[0, 0, -1], [1, 0, 0], [0, -1, 0]]
    return CameraRig((Camera("FRONT", 64, 32, intrinsic, forward), Camera("BACK", 64, 32, intrinsic, backward)))


class Walls(Dataset):
    """Windows of two keyframes; bright images mean the far wall (vegetation), dark ones the near wall (manmade)."""

    def __init__(self, lift: LiftSpec, count: int = 8, seed: int = 0) -> None:
        self.tables, self.count, self.seed = build_lift_tables(rig(), lift), count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int | tuple[int, int]) -> list[OccupancySample]:
        item, epoch = item if isinstance(item, tuple) else (item, 0)
        rng = np.random.default_rng([self.seed, epoch, item])
        return [self._sample(item, rng, first) for first in (True, False)]

    def _sample(self, item: int, rng: np.random.Generator, first: bool) -> OccupancySample:
        far = item % 2 == 1
        brightness = 190 if far else 60
        images = np.clip(rng.normal(brightness, 10, (2, 32, 64, 3)), 0, 255).astype(np.uint8)
        return OccupancySample(
            token=f"token-{item}",
            scene="walls",
            stamp_us=0,
            images=images,
            tables=self.tables,
            previous_from_current=None if first else np.eye(4),
            rays=None if first else wall_rays(rng, far),
            views=None,
            encoder_pixels=None,
            boxes=None if first else MovingBoxes.empty(),
            depth_m=None if first else np.full((2, 4, 8), FAR_M if far else NEAR_M, np.float32),
            depth_label=None if first else np.full((2, 4, 8), FAR_WALL if far else WALL, np.uint8),
            occupancy=None if first else wall_voxels(far),
            frame_time_s=np.zeros(1, np.float32),
        )


def wall_rays(rng: np.random.Generator, far: bool, count: int = 128) -> Rays:
    """Rays from the origin into both images, which end on the wall."""
    direction = np.stack(
        [rng.choice([-1.0, 1.0], count), rng.uniform(-0.5, 0.5, count), rng.uniform(-0.2, 0.2, count)], 1
    )
    length = np.linalg.norm(direction, axis=1)
    distance_m = FAR_M if far else NEAR_M
    label = np.full(count, FAR_WALL if far else WALL)
    return Rays.from_numpy(np.zeros((count, 3)), direction / length[:, None], distance_m * length, label)


def wall_voxels(far: bool) -> Occupancy:
    labels = np.full((16, 8, 4), FREE, np.uint8)
    at = int(FAR_M if far else NEAR_M)
    labels[[8 + at, 7 - at]] = FAR_WALL if far else WALL
    return Occupancy(labels, labels >= 0, labels >= 0)


class WallData(pl.LightningDataModule):
    """Stands where ``OccupancyData`` does, with walls for a data set."""

    def __init__(self, config: TrainingConfig, lift: LiftSpec, dataset: Dataset | None = None) -> None:
        super().__init__()
        self.config, self.train = config, dataset or Walls(lift)
        self.validation = Walls(lift, 2, seed=1)
        self.total_steps = config.trainer.max_steps

    def train_dataloader(self) -> DataLoader:
        sampler = EpochSampler(len(self.train), rank=self.trainer.global_rank, ranks=self.trainer.world_size)
        batches = EndlessBatches(sampler, self.config.trainer.batch_size)
        batches.first_batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        return ResumableLoader(self.train, batch_sampler=batches, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        mine = Subset(self.validation, range(self.trainer.global_rank, len(self.validation), self.trainer.world_size))
        return DataLoader(mine, batch_size=1, collate_fn=collate)

    def validation_rig(self, token: str) -> CameraRig:
        return rig()
