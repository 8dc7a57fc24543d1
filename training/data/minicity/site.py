# SPDX-License-Identifier: Apache-2.0
"""Site: the static world while it is being built, and the categories and heights that builders share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from shapely.geometry import LineString, Point, Polygon

from occflownet_core.labels import LIDARSEG_NAMES
from training.data.minicity.mesh import Mesh
from training.data.minicity.palette import Palette
from training.data.minicity.streets import StreetPlan

ROAD, OTHER_FLAT, SIDEWALK, TERRAIN, MANMADE, VEGETATION = (
    LIDARSEG_NAMES.index(f"{n}")
    for n in (
        "flat.driveable_surface",
        "flat.other",
        "flat.sidewalk",
        "flat.terrain",
        "static.manmade",
        "static.vegetation",
    )
)
KERB_M = 0.15
"""How high pavements and islands lie above the carriageway."""

LAWN_M = KERB_M - 0.02
NEAR_M = 95.0
"""Small things further than this from the ego vehicle's way are left out."""


@dataclass
class Site:
    """A static world under construction: what the placing functions share and fill."""

    rng: np.random.Generator
    palette: Palette
    plan: StreetPlan
    way: LineString
    parts: list[Mesh] = field(default_factory=list)
    ground: list[Mesh] = field(default_factory=list)
    obstacles: list[tuple[float, float, float]] = field(default_factory=list)
    lots: list[Polygon] = field(default_factory=list)

    def near(self, point_m: np.ndarray, limit_m: float = NEAR_M) -> bool:
        return self.way.distance(Point(point_m)) < limit_m

    def stand(
        self,
        mesh: Mesh,
        category: int,
        x: float,
        y: float,
        yaw: float,
        radius_m: float = 0.0,
        z: float = KERB_M,
        scale: float = 1.0,
    ) -> None:
        """Put a model down; a radius makes walkers go around it."""
        self.parts.append(mesh.moved(x, y, z, yaw, scale).labelled(category))
        if radius_m:
            self.obstacles.append((x, y, radius_m))
