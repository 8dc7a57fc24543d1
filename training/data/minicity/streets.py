# SPDX-License-Identifier: Apache-2.0
"""StreetPlan: the plan view of one scene - carriageways, lanes, pavements, markings and the ego vehicle's way."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from shapely.geometry import LineString, MultiPolygon, Polygon
from shapely.ops import unary_union

from training.data.minicity.path import Path, Speed, joined

KINDS = ("straight", "curve", "turn_right", "turn_left")
MARGIN_M = 150.0
"""How far the world goes on before and beyond the way driven."""


@dataclass(frozen=True)
class Street:
    """A two-way street along an axis; traffic keeps to the right.

    Attributes:
        axis: its centre line.
        lanes: lanes per direction.
        lane_m: lane width.
        parking_m: width of the parking lane on either side (0: none).
        median_m: width of the raised island in the middle (0: none).
    """

    axis: Path
    lanes: int
    lane_m: float
    parking_m: float = 0.0
    median_m: float = 0.0

    @property
    def half_m(self) -> float:
        """From the axis to the kerb."""
        return self.median_m / 2 + self.lanes * self.lane_m + self.parking_m

    def lane(self, number: int, forward: bool) -> Path:
        """Centre line, in driving direction, of a lane; number 0 is next to the middle."""
        right = self.median_m / 2 + (number + 0.5) * self.lane_m
        path = self.axis.offset(-right if forward else right)
        return path if forward else path.reversed()


@dataclass(frozen=True)
class Crossing:
    """Where a side street meets the main street: its centre, and how far each carriageway reaches from there."""

    centre_m: np.ndarray
    main_arc_m: float
    side: Street
    main_half_m: float


@dataclass
class StreetPlan:
    """One scene's plan view. Shapes are shapely geometries in the global frame, metres.

    Attributes:
        kind: one of ``KINDS``.
        streets: the main street first.
        crossings: along the main street.
        road, islands, verge, sidewalk, terrain: disjoint surfaces.
        paint: painted surfaces on the road, by colour name.
        ego_path, ego_start_m, ego_speed: how the recording vehicle moves.
        verge_m, walk_m: widths of the green strip and the pavement along the kerb.
    """

    kind: str
    streets: list[Street]
    crossings: list[Crossing]
    ego_path: Path
    ego_start_m: float
    ego_speed: Speed
    verge_m: float
    walk_m: float
    road: MultiPolygon = field(default_factory=MultiPolygon)
    islands: MultiPolygon = field(default_factory=MultiPolygon)
    verge: MultiPolygon = field(default_factory=MultiPolygon)
    sidewalk: MultiPolygon = field(default_factory=MultiPolygon)
    terrain: MultiPolygon = field(default_factory=MultiPolygon)
    paint: dict[str, MultiPolygon] = field(default_factory=dict)

    @property
    def main(self) -> Street:
        return self.streets[0]

    def ego(self, time_s: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Position [..., 2] of the ego frame and heading [...] at times [...]."""
        return self.ego_path.at(self.ego_start_m + self.ego_speed.distance_m(time_s))

    def at_crossing(self, position_m: np.ndarray, margin_m: float) -> bool:
        """Is a point [2] within a margin of where two carriageways meet?"""
        return any(
            np.linalg.norm(position_m - c.centre_m) < np.hypot(c.main_half_m, c.side.half_m) + margin_m
            for c in self.crossings
        )


def plan_streets(rng: np.random.Generator, duration_s: float) -> StreetPlan:
    """Draw the streets of one scene and the ego vehicle's way of at least ``duration_s`` along them."""
    kind = str(rng.choice(KINDS, p=(0.36, 0.30, 0.18, 0.16)))
    turning = kind.startswith("turn")
    speed = Speed(
        rng.uniform(4.2, 5.2) if turning else rng.uniform(5.5, 10.0),
        rng.uniform(0.3, 1.1) if turning else rng.uniform(0.5, 2.0),
        rng.uniform(0.3, 0.7),
        rng.uniform(0, 2 * np.pi),
    )
    driven_m = float(speed.distance_m(duration_s))
    main = _main_street(rng, kind, driven_m)
    turn_arc_m = MARGIN_M + float(np.clip(0.55 * driven_m, 22, 60))
    crossings = _crossings(rng, main, kind, turn_arc_m, driven_m)
    ego_path, ego_start_m = _ego_way(rng, kind, main, crossings, turn_arc_m)
    plan = StreetPlan(
        kind=kind,
        streets=[main, *(c.side for c in crossings)],
        crossings=crossings,
        ego_path=ego_path,
        ego_start_m=ego_start_m,
        ego_speed=speed,
        verge_m=float(rng.choice([0.0, 1.4, 2.2], p=[0.3, 0.3, 0.4])),
        walk_m=float(rng.uniform(2.4, 4.0)),
    )
    _surface(rng, plan)
    return plan


