# SPDX-License-Identifier: Apache-2.0
"""Marching cubes against scikit-image's own, vertices against closed forms, colours, files."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import marching_cubes

from occflownet_core.errors import ConfigError, OccflownetError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import COLORS_RGB
from occflownet_core.mesh import extract_mesh, march, save_mesh
from occflownet_core.mise import CORNERS, SurfaceCells
from tests.core.surface_twins import BOX, CAR, VEGETATION, DistanceField, ball, cut_cells


def all_cells(volume: np.ndarray, grid: VoxelGrid, threshold: float) -> SurfaceCells:
    """The cut cells of a lattice that is known everywhere, by plain indexing."""
    cells = np.array(sorted(cut_cells(volume > threshold)), dtype=np.int32)
    nodes = cells[:, None] + CORNERS
    index = np.ravel_multi_index(tuple(np.moveaxis(nodes, -1, 0)), volume.shape)
    return SurfaceCells(cells, index, volume[tuple(np.moveaxis(nodes, -1, 0))], grid, 0, volume.size)


def open_edges(triangles: np.ndarray) -> int:
    """How many directed edges have no counterpart in the other direction."""
    directed = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    there = Counter(map(tuple, directed.tolist()))
    return sum(count != there[b, a] for (a, b), count in there.items())


# Marching cubes


def as_points(vertices_m: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Triangles as nine coordinates, turned to begin with their least corner, sorted."""
    corners = np.round(vertices_m[triangles].astype(np.float64), 4)  # [T, 3, 3]
    key = corners @ [1e6, 1e3, 1.0]
    turned = np.stack([np.roll(t, -k, axis=0) for t, k in zip(corners, key.argmin(axis=1), strict=True)])
    rows = turned.reshape(-1, 9)
    return rows[np.lexsort(rows.T)]


def test_triangles_are_scikit_images_own():
    """On noise, where every case occurs; the library interpolates the log odds of the dense lattice."""
    grid = VoxelGrid((0, 0, 0), (12, 12, 12), 1.0)
    log_odds = np.random.default_rng(3).normal(0, 2, (13, 13, 13)).astype(np.float32)
    log_odds = np.copysign(np.maximum(np.abs(log_odds), 0.1), log_odds)
    cells = all_cells(1 / (1 + np.exp(-log_odds)), grid, 0.5)
    assert len(np.unique((cells.corner_probability > 0.5) @ (1 << np.arange(8)))) > 240
    vertices_m, triangles = march(cells, 0.5)
    theirs_m, their_triangles, _, _ = marching_cubes(log_odds, 0.0, method="lorensen", gradient_direction="ascent")
    assert len(vertices_m) == len(np.unique(np.round(theirs_m, 4), axis=0))
    np.testing.assert_allclose(as_points(vertices_m, triangles), as_points(theirs_m, their_triangles), atol=2e-4)


@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
@settings(max_examples=20)
def test_noise_is_meshed_without_a_crack(seed, threshold):
    """Any signs at all: each directed edge of a closed surface has its opposite."""
    volume = np.zeros((9, 9, 9), dtype=np.float32)
    volume[1:-1, 1:-1, 1:-1] = np.random.default_rng(seed).uniform(0, 1, (7, 7, 7))
    volume[4, 4, 4] = 1.0
    _, triangles = march(all_cells(volume, VoxelGrid((0, 0, 0), (8, 8, 8), 1.0), threshold), threshold)
    assert len(triangles) and open_edges(triangles) == 0


def test_one_occupied_corner_gives_the_triangle_around_it():
    volume = np.full((2, 2, 2), 0.2, dtype=np.float32)
    volume[0, 0, 0] = 0.8
    vertices_m, triangles = march(all_cells(volume, VoxelGrid((10, 0, 0), (12, 2, 2), 2.0), 0.5), 0.5)
    # Log odds are 1.386 and -1.386: the surface lies in the middle of the edges.
    np.testing.assert_allclose(sorted(vertices_m.tolist()), [(10, 0, 1), (10, 1, 0), (11, 0, 0)], atol=1e-6)
    a, b, c = vertices_m[triangles[0]]
    assert len(triangles) == 1 and np.cross(b - a, c - a).min() > 0  # looks away from what is occupied


