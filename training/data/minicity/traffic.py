# SPDX-License-Identifier: Apache-2.0
"""Actors: everything that carries an annotated box, where it is at any time, and how a street is peopled with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from training.data.minicity import calibration, people, props, vehicles
from training.data.minicity.mesh import Mesh
from training.data.minicity.palette import Palette
from training.data.minicity.path import STANDING, Path, Speed
from training.data.minicity.scenery import KERB_M
from training.data.minicity.streets import Crossing, Street, StreetPlan

_CHECK_EVERY_S = 0.25
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
class _Crowd:
    """Actors accepted so far, with the footprints that newcomers must not touch."""

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
    from occflownet_core.labels import LIDARSEG_NAMES

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


def populate(
    rng: np.random.Generator, palette: Palette, plan: StreetPlan, obstacles: np.ndarray, duration_s: float
) -> list[Actor]:
    """Draw the actors of one scene; none of them ever touches another, the ego vehicle or what it must walk around."""
    times_s = np.arange(-0.25, duration_s + 0.5, _CHECK_EVERY_S)
    crowd = _Crowd(rng, palette, plan, obstacles, times_s)
    _roadworks(crowd)
    _special_traffic(crowd)
    for index, street in enumerate(plan.streets):
        _parked(crowd, street)
        _flowing(crowd, street, index)
    for crossing in plan.crossings:
        _queue(crowd, crossing)
        _crossing_people(crowd, crossing)
    for street in plan.streets:
        _walkers(crowd, street)
        _small_things(crowd, street)
    return crowd.actors


def _lanes(crowd: _Crowd, street: Street) -> list[tuple[Path, bool, bool]]:
    """(path, is it the ego's lane, is it the outermost) of a street's lanes."""
    plan, result = crowd.plan, []
    for forward in (True, False):
        for number in range(street.lanes):
            path = street.lane(number, forward)
            shift = np.linalg.norm(path.at(path.project(crowd.ego_m[0]))[0] - crowd.ego_m[0])
            is_ego = street is plan.main and forward and shift < 1.0
            result.append(
                (
                    plan.ego_path if is_ego and plan.kind in ("straight", "curve") else path,
                    is_ego,
                    number == street.lanes - 1,
                )
            )
    return result


def _vehicle(crowd: _Crowd, moving: bool, kinds: dict[str, float] | None = None) -> tuple[str, Callable[[], Mesh], str]:
    """A random vehicle: category, model, attribute."""
    rng, palette = crowd.rng, crowd.palette
    kinds = kinds or {"car": 0.66, "truck": 0.12, "bus": 0.08, "motorcycle": 0.09, "bicycle": 0.05}
    kind = str(rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values())))
    state = "vehicle.moving" if moving else "vehicle.parked"
    cycle = "cycle.with_rider" if moving else "cycle.without_rider"
    return {
        "car": ("vehicle.car", lambda: vehicles.car(rng, palette), state),
        "truck": ("vehicle.truck", lambda: vehicles.truck(rng, palette), state),
        "bus": ("vehicle.bus.rigid", lambda: vehicles.bus(rng, palette), state),
        "trailer": ("vehicle.trailer", lambda: vehicles.trailer(rng, palette), state),
        "motorcycle": ("vehicle.motorcycle", lambda: vehicles.motorcycle(rng, palette, moving), cycle),
        "bicycle": ("vehicle.bicycle", lambda: vehicles.bicycle(rng, palette, moving), cycle),
    }[kind]


def _flowing(crowd: _Crowd, street: Street, index: int) -> None:
    """Traffic that drives: one speed per lane, so that nobody runs into the one in front."""
    rng, plan = crowd.rng, crowd.plan
    for path, is_ego, _ in _lanes(crowd, street):
        speed = (
            plan.ego_speed
            if is_ego
            else Speed(rng.uniform(4, 10), rng.uniform(0, 1.2), rng.uniform(0.3, 0.8), rng.uniform(0, 6))
        )
        if index > 0 and not plan.kind.startswith("turn"):
            continue  # side streets wait while the main street has green
        here = path.project(crowd.ego_m[0])
        at = here - 75 + rng.uniform(0, 15)
        while at < here + 110 + float(speed.distance_m(crowd.times_s[-1])) * (0 if is_ego else 1):
            category, mesh, attribute = _vehicle(crowd, moving=True)
            crowd.offer(category, mesh, path, at, speed, attribute=attribute, clearance_m=1.2)
            at += rng.uniform(11, 34)


def _special_traffic(crowd: _Crowd) -> None:
    """A lorry with a trailer, a cyclist and a motorcyclist near the ego vehicle, in most scenes."""
    rng, palette, main = crowd.rng, crowd.palette, crowd.plan.main
    lanes = [entry for entry in _lanes(crowd, main) if not entry[1]]
    for path, _, _ in lanes:
        if rng.random() < 0.7:
            speed = Speed(rng.uniform(4, 8))
            start = path.project(crowd.ego_m[rng.integers(len(crowd.ego_m))]) + rng.uniform(-30, 25)
            start -= float(speed.distance_m(crowd.times_s[-1])) / 2
            lorry = vehicles.truck(rng, palette)
            length = float(np.ptp(lorry.corners[..., 0]))
            load = vehicles.trailer(rng, palette)
            gap = length / 2 + float(np.ptp(load.corners[..., 0])) / 2 + 0.9
            if crowd.offer(
                "vehicle.truck",
                lambda lorry=lorry: lorry,
                path,
                start,
                speed,
                attribute="vehicle.moving",
                clearance_m=0.3,
            ):
                crowd.offer(
                    "vehicle.trailer",
                    lambda load=load: load,
                    path,
                    start - gap,
                    speed,
                    attribute="vehicle.moving",
                    clearance_m=0.2,
                )
                break
    for forward in (True, False):
        edge = main.lane(main.lanes - 1, forward).offset(-main.lane_m / 2 + 0.45)
        for _ in range(3):
            speed = Speed(rng.uniform(3.5, 6.0))
            start = edge.project(crowd.ego_m[rng.integers(len(crowd.ego_m))]) + rng.uniform(-30, 35)
            kind = {"bicycle": 1.0} if rng.random() < 0.65 else {"motorcycle": 1.0}
            category, mesh, attribute = _vehicle(crowd, True, kind)
            crowd.offer(category, mesh, edge, start, speed, attribute=attribute, clearance_m=0.1)


def _parked(crowd: _Crowd, street: Street) -> None:
    rng = crowd.rng
    if not street.parking_m:
        return
    fullness = rng.uniform(0.35, 0.85)
    for forward in (True, False):
        line = street.lane(street.lanes - 1, forward).offset(-(street.lane_m + street.parking_m) / 2)
        at = rng.uniform(0, 8)
        while at < line.length_m:
            position, _ = line.at(at)
            step = 5.0
            if rng.random() < fullness and not _close_to_crossing(crowd.plan, position, 8.0):
                category, mesh, attribute = _vehicle(
                    crowd, False, {"car": 0.82, "truck": 0.06, "motorcycle": 0.06, "trailer": 0.03, "bus": 0.03}
                )
                turned = np.pi if rng.random() < 0.06 else 0.0
                lateral = line.offset(rng.uniform(-0.12, 0.12)) if step else line
                crowd.offer(category, mesh, lateral, at, yaw_offset=turned, attribute=attribute, clearance_m=0.3)
                step = {
                    "vehicle.truck": 9.0,
                    "vehicle.trailer": 11.5,
                    "vehicle.bus.rigid": 13.0,
                    "vehicle.motorcycle": 2.4,
                }.get(category, 5.0)
            at += step + rng.uniform(0.6, 1.8)


def _close_to_crossing(plan: StreetPlan, position: np.ndarray, margin_m: float) -> bool:
    return any(
        np.linalg.norm(position - c.centre_m) < np.hypot(c.main_half_m, c.side.half_m) + margin_m
        for c in plan.crossings
    )


def _queue(crowd: _Crowd, crossing: Crossing) -> None:
    """Vehicles that wait on the side street."""
    rng, side = crowd.rng, crossing.side
    for forward in (True, False):
        path = side.lane(0, forward)
        at = path.project(crossing.centre_m) - crossing.main_half_m - 6.3
        if at < 10 or np.linalg.norm(path.at(at)[0] - crossing.centre_m) > crossing.main_half_m + 12:
            continue
        for _ in range(int(rng.integers(0, 5))):
            category, mesh, _ = _vehicle(crowd, True, {"car": 0.75, "truck": 0.1, "bus": 0.05, "motorcycle": 0.1})
            length = {"vehicle.truck": 9.0, "vehicle.bus.rigid": 12.5, "vehicle.motorcycle": 2.2}.get(category, 5.0)
            attribute = "cycle.with_rider" if category == "vehicle.motorcycle" else "vehicle.stopped"
            crowd.offer(category, mesh, path, at - length / 2, attribute=attribute, clearance_m=0.4)
            at -= length + rng.uniform(1.2, 2.5)


def _person(
    crowd: _Crowd, path: Path, start_m: float, speed: Speed, ground_m: float, category: str | None = None
) -> bool:
    rng = crowd.rng
    category = category or str(rng.choice(["human.pedestrian.adult", "human.pedestrian.child"], p=[0.9, 0.1]))
    walking = speed.mean_mps > 0
    return crowd.offer(
        category,
        lambda: people.pedestrian(rng, crowd.palette, category, walking),
        path,
        start_m,
        speed,
        ground_m,
        yaw_offset=0.0 if walking else float(rng.uniform(-np.pi, np.pi)),
        attribute="pedestrian.moving" if walking else "pedestrian.standing",
        clearance_m=0.1,
        walks=True,
    )


def _walkers(crowd: _Crowd, street: Street) -> None:
    """People on both pavements, walking or standing, some in pairs."""
    rng, plan = crowd.rng, crowd.plan
    per_m = rng.uniform(0.03, 0.10)
    for side in (-1, 1):
        for _ in range(int(per_m * min(street.axis.length_m, 260))):
            lateral = street.half_m + plan.verge_m + rng.uniform(0.15, 0.85) * plan.walk_m
            line = street.axis.offset(side * lateral)
            line = line if rng.random() < 0.5 else line.reversed()
            anchor = crowd.ego_m[rng.integers(len(crowd.ego_m))]
            start = line.project(anchor) + rng.uniform(-75, 75)
            if _close_to_crossing(plan, line.at(start)[0], 3.0):
                continue
            speed = STANDING if rng.random() < 0.22 else Speed(round(rng.uniform(0.9, 1.7), 2))
            _person(crowd, line, start, speed, KERB_M)
            if rng.random() < 0.3:
                _person(crowd, line.offset(0.7), start + rng.uniform(-0.3, 0.3), speed, KERB_M)
            elif rng.random() < 0.08 and speed is not STANDING:
                crowd.offer(
                    "animal",
                    lambda: props.dog(rng, crowd.palette),
                    line.offset(-0.6),
                    start + 1.0,
                    speed,
                    KERB_M,
                    walks=True,
                )


def _crossing_people(crowd: _Crowd, crossing: Crossing) -> None:
    """People on the zebra stripes over the side street, whose traffic waits."""
    rng, side = crowd.rng, crossing.side
    centre_arc = side.axis.project(crossing.centre_m)
    for towards in (-1, 1):
        at = centre_arc + towards * (crossing.main_half_m + 3.2)
        if not 3 < at < side.axis.length_m - 3:
            continue
        middle, heading = side.axis.at(at)
        left = np.array([-np.sin(heading), np.cos(heading)])
        reach = side.half_m + 25
        for _ in range(int(rng.integers(0, 4))):
            shift = rng.uniform(-1, 1) * np.array([np.cos(heading), np.sin(heading)])
            ends = np.stack([middle + shift - reach * left, middle + shift + reach * left])
            path = Path(ends if rng.random() < 0.5 else ends[::-1])
            speed = Speed(round(rng.uniform(1.0, 1.6), 2))
            # On the carriageway for the whole scene, or they would float at the kerbs.
            span = float(speed.distance_m(crowd.times_s[-1]))
            room = 2 * side.half_m - 0.8 - span
            if room > 0:
                _person(crowd, path, reach - side.half_m + 0.4 + rng.uniform(0, room), speed, 0.0)
            else:
                _person(crowd, path, reach - side.half_m + rng.uniform(0.5, 2 * side.half_m - 0.5), STANDING, 0.0)


def _small_things(crowd: _Crowd, street: Street) -> None:
    """Bins, heaps of rubbish, bicycle racks and parked bicycles on the pavements."""
    rng, palette, plan = crowd.rng, crowd.palette, crowd.plan
    things = [
        ("movable_object.pushable_pullable", lambda: props.rubbish_bin(rng, palette), "", 0.5),
        ("movable_object.debris", lambda: props.debris(rng, palette), "", 0.2),
        ("static_object.bicycle_rack", lambda: props.bicycle_rack(rng, palette), "", 0.15),
        ("vehicle.bicycle", lambda: vehicles.bicycle(rng, palette, False), "cycle.without_rider", 0.35),
        ("vehicle.motorcycle", lambda: vehicles.motorcycle(rng, palette, False), "cycle.without_rider", 0.15),
    ]
    weights = np.array([t[3] for t in things])
    for side in (-1, 1):
        line = street.axis.offset(
            side * (street.half_m + plan.verge_m + rng.choice([0.75, max(0.8, plan.walk_m - 0.7)]))
        )
        for at in np.arange(rng.uniform(0, 12), line.length_m, rng.uniform(9, 17)):
            position, _ = line.at(at)
            if _close_to_crossing(plan, position, 6.0):
                continue
            category, mesh, attribute, _ = things[rng.choice(len(things), p=weights / weights.sum())]
            turned = float(rng.uniform(-0.3, 0.3)) + (
                np.pi / 2 if category == "movable_object.pushable_pullable" else 0
            )
            crowd.offer(category, mesh, line, at, ground_m=KERB_M, yaw_offset=turned, attribute=attribute, walks=True)


def _roadworks(crowd: _Crowd) -> None:
    """A closed stretch at the edge of the carriageway: barriers, cones, a machine and workers."""
    rng, palette, main = crowd.rng, crowd.palette, crowd.plan.main
    if rng.random() < 0.2:
        return
    forward = bool(rng.random() < 0.5)
    width = main.parking_m if main.parking_m else 0.0
    wide = main.lanes == 2 and not (
        forward and np.linalg.norm(main.lane(1, True).at(0.0)[0] - crowd.plan.ego_path.at(0.0)[0]) < 1.0
    )
    width += main.lane_m if wide else 0.0
    if width < 2.0:
        width = 1.6
    edge = main.lane(main.lanes - 1, forward).offset(-main.lane_m / 2 - main.parking_m)  # the kerb
    inner, middle = edge.offset(width), edge.offset(width / 2)
    # Anywhere along the way, seen from the ego's first to last position.
    anchor = edge.project(crowd.ego_m[int(rng.integers(len(crowd.ego_m)))])
    start = anchor + rng.uniform(-15, 20)
    length = rng.uniform(16, 30)
    if any(_close_to_crossing(crowd.plan, middle.at(s)[0], 6.0) for s in np.linspace(start, start + length, 8)):
        start += 30
    if width > 2.0:
        model = vehicles.construction_vehicle(rng, palette)
        crowd.offer(
            "vehicle.construction",
            lambda: model,
            middle,
            start + length * rng.uniform(0.35, 0.65),
            yaw_offset=float(rng.choice([0, np.pi])),
            attribute="vehicle.stopped",
            clearance_m=0.05,
        )
    closed_by_cones = rng.random() < 0.4
    for at in np.arange(start + 3, start + length, 2.05):
        if closed_by_cones and rng.random() < 0.5:
            crowd.offer(
                "movable_object.trafficcone", lambda: props.traffic_cone(rng, palette), inner, at, clearance_m=0.02
            )
        else:
            crowd.offer(
                "movable_object.barrier", lambda: props.jersey_barrier(rng, palette), inner, at, clearance_m=-0.02
            )
    for step in range(5):
        taper = edge.offset(width * step / 4)
        crowd.offer(
            "movable_object.trafficcone",
            lambda: props.traffic_cone(rng, palette),
            taper,
            start - 5 + 1.8 * step,
            clearance_m=0.02,
        )
        crowd.offer(
            "movable_object.trafficcone",
            lambda: props.traffic_cone(rng, palette),
            taper,
            start + length + 6 - 1.4 * step,
            clearance_m=0.02,
        )
    for _ in range(int(rng.integers(1, 4))):
        _person(
            crowd, middle, start + rng.uniform(0.1, 0.9) * length, STANDING, 0.0, "human.pedestrian.construction_worker"
        )