def _main_street(rng: np.random.Generator, kind: str, driven_m: float) -> Street:
    length_m = driven_m + 2 * MARGIN_M
    arc = np.arange(0, length_m, 1.0)
    start_heading = rng.uniform(-np.pi, np.pi)
    heading = np.full(len(arc), start_heading)
    if kind == "curve":
        swing, wave_m = rng.uniform(0.35, 0.7) * rng.choice([-1, 1]), rng.uniform(170, 260)
        heading = heading + swing * np.sin(2 * np.pi * arc / wave_m + rng.uniform(0, 2 * np.pi))
    points = np.column_stack([np.cumsum(np.cos(heading)), np.cumsum(np.sin(heading))])
    points += rng.uniform(200, 400, 2) - points[int(MARGIN_M)]
    lanes = int(rng.choice([1, 2], p=[0.45, 0.55]))
    return Street(
        axis=Path(points),
        lanes=lanes,
        lane_m=float(rng.uniform(3.2, 3.6)),
        parking_m=float(rng.choice([0.0, 2.3], p=[0.3, 0.7])),
        median_m=float(rng.uniform(1.2, 2.4)) if rng.random() < (0.6 if lanes == 2 else 0.3) else 0.0,
    )


def _crossings(rng: np.random.Generator, main: Street, kind: str, turn_arc_m: float, driven_m: float) -> list[Crossing]:
    if kind.startswith("turn"):
        arcs = [turn_arc_m]
    else:
        first = MARGIN_M + rng.uniform(-60, 50)
        arcs = list(np.arange(first, MARGIN_M + driven_m + 80, rng.uniform(75, 130)))
    result = []
    for arc_m in arcs:
        centre, heading = main.axis.at(arc_m)
        square = 0.0 if kind != "curve" else rng.uniform(-0.12, 0.12)
        direction = heading - np.pi / 2 + square
        back = 0.0 if rng.random() < 0.3 and not kind.startswith("turn") else -(MARGIN_M + 20)
        flip = rng.choice([-1, 1]) if back == 0 else 1
        steps = np.arange(back, MARGIN_M + driven_m * kind.startswith("turn") + 20, 1.0)
        points = centre + flip * steps[:, None] * np.array([np.cos(direction), np.sin(direction)])
        wide = kind.startswith("turn") or rng.random() < 0.4
        side = Street(Path(points), 1, 3.4, parking_m=float(rng.choice([0.0, 2.3])) if wide else 0.0)
        result.append(Crossing(centre, float(arc_m), side, main.half_m))
    return result


def _ego_way(
    rng: np.random.Generator, kind: str, main: Street, crossings: list[Crossing], turn_arc_m: float
) -> tuple[Path, float]:
    if not kind.startswith("turn"):
        number = int(rng.integers(main.lanes))
        return main.lane(number, forward=True), MARGIN_M
    right = kind == "turn_right"
    lane = main.lane(main.lanes - 1 if right else 0, forward=True)
    side = crossings[0].side.lane(0, forward=right)
    way = joined(lane.part(0, turn_arc_m - 2), side, 7.5 if right else 11.0)
    return way, MARGIN_M


def _surface(rng: np.random.Generator, plan: StreetPlan) -> None:
    """Fill in the plan's surfaces from its streets."""
    ways = [LineString(s.axis.points_m).buffer(s.half_m, cap_style="flat", quad_segs=6) for s in plan.streets]
    corner_m = 6.0
    carriageway = unary_union(ways).buffer(corner_m, quad_segs=8).buffer(-corner_m, quad_segs=8)
    boxes = [_crossing_zone(c, plan.main, 1.5) for c in plan.crossings]
    clear = unary_union([_crossing_zone(c, plan.main, 6.5) for c in plan.crossings]) if boxes else Polygon()
    islands = [
        LineString(s.axis.points_m).buffer(s.median_m / 2, cap_style="flat").difference(clear)
        for s in plan.streets
        if s.median_m
    ]
    plan.islands = _clean(unary_union([shape.buffer(-0.25).buffer(0.25) for shape in islands]))
    plan.road = _clean(carriageway.difference(plan.islands))
    verge = carriageway.buffer(plan.verge_m, quad_segs=4).difference(carriageway)
    ends = unary_union([zone.buffer(plan.verge_m + plan.walk_m + 3) for zone in boxes]) if boxes else Polygon()
    plan.verge = _clean(verge.difference(ends)) if plan.verge_m else MultiPolygon()
    walkway = carriageway.buffer(plan.verge_m + plan.walk_m, quad_segs=4)
    plan.sidewalk = _clean(walkway.difference(carriageway).difference(plan.verge))
    extent = carriageway.buffer(400).envelope
    plan.terrain = _clean(extent.difference(walkway))
    plan.paint = _paint(rng, plan, clear)


