# SPDX-License-Identifier: Apache-2.0
"""How a street is peopled: driving, parked and waiting vehicles, roadworks, and with the footways' help everyone else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from training.data.minicity import props, vehicles
from training.data.minicity.actors import Actor, Crowd
from training.data.minicity.footways import crossing_people, person, small_things, walkers
from training.data.minicity.mesh import Mesh
from training.data.minicity.palette import Palette
from training.data.minicity.path import STANDING, Path, Speed
from training.data.minicity.streets import Crossing, Street, StreetPlan

_CHECK_EVERY_S = 0.25


def populate(
    rng: np.random.Generator, palette: Palette, plan: StreetPlan, obstacles: np.ndarray, duration_s: float
) -> list[Actor]:
    """Draw the actors of one scene; none of them ever touches another, the ego vehicle or what it must walk around."""
    times_s = np.arange(-0.25, duration_s + 0.5, _CHECK_EVERY_S)
    crowd = Crowd(rng, palette, plan, obstacles, times_s)
    _roadworks(crowd)
    _special_traffic(crowd)
    for index, street in enumerate(plan.streets):
        _parked(crowd, street)
        _flowing(crowd, street, index)
    for crossing in plan.crossings:
        _queue(crowd, crossing)
        crossing_people(crowd, crossing)
    for street in plan.streets:
        walkers(crowd, street)
        small_things(crowd, street)
    return crowd.actors


def _lanes(crowd: Crowd, street: Street) -> list[tuple[Path, bool, bool]]:
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


def _vehicle(crowd: Crowd, moving: bool, kinds: dict[str, float] | None = None) -> tuple[str, Callable[[], Mesh], str]:
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


def _flowing(crowd: Crowd, street: Street, index: int) -> None:
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


def _special_traffic(crowd: Crowd) -> None:
    """A lorry with a trailer, a cyclist and a motorcyclist near the ego vehicle, in most scenes."""
    rng, palette, main = crowd.rng, crowd.palette, crowd.plan.main
    # Oncoming, or it would drive beside the ego vehicle and hide half the world for the whole scene.
    for path in (main.lane(number, forward=False) for number in range(main.lanes)):
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


def _parked(crowd: Crowd, street: Street) -> None:
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
            if rng.random() < fullness and not crowd.plan.at_crossing(position, 8.0):
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


def _queue(crowd: Crowd, crossing: Crossing) -> None:
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


def _roadworks(crowd: Crowd) -> None:
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
    if any(crowd.plan.at_crossing(middle.at(s)[0], 6.0) for s in np.linspace(start, start + length, 8)):
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
        person(
            crowd, middle, start + rng.uniform(0.1, 0.9) * length, STANDING, 0.0, "human.pedestrian.construction_worker"
        )