def test_vertices_lie_where_log_odds_meet_the_thresholds():
    """Corners of 0.9 and 0.1 about a threshold of 0.25: log odds 2.197, -2.197 and -1.099."""
    volume = np.full((2, 2, 2), 0.1, dtype=np.float32)
    volume[0] = 0.9
    vertices_m, _ = march(all_cells(volume, VoxelGrid((0, 0, 0), (1, 1, 1), 1.0), 0.25), 0.25)
    np.testing.assert_allclose(vertices_m[:, 0], (math.log(9) + math.log(3)) / (2 * math.log(9)), atol=1e-6)


# The mesh


def volume_m3(mesh) -> float:
    a, b, c = np.moveaxis(mesh.vertices_m.astype(np.float64)[mesh.triangles], 1, 0)
    return float((np.cross(a, b) * c).sum() / 6)


def test_a_ball_is_round_closed_and_of_its_classes():
    mesh = extract_mesh(ball(2.5, (0.1, 0.2, 0.3)), BOX, 0.5, levels=2)
    distance_m = np.linalg.norm(mesh.vertices_m - np.array([0.1, 0.2, 0.3]), axis=1)
    np.testing.assert_allclose(distance_m, 2.5, atol=1e-4)
    assert open_edges(mesh.triangles) == 0
    assert len(mesh.vertices_m) - 1.5 * len(mesh.triangles) + len(mesh.triangles) == 2  # Euler: a sphere
    assert volume_m3(mesh) == pytest.approx(4 / 3 * math.pi * 2.5**3, rel=0.01)  # positive: triangles look outward
    assert set(mesh.labels[mesh.vertices_m[:, 1] > 0.01]) == {CAR}
    assert set(mesh.labels[mesh.vertices_m[:, 1] < -0.01]) == {VEGETATION}
    assert mesh.triangles.dtype == np.int32 and mesh.labels.dtype == np.uint8


def test_refinement_moves_vertices_onto_the_surface_and_not_far():
    """A probability whose log odds are the cube of a distance, which interpolation along an edge misjudges."""
    field = DistanceField(lambda p: 0.1 * ((np.linalg.norm(p, axis=1) - 1.7) + 1) ** 3 - 0.1)
    error_m = []
    for refinements in (0, 1, 3):
        mesh = extract_mesh(field, BOX, 0.5, levels=1, refinements=refinements)
        error_m.append(np.abs(np.linalg.norm(mesh.vertices_m, axis=1) - 1.7).max())
        rough_m, _ = march(mesh.cells, 0.5)
        assert np.linalg.norm(mesh.vertices_m - rough_m, axis=1).max() <= mesh.cells.grid.voxel_size_m / 2 + 1e-6
    assert error_m[0] > 0.02 and error_m[1] < error_m[0] / 2 and error_m[2] < error_m[1] / 2


def test_a_slope_that_leads_astray_moves_nothing():
    class Misleading(DistanceField):
        def samples(self, points_m, gradient=False):
            answer = super().samples(points_m, gradient)
            return answer if answer.gradient_per_m is None else answer._replace(gradient_per_m=-answer.gradient_per_m)

    mesh = extract_mesh(Misleading(lambda p: np.linalg.norm(p, axis=1) - 2.2), BOX, 0.5, levels=1)
    np.testing.assert_array_equal(mesh.vertices_m, march(mesh.cells, 0.5)[0])


def test_a_box_that_ends_cuts_the_surface_open_or_closes_it():
    """A wall of ground below z = 0.3: 8 x 8 x 4.3 m of it lie in the box."""
    ground = DistanceField(lambda p: p[:, 2] - 0.3)
    surface = extract_mesh(ground, BOX, 0.5, levels=1)
    np.testing.assert_allclose(surface.vertices_m[:, 2], 0.3, atol=1e-5)
    assert np.ptp(surface.vertices_m[:, :2], axis=0).tolist() == [8, 8]
    assert open_edges(surface.triangles) > 0
    solid = extract_mesh(ground, BOX, 0.5, levels=4, closed=True)
    assert open_edges(solid.triangles) == 0
    assert volume_m3(solid) == pytest.approx(8 * 8 * 4.3, rel=0.03)
    assert (np.abs(solid.vertices_m) <= 4).all()