def _crossing_zone(crossing: Crossing, main: Street, margin_m: float) -> Polygon:
    """The part of the main carriageway that a side street crosses, with a margin along the main street."""
    reach = crossing.side.half_m + margin_m
    piece = main.axis.part(crossing.main_arc_m - reach, crossing.main_arc_m + reach)
    return LineString(piece.points_m).buffer(main.half_m + margin_m, cap_style="flat")


def _clean(shape) -> MultiPolygon:
    """Only the polygons of a geometry, without slivers."""
    parts = [p for p in getattr(shape, "geoms", [shape]) if p.geom_type == "Polygon" and p.area > 0.05]
    return MultiPolygon(parts)


def _paint(rng: np.random.Generator, plan: StreetPlan, clear: Polygon) -> dict[str, MultiPolygon]:
    yellow_middle = bool(rng.random() < 0.5)
    white, yellow = [], []
    for index, street in enumerate(plan.streets):
        keep_off = (
            clear
            if index == 0
            else plan.main.axis and LineString(plan.main.axis.points_m).buffer(plan.main.half_m + 7.0)
        )
        middle = yellow if yellow_middle else white
        if street.median_m:
            for side in (-1, 1):
                middle.append(_line(street, side * (street.median_m / 2 + 0.25), 0.12).difference(keep_off))
        else:
            for side in (-0.14, 0.14):
                middle.append(_line(street, side, 0.12).difference(keep_off))
        for number in range(1, street.lanes):
            for side in (-1, 1):
                at = side * (street.median_m / 2 + number * street.lane_m)
                white.append(_dashes(street, at, 3.0, 9.0, 0.13).difference(keep_off))
        if street.parking_m:
            for side in (-1, 1):
                white.append(
                    _dashes(street, side * (street.half_m - street.parking_m), 1.0, 2.0, 0.1).difference(keep_off)
                )
        else:
            for side in (-1, 1):
                white.append(_line(street, side * (street.half_m - 0.3), 0.12).difference(keep_off))
    for crossing in plan.crossings:
        white.extend(_crosswalks(crossing, plan.main))
    return {
        "white": _clean(unary_union(white).intersection(plan.road)),
        "yellow": _clean(unary_union(yellow).intersection(plan.road)),
    }


def _line(street: Street, left_m: float, width_m: float) -> Polygon:
    return LineString(street.axis.offset(left_m).points_m).buffer(width_m / 2, cap_style="flat")


def _dashes(street: Street, left_m: float, dash_m: float, period_m: float, width_m: float) -> MultiPolygon:
    line = street.axis.offset(left_m)
    starts = np.arange(0, line.length_m - dash_m, period_m)
    return MultiPolygon(
        [LineString(line.part(s, s + dash_m).points_m).buffer(width_m / 2, cap_style="flat") for s in starts]
    )


def _crosswalks(crossing: Crossing, main: Street) -> list[Polygon]:
    """Zebra stripes over the main street before and after the side street, over the side street, and stop lines."""
    stripes = []
    arms = [(main, crossing.main_arc_m, crossing.side.half_m)]
    arms.append((crossing.side, crossing.side.axis.project(crossing.centre_m), main.half_m))
    for street, arc_m, reach_m in arms:
        for towards in (-1, 1):
            at = arc_m + towards * (reach_m + 3.2)
            if not 3 < at < street.axis.length_m - 3:
                continue
            position, heading = street.axis.at(at)
            forward = np.array([np.cos(heading), np.sin(heading)])
            left = np.array([-forward[1], forward[0]])
            for lateral in np.arange(-street.half_m + 0.6, street.half_m - 0.3, 1.0):
                if abs(lateral) < street.median_m / 2 + 0.3 and street.median_m:
                    continue
                middle = position + lateral * left
                stripes.append(
                    LineString([middle - 1.4 * forward, middle + 1.4 * forward]).buffer(0.25, cap_style="flat")
                )
            # Oncoming traffic stops before the zebra: on the right of its own direction.
            stop = position + towards * 2.6 * forward
            near, far = street.median_m / 2 + 0.2, street.median_m / 2 + street.lanes * street.lane_m - 0.2
            side = towards  # arriving traffic drives towards the crossing, so its right is our left for towards = +1
            stripes.append(
                LineString([stop + side * near * left, stop + side * far * left]).buffer(0.2, cap_style="flat")
            )
    return stripes
