# SPDX-License-Identifier: Apache-2.0
"""OccupancyEvaluation: every number of the benchmark from predicted and true labels, sample by sample, for whoever
runs the model: the training's evaluation and a replay through ROS count alike."""

from __future__ import annotations

import math

import numpy as np

from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import CLASS_NAMES, FREE, OCCUPIED_CLASSES
from occflownet_core.metrics import CLASS_SETS, LABELS, VoxelScores, confusion_matrix
from occflownet_core.ray_metrics import THRESHOLDS_M, RayCaster, RayScores

RIGHT, WRONG_CLASS, MISSED, INVENTED = range(4)
"""Kinds of voxels in ``difference``."""

DIFFERENCE_RGB: np.ndarray = np.array([(205, 208, 212), (240, 170, 20), (40, 90, 220), (220, 40, 50)], dtype=np.uint8)
"""[4, 3] uint8, the colour of each kind."""


def difference(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Kind of agreement per voxel, uint8 [X, Y, Z]: RIGHT, WRONG_CLASS, MISSED, INVENTED; FREE where both say free or
    the mask excludes the voxel."""
    kind = np.full(truth.shape, FREE, dtype=np.uint8)
    predicted, there = prediction != FREE, truth != FREE
    kind[predicted & there] = np.where(prediction == truth, RIGHT, WRONG_CLASS)[predicted & there]
    kind[~predicted & there] = MISSED
    kind[predicted & ~there] = INVENTED
    return np.where(mask, kind, FREE).astype(np.uint8)


class OccupancyEvaluation:
    """Adds up over samples.

    Args:
        grid: of all labels.

    Attributes:
        samples: how many were added.
        in_mask, everywhere: confusion matrices [18, 18] over voxels that a camera could see, and over all.
        rays: RayIoU's counts.
    """

    def __init__(self, grid: VoxelGrid) -> None:
        self.grid = grid
        self.samples = 0
        self.in_mask = np.zeros((LABELS, LABELS), dtype=np.int64)
        self.everywhere = np.zeros((LABELS, LABELS), dtype=np.int64)
        self.rays = RayScores()

    def add(
        self, prediction: np.ndarray, truth: np.ndarray, camera_mask: np.ndarray, origins_m: np.ndarray | None = None
    ) -> None:
        """Count one sample.

        Args:
            prediction, truth: uint8 [X, Y, Z].
            camera_mask: bool [X, Y, Z].
            origins_m: [O, 3] from ``ray_metrics.ray_origins_m``; None leaves RayIoU out.

        Raises:
            GeometryError: a shape is not the grid's.
        """
        self.in_mask += confusion_matrix(prediction, truth, camera_mask)
        self.everywhere += confusion_matrix(prediction, truth)
        if origins_m is not None:
            caster = RayCaster(self.grid, origins_m)
            self.rays.add(caster.cast(prediction), caster.cast(truth))
        self.samples += 1

    def include(self, other: OccupancyEvaluation) -> None:
        """Count another evaluation's samples too."""
        self.in_mask += other.in_mask
        self.everywhere += other.everywhere
        self.rays.include(other.rays)
        self.samples += other.samples

    def to_dict(self) -> dict:
        """All scores as plain values for JSON; None where a score is not defined."""
        return {
            "samples": self.samples,
            "camera_mask": voxel_scores_to_dict(VoxelScores.of(self.in_mask)),
            "no_mask": voxel_scores_to_dict(VoxelScores.of(self.everywhere)),
            "rays": ray_scores_to_dict(self.rays),
        }


def voxel_scores_to_dict(scores: VoxelScores) -> dict:
    """Means over 17 and 15 classes, dynamic and static means, IoU of all dynamic classes as one, geometric, per class."""
    return {
        **{f"miou_{count}": _plain(scores.mean(classes)) for count, classes in CLASS_SETS.items()},
        "dynamic_miou": _plain(scores.dynamic_miou),
        "static_miou": _plain(scores.static_miou),
        "dynamic_iou": _plain(scores.dynamic_iou),
        "geometric_iou": _plain(scores.geometric_iou),
        "precision": _plain(scores.precision),
        "recall": _plain(scores.recall),
        "iou": {CLASS_NAMES[c]: _plain(scores.iou[c]) for c in range(OCCUPIED_CLASSES)},
    }


def ray_scores_to_dict(scores: RayScores) -> dict:
    """RayIoU, its value at each depth tolerance, and per class the mean over the tolerances."""
    per_class = scores.iou.mean(axis=0)
    return {
        "ray_iou": _plain(scores.ray_iou),
        **{f"ray_iou_{limit_m:g}m": _plain(value) for limit_m, value in zip(THRESHOLDS_M, scores.means, strict=True)},
        "iou": {CLASS_NAMES[c]: _plain(per_class[c]) for c in range(OCCUPIED_CLASSES)},
    }


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
