# SPDX-License-Identifier: Apache-2.0
"""Actors: everything that carries an annotated box, and where it is at any time; Crowd keeps them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from occflownet_core.labels import LIDARSEG_NAMES
from training.data.minicity import calibration
from training.data.minicity.mesh import Mesh
from training.data.minicity.palette import Palette
from training.data.minicity.path import STANDING, Path, Speed
from training.data.minicity.streets import StreetPlan

_REACH_M = 90.0


@dataclass(frozen=True)
class Actor:
    """A rigid thing that stands, or follows a path.

    Attributes:
        category: nuScenes category name.
        mesh: in its box frame (x forward, y left, z up, origin at the box's centre), labelled.
        size_m: length, width, height of the box; the mesh fits in exactly.
        path, start_m, speed: its place at time t is ``path.at(start_m + speed.distance_m(t))``.
        ground_m: height of its feet.
        yaw_offset: its heading relative to the path's.
        attribute: nuScenes attribute name, or an empty string.
    """

    category: str
    mesh: Mesh
    size_m: np.ndarray
    path: Path
    start_m: float
    speed: Speed
    ground_m: float
    yaw_offset: float
    attribute: str

    @property
    def stands(self) -> bool:
        """It never moves."""
        return self.speed == STANDING

    def place(self, time_s: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Position [..., 2] and heading [...] at times [...]."""
        position, heading = self.path.at(self.start_m + self.speed.distance_m(time_s))
        return position, heading + self.yaw_offset

    def global_from_box(self, time_s: float) -> np.ndarray:
        """[4, 4] pose of the box's centre at a time."""
        (x, y), yaw = self.place(time_s)
        c, s = np.cos(yaw), np.sin(yaw)
        return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, self.ground_m + self.size_m[2] / 2], [0, 0, 0, 1.0]])


@dataclass
class Crowd:
    """Actors accepted so far, with the footprints that newcomers must not touch (the ego vehicle's is the first)."""

    rng: np.random.Generator
    palette: Palette
    plan: StreetPlan
    obstacles: np.ndarray
    times_s: np.ndarray
    actors: list[Actor] = field(default_factory=list)
    rectangles: list[np.ndarray] = field(default_factory=list)  # each [T, 5]: x, y, yaw, length, width

    def __post_init__(self) -> None:
        position, heading = self.plan.ego(self.times_s)
        self.ego_m = position
        ahead = calibration.EGO_LENGTH_M / 2 - calibration.EGO_REAR_OVERHANG_M
        centre = position + ahead * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
        self.rectangles.append(
            _rectangle(centre, heading, calibration.EGO_LENGTH_M + 3.0, calibration.EGO_WIDTH_M + 0.7)
        )

    def offer(
        self,
        category: str,
        mesh: Callable[[], Mesh],
        path: Path,
        start_m: float,
        speed: Speed = STANDING,
        ground_m: float = 0.0,
        yaw_offset: float = 0.0,
        attribute: str = "",
        clearance_m: float = 0.25,
        walks: bool = False,
    ) -> bool:
        """Take the actor in unless it is never near or would run into something."""
        position, heading = path.at(start_m + speed.distance_m(self.times_s))
        if np.linalg.norm(position - self.ego_m, axis=1).min() > _REACH_M:
            return False
        body, size = _boxed(mesh(), category)
        rectangle = _rectangle(position, heading + yaw_offset, size[0] + 2 * clearance_m, size[1] + clearance_m)
        if any(_touch(rectangle, other) for other in self.rectangles):
            return False
        if walks and len(self.obstacles):
            gap = np.linalg.norm(position[:, None] - self.obstacles[None, :, :2], axis=-1) - self.obstacles[:, 2]
            if gap.min() < 0.35:
                return False
        self.rectangles.append(rectangle)
        self.actors.append(Actor(category, body, size, path, float(start_m), speed, ground_m, yaw_offset, attribute))
        return True


def _boxed(mesh: Mesh, category: str) -> tuple[Mesh, np.ndarray]:
    """The mesh with its bounding box centred on the origin, labelled; and the box's size."""
    low, high = mesh.corners.min(axis=(0, 1)), mesh.corners.max(axis=(0, 1))
    x, y, z = -(low + high) / 2
    return mesh.moved(x, y, z).labelled(LIDARSEG_NAMES.index(category)), np.round(high - low + 0.002, 3)


def _rectangle(position: np.ndarray, heading: np.ndarray, length: float, width: float) -> np.ndarray:
    n = len(position)
    return np.column_stack([position, np.broadcast_to(heading, n), np.full(n, length), np.full(n, width)])


def _touch(a: np.ndarray, b: np.ndarray) -> bool:
    """Do two moving rectangles [T, 5] overlap at any time (separating axes)?"""
    between = b[:, :2] - a[:, :2]
    close = np.linalg.norm(between, axis=1) < (np.hypot(a[0, 3], a[0, 4]) + np.hypot(b[0, 3], b[0, 4])) / 2
    if not close.any():
        return False
    a, b, between = a[close], b[close], between[close]
    apart = np.zeros(len(a), dtype=bool)
    for yaw in (a[:, 2], a[:, 2] + np.pi / 2, b[:, 2], b[:, 2] + np.pi / 2):
        axis = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)
        reach = sum(
            0.5 * r[:, 3] * np.abs(np.cos(r[:, 2] - yaw)) + 0.5 * r[:, 4] * np.abs(np.sin(r[:, 2] - yaw))
            for r in (a, b)
        )
        apart |= np.abs((between * axis).sum(axis=1)) > reach
    return bool((~apart).any())
