# SPDX-License-Identifier: Apache-2.0
"""What a query of an occupancy field gives, and what its points must be; NumPy alone, for PyTorch and runtimes alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from occflownet_core.errors import GeometryError

POINTS_AT_A_TIME = 1 << 13
"""Points that are evaluated together, however many there are in all. Eight corners of 32 features each make 8 MB of them,
which no larger batch is faster than."""


class FieldSamples(NamedTuple):
    """An occupancy field at N points, as arrays or tensors.

    Attributes:
        probability: [N], of being occupied: of an edge of one voxel of the field's density being opaque.
        logits: [N, 17] of the occupied classes, or None if they were not asked for.
        inside: [N] bool; outside the box everything else is zero.
        gradient_per_m: [N, 3], of the probability, or None if it was not asked for.
    """

    probability: Any
    logits: Any
    inside: Any
    gradient_per_m: Any = None


class QueryableField(Protocol):
    """A field that answers in NumPy, whatever computes it (``field.TorchField``, ``runtime.field_query.FrameField``)."""

    def probability(self, points_m: np.ndarray) -> np.ndarray:
        """Probability of being occupied [N], at points [N, 3] of the ego frame; zero outside the box."""

    def samples(self, points_m: np.ndarray, gradient: bool = False) -> FieldSamples:
        """All that the field knows about points [N, 3]."""


def require_points(points_m: Any) -> None:
    """Check that query points, array or tensor, are [N, 3] and numbers; infinite ones are merely outside.

    Raises:
        GeometryError: they have another shape, or a coordinate is NaN.
    """
    if points_m.ndim != 2 or points_m.shape[1] != 3:
        raise GeometryError(f"query points have shape {tuple(points_m.shape)}; give [N, 3]: x, y, z in metres")
    wrong = (points_m != points_m).any(1)
    if bool(wrong.any()):
        first = int(np.flatnonzero(np.asarray(wrong))[0])
        raise GeometryError(f"query point {first} is {points_m[first].tolist()}; leave out points that are not numbers")


def batches(count: int, at_a_time: int = POINTS_AT_A_TIME) -> Iterator[slice]:
    """Slices that cover ``count`` rows, at least one (so that no rows still have a result of the right shape)."""
    for start in range(0, max(count, 1), at_a_time):
        yield slice(start, min(start + at_a_time, count))
