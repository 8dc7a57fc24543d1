# SPDX-License-Identifier: Apache-2.0
"""The spinning LiDAR: one sweep cast while the vehicle and the actors move, compensated for ego motion as nuScenes does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occflownet_core import poses
from training.data.minicity import calibration
from training.data.minicity.actors import Actor
from training.data.minicity.raycast import NO_INSTANCE
from training.data.minicity.world import World

_WEAKEST_SIGNAL = 4e-5  # echo * cosine / range^2 below which nothing returns
_GLASS_GLOSS, _GLASS_RETURNS = 0.3, 0.5


@dataclass(frozen=True)
class Sweep:
    """The returns of one revolution, in firing order.

    Attributes:
        points: [N, 5] float32: x, y, z in the LIDAR_TOP frame at the sweep's timestamp, intensity 0..255, ring.
        category: [N] uint8, raw lidarseg index.
        instance: [N] int32, index of the actor + 1, 0 for static surfaces.
        time_s: [N] float64, when each point was measured (scene time; the sweep's timestamp is its end).
        origin_ego_m: [N, 3] where the sensor was then, in the ego frame of the sweep's timestamp.
        point_ego_m: [N, 3] the points in that frame.
    """

    points: np.ndarray
    category: np.ndarray
    instance: np.ndarray
    time_s: np.ndarray
    origin_ego_m: np.ndarray
    point_ego_m: np.ndarray


@dataclass
class _Beams:
    """All rays of a sweep in the global frame, and what each has hit so far."""

    origin_m: np.ndarray
    direction: np.ndarray
    time_s: np.ndarray
    ring: np.ndarray
    range_m: np.ndarray
    category: np.ndarray
    instance: np.ndarray
    cosine: np.ndarray
    echo: np.ndarray
    gloss: np.ndarray


def sweep(world: World, timestamp_s: float, noise: np.random.Generator) -> Sweep:
    """The sweep whose last column is fired at ``timestamp_s``."""
    beams = _fire(world, timestamp_s)
    _hit_static(world, beams)
    for index in world.nearby(timestamp_s, calibration.LIDAR_RANGE_M + 10):
        if not world.actors[index].stands:
            _hit_actor(world, beams, index)
    chance = noise.random(len(beams.time_s))
    deviation = noise.normal(0, calibration.LIDAR_NOISE_M, len(beams.time_s))
    returned = beams.range_m < calibration.LIDAR_RANGE_M
    returned &= beams.echo * beams.cosine > _WEAKEST_SIGNAL * np.minimum(beams.range_m, 1e3) ** 2
    returned &= (beams.gloss < _GLASS_GLOSS) | (chance < _GLASS_RETURNS)
    keep = np.flatnonzero(returned)
    measured = beams.origin_m[keep] + (beams.range_m[keep] + deviation[keep])[:, None] * beams.direction[keep]
    ego_from_global = poses.inverse(world.global_from_ego(timestamp_s))
    in_ego = poses.transform_points(ego_from_global, measured)
    in_lidar = poses.transform_points(poses.inverse(calibration.EGO_FROM_LIDAR), in_ego)
    intensity = np.clip(np.round(beams.echo[keep] * beams.cosine[keep] ** 0.5), 0, 255)
    return Sweep(
        points=np.column_stack([in_lidar, intensity, beams.ring[keep]]).astype(np.float32),
        category=beams.category[keep],
        instance=beams.instance[keep],
        time_s=beams.time_s[keep],
        origin_ego_m=poses.transform_points(ego_from_global, beams.origin_m[keep]),
        point_ego_m=in_ego,
    )


def _fire(world: World, timestamp_s: float) -> _Beams:
    """Every ray of the revolution, from where the vehicle is when it is fired."""
    column = np.arange(calibration.LIDAR_COLUMNS)
    turned = (column + 1) / calibration.LIDAR_COLUMNS
    time_s = timestamp_s + (turned - 1) * calibration.SWEEP_US * 1e-6
    ego_yaw = np.radians(calibration.LIDAR_START_YAW_DEG) - 2 * np.pi * turned
    azimuth = ego_yaw + np.pi / 2  # the LiDAR's own x axis looks to the right
    elevation = np.radians(calibration.LIDAR_ELEVATION_DEG)
    in_lidar = np.stack(
        [
            np.cos(azimuth)[:, None] * np.cos(elevation),
            np.sin(azimuth)[:, None] * np.cos(elevation),
            np.broadcast_to(np.sin(elevation), (len(column), len(elevation))),
        ],
        axis=-1,
    )
    in_ego = in_lidar @ calibration.EGO_FROM_LIDAR[:3, :3].T
    position, yaw = world.plan.ego(time_s)
    c, s = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    direction = np.stack(
        [c * in_ego[..., 0] - s * in_ego[..., 1], s * in_ego[..., 0] + c * in_ego[..., 1], in_ego[..., 2]], -1
    )
    x, y, z = calibration.EGO_FROM_LIDAR[:3, 3]
    origin = np.column_stack(
        [
            position[:, 0] + c[:, 0] * x - s[:, 0] * y,
            position[:, 1] + s[:, 0] * x + c[:, 0] * y,
            np.full(len(column), z),
        ]
    )
    rings = len(elevation)
    n = len(column) * rings
    return _Beams(
        origin_m=np.repeat(origin, rings, axis=0),
        direction=direction.reshape(n, 3),
        time_s=np.repeat(time_s, rings),
        ring=np.tile(np.arange(rings), len(column)),
        range_m=np.full(n, np.inf),
        category=np.zeros(n, dtype=np.uint8),
        instance=np.full(n, NO_INSTANCE, dtype=np.int32),
        cosine=np.zeros(n),
        echo=np.zeros(n),
        gloss=np.zeros(n),
    )


def _record(
    world: World,
    beams: _Beams,
    rows: np.ndarray,
    range_m: np.ndarray,
    cosine: np.ndarray,
    category: np.ndarray,
    material: np.ndarray,
    instance: np.ndarray | int,
) -> None:
    columns = world.material_columns
    beams.range_m[rows], beams.cosine[rows], beams.category[rows] = range_m, np.abs(cosine), category
    beams.instance[rows] = instance
    beams.echo[rows], beams.gloss[rows] = columns["echo"][material], columns["gloss"][material]


def _hit_static(world: World, beams: _Beams) -> None:
    hits = world.static.first_hits(beams.origin_m, beams.direction)
    rows = np.flatnonzero(hits.hit)
    face, surfaces = hits.face[rows], world.static_surfaces
    cosine = (surfaces.normal[face] * beams.direction[rows]).sum(axis=1)
    _record(
        world,
        beams,
        rows,
        hits.range_m[rows],
        cosine,
        surfaces.category[face],
        surfaces.material[face],
        surfaces.instance[face],
    )


def _hit_actor(world: World, beams: _Beams, index: int) -> None:
    """Cast the rays that pass near an actor in its own frame, at each ray's own time: exact while it moves."""
    actor = world.actors[index]
    columns = _columns_towards(beams, actor)
    if not len(columns):
        return
    rows = (columns[:, None] * calibration.LIDAR_RINGS + np.arange(calibration.LIDAR_RINGS)).ravel()
    position, yaw = actor.place(beams.time_s[rows])
    centre = np.column_stack([position, np.full(len(rows), actor.ground_m + actor.size_m[2] / 2)])
    towards = centre - beams.origin_m[rows]
    along = (towards * beams.direction[rows]).sum(axis=1)
    radius = np.linalg.norm(actor.size_m) / 2
    off_axis = (towards**2).sum(axis=1) - along**2
    near = (off_axis < radius**2) & (along > -radius) & (along - radius < beams.range_m[rows])
    rows, towards, yaw = rows[near], towards[near], yaw[near]
    if not len(rows):
        return
    c, s = np.cos(yaw), np.sin(yaw)

    def in_box(vectors: np.ndarray) -> np.ndarray:
        return np.column_stack(
            [c * vectors[:, 0] + s * vectors[:, 1], -s * vectors[:, 0] + c * vectors[:, 1], vectors[:, 2]]
        )

    direction = in_box(beams.direction[rows])
    hits = world.actor_tracer(index).first_hits(in_box(-towards), direction, np.minimum(beams.range_m[rows], 1e4))
    found = np.flatnonzero(hits.hit)
    face, mesh = hits.face[found], actor.mesh
    cosine = (world.actor_normals(index)[face] * direction[found]).sum(axis=1)
    _record(world, beams, rows[found], hits.range_m[found], cosine, mesh.category[face], mesh.material[face], index + 1)


def _columns_towards(beams: _Beams, actor: Actor) -> np.ndarray:
    """Firing columns whose vertical plane passes near an actor's place in the middle of the sweep."""
    first = slice(None, None, calibration.LIDAR_RINGS)
    heading = beams.direction[first, :2] / np.linalg.norm(beams.direction[first, :2], axis=1, keepdims=True)
    position, _ = actor.place(beams.time_s[len(beams.time_s) // 2])
    towards = position - beams.origin_m[first, :2]
    along = (towards * heading).sum(axis=1)
    across = np.abs(towards[:, 0] * heading[:, 1] - towards[:, 1] * heading[:, 0])
    # The sensor is tilted by a degree or so, and actors move during the sweep.
    reach = np.linalg.norm(actor.size_m) / 2 + 1.0 + 0.03 * np.abs(along)
    return np.flatnonzero((across < reach) & (along > -reach))
