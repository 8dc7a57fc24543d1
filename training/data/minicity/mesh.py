# SPDX-License-Identifier: Apache-2.0
"""Mesh: a soup of textured, labelled triangles, and the convex parts that everything in the city is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import trimesh
from mapbox_earcut import triangulate_float64
from shapely.geometry import MultiPolygon, Polygon, box
from shapely.geometry.polygon import orient

_TILE_M = 40.0
_FLATNESS = 0.7  # |normal z| above which a face is textured from above


@dataclass(frozen=True)
class Mesh:
    """Triangles with a material and a category each.

    Attributes:
        corners: [F, 3, 3] float64, metres; counter-clockwise seen from outside.
        uv: [F, 3, 2] float32, texture coordinates in metres.
        material: [F] int32, row of the palette.
        category: [F] uint8, raw nuScenes-lidarseg index.
    """

    corners: np.ndarray
    uv: np.ndarray
    material: np.ndarray
    category: np.ndarray

    def __len__(self) -> int:
        return len(self.corners)

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0, yaw: float = 0.0, scale: float = 1.0) -> Mesh:
        """The mesh scaled, turned about z, then shifted; texture stays as it was."""
        c, s = np.cos(yaw), np.sin(yaw)
        rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
        return replace(self, corners=(self.corners * scale) @ rotation.T + (x, y, z))

    def transformed(self, target_from_mesh: np.ndarray) -> Mesh:
        """The mesh in another frame, through a rigid transform [4, 4]."""
        return replace(self, corners=self.corners @ target_from_mesh[:3, :3].T + target_from_mesh[:3, 3])

    def labelled(self, category: int) -> Mesh:
        """The same triangles, all of one raw lidarseg category."""
        return replace(self, category=np.full(len(self), category, dtype=np.uint8))

    def normals(self) -> np.ndarray:
        """Unit normals [F, 3] (zero for degenerate triangles)."""
        normal, area = self._cross()
        return normal / np.maximum(area, 1e-12)[:, None]

    def areas_m2(self) -> np.ndarray:
        return self._cross()[1] / 2

    def _cross(self) -> tuple[np.ndarray, np.ndarray]:
        cross = _cross(self.corners)
        return cross, np.linalg.norm(cross, axis=1)


def concatenate(meshes: Iterable[Mesh]) -> Mesh:
    """One mesh of many (an empty one of none)."""
    meshes = [m for m in meshes if len(m)]
    if not meshes:
        return Mesh(np.zeros((0, 3, 3)), np.zeros((0, 3, 2), np.float32), np.zeros(0, np.int32), np.zeros(0, np.uint8))
    return Mesh(*(np.concatenate([getattr(m, f) for m in meshes]) for f in ("corners", "uv", "material", "category")))


def triangles(corners: np.ndarray, material: int | np.ndarray, uv: np.ndarray | None = None) -> Mesh:
    """A mesh of corners [F, 3, 3], textured by planar projection unless ``uv`` [F, 3, 2] is given."""
    corners = np.asarray(corners, dtype=np.float64).reshape(-1, 3, 3)
    material = np.broadcast_to(np.asarray(material, dtype=np.int32), len(corners)).copy()
    uv = planar_uv(corners) if uv is None else uv
    return Mesh(corners, np.asarray(uv, dtype=np.float32), material, np.zeros(len(corners), dtype=np.uint8))


def _cross(corners: np.ndarray) -> np.ndarray:
    """Normals [F, 3] of triangles, twice their areas long (written out: NumPy's cross is slow on few rows)."""
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return np.stack(
        [
            a[:, 1] * b[:, 2] - a[:, 2] * b[:, 1],
            a[:, 2] * b[:, 0] - a[:, 0] * b[:, 2],
            a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0],
        ],
        axis=1,
    )


