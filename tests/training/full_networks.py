# SPDX-License-Identifier: Apache-2.0
"""The full-size configurations, small enough for a CPU: all parts as they are, images, grid and depth bins reduced."""

import dataclasses

import torch

from occflownet_core.encoder.lift import stacked_tables
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import build_lift_tables
from occflownet_core.model import ModelConfig, OccFlowNet
from training.parity import ring_rig
from training.settings import CONFIG_FOLDER, TrainingConfig

PAPER, REAL_TIME = "nuscenes_swinb_512x1408", "nuscenes_r50_256x704"


def reduced(name: str) -> ModelConfig:
    """Of six cameras two, images of 96 x 64 px, a grid of 16 x 16 x 4 working cells; Swin one block deep per stage."""
    config = TrainingConfig.from_yaml(CONFIG_FOLDER / f"{name}.yaml").model
    # ResNet's residual branches start at nothing, by habit; here every weight is to count.
    options = {"zero_init_last": False}
    if name == PAPER:
        options = {"depths": [1, 1, 1, 1], "embed_dim": 32, "num_heads": [1, 2, 4, 8]}
    return dataclasses.replace(
        config,
        cameras=("CAM_FRONT", "CAM_BACK"),
        image_width_px=96,
        image_height_px=64,
        grid=VoxelGrid((-12.8, -12.8, -1.0), (12.8, 12.8, 5.4), 0.8),
        working_coarsening=2,
        backbone=dataclasses.replace(config.backbone, pretrained=False, channels=32, options=options),
        depth=dataclasses.replace(
            config.depth, bins=dataclasses.replace(config.depth.bins, max_m=17.0, step_m=1.0), hidden_channels=32
        ),
        volume=dataclasses.replace(config.volume, widths=tuple(w // 4 for w in config.volume.widths)),
    )


def network(name: str, seed: int = 0) -> OccFlowNet:
    torch.manual_seed(seed)
    return OccFlowNet(reduced(name))


def inputs(model: OccFlowNet, batch: int = 1, seed: int = 0):
    """Images, tables and an ego motion of one metre ahead."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    size = batch, len(config.cameras), config.image_height_px, config.image_width_px, 3
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    tables = stacked_tables([build_lift_tables(ring_rig(config), model.lift_spec)] * batch)
    motion = torch.eye(4).repeat(batch, 1, 1)
    motion[:, 0, 3] = 1.0
    return images, tables, motion
