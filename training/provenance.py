# SPDX-License-Identifier: Apache-2.0
"""Where trained weights come from, as plain values that travel with checkpoints and bundles."""

from __future__ import annotations

import datetime
import math
import platform
from pathlib import Path

import lightning
import timm
import torch

import occflownet_core
from training.settings import TrainingConfig

_SUPERVISION = {
    "2d": "2D labels only: {rays}, {motion}",
    "3d": "{voxels} only",
    "images": "2D labels of single images only: depth and class from {rays}",
    "photometric_depth": "images alone, depths of their pixels ({pixels}, keyframes -{horizon} to {horizon})",
    "photometric": "images alone ({pixels}, keyframes -{horizon} to {horizon})",
    "2d3d": "2D labels ({rays}, {motion}) and {voxels}",
}
_OF_START = ("supervision", "initial_weights", "dataset", "steps", "batch_size", "wall_time_s")
_RAYS = {
    "lidarseg": "LiDAR rays (lidarseg)",
    "panoptic": "LiDAR rays (panoptic)",
    "pseudo": "pseudo-label images (depth and class)",
}
_MOTION = {
    "static": "the world taken as standing still",
    "filter": "dynamic ray filter",
    "box_flow": "occupancy flow of annotated boxes",
    "learned": "learned occupancy flow",
}


def describe(
    config: TrainingConfig, steps: int, wall_time_s: float, scores: dict[str, float], start: dict | None = None
) -> dict:
    """Data set, supervision, length, seed, time, date and versions.

    Args:
        config: the run.
        steps: optimiser steps so far.
        wall_time_s: training time so far.
        scores: of the latest validation.
        start: the same of the run whose weights this one started from; None for a network made anew.
    """
    kind, trainer = config.supervision.kind, config.trainer
    if kind == "images" and not config.reads_pixel_labels:
        kind = "photometric_depth"
    motion = f"{_MOTION[config.motion.kind]}, keyframes -{config.data.horizon} to {config.data.horizon}"
    if config.data.horizon == 0:
        motion = "current keyframe only"
    roots = [config.data.dataroot] if isinstance(config.data.dataroot, str) else config.data.dataroot
    mask = config.supervision.reads_voxels and config.losses.voxel_camera_mask
    folder = config.data.labels_folder
    voxels = "3D voxel labels" if folder == "gts" else f"voxel labels of '{folder}'"
    pixels = "pixels in moving boxes left out" if config.motion.kind == "box_flow" else "all pixels"
    words = {"rays": _RAYS[config.data.rays], "motion": motion, "voxels": voxels, "pixels": pixels}
    supervision = _SUPERVISION[kind].format(**words, horizon=config.data.horizon)
    if config.photometric.is_used and not kind.startswith("photometric"):
        supervision += f", and photometric ({pixels})"
    return {
        "supervision": supervision,
        "initial_weights": "none" if start is None else {name: start[name] for name in _OF_START if name in start},
        "trained_with_camera_mask": mask,
        "dataset": ", ".join(Path(root).name for root in roots),
        "split": config.data.train_split,
        "steps": steps,
        "batch_size": trainer.batch_size * trainer.accumulate * max(trainer.devices, 1) * trainer.nodes,
        "seed": trainer.seed,
        "wall_time_s": round(wall_time_s, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "averaged_weights": config.optimizer.ema_decay > 0,
        "validation": {name: round(float(value), 5) for name, value in scores.items() if math.isfinite(value)},
        "versions": {
            "occflownet": occflownet_core.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "lightning": lightning.__version__,
            "timm": timm.__version__,
        },
    }
