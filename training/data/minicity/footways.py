# SPDX-License-Identifier: Apache-2.0
"""Who walks, stands and is left on the pavements."""

from __future__ import annotations

import numpy as np

from training.data.minicity import people, props, vehicles
from training.data.minicity.actors import Crowd
from training.data.minicity.path import STANDING, Path, Speed
from training.data.minicity.site import KERB_M
from training.data.minicity.streets import Crossing, Street


def walkers(crowd: Crowd, street: Street) -> None:
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
            if plan.at_crossing(line.at(start)[0], 3.0):
                continue
            speed = STANDING if rng.random() < 0.22 else Speed(round(rng.uniform(0.9, 1.7), 2))
            person(crowd, line, start, speed, KERB_M)
            if rng.random() < 0.3:
                person(crowd, line.offset(0.7), start + rng.uniform(-0.3, 0.3), speed, KERB_M)
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


def crossing_people(crowd: Crowd, crossing: Crossing) -> None:
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
                person(crowd, path, reach - side.half_m + 0.4 + rng.uniform(0, room), speed, 0.0)
            else:
                person(crowd, path, reach - side.half_m + rng.uniform(0.5, 2 * side.half_m - 0.5), STANDING, 0.0)


def small_things(crowd: Crowd, street: Street) -> None:
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
            if plan.at_crossing(position, 6.0):
                continue
            category, mesh, attribute, _ = things[rng.choice(len(things), p=weights / weights.sum())]
            turned = float(rng.uniform(-0.3, 0.3)) + (
                np.pi / 2 if category == "movable_object.pushable_pullable" else 0
            )
            crowd.offer(category, mesh, line, at, ground_m=KERB_M, yaw_offset=turned, attribute=attribute, walks=True)


def person(
    crowd: Crowd, path: Path, start_m: float, speed: Speed, ground_m: float, category: str | None = None
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