def planar_uv(corners: np.ndarray) -> np.ndarray:
    """Texture coordinates [F, 3, 2] in metres: (x, y) on flat faces, (along the wall, height) on upright ones."""
    normal = _cross(corners)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    tangent = np.stack([-normal[:, 1], normal[:, 0]], axis=1)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
    along = (corners[..., :2] * tangent[:, None]).sum(axis=-1)
    upright = np.stack([along, corners[..., 2]], axis=-1)
    flat = np.abs(normal[:, 2]) > _FLATNESS
    return np.where(flat[:, None, None], corners[..., :2], upright)


def hull(points: Sequence[Sequence[float]] | np.ndarray, material: int) -> Mesh:
    """The convex hull of points [n, 3]."""
    return triangles(_hull_corners(np.asarray(points, dtype=np.float64)), material)


def _hull_corners(points: np.ndarray) -> np.ndarray:
    from scipy.spatial import ConvexHull

    found = ConvexHull(points)
    corners = points[found.simplices]
    normal = _cross(corners)
    inwards = (normal * found.equations[:, :3]).sum(axis=1) < 0
    corners[inwards] = corners[inwards][:, ::-1]
    return corners


_BOX_FACES = np.array(
    [
        [0, 2, 3],
        [0, 3, 1],
        [4, 5, 7],
        [4, 7, 6],
        [0, 1, 5],
        [0, 5, 4],
        [2, 6, 7],
        [2, 7, 3],
        [0, 4, 6],
        [0, 6, 2],
        [1, 3, 7],
        [1, 7, 5],
    ]
)


def frustum(
    lower: tuple[float, float, float, float],
    upper: tuple[float, float, float, float],
    z: tuple[float, float],
    material: int,
    top_material: int | None = None,
) -> Mesh:
    """A block between two level rectangles (x0, x1, y0, y1) at heights z[0] and z[1]."""
    corners = np.array([(x, y, h) for r, h in ((lower, z[0]), (upper, z[1])) for y in r[2:] for x in r[:2]])
    mesh = triangles(corners[_BOX_FACES], material)
    if top_material is not None:
        mesh.material[2:4] = top_material
    return mesh


def block(
    x: tuple[float, float],
    y: tuple[float, float],
    z: tuple[float, float],
    material: int,
    top_material: int | None = None,
) -> Mesh:
    """An axis-aligned box."""
    return frustum((*x, *y), (*x, *y), z, material, top_material)


def prism(profile_xz: Sequence[tuple[float, float]], y: tuple[float, float], material: int) -> Mesh:
    """A side profile [(x, z), ...] in any order of turning, extruded from y[0] to y[1]."""
    shape = orient(Polygon(profile_xz))
    ring = np.array(shape.exterior.coords)[:-1]
    n = len(ring)
    near = np.column_stack([ring[:, 0], np.full(n, y[0]), ring[:, 1]])
    far = np.column_stack([ring[:, 0], np.full(n, y[1]), ring[:, 1]])
    cap = triangulate_float64(ring, np.array([n], dtype=np.uint32)).reshape(-1, 3)
    cap = _counter_clockwise(ring, cap)
    following = np.roll(np.arange(n), -1)
    sides = [np.stack([near, near[following], far[following]], 1), np.stack([near, far[following], far], 1)]
    return triangles(np.concatenate([near[cap], far[cap][:, ::-1], *(s[:, ::-1] for s in sides)]), material)


def cylinder(
    base: Sequence[float],
    tip: Sequence[float],
    radius: float,
    material: int,
    tip_radius: float | None = None,
    sides: int = 8,
) -> Mesh:
    """A round bar (or cone) between two points [3], closed at both ends."""
    base, tip = np.asarray(base, dtype=np.float64), np.asarray(tip, dtype=np.float64)
    axis = (tip - base) / np.linalg.norm(tip - base)
    helper = np.array([1.0, 0, 0]) if abs(axis[0]) < 0.7 else np.array([0, 1.0, 0])
    u = np.cross(axis, helper)
    u /= np.linalg.norm(u)
    v = np.cross(axis, u)
    angle = 2 * np.pi * np.arange(sides) / sides
    ring = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * v
    low, high = base + radius * ring, tip + (radius if tip_radius is None else tip_radius) * ring
    low_next, high_next = np.roll(low, -1, axis=0), np.roll(high, -1, axis=0)
    lid = [
        np.stack([np.tile(base, (sides, 1)), low_next, low], 1),
        np.stack([np.tile(tip, (sides, 1)), high, high_next], 1),
    ]
    return triangles(
        np.concatenate([np.stack([low, low_next, high_next], 1), np.stack([low, high_next, high], 1), *lid]), material
    )


