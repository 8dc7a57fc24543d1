# SPDX-License-Identifier: Apache-2.0
"""What occupancy is measured by: IoU over voxels (Occ3D, arXiv 2304.14365), with and without a visibility mask, and
over a sweep of thresholds. All of it comes from one 18 x 18 confusion matrix, which adds up over samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from occflownet_core.errors import GeometryError
from occflownet_core.labels import BOXED_CLASSES, FREE, OCCUPIED_CLASSES, label_of

LABELS = FREE + 1
DYNAMIC_CLASSES = BOXED_CLASSES
STATIC_CLASSES = tuple(c for c in range(OCCUPIED_CLASSES) if c not in DYNAMIC_CLASSES)
CLASS_SETS = {
    17: tuple(range(OCCUPIED_CLASSES)),
    15: tuple(c for c in range(OCCUPIED_CLASSES) if c not in (label_of("others"), label_of("other_flat"))),
}
"""Classes that a mean runs over: Occ3D's 17, or the 15 that camera-only work reports, which has no pseudo labels for
``others`` and ``other_flat``."""


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """How often truth t (row) was predicted as p (column), int64 [18, 18].

    Args:
        prediction, truth: uint8 [...], labels 0..17.
        mask: optional bool [...], which voxels count.

    Raises:
        GeometryError: shapes differ, or a label is above 17.
    """
    if prediction.shape != truth.shape or (mask is not None and mask.shape != truth.shape):
        shapes = [a.shape for a in (prediction, truth, mask) if a is not None]
        raise GeometryError(f"prediction, truth and mask have shapes {shapes}; give one shape")
    if mask is not None:
        prediction, truth = prediction[mask], truth[mask]
    if truth.size and max(prediction.max(), truth.max()) >= LABELS:
        raise GeometryError(f"a label is {max(prediction.max(), truth.max())}; labels run from 0 to {FREE}")
    pairs = truth.astype(np.uint16).ravel() * LABELS + prediction.ravel()
    return np.bincount(pairs, minlength=LABELS**2).reshape(LABELS, LABELS)


@dataclass(frozen=True)
class VoxelScores:
    """Scores of a confusion matrix.

    Attributes:
        iou: [17] float64, IoU per occupied class; NaN for a class that is neither there nor predicted.
        geometric_iou: IoU of occupied against free, whatever the class.
        precision, recall: of occupied against free.
        dynamic_iou: IoU of "some dynamic class" against everything else, NaN if it is neither there nor predicted. Unlike
            the mean over dynamic classes it does not give a rare one the weight of all cars.
    """

    iou: np.ndarray
    geometric_iou: float
    precision: float
    recall: float
    dynamic_iou: float

    @classmethod
    def of(cls, confusion: np.ndarray) -> VoxelScores:
        """Scores of a confusion matrix [18, 18] of ``confusion_matrix``."""
        hits = np.diag(confusion).astype(np.float64)
        union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
        both = confusion[:FREE, :FREE].sum()
        predicted, there = confusion[:, :FREE].sum(), confusion[:FREE].sum()
        dynamic = list(DYNAMIC_CLASSES)
        dynamic_both = confusion[np.ix_(dynamic, dynamic)].sum()
        dynamic_union = confusion[dynamic].sum() + confusion[:, dynamic].sum() - dynamic_both
        return cls(
            iou=_ratio(hits, union)[:OCCUPIED_CLASSES],
            geometric_iou=float(_ratio(both, predicted + there - both)),
            precision=float(_ratio(both, predicted)),
            recall=float(_ratio(both, there)),
            dynamic_iou=float(_ratio(dynamic_both, dynamic_union)),
        )

    @property
    def miou(self) -> float:
        """Mean IoU over the 17 occupied classes; NaN classes are left out."""
        return self.mean(CLASS_SETS[17])

    @property
    def dynamic_miou(self) -> float:
        """Mean IoU over the classes that annotated boxes move."""
        return self.mean(DYNAMIC_CLASSES)

    @property
    def static_miou(self) -> float:
        """Mean IoU over all others."""
        return self.mean(STATIC_CLASSES)

    def mean(self, classes: Sequence[int]) -> float:
        """Mean IoU over the given classes; NaN classes are left out, NaN if none remains."""
        return mean_known(self.iou[list(classes)])


def mean_known(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, np.divide(numerator, denominator, dtype=np.float64), np.nan)


class ThresholdSweep:
    """Confusion matrices at many thresholds from one pass over the voxels.

    Args:
        thresholds: ascending; a voxel is occupied where its probability is *above* the threshold.

    Raises:
        GeometryError: the thresholds do not ascend.
    """

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = np.asarray(thresholds, dtype=np.float32)
        if self.thresholds.size == 0 or (np.diff(self.thresholds) <= 0).any():
            raise GeometryError(f"thresholds {list(thresholds)} do not ascend; sort them and leave out doubles")
        self._counts = np.zeros((len(self.thresholds) + 1, LABELS, LABELS), dtype=np.int64)

    def add(
        self, probability: np.ndarray, label: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None
    ) -> None:
        """Count one sample.

        Args:
            probability: float32 [...] of being occupied.
            label: uint8 [...], the class that the voxel has if it is occupied.
            truth: uint8 [...].
            mask: optional bool [...], which voxels count.
        """
        if mask is not None:
            probability, label, truth = probability[mask], label[mask], truth[mask]
        # The number of thresholds that lie strictly below: occupied for exactly that many of them.
        passed = np.searchsorted(self.thresholds, probability.ravel(), side="left").astype(np.int64)
        cells = (passed * LABELS + truth.ravel()) * LABELS + label.ravel()
        self._counts += np.bincount(cells, minlength=self._counts.size).reshape(self._counts.shape)

    def confusion_matrices(self) -> np.ndarray:
        """[T, 18, 18], one per threshold."""
        # Voxels that passed more than i thresholds are occupied at threshold i; all others are free there.
        occupied = self._counts[::-1].cumsum(axis=0)[::-1][1:]
        result = occupied.copy()
        result[:, :, FREE] += self._counts.sum(axis=(0, 2)) - occupied.sum(axis=2)
        return result