@pytest.mark.parametrize("distance_m", [1.0, -1.0], ids=["empty", "occupied everywhere"])
@pytest.mark.parametrize("levels", [0, 2])
def test_without_a_surface_there_is_an_empty_mesh(distance_m, levels, tmp_path):
    field = DistanceField(lambda p: np.full(len(p), distance_m))
    mesh = extract_mesh(field, BOX, 0.5, levels)
    assert mesh.vertices_m.shape == (0, 3) and mesh.triangles.shape == (0, 3) and mesh.labels.shape == (0,)
    assert mesh.triangle_soup()[0].shape == (0, 3)
    for name in ("empty.ply", "empty.glb"):
        save_mesh(mesh, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 0


def test_occupied_everywhere_and_closed_is_the_box():
    mesh = extract_mesh(DistanceField(lambda p: np.full(len(p), -1.0)), BOX, 0.5, levels=4, closed=True)
    assert open_edges(mesh.triangles) == 0
    assert volume_m3(mesh) == pytest.approx(8**3, rel=0.05)


def test_triangle_soup_is_corner_by_corner():
    mesh = extract_mesh(ball(2.0), BOX, 0.5, levels=0)
    corners_m, colors_rgb = mesh.triangle_soup()
    assert len(corners_m) == len(colors_rgb) == 3 * len(mesh.triangles)
    for t, k in itertools.product((0, len(mesh.triangles) - 1), range(3)):
        vertex = mesh.triangles[t, k]
        np.testing.assert_array_equal(corners_m[3 * t + k], mesh.vertices_m[vertex])
        np.testing.assert_array_equal(colors_rgb[3 * t + k], COLORS_RGB[mesh.labels[vertex]])


# Files


def test_ply_is_in_the_ego_frame_with_the_classes_colours(tmp_path):
    mesh = extract_mesh(ball(2.0, (1, 0, 0)), BOX, 0.5, levels=1)
    save_mesh(mesh, tmp_path / "new folder" / "ball.ply")
    read = trimesh.load(tmp_path / "new folder" / "ball.ply", process=False)
    np.testing.assert_allclose(read.vertices, mesh.vertices_m, atol=1e-6)
    np.testing.assert_array_equal(read.faces, mesh.triangles)
    np.testing.assert_array_equal(np.asarray(read.visual.vertex_colors)[:, :3], COLORS_RGB[mesh.labels])


def test_glb_stands_upright_in_linear_colours(tmp_path):
    mesh = extract_mesh(ball(0.8, (1, 2, 3)), BOX, 0.5, levels=1)
    save_mesh(mesh, tmp_path / "ball.glb")
    scene = trimesh.load(tmp_path / "ball.glb", process=False)
    # Ego (forward 1, left 2, up 3) -> glTF, y up, facing along x: (1, 3, -2).
    np.testing.assert_allclose(scene.bounds.mean(axis=0), [1, 3, -2], atol=0.02)
    colors = np.unique(np.asarray(next(iter(scene.geometry.values())).visual.vertex_colors)[:, :3], axis=0)
    # A car is (255, 158, 0) in sRGB; ((158 / 255 + 0.055) / 1.055)^2.4 = 0.342.
    assert colors.tolist() == [[255, 87, 0]]


# Bad input


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.2, 1.5, math.nan])
def test_thresholds_that_nothing_can_cross(threshold):
    with pytest.raises(ConfigError, match=r"threshold is .*; give a probability between 0 and 1"):
        extract_mesh(ball(2.0), BOX, threshold)


def test_numbers_that_make_no_sense(tmp_path):
    with pytest.raises(ConfigError, match="levels is -1; give 0 or more"):
        extract_mesh(ball(2.0), BOX, 0.5, levels=-1)
    with pytest.raises(ConfigError, match="refinements is -2; give 0 or more"):
        extract_mesh(ball(2.0), BOX, 0.5, refinements=-2)
    with pytest.raises(OccflownetError, match=r"scene\.obj is no mesh format that can be written; name it"):
        save_mesh(extract_mesh(ball(2.0), BOX, 0.5, levels=0), tmp_path / "scene.obj")
    (tmp_path / "folder.ply").mkdir()
    with pytest.raises(OccflownetError, match=r"folder\.ply cannot be written"):
        save_mesh(extract_mesh(ball(2.0), BOX, 0.5, levels=0), tmp_path / "folder.ply")