@lru_cache(maxsize=4)
def _sphere(subdivisions: int) -> np.ndarray:
    return trimesh.creation.icosphere(subdivisions=subdivisions).triangles.view(np.ndarray).copy()


def ellipsoid(centre: Sequence[float], radii: Sequence[float], material: int, subdivisions: int = 1) -> Mesh:
    """An ellipsoid of 20 * 4 ** subdivisions triangles."""
    return triangles(_sphere(subdivisions) * np.asarray(radii) + np.asarray(centre), material)


def flat(shape: Polygon | MultiPolygon, z: float, material: int) -> Mesh:
    """A level surface, seen from above, over the polygons of a shapely geometry (holes stay open)."""
    parts = []
    for polygon in _tiles(shape):
        rings = [np.array(r.coords)[:-1] for r in (polygon.exterior, *polygon.interiors)]
        points = np.concatenate(rings)
        index = triangulate_float64(points, np.cumsum([len(r) for r in rings]).astype(np.uint32)).reshape(-1, 3)
        corners = points[_counter_clockwise(points, index)]
        parts.append(np.concatenate([corners, np.full((*corners.shape[:2], 1), z)], axis=-1))
    return triangles(np.concatenate(parts), material) if parts else concatenate([])


def _tiles(shape: Polygon | MultiPolygon) -> Iterable[Polygon]:
    """Polygons cut along a square lattice: long thin triangles would make every ray query slow."""
    for polygon in getattr(shape, "geoms", [shape]):
        x0, y0, x1, y1 = polygon.bounds
        for x in np.arange(x0, x1, _TILE_M):
            column = polygon.intersection(box(x, y0 - 1, x + _TILE_M, y1 + 1))
            for y in np.arange(y0, y1, _TILE_M):
                tile = column.intersection(box(x - 1, y, x + _TILE_M + 1, y + _TILE_M))
                for part in getattr(tile, "geoms", [tile]):
                    if part.geom_type == "Polygon" and part.area > 1e-6:
                        yield part


def _counter_clockwise(points: np.ndarray, index: np.ndarray) -> np.ndarray:
    a, b, c = (points[index[:, i]] for i in range(3))
    turned = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0]) < 0
    return np.where(turned[:, None], index[:, ::-1], index)


def strip(line: np.ndarray, z: tuple[float, float], material: int, facing_left: bool = True) -> Mesh:
    """An upright wall of no thickness along a line [n, 2]; the texture's u runs along the line."""
    line = np.asarray(line, dtype=np.float64)
    if not facing_left:
        line = line[::-1]
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    n = len(line) - 1
    low = np.column_stack([line, np.full(n + 1, z[0])])
    high = np.column_stack([line, np.full(n + 1, z[1])])
    corners = np.concatenate([np.stack([low[1:], low[:-1], high[:-1]], 1), np.stack([low[1:], high[:-1], high[1:]], 1)])
    u0, u1 = length[:-1], length[1:]
    bottom, top = np.full(n, z[0]), np.full(n, z[1])
    first = np.stack([np.stack([u1, bottom], 1), np.stack([u0, bottom], 1), np.stack([u0, top], 1)], 1)
    second = np.stack([np.stack([u1, bottom], 1), np.stack([u0, top], 1), np.stack([u1, top], 1)], 1)
    return triangles(corners, material, np.concatenate([first, second]))
