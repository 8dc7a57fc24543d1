# SPDX-License-Identifier: Apache-2.0
"""World: one scene of MiniCity - its street plan, static mesh, actors, materials and light - drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from occflownet_core.grid import OCC3D_GRID
from training.data.minicity import calibration
from training.data.minicity.actors import Actor
from training.data.minicity.mesh import Mesh, concatenate
from training.data.minicity.palette import Palette
from training.data.minicity.raycast import NO_INSTANCE, Snapshot, Surfaces, Tracer
from training.data.minicity.sampling import clipped, surface_samples
from training.data.minicity.scenery import build_scenery
from training.data.minicity.streets import StreetPlan, plan_streets
from training.data.minicity.traffic import populate

_NEARBY_M = 115.0
_STREETS, _SCENERY, _TRAFFIC, _LIGHT, _SAMPLES = range(5)
_VISIBILITY_SAMPLES = 200
_STATIC_SAMPLES_PER_M2, _ACTOR_SAMPLES_PER_M2 = 64.0, 64.0


@dataclass(frozen=True)
class Light:
    """Weather of a scene.

    Attributes:
        towards_sun: [3] unit vector.
        sun_rgb, sky_rgb, horizon_rgb: radiance of the sun on a surface facing it, of the sky overhead, of the horizon.
        clouds: how much of the sky is clouded, 0..1.
        exposure: camera gain.
        haze_m: distance at which 63 % of the contrast is gone.
    """

    towards_sun: np.ndarray
    sun_rgb: np.ndarray
    sky_rgb: np.ndarray
    horizon_rgb: np.ndarray
    clouds: float
    exposure: float
    haze_m: float


@dataclass(frozen=True)
class World:
    """One scene. Frames are global; times are seconds since the first keyframe's LIDAR_TOP timestamp."""

    seed: int
    index: int
    duration_s: float
    plan: StreetPlan
    actors: list[Actor]
    ground: Mesh
    upright: Mesh
    palette: Palette
    light: Light
    static: Tracer
    static_surfaces: Surfaces

    @classmethod
    def build(cls, seed: int, index: int, duration_s: float) -> World:
        """The scene of a seed and scene number that lasts at least ``duration_s``."""
        palette = Palette()
        plan = plan_streets(_rng(seed, index, _STREETS), duration_s)
        scenery = build_scenery(_rng(seed, index, _SCENERY), palette, plan, duration_s)
        actors = populate(_rng(seed, index, _TRAFFIC), palette, plan, scenery.obstacles, duration_s)
        # What stands for the whole scene is traced with the houses: only what moves is rebuilt for each camera.
        standing, owner = _placed(actors, [i for i, actor in enumerate(actors) if actor.stands], 0.0)
        scene = concatenate([scenery.ground, scenery.upright])
        static = concatenate([scene, standing])
        instance = np.concatenate([np.full(len(scene), NO_INSTANCE, dtype=np.int32), owner])
        return cls(
            seed=seed,
            index=index,
            duration_s=duration_s,
            plan=plan,
            actors=actors,
            ground=scenery.ground,
            upright=scenery.upright,
            palette=palette,
            light=_light(_rng(seed, index, _LIGHT)),
            static=Tracer(static.corners),
            static_surfaces=Surfaces.of(static, instance),
        )

    def global_from_ego(self, time_s: float) -> np.ndarray:
        """[4, 4] pose of the ego vehicle."""
        (x, y), yaw = self.plan.ego(time_s)
        c, s = np.cos(yaw), np.sin(yaw)
        return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, 0], [0, 0, 0, 1.0]])

    def nearby(self, time_s: float, reach_m: float = _NEARBY_M) -> list[int]:
        """Indices of the actors within reach of the ego vehicle at a time."""
        ego, _ = self.plan.ego(time_s)
        return [i for i, actor in enumerate(self.actors) if np.linalg.norm(actor.place(time_s)[0] - ego) < reach_m]

    @cached_property
    def material_columns(self) -> dict[str, np.ndarray]:
        """The palette's attributes, one array each."""
        return self.palette.columns()

    @cached_property
    def ground_tracer(self) -> Tracer:
        """Ray queries against the ground alone."""
        return Tracer(self.ground.corners)

    @cached_property
    def static_samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Points [N, 3] over all that stands near the ego vehicle's way and within the grid's height; categories [N]."""
        way, _ = self.plan.ego(np.linspace(0, self.duration_s, max(2, round(self.duration_s * 2))))
        near = clipped(self.upright, way, 1.45 * OCC3D_GRID.upper_m[0], OCC3D_GRID.upper_m[2])
        return surface_samples(near, _STATIC_SAMPLES_PER_M2, _rng(self.seed, self.index, _SAMPLES))

    def actor_samples(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Points [N, 3] over an actor in its box frame; categories [N]."""
        return self._of_actor(
            "samples",
            index,
            lambda mesh: surface_samples(mesh, _ACTOR_SAMPLES_PER_M2, _rng(self.seed, self.index, _SAMPLES, index + 1)),
        )

    def visibility_samples(self, index: int) -> np.ndarray:
        """A thin scatter of points [N, 3] over an actor in its box frame."""
        points, _ = self.actor_samples(index)
        return points[:: max(1, len(points) // _VISIBILITY_SAMPLES)]

    def actor_tracer(self, index: int) -> Tracer:
        """Ray queries against one actor in its box frame."""
        return self._of_actor("tracer", index, lambda mesh: Tracer(mesh.corners))

    def actor_normals(self, index: int) -> np.ndarray:
        """Unit normals [F, 3] of an actor's triangles in its box frame."""
        return self._of_actor("normals", index, lambda mesh: mesh.normals())

    @cached_property
    def _made(self) -> dict:
        return {}

    def _of_actor(self, what: str, index: int, make: Callable[[Mesh], Any]) -> Any:
        """Something derived from an actor's mesh, made once."""
        if (what, index) not in self._made:
            self._made[what, index] = make(self.actors[index].mesh)
        return self._made[what, index]

    def snapshot(self, time_s: float) -> Snapshot:
        """The world at a time; instance = index of the actor + 1, 0 for what is static."""
        if self._made.get("snapshot time") != time_s:
            self._made["snapshot time"], self._made["snapshot"] = time_s, self._freeze(time_s)
        return self._made["snapshot"]

    def _freeze(self, time_s: float) -> Snapshot:
        moving = [i for i in self.nearby(time_s) if not self.actors[i].stands]
        mesh, instance = _placed(self.actors, moving, time_s)
        return Snapshot(self.static, self.static_surfaces, mesh, instance)

    def noise(self, keyframe: int, stream: int) -> np.random.Generator:
        """Random numbers that belong to one keyframe, whichever process draws them."""
        return _rng(self.seed, self.index, 100 + keyframe, stream)


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _placed(actors: list[Actor], pick: list[int], time_s: float) -> tuple[Mesh, np.ndarray]:
    """The meshes of some actors in the global frame at a time, and each triangle's instance (index + 1)."""
    meshes = [actors[i].mesh.transformed(actors[i].global_from_box(time_s)) for i in pick]
    return concatenate(meshes), np.repeat(np.array(pick, dtype=np.int32) + 1, [len(m) for m in meshes])


def _light(rng: np.random.Generator) -> Light:
    sunny = bool(rng.random() < 0.6)
    azimuth, elevation = rng.uniform(-np.pi, np.pi), np.radians(rng.uniform(28, 62))
    towards = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    warmth = rng.uniform(0, 1)
    if sunny:
        sun = rng.uniform(2.6, 3.4) * np.array([1.0, 0.95 - 0.04 * warmth, 0.88 - 0.1 * warmth])
        sky, horizon = np.array([0.42, 0.56, 0.80]), np.array([0.95, 1.0, 1.05])
        clouds, haze = rng.uniform(0.1, 0.6), rng.uniform(700, 1200)
    else:
        sun = rng.uniform(0.15, 0.45) * np.array([1.0, 0.98, 0.95])
        sky, horizon = rng.uniform(1.0, 1.3) * np.array([0.92, 0.96, 1.0]), np.array([1.15, 1.18, 1.2])
        clouds, haze = rng.uniform(0.75, 1.0), rng.uniform(350, 800)
    return Light(
        towards,
        sun,
        sky,
        horizon,
        float(clouds),
        float(rng.uniform(0.9, 1.15) * (1.25 if sunny else 1.35)),
        float(haze),
    )


def keyframe_time_s(keyframe: int) -> float:
    """Time of a keyframe's LIDAR_TOP timestamp."""
    return keyframe * calibration.KEYFRAME_INTERVAL_US * 1e-6
