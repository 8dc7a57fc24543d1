# SPDX-License-Identifier: Apache-2.0
"""Tracer: first hits and occlusion of many rays against a mesh, by Embree; Snapshot: the world frozen at one time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from training.data.minicity.mesh import Mesh

MISS = -1
NO_INSTANCE = 0
FAR_M = 1e4


@dataclass(frozen=True)
class Surfaces:
    """What is known about each triangle: unit normal [F, 3], uv [F, 3, 2], material, category, instance [F]."""

    normal: np.ndarray
    uv: np.ndarray
    material: np.ndarray
    category: np.ndarray
    instance: np.ndarray

    @classmethod
    def of(cls, mesh: Mesh, instance: np.ndarray | int = NO_INSTANCE) -> Surfaces:
        instance = np.broadcast_to(np.asarray(instance, dtype=np.int32), len(mesh))
        return cls(mesh.normals().astype(np.float32), mesh.uv, mesh.material, mesh.category, instance)


@dataclass(frozen=True)
class Hits:
    """First hits of N rays.

    Attributes:
        range_m: [N] float32, ``FAR_M`` where nothing was hit.
        face: [N] int32, index into the snapshot's surfaces, ``MISS`` where nothing was hit.
        barycentric: [N, 2] float32.
    """

    range_m: np.ndarray
    face: np.ndarray
    barycentric: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        return self.face != MISS


class Tracer:
    """Ray queries against the triangles of one mesh (origins and directions [N, 3], directions unit)."""

    def __init__(self, corners_m: np.ndarray) -> None:
        self._scene = EmbreeScene(robust=True) if len(corners_m) else None
        if self._scene is not None:
            self._mesh = TriangleMesh(self._scene, np.ascontiguousarray(corners_m, dtype=np.float32))

    def first_hits(self, origins_m: np.ndarray, directions: np.ndarray, limit_m: np.ndarray | None = None) -> Hits:
        """The nearest triangle along each ray, nearer than ``limit_m`` [N] if given."""
        n = len(origins_m)
        limit_m = np.full(n, FAR_M, dtype=np.float32) if limit_m is None else limit_m.astype(np.float32)
        if self._scene is None or n == 0:
            return Hits(limit_m, np.full(n, MISS, dtype=np.int32), np.zeros((n, 2), dtype=np.float32))
        found = self._scene.run(_rows(origins_m), _rows(directions), dists=limit_m.copy(), output=1)
        face = found["primID"].astype(np.int32)
        barycentric = np.stack([found["u"], found["v"]], axis=-1)
        return Hits(np.where(face == MISS, limit_m, found["tfar"]), face, barycentric)

    def blocked(self, origins_m: np.ndarray, directions: np.ndarray, limit_m: np.ndarray) -> np.ndarray:
        """True [N] where something lies on the ray nearer than its limit [N]."""
        if self._scene is None or len(origins_m) == 0:
            return np.zeros(len(origins_m), dtype=bool)
        result = self._scene.run(
            _rows(origins_m), _rows(directions), dists=np.array(limit_m, dtype=np.float32), query="OCCLUDED"
        )
        return result != MISS


def _rows(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, dtype=np.float32)


class Snapshot:
    """The world at one time: what never moves, and the actors where they are then.

    Faces are numbered through: first the static ones, then the moving ones.
    """

    def __init__(self, static: Tracer, static_surfaces: Surfaces, moving: Mesh, moving_instance: np.ndarray) -> None:
        self._static, self._static_surfaces = static, static_surfaces
        self._moving = Tracer(moving.corners)
        self._moving_surfaces = Surfaces.of(moving, moving_instance)
        self._first_moving = len(static_surfaces.material)

    def first_hits(self, origins_m: np.ndarray, directions: np.ndarray) -> Hits:
        """First hits of rays [N, 3] with the whole world."""
        still = self._static.first_hits(origins_m, directions)
        moving = self._moving.first_hits(origins_m, directions, still.range_m)
        nearer = moving.hit
        return Hits(
            np.where(nearer, moving.range_m, still.range_m),
            np.where(nearer, moving.face + self._first_moving, still.face),
            np.where(nearer[:, None], moving.barycentric, still.barycentric),
        )

    def blocked(self, origins_m: np.ndarray, directions: np.ndarray, limit_m: np.ndarray) -> np.ndarray:
        """True [N] where anything lies on the ray nearer than its limit [N]."""
        result = self._static.blocked(origins_m, directions, limit_m)
        open_ray = np.flatnonzero(~result)
        result[open_ray] = self._moving.blocked(origins_m[open_ray], directions[open_ray], limit_m[open_ray])
        return result

    def of_faces(self, name: str, face: np.ndarray) -> np.ndarray:
        """An attribute of ``Surfaces`` at faces [N] (all of them hits)."""
        still, moving = getattr(self._static_surfaces, name), getattr(self._moving_surfaces, name)
        is_moving = face >= self._first_moving
        result = still[np.where(is_moving, 0, face)]
        result[is_moving] = moving[face[is_moving] - self._first_moving]
        return result

    def uv(self, hits: Hits) -> np.ndarray:
        """Texture coordinates [N, 2] of hits (all of them hits)."""
        corner = self.of_faces("uv", hits.face)
        u, v = hits.barycentric[:, 0, None], hits.barycentric[:, 1, None]
        return corner[:, 0] * (1 - u - v) + corner[:, 1] * u + corner[:, 2] * v
