# SPDX-License-Identifier: Apache-2.0
"""Paths and speeds: where something is along a line in the plane, at any time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SPACING_M = 0.5


class Path:
    """A smooth line in the plane, parametrised by arc length; extended straight beyond both ends.

    Args:
        points_m: [n, 2], resampled to half a metre; the heading turns linearly between samples.
    """

    def __init__(self, points_m: np.ndarray) -> None:
        points_m = np.asarray(points_m, dtype=np.float64)
        step = np.linalg.norm(np.diff(points_m, axis=0), axis=1)
        keep = np.concatenate([[True], step > 1e-6])
        points_m = points_m[keep]
        at = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points_m, axis=0), axis=1))])
        samples = np.linspace(0, at[-1], max(2, round(at[-1] / _SPACING_M) + 1))
        self.points_m = np.column_stack([np.interp(samples, at, points_m[:, i]) for i in range(2)])
        self.arc_m = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(self.points_m, axis=0), axis=1))])
        tangent = np.gradient(self.points_m, axis=0)
        self.heading = np.unwrap(np.arctan2(tangent[:, 1], tangent[:, 0]))

    @property
    def length_m(self) -> float:
        return float(self.arc_m[-1])

    def at(self, arc_m: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Position [..., 2] and heading [...] at arc lengths [...]."""
        arc_m = np.asarray(arc_m, dtype=np.float64)
        inside = np.clip(arc_m, 0, self.length_m)
        heading = np.interp(inside, self.arc_m, self.heading)
        position = np.stack([np.interp(inside, self.arc_m, self.points_m[:, i]) for i in range(2)], axis=-1)
        beyond = (arc_m - inside)[..., None] * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
        return position + beyond, heading

    def offset(self, left_m: float) -> Path:
        """The parallel line at a distance to the left (negative: to the right)."""
        normal = np.column_stack([-np.sin(self.heading), np.cos(self.heading)])
        return Path(self.points_m + left_m * normal)

    def reversed(self) -> Path:
        return Path(self.points_m[::-1])

    def part(self, start_m: float, end_m: float) -> Path:
        """The piece between two arc lengths (may reach beyond the ends)."""
        return Path(self.at(np.linspace(start_m, end_m, max(2, round(abs(end_m - start_m) / _SPACING_M) + 1)))[0])

    def project(self, point_m: np.ndarray) -> float:
        """Arc length of the sample nearest to a point [2]."""
        return float(self.arc_m[np.argmin(((self.points_m - point_m) ** 2).sum(axis=1))])


def joined(first: Path, second: Path, radius_m: float) -> Path:
    """From one straight line onto another that crosses it, through an arc that touches both.

    ``first`` is left and ``second`` entered where the arc of the given radius fits into their corner.
    """
    p, a = first.at(first.length_m)
    q, b = second.at(0.0)
    da, db = np.array([np.cos(a), np.sin(a)]), np.array([np.cos(b), np.sin(b)])
    along = np.linalg.solve(np.column_stack([da, -db]), q - p)
    corner = p + along[0] * da
    turn = np.arctan2(np.sin(b - a), np.cos(b - a))
    tangent_m = radius_m * np.tan(abs(turn) / 2)
    side = np.sign(turn)
    start = corner - tangent_m * da
    centre = start + side * radius_m * np.array([-da[1], da[0]])
    angles = np.arctan2(*(start - centre)[::-1]) + np.linspace(0, turn, 40)
    arc = centre + radius_m * np.column_stack([np.cos(angles), np.sin(angles)])
    end_of_second = second.at(second.length_m)[0]
    return Path(np.concatenate([[first.points_m[0]], arc, [end_of_second]]))


@dataclass(frozen=True)
class Speed:
    """A speed that swings smoothly about its mean: v(t) = mean + swing * cos(rate * t + phase), all in SI units."""

    mean_mps: float
    swing_mps: float = 0.0
    rate: float = 0.5
    phase: float = 0.0

    def distance_m(self, time_s: np.ndarray | float) -> np.ndarray:
        """Distance gone since time 0 (the integral of the speed)."""
        time_s = np.asarray(time_s, dtype=np.float64)
        swing = self.swing_mps / self.rate * (np.sin(self.rate * time_s + self.phase) - np.sin(self.phase))
        return self.mean_mps * time_s + swing

    def mps(self, time_s: np.ndarray | float) -> np.ndarray:
        return self.mean_mps + self.swing_mps * np.cos(self.rate * np.asarray(time_s, dtype=np.float64) + self.phase)


STANDING = Speed(0.0)
