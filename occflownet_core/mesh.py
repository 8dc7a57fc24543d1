# SPDX-License-Identifier: Apache-2.0
"""Meshes of an occupancy field: MISE, marching cubes, vertices moved onto the surface, a class for each; PLY and GLB.

    mesh = extract_mesh(field, bundle.grid.coarsened(2), bundle.occupancy_threshold, levels=3)
    save_mesh(mesh, "scene.glb")

Marching cubes' cases are scikit-image's (Lorensen and Cline 1987, all 256 written out): how a cell's face is cut depends
on the signs of its own four corners alone, so cells always meet, whichever blocks they lie in.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from occflownet_core.errors import ConfigError, OccflownetError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import COLORS_RGB
from occflownet_core.mise import CORNERS, SurfaceCells, surface_cells
from occflownet_core.query import POINTS_AT_A_TIME, FieldSamples, QueryableField, batches

if TYPE_CHECKING:
    import trimesh

MESH_FORMATS = (".glb", ".ply")

_LEAST_PROBABILITY = 1e-6  # float32 knows no number between 1 - 6e-8 and 1
_LEAST_SHARE = 1e-3  # of an edge, between a vertex and the edge's ends: no triangle without area
_Y_UP_FROM_Z_UP = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=np.float64)


@dataclass(frozen=True)
class Mesh:
    """Triangles with a class at each vertex.

    Attributes:
        vertices_m: float32 [V, 3], ego frame.
        triangles: int32 [T, 3], rows of ``vertices_m``, counter-clockwise as seen from free space.
        labels: uint8 [V], one of the occupied classes.
        cells: how the surface was found: its finest cells, their size, the number of evaluations.
    """

    vertices_m: np.ndarray
    triangles: np.ndarray
    labels: np.ndarray
    cells: SurfaceCells

    @property
    def colors_rgb(self) -> np.ndarray:
        """uint8 [V, 3], the classes' nuScenes colours."""
        return COLORS_RGB[self.labels]

    def triangle_soup(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners float32 [3 T, 3], three by three, and their colours uint8 [3 T, 3]: a Marker's TRIANGLE_LIST."""
        corners = self.triangles.ravel()
        return self.vertices_m[corners], self.colors_rgb[corners]


def extract_mesh(
    field: QueryableField,
    coarse: VoxelGrid,
    threshold: float,
    levels: int = 3,
    refinements: int = 1,
    closed: bool = False,
    go_on: Callable[[int, int], bool] = lambda level, cells: True,
) -> Mesh:
    """The surface ``probability = threshold`` of a field as a mesh; of an empty field, and of one that is occupied
    everywhere (unless ``closed``), an empty one.

    Args:
        field: what to mesh.
        coarse, threshold, levels, closed, go_on: as for ``mise.surface_cells``.
        refinements: Newton steps along the gradient that move each vertex onto the surface.

    Raises:
        ConfigError: the threshold is not inside (0, 1), or a number negative; scikit-image is not installed.
        EngineError: the field's answer is not one number for each point.
    """
    if refinements < 0:
        raise ConfigError(f"refinements is {refinements}; give 0 or more steps")
    cells = surface_cells(field.probability, coarse, threshold, levels, closed, go_on)
    vertices_m, triangles = march(cells, threshold)
    # A closed surface's outermost vertices lie where the box ends, not where the field does.
    margin_m = cells.grid.voxel_size_m if closed else 0.0
    parts = [
        _refined(field, vertices_m[part], threshold, cells.grid, refinements, margin_m)
        for part in batches(len(vertices_m), POINTS_AT_A_TIME)
    ]
    refined_m, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Mesh(refined_m, triangles, labels, cells)


def march(cells: SurfaceCells, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Marching cubes over the cells of a surface.

    Vertices lie on lattice edges, where the log odds of being occupied, interpolated, are the threshold's: they are nearly
    linear where the probability itself is a step.

    Returns:
        vertices_m float32 [V, 3], triangles int32 [T, 3].

    Raises:
        ConfigError: scikit-image is not installed.
    """
    occupied = cells.corner_probability > np.float32(threshold)
    case = occupied @ (1 << np.arange(8))  # [A]
    edges = triangles_of_cases()[case]  # [A, 5, 3]
    cell, nth = np.nonzero(edges[..., 0] >= 0)
    edge = edges[cell, nth].astype(np.int64)  # [T, 3]
    key = (
        3 * cells.corner_index[cell[:, None], edge // 3] + edge % 3
    )  # [T, 3], the same in all cells that share the edge
    first, triangles = _numbered(key.ravel())
    vertices_m = _on_edges(cells, cell[first // 3], edge.ravel()[first], threshold)
    return vertices_m, triangles.reshape(-1, 3)


def save_mesh(mesh: Mesh, path: str | Path) -> None:
    """Write a mesh with its classes' colours: ``.ply`` in the ego frame, ``.glb`` stood upright as glTF has it (y up).

    Raises:
        OccflownetError: the file's name has another ending, it cannot be written, or trimesh is not installed.
    """
    path = Path(path)
    require_format(path)
    try:
        import trimesh
    except ImportError:
        raise OccflownetError(
            "meshes are written by trimesh, which is not installed; run: pip install trimesh"
        ) from None
    is_gltf = path.suffix.lower() == ".glb"
    colors_rgb = _linear(mesh.colors_rgb) if is_gltf else mesh.colors_rgb
    shape = trimesh.Trimesh(mesh.vertices_m, mesh.triangles, vertex_colors=colors_rgb, process=False)
    content = _glb(shape) if is_gltf else shape.export(file_type="ply")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise OccflownetError(f"{path} cannot be written: {error.strerror}") from None


def require_format(path: Path) -> None:
    """Refuse a file name that ``save_mesh`` would, before there is a mesh.

    Raises:
        OccflownetError: its ending is of no format that can be written.
    """
    if path.suffix.lower() not in MESH_FORMATS:
        raise OccflownetError(f"{path} is no mesh format that can be written; name it *{' or *'.join(MESH_FORMATS)}")


def _glb(shape: trimesh.Trimesh) -> bytes:
    if shape.is_empty:  # which trimesh does not write: a file of one chunk, a scene without nodes
        chunk = b'{"asset":{"version":"2.0"},"scene":0,"scenes":[{}]} '
        return struct.pack("<4sIIII", b"glTF", 2, 20 + len(chunk), len(chunk), 0x4E4F534A) + chunk
    scene = shape.scene()
    scene.apply_transform(_Y_UP_FROM_Z_UP)
    return scene.export(file_type="glb")


def _refined(
    field: QueryableField, start_m: np.ndarray, threshold: float, grid: VoxelGrid, steps: int, margin_m: float
) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [n, 3] moved at most half a cell along the gradient to where the field is the threshold; their classes.

    A vertex that a step does not bring nearer goes back to where it was.
    """
    lower_m, upper_m = (np.array(corner, dtype=np.float32) for corner in (grid.lower_m, grid.upper_m))
    upper_m = np.nextafter(upper_m, np.float32(-np.inf))
    movable = ((start_m >= lower_m + margin_m) & (start_m <= upper_m - margin_m)).all(axis=1)
    best_m, best = start_m, field.samples(start_m, gradient=steps > 0)
    for step in range(steps):
        moved_m = best_m + _newton_step_m(best, threshold)
        offset_m = moved_m - start_m
        length_m = np.linalg.norm(offset_m, axis=1, keepdims=True)
        offset_m *= np.minimum(1.0, grid.voxel_size_m / 2 / np.maximum(length_m, 1e-9))
        moved_m = np.clip(start_m + offset_m, lower_m, upper_m).astype(np.float32)
        there = field.samples(moved_m, gradient=step + 1 < steps)
        nearer = movable & (np.abs(_excess(there, threshold)) < np.abs(_excess(best, threshold)))
        best_m = np.where(nearer[:, None], moved_m, best_m)
        best = FieldSamples(*(None if a is None else _choose(nearer, a, b) for a, b in zip(there, best, strict=True)))
    return best_m, best.logits.argmax(axis=1).astype(np.uint8)


def _choose(condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _newton_step_m(at: FieldSamples, threshold: float) -> np.ndarray:
    """To first order, the shortest way [n, 3] to where the log odds are the threshold's; none where the field is flat."""
    bounded = np.clip(at.probability, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    slope_per_m = at.gradient_per_m / (bounded * (1 - bounded))[:, None]  # of the log odds
    steepness = (slope_per_m**2).sum(axis=1, keepdims=True)
    return -_excess(at, threshold)[:, None] * slope_per_m / np.maximum(steepness, 1e-12)


def _excess(at: FieldSamples, threshold: float) -> np.ndarray:
    return _log_odds(at.probability) - _log_odds(np.float32(threshold))


def _log_odds(probability: np.ndarray) -> np.ndarray:
    bounded = np.clip(probability, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    return np.log(bounded / (1 - bounded))


def _on_edges(cells: SurfaceCells, cell: np.ndarray, edge: np.ndarray, threshold: float) -> np.ndarray:
    """Where the surface cuts edges [V] (lower corner * 3 + axis) of cells [V], float32 [V, 3]."""
    corner, axis = edge // 3, edge % 3
    step = np.eye(3, dtype=np.int64)[axis]
    lower = _log_odds(cells.corner_probability[cell, corner]) - _log_odds(np.float32(threshold))
    upper = _log_odds(cells.corner_probability[cell, corner + (4 >> axis)]) - _log_odds(np.float32(threshold))
    span = lower - upper
    share = np.clip(lower / np.where(span == 0, 1, span), _LEAST_SHARE, 1 - _LEAST_SHARE)
    at = cells.cells[cell] + CORNERS[corner] + share[:, None] * step
    return cells.grid.metric_from_index(at).astype(np.float32)


def _numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal keys get equal numbers, 0, 1, ...: where each number's key stands [V], and the number of each key int32 [n].

    ``np.unique`` without its sorting: keys are not much larger than there are many.
    """
    size = int(keys.max(initial=-1)) + 1
    place = np.full(size, -1, dtype=np.int32)
    place[keys] = np.arange(len(keys), dtype=np.int32)
    used = np.flatnonzero(place >= 0)
    first = place[used]
    place[used] = np.arange(len(used), dtype=np.int32)
    return first, place[keys]


@functools.cache
def triangles_of_cases() -> np.ndarray:
    """int8 [256, 5, 3]: the cut edges (lower corner * 3 + axis) that each triangle joins, -1 where there is none.

    Case = sum of 2^corner over occupied corners. Read off scikit-image's marching cubes on cubes of one cell, once.

    Raises:
        ConfigError: scikit-image is not installed.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise ConfigError("meshes need scikit-image, which is not installed; run: pip install scikit-image") from None
    table = np.full((256, 5, 3), -1, dtype=np.int8)
    for case in range(1, 255):
        sign = np.where(case >> np.arange(8) & 1, 1.0, -1.0).astype(np.float32).reshape(2, 2, 2)
        corners, triangles, _, _ = marching_cubes(sign, 0.0, method="lorensen", gradient_direction="ascent")
        lower, axis = np.floor(corners).astype(int), (corners % 1).argmax(axis=1)  # at the middles of edges
        table[case, : len(triangles)] = (3 * lower @ [4, 2, 1] + axis)[triangles]
    return table


def _linear(srgb: np.ndarray) -> np.ndarray:
    """uint8 colours as glTF wants them at vertices: linear light (IEC 61966-2-1)."""
    c = srgb / 255.0
    return np.round(255 * np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)).astype(np.uint8)
