# SPDX-License-Identifier: Apache-2.0
"""Scenery: everything that never moves and carries no box - ground, buildings, plants, street furniture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from shapely import STRtree
from shapely.geometry import LineString, Point, Polygon, box
from shapely.ops import unary_union
from shapely.prepared import prep

from training.data.minicity import buildings, plants, props
from training.data.minicity.ground import lay_ground
from training.data.minicity.mesh import Mesh, concatenate
from training.data.minicity.palette import Palette
from training.data.minicity.site import LAWN_M, MANMADE, VEGETATION, Site
from training.data.minicity.streets import Street, StreetPlan

_LEAFY_M, _FAR_M = 50.0, 200.0


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


def build_scenery(rng: np.random.Generator, palette: Palette, plan: StreetPlan, duration_s: float) -> Scenery:
    """The static world along the way that the ego vehicle drives in ``duration_s``."""
    way = LineString(plan.ego(np.linspace(-0.1, max(duration_s, 0.5), 60))[0])
    site = Site(rng, palette, plan, way)
    lay_ground(site)
    for street in plan.streets:
        for side in (-1, 1):
            _frontage(site, street, side)
            _kerbside(site, street, side)
    _signals(site)
    _greenery(site)
    _backdrop(site)
    return Scenery(concatenate(site.ground), concatenate(site.parts), np.array(site.obstacles).reshape(-1, 3))


def _frontage(site: Site, street: Street, side: int) -> None:
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


def _fill_lot(site: Site, kind: str, front: np.ndarray, yaw: float, width: float, depth: float, setback: float) -> None:
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
        model = _tree(rng, palette, rng.uniform(5, 9))[not site.near(front, _LEAFY_M)]
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


def _kerbside(site: Site, street: Street, side: int) -> None:
    """Trees, lamps, signs and other furniture along a kerb."""
    rng, palette, plan = site.rng, site.palette, site.plan
    trees = [_tree(rng, palette, rng.uniform(5.5, 9.5)) for _ in range(3)]
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
            or plan.at_crossing(position, 4.0)
        ):
            continue
        towards_road = float(heading - side * np.pi / 2)
        along = float(heading if side < 0 else heading + np.pi)
        if i % lamp_every == 0:
            site.stand(props.street_lamp(rng, palette), MANMADE, *position, towards_road, 0.2)
            continue
        choice = rng.random()
        if leafy and choice < 0.62:
            model = trees[rng.integers(3)][not site.near(position, _LEAFY_M)]
            site.stand(model, VEGETATION, *position, rng.uniform(0, 6), 0.3, LAWN_M, rng.uniform(0.85, 1.15))
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


def _tree(rng: np.random.Generator, palette: Palette, height_m: float) -> tuple[Mesh, Mesh]:
    """A tree for close and one for distant views."""
    return plants.tree(rng, palette, height_m), plants.distant_tree(rng, palette, height_m)


def _signals(site: Site) -> None:
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


def _greenery(site: Site) -> None:
    """Trees and bushes on open ground behind the pavements, where no lot is."""
    rng, palette, plan = site.rng, site.palette, site.plan
    trees = [plants.tree(rng, palette, rng.uniform(5, 10)) for _ in range(3)]
    bushes = [plants.bush(rng, palette) for _ in range(4)]
    free, taken = prep(plan.terrain), STRtree(site.lots)
    x0, y0, x1, y1 = site.way.buffer(45).bounds
    for _ in range(int((x1 - x0) * (y1 - y0) / 60)):
        spot = rng.uniform((x0, y0), (x1, y1))
        around = Point(spot).buffer(1.2, quad_segs=2)
        if not free.contains(around) or len(taken.query(Point(spot).buffer(2.2), "intersects")):
            continue
        is_tree = rng.random() < 0.35
        model = trees[rng.integers(3)] if is_tree else bushes[rng.integers(4)]
        site.stand(model, VEGETATION, *spot, rng.uniform(0, 6), 0.4, LAWN_M, rng.uniform(0.8, 1.3))


def _backdrop(site: Site) -> None:
    """Towers and woods that close the view far away."""
    rng, palette = site.rng, site.palette
    middle = np.array(site.way.centroid.coords[0])
    tree_list = STRtree(site.lots) if site.lots else None
    woods = [plants.distant_tree(rng, palette, 9.0) for _ in range(3)]
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
                    woods[rng.integers(3)],
                    VEGETATION,
                    *(spot + rng.uniform(-9, 9, 2)),
                    rng.uniform(0, 6),
                    scale=rng.uniform(1, 1.6),
                )
