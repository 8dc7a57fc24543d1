# SPDX-License-Identifier: Apache-2.0
"""Directions in which a spinning LiDAR fired and got no echo, recovered from the gaps in its rings.

A nuScenes sweep stores x, y, z, intensity and ring; firings without echo are stored as points near the sensor's own
centre, without direction. A ring is a cone: its elevation is known from its echoes, and its firings are evenly
spaced in azimuth, so a gap between two echoes of a ring says how many firings were lost in it, and where.
"""

from __future__ import annotations

import numpy as np

BLIND_RANGE_M = 1.0
"""Nearer points are firings without echo (motion compensation moves them off zero) or the vehicle's own roof."""

_LEAST_ECHOES = 32
_MOST_SPREAD_DEG = 1.0
_ELEVATION_TOLERANCE_DEG = 0.01


def directions_without_return(points: np.ndarray, min_elevation_deg: float = 0.0) -> np.ndarray:
    """Unit vectors [H, 3], LiDAR frame, of firings that met nothing.

    Args:
        points: float32 [N, 5]: x, y, z (metres, LiDAR frame), intensity, ring.
        min_elevation_deg: rings below are left out. Looking down, a missing echo mostly means a dark or mirroring
            surface (wet road, car paint) rather than nothing at all.

    Returns:
        Empty where the ring column does not tell rings apart. The firings next to an echo are left out: the beam is
        wide, and an edge may have swallowed it.
    """
    range_m = np.sqrt(np.einsum("pc,pc->p", points[:, :3], points[:, :3]))
    echo = np.flatnonzero(range_m > BLIND_RANGE_M)
    ring = points[echo, 4]
    by_ring = echo[np.argsort(ring, kind="stable")]
    found = []
    for mine in np.split(by_ring, np.cumsum(np.unique(ring, return_counts=True)[1])[:-1]):
        if len(mine) < _LEAST_ECHOES:
            continue
        sine = np.sort(points[mine, 2] / range_m[mine])
        fifth, middle, ninety_fifth = np.degrees(np.arcsin(sine[[len(sine) // 20, len(sine) // 2, -len(sine) // 20]]))
        if middle >= min_elevation_deg - _ELEVATION_TOLERANCE_DEG and ninety_fifth - fifth < _MOST_SPREAD_DEG:
            azimuth = np.arctan2(points[mine, 1], points[mine, 0]).astype(np.float64)
            found.append(_on_cone(_lost_azimuths(azimuth), np.radians(middle)))
    return np.concatenate(found) if found else np.zeros((0, 3))


def _lost_azimuths(azimuth: np.ndarray) -> np.ndarray:
    """Azimuths in the middle of the gaps, at the spacing of the echoes around them."""
    ordered = np.sort(azimuth)
    gap = np.diff(ordered, append=ordered[0] + 2 * np.pi)
    step = np.median(gap[gap > 1e-4])  # echoes of the sweep's overlapping ends may coincide
    lost = np.maximum(np.round(gap / step).astype(int) - 3, 0)  # firings within, less one beside each echo
    first = np.repeat(ordered, lost)
    within = np.arange(lost.sum()) - np.repeat(np.cumsum(lost) - lost, lost)
    return first + (within + 2) * np.repeat(gap / np.maximum(lost + 3, 1), lost)


def _on_cone(azimuth: np.ndarray, elevation: float) -> np.ndarray:
    level = np.cos(elevation)
    return np.stack(
        [level * np.cos(azimuth), level * np.sin(azimuth), np.full(len(azimuth), np.sin(elevation))], axis=1
    )
