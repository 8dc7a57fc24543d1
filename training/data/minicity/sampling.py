# SPDX-License-Identifier: Apache-2.0
"""Points spread over meshes, for voxelising them."""

from __future__ import annotations

import numpy as np

from training.data.minicity.mesh import Mesh

_LONGEST_EDGE_M = 3.0


def surface_samples(mesh: Mesh, per_m2: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 3] spread over a mesh, at least one per triangle, and their raw categories [N]."""
    count = np.maximum(1, np.ceil(mesh.areas_m2() * per_m2)).astype(int)
    face = np.repeat(np.arange(len(mesh)), count)
    a, b = rng.random(len(face)), rng.random(len(face))
    folded = a + b > 1
    a[folded], b[folded] = 1 - a[folded], 1 - b[folded]
    corner = mesh.corners[face]
    points = corner[:, 0] + a[:, None] * (corner[:, 1] - corner[:, 0]) + b[:, None] * (corner[:, 2] - corner[:, 0])
    return points, mesh.category[face]


def clipped(mesh: Mesh, way_m: np.ndarray, reach_m: float, ceiling_m: float) -> Mesh:
    """The triangles within reach of a way [n, 2] and below a ceiling, big ones split so that little else is kept."""
    done, todo = [], mesh
    while len(todo):
        centre = todo.corners.mean(axis=1)[:, :2]
        longest = np.linalg.norm(todo.corners - np.roll(todo.corners, 1, axis=1), axis=-1).max(axis=1)
        gap = np.sqrt(((centre[:, None] - way_m[None]) ** 2).sum(axis=-1).min(axis=1))
        todo = _rows(todo, (gap < reach_m + longest) & (todo.corners[..., 2].min(axis=1) < ceiling_m))
        longest = np.linalg.norm(todo.corners - np.roll(todo.corners, 1, axis=1), axis=-1).max(axis=1)
        done.append(_rows(todo, longest <= _LONGEST_EDGE_M))
        todo = _quartered(_rows(todo, longest > _LONGEST_EDGE_M))
    return Mesh(*(np.concatenate([getattr(m, f) for m in done]) for f in ("corners", "uv", "material", "category")))


def _rows(mesh: Mesh, pick: np.ndarray) -> Mesh:
    return Mesh(mesh.corners[pick], mesh.uv[pick], mesh.material[pick], mesh.category[pick])


def _quartered(mesh: Mesh) -> Mesh:
    """Every triangle cut into four at the middles of its edges (texture is not carried over)."""
    a, b, c = (mesh.corners[:, i] for i in range(3))
    ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
    corners = np.concatenate([np.stack(t, axis=1) for t in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))])
    return Mesh(corners, np.tile(mesh.uv, (4, 1, 1)), np.tile(mesh.material, 4), np.tile(mesh.category, 4))
