# SPDX-License-Identifier: Apache-2.0
"""Scenery: everything that never moves and carries no box - ground, kerbs, buildings, plants, street furniture."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from shapely import STRtree
from shapely.geometry import LineString, MultiPolygon, Point, Polygon, box
from shapely.ops import unary_union
from shapely.prepared import prep

from occflownet_core.labels import LIDARSEG_NAMES
from training.data.minicity import buildings, plants, props
from training.data.minicity.mesh import Mesh, concatenate, flat, strip
from training.data.minicity.palette import Material, Palette, varied
from training.data.minicity.streets import Street, StreetPlan

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
_NEAR_M, _FAR_M = 95.0, 200.0


@dataclass
class Scenery:
    """The static world.

    Attributes:
        ground, upright: triangles that are the ground, and everything that stands on it.
        obstacles: [n, 3] x, y and radius of what walkers must avoid.
    """

    ground: Mesh
    upright: Mesh
    obstacles: np.ndarray


@dataclass
class _Site:
    """What the placing functions share and fill."""

    rng: np.random.Generator
    palette: Palette
    plan: StreetPlan
    way: LineString
    parts: list[Mesh] = field(default_factory=list)
    ground: list[Mesh] = field(default_factory=list)
    obstacles: list[tuple[float, float, float]] = field(default_factory=list)
    lots: list[Polygon] = field(default_factory=list)

    def near(self, point_m: np.ndarray, limit_m: float = _NEAR_M) -> bool:
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


def build_scenery(rng: np.random.Generator, palette: Palette, plan: StreetPlan, duration_s: float) -> Scenery:
    """The static world along the way that the ego vehicle drives in ``duration_s``."""
    way = LineString(plan.ego(np.linspace(-0.1, max(duration_s, 0.5), 60))[0])
    site = _Site(rng, palette, plan, way)
    _ground(site)
    for street in plan.streets:
        for side in (-1, 1):
            _frontage(site, street, side)
            _kerbside(site, street, side)
    _signals(site)
    _backdrop(site)
    return Scenery(concatenate(site.ground), concatenate(site.parts), np.array(site.obstacles).reshape(-1, 3))


def _ground(site: _Site) -> None:
    rng, add, plan = site.rng, site.palette.add, site.plan
    dark = rng.uniform(0.055, 0.12)
    asphalt = add(
        Material(
            varied(rng, (dark, dark, 1.03 * dark), 0.08), grain=0.30, grain_m=0.035, stain=0.16, stain_m=3.5, echo=8
        )
    )
    patch = add(
        Material(
            varied(rng, (0.7 * dark, 0.7 * dark, 0.7 * dark), 0.1),
            grain=0.3,
            grain_m=0.035,
            stain=0.1,
            stain_m=2.0,
            echo=7,
        )
    )
    iron = add(
        Material((0.05, 0.05, 0.05), course_m=(0.09, 0.09), course_gap_m=0.02, course_dark=0.5, gloss=0.1, echo=25)
    )
    stone = add(
        Material(
            varied(rng, (0.40, 0.39, 0.37), 0.15),
            grain=0.2,
            grain_m=0.03,
            stain=0.15,
            stain_m=1.0,
            course_m=(1.0, 9.0),
            course_gap_m=0.015,
            course_dark=0.4,
            echo=28,
        )
    )
    paving = add(
        [
            Material(
                varied(rng, (0.33, 0.32, 0.30), 0.2),
                grain=0.15,
                grain_m=0.04,
                stain=0.18,
                stain_m=1.5,
                course_m=(0.6, 0.6),
                course_gap_m=0.014,
                course_dark=0.35,
                echo=22,
            ),
            Material(
                varied(rng, (0.38, 0.37, 0.35), 0.15),
                grain=0.15,
                grain_m=0.05,
                stain=0.15,
                stain_m=2.5,
                course_m=(1.8, 1.8),
                course_gap_m=0.02,
                course_dark=0.35,
                echo=24,
            ),
            Material(
                varied(rng, (0.30, 0.17, 0.13), 0.15),
                grain=0.15,
                grain_m=0.04,
                stain=0.2,
                stain_m=1.2,
                course_m=(0.22, 0.11),
                course_gap_m=0.01,
                course_dark=0.3,
                echo=22,
            ),
        ][rng.integers(3)]
    )
    grass = add(
        Material(
            varied(rng, [(0.10, 0.15, 0.035), (0.15, 0.16, 0.06), (0.07, 0.12, 0.03)][rng.integers(3)], 0.15),
            grain=0.5,
            grain_m=0.06,
            stain=0.35,
            stain_m=1.6,
            echo=18,
        )
    )
    setts = add(
        Material(
            varied(rng, (0.24, 0.23, 0.22), 0.2),
            grain=0.3,
            grain_m=0.03,
            course_m=(0.16, 0.16),
            course_gap_m=0.02,
            course_dark=0.5,
            echo=20,
        )
    )
    white, yellow = (
        add(Material(c, grain=0.25, grain_m=0.05, stain=0.25, stain_m=0.7, echo=95))
        for c in ((0.62, 0.62, 0.60), (0.55, 0.36, 0.05))
    )

    def lay(shape: Polygon | MultiPolygon, z: float, material: int, category: int) -> None:
        site.ground.append(flat(shape, z, material).labelled(category))

    lay(plan.road, 0.0, asphalt, ROAD)
    lay(_patches(site), 0.003, patch, ROAD)
    lay(_manholes(site), 0.005, iron, ROAD)
    lay(plan.paint["white"], 0.007, white, ROAD)
    lay(plan.paint["yellow"], 0.007, yellow, ROAD)
    lay(plan.sidewalk, KERB_M, paving, SIDEWALK)
    lay(plan.verge, KERB_M - 0.02, grass, TERRAIN)
    lay(plan.terrain, KERB_M - 0.02, grass, TERRAIN)
    lay(plan.islands, KERB_M, setts, OTHER_FLAT)
    islands = unary_union(plan.islands)
    carriageway = unary_union([plan.road, plan.islands])
    lay(carriageway.buffer(0.16, quad_segs=4).difference(carriageway), KERB_M + 0.003, stone, SIDEWALK)
    lay(islands.difference(islands.buffer(-0.16)), KERB_M + 0.003, stone, OTHER_FLAT)
    for shapes, category in (
        (getattr(carriageway, "geoms", [carriageway]), SIDEWALK),
        (plan.islands.geoms, OTHER_FLAT),
    ):
        for polygon in shapes:
            for ring in (polygon.exterior, *polygon.interiors):
                site.ground.append(strip(np.array(ring.coords), (0.0, KERB_M + 0.003), stone).labelled(category))


def _patches(site: _Site) -> MultiPolygon:
    """Mended pieces of carriageway."""
    main, shapes = site.plan.main, []
    for _ in range(int(main.axis.length_m / 28)):
        position, heading = main.axis.offset(site.rng.uniform(-1, 1) * (main.half_m - 1.5)).at(
            site.rng.uniform(0, main.axis.length_m)
        )
        forward = np.array([np.cos(heading), np.sin(heading)]) * site.rng.uniform(0.6, 6)
        shapes.append(
            LineString([position - forward, position + forward]).buffer(site.rng.uniform(0.3, 0.9), cap_style="flat")
        )
    return _polygons(unary_union(shapes).intersection(site.plan.road))


def _manholes(site: _Site) -> MultiPolygon:
    main = site.plan.main
    at = [
        main.axis.offset(site.rng.uniform(-1, 1) * (main.half_m - 1)).at(s)[0]
        for s in np.arange(10, main.axis.length_m, 24)
    ]
    return _polygons(unary_union([Point(p).buffer(0.33, quad_segs=4) for p in at]).intersection(site.plan.road))


def _polygons(shape) -> MultiPolygon:
    return MultiPolygon([p for p in getattr(shape, "geoms", [shape]) if p.geom_type == "Polygon" and p.area > 1e-3])


def _frontage(site: _Site, street: Street, side: int) -> None:
    """Line a side of a street with buildings, parks and gardens."""
    rng, plan = site.rng, site.plan
    edge_m = street.half_m + plan.verge_m + plan.walk_m
    free = prep(plan.terrain)
    at = rng.uniform(0, 6)
    while at < street.axis.length_m - 8:
        width = float(rng.uniform(11, 26))
        kind = str(rng.choice(["building", "park", "garden"], p=[0.72, 0.16, 0.12]))
        depth = float(rng.uniform(10, 17))
        middle, heading = street.axis.at(at + width / 2)
        at += width + float(rng.choice([0.0, rng.uniform(1.5, 5.0)], p=[0.45, 0.55]))
        if not site.near(middle, _FAR_M):
            continue
        outward = side * np.array([-np.sin(heading), np.cos(heading)])
        yaw = float(np.arctan2(outward[1], outward[0]) - np.pi / 2)
        setback = 0.15 if kind == "park" else float(rng.choice([0.2, rng.uniform(1.5, 4.0)], p=[0.6, 0.4]))
        for extra in (0.0, 1.0, 2.5, 5.0):
            front = middle + outward * (edge_m + setback + extra)
            lot = _rectangle(front, yaw, width, depth)
            if free.contains(lot) and not any(lot.intersects(other) for other in site.lots):
                site.lots.append(lot)
                _fill_lot(site, kind, front, yaw, width, depth, setback + extra)
                break


def _rectangle(front: np.ndarray, yaw: float, width: float, depth: float) -> Polygon:
    c, s = np.cos(yaw), np.sin(yaw)
    local = np.array([(-width / 2, -0.02), (width / 2, -0.02), (width / 2, depth), (-width / 2, depth)])
    return Polygon(local @ np.array([[c, s], [-s, c]]) + front)


def _fill_lot(
    site: _Site, kind: str, front: np.ndarray, yaw: float, width: float, depth: float, setback: float
) -> None:
    rng, palette = site.rng, site.palette
    near = site.near(front)
    c, s = np.cos(yaw), np.sin(yaw)

    def spot(x: float, y: float) -> tuple[float, float]:
        return float(front[0] + c * x - s * y), float(front[1] + s * x + c * y)

    if kind == "building":
        site.stand(buildings.building(rng, palette, width - 0.6, depth), MANMADE, *front, yaw)
        if near and setback > 1.2:
            if rng.random() < 0.5:
                site.stand(
                    plants.hedge(rng, palette, width * 0.38),
                    VEGETATION,
                    *spot(-width / 2 + 0.3, 0.3 - setback + 0.4),
                    yaw,
                )
                site.stand(
                    plants.hedge(rng, palette, width * 0.38), VEGETATION, *spot(width * 0.12, 0.3 - setback + 0.4), yaw
                )
            for _ in range(int(rng.integers(0, 4))):
                site.stand(
                    plants.bush(rng, palette),
                    VEGETATION,
                    *spot(rng.uniform(-width / 2 + 0.8, width / 2 - 0.8), -0.9),
                    rng.uniform(0, 6),
                    scale=0.8,
                )
        return
    if not near:
        return
    boundary = str(rng.choice(["fence", "wall", "hedge", "hoarding", "none"], p=[0.3, 0.25, 0.25, 0.08, 0.12]))
    start = spot(-width / 2, 0.15)
    if boundary == "hedge":
        site.stand(plants.hedge(rng, palette, width), VEGETATION, *spot(-width / 2, 0.45), yaw)
    elif boundary != "none":
        site.stand(getattr(props, boundary)(width, palette, rng), MANMADE, *start, yaw)
    for _ in range(int(rng.integers(2, 6) if kind == "park" else rng.integers(0, 3))):
        model = plants.tree(rng, palette, rng.uniform(5, 9))
        site.stand(
            model, VEGETATION, *spot(rng.uniform(-0.42, 0.42) * width, rng.uniform(2.5, depth - 1)), rng.uniform(0, 6)
        )
    for _ in range(int(rng.integers(2, 7))):
        site.stand(
            plants.bush(rng, palette),
            VEGETATION,
            *spot(rng.uniform(-0.46, 0.46) * width, rng.uniform(1.2, depth - 1)),
            rng.uniform(0, 6),
        )


def _kerbside(site: _Site, street: Street, side: int) -> None:
    """Trees, lamps, signs and other furniture along a kerb."""
    rng, palette, plan = site.rng, site.palette, site.plan
    trees = [plants.tree(rng, palette, rng.uniform(5.5, 9.5)) for _ in range(3)]
    leafy = rng.random() < 0.75
    inset = plan.verge_m / 2 if plan.verge_m else 0.55
    line = street.axis.offset(side * (street.half_m + inset))
    lamp_every, pace = 4, rng.uniform(6.5, 9.0)
    ground = prep(unary_union([plan.verge, plan.sidewalk]))
    for i, at in enumerate(np.arange(rng.uniform(2, 8), line.length_m - 2, pace)):
        position, heading = line.at(at + rng.uniform(-0.8, 0.8))
        if (
            not site.near(position)
            or not ground.contains(Point(position).buffer(0.25))
            or _at_crossing(plan, position, 4.0)
        ):
            continue
        towards_road = float(heading - side * np.pi / 2)
        along = float(heading if side < 0 else heading + np.pi)
        if i % lamp_every == 0:
            site.stand(props.street_lamp(rng, palette), MANMADE, *position, towards_road, 0.2)
            continue
        choice = rng.random()
        if leafy and choice < 0.62:
            z = KERB_M - 0.02
            site.stand(
                trees[rng.integers(3)], VEGETATION, *position, rng.uniform(0, 6), 0.3, z, rng.uniform(0.85, 1.15)
            )
        elif choice < 0.72:
            site.stand(props.sign(rng, palette), MANMADE, *position, along, 0.15)
        elif choice < 0.79:
            for step in range(3):
                post, _ = line.at(at + 1.5 * step)
                if ground.contains(Point(post).buffer(0.15)):
                    site.stand(props.bollard(rng, palette), MANMADE, *post, along, 0.2)
        elif choice < 0.83:
            site.stand(props.hydrant(rng, palette), MANMADE, *position, along, 0.25)
        elif choice < 0.87 and plan.walk_m > 2.8:
            site.stand(props.bench(rng, palette), MANMADE, *position, towards_road + np.pi / 2, 0.9)
        elif choice < 0.90 and plan.walk_m + plan.verge_m > 3.4:
            spot, _ = street.axis.offset(side * (street.half_m + 1.2)).at(at)
            if ground.contains(Point(spot).buffer(2.2).intersection(Point(spot).buffer(0.9))):
                site.stand(props.bus_shelter(rng, palette), MANMADE, *spot, towards_road + np.pi / 2, 2.0)
        elif choice < 0.92 and plan.walk_m > 3.0:
            site.stand(props.kiosk(rng, palette), MANMADE, *position, along, 0.8)


def _at_crossing(plan: StreetPlan, position: np.ndarray, margin_m: float) -> bool:
    return any(
        np.linalg.norm(position - c.centre_m) < np.hypot(c.main_half_m, c.side.half_m) + margin_m
        for c in plan.crossings
    )


def _signals(site: _Site) -> None:
    """Traffic lights where the main street meets side streets."""
    rng, palette, main = site.rng, site.palette, site.plan.main
    for crossing in site.plan.crossings:
        if not site.near(crossing.centre_m) or rng.random() < 0.25:
            continue
        for direction in (1, -1):
            at = crossing.main_arc_m - direction * (crossing.side.half_m + 6.2)
            position, heading = main.axis.offset(-direction * (main.half_m + 0.55)).at(at)
            yaw = float(heading if direction > 0 else heading + np.pi)
            site.stand(props.traffic_light(rng, palette, min(main.half_m - 1, 5.0)), MANMADE, *position, yaw, 0.25)


def _backdrop(site: _Site) -> None:
    """Towers and woods that close the view far away."""
    rng, palette = site.rng, site.palette
    middle = np.array(site.way.centroid.coords[0])
    tree_list = STRtree(site.lots) if site.lots else None
    woods = [plants.tree(rng, palette, 9.0) for _ in range(2)]
    for angle in np.arange(0, 2 * np.pi, 2 * np.pi / 64):
        reach = rng.uniform(150, 330)
        width = rng.uniform(14, 32)
        spot = middle + reach * np.array([np.cos(angle), np.sin(angle)])
        area = box(*(spot - width), *(spot + width))
        if not site.plan.terrain.contains(area) or (tree_list is not None and len(tree_list.query(area, "intersects"))):
            continue
        if rng.random() < 0.75:
            site.stand(
                buildings.skyline_block(rng, palette, width, rng.uniform(14, 75)), MANMADE, *spot, rng.uniform(0, 1.5)
            )
        else:
            for _ in range(4):
                site.stand(
                    woods[rng.integers(2)],
                    VEGETATION,
                    *(spot + rng.uniform(-9, 9, 2)),
                    rng.uniform(0, 6),
                    scale=rng.uniform(1, 1.6),
                )
