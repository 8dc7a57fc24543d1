# SPDX-License-Identifier: Apache-2.0
"""MISE against evaluating everything, marching cubes against scikit-image's own, vertices against closed forms, files."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from skimage.measure import marching_cubes

from occflownet_core.errors import ConfigError, EngineError, OccflownetError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import COLORS_RGB
from occflownet_core.mesh import extract_mesh, march, save_mesh
from occflownet_core.mise import CORNERS, SparseLattice, SurfaceCells, surface_cells, within_budget
from occflownet_core.query import POINTS_AT_A_TIME, FieldSamples

BOX = VoxelGrid((-4, -4, -4), (4, 4, 4), 1.0)
CAR, VEGETATION = 4, 16
WIDTH_M = 0.25


class DistanceField:
    """Occupied within a signed distance (negative inside): probability sigmoid(-distance / WIDTH_M), so 0.5 on the surface.

    To the left (y > 0) everything is a car, to the right vegetation.
    """

    def __init__(self, distance_m) -> None:
        self._distance_m = distance_m
        self.calls = []

    def probability(self, points_m):
        self.calls.append(len(points_m))
        return 1 / (1 + np.exp(np.clip(self._distance_m(points_m.astype(np.float64)) / WIDTH_M, -60, 60)))

    def samples(self, points_m, gradient=False):
        probability = self.probability(points_m)
        logits = np.zeros((len(points_m), 17))
        logits[np.arange(len(points_m)), np.where(points_m[:, 1] > 0, CAR, VEGETATION)] = 1
        if not gradient:
            return FieldSamples(probability, logits, probability >= 0)
        ahead, behind = (
            np.stack([self.probability(points_m + sign * step) for step in 1e-5 * np.eye(3)], axis=1)
            for sign in (1, -1)
        )
        return FieldSamples(probability, logits, probability >= 0, (ahead - behind) / 2e-5)


def ball(radius_m: float, centre_m=(0.0, 0.0, 0.0)) -> DistanceField:
    return union((radius_m, centre_m))


def union(*balls) -> DistanceField:
    return DistanceField(
        lambda p: np.min([np.linalg.norm(p - np.array(c), axis=1) - r for r, c in balls], axis=0, initial=99.0)
    )


def everything(field, grid: VoxelGrid) -> np.ndarray:
    """The field at every lattice point of a grid, [X + 1, Y + 1, Z + 1]."""
    axes = [np.arange(n + 1) for n in grid.shape]
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    points_m = np.minimum(grid.metric_from_index(nodes), np.array(grid.upper_m) - 1e-6)
    return field.probability(points_m.reshape(-1, 3)).reshape(nodes.shape[:3]).astype(np.float32)


def cut_cells(occupied: np.ndarray) -> set[tuple[int, int, int]]:
    """Cells whose corners disagree, of lattice points [X + 1, Y + 1, Z + 1]."""
    windows = np.lib.stride_tricks.sliding_window_view(occupied, (2, 2, 2)).reshape(*[n - 1 for n in occupied.shape], 8)
    return set(map(tuple, np.argwhere(windows.any(axis=-1) & ~windows.all(axis=-1)).tolist()))


def finer(grid: VoxelGrid, levels: int) -> VoxelGrid:
    return VoxelGrid(grid.lower_m, grid.upper_m, grid.voxel_size_m / 2**levels)


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


# The lattice that grows where it is needed


@given(st.lists(st.tuples(*[st.integers(0, 40)] * 3), min_size=1, max_size=60), st.integers(1, 7))
@settings(max_examples=60)
def test_a_sparse_lattice_is_a_dictionary_of_points(nodes, at_a_time):
    lattice, expected = SparseLattice((41, 41, 41)), {}
    for start in range(0, len(nodes), at_a_time):
        part = np.array(nodes[start : start + at_a_time], dtype=np.int32)
        index = lattice.index(part)
        lattice.values[index] = np.arange(start, start + len(part))
        expected |= {tuple(node): start + i for i, node in enumerate(part.tolist())}
    every = np.array(list(expected), dtype=np.int32)
    index = lattice.index(every)
    assert len(np.unique(index)) == len(every)
    np.testing.assert_array_equal(lattice.nodes(index), every)
    np.testing.assert_array_equal(lattice.values[index], list(expected.values()))
    assert np.isnan(lattice.values).sum() == len(lattice.values) - len(every)


# What is found


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_a_ball_is_found_as_by_evaluating_everything(levels):
    field = ball(2.3, (0.3, -0.2, 0.4))
    found = surface_cells(field.probability, BOX, 0.5, levels)
    volume = everything(field, finer(BOX, levels))
    assert set(map(tuple, found.cells.tolist())) == cut_cells(volume > 0.5)
    assert len(np.unique(found.cells, axis=0)) == len(found.cells)
    assert (found.level, found.grid) == (levels, finer(BOX, levels))
    at = found.cells[:, None] + CORNERS
    np.testing.assert_array_equal(found.corner_probability, volume[tuple(np.moveaxis(at, -1, 0))])


coordinate = st.floats(-3.9, 3.9)
any_ball = st.tuples(st.floats(0.1, 2.5), st.tuples(coordinate, coordinate, coordinate))


def surface_pieces(occupied: np.ndarray) -> list[set[tuple[int, int, int]]]:
    """Cut cells that hang together through cut faces."""
    cells = sorted(cut_cells(occupied))
    number, pairs = {cell: i for i, cell in enumerate(cells)}, []
    for (x, y, z), axis in itertools.product(cells, range(3)):
        there = tuple(np.add((x, y, z), np.eye(3, dtype=int)[axis]).tolist())
        face = [slice(x, x + 2), slice(y, y + 2), slice(z, z + 2)]
        face[axis] = there[axis]
        corners = occupied[tuple(face)]
        if there in number and corners.any() and not corners.all():
            pairs.append((number[x, y, z], number[there]))
    links = sparse.coo_array((np.ones(len(pairs)), np.array(pairs).reshape(-1, 2).T), shape=[len(cells)] * 2)
    count, piece = sparse.csgraph.connected_components(links, directed=False)
    return [{cell for cell, p in zip(cells, piece, strict=True) if p == k} for k in range(count)]


@given(st.lists(any_ball, min_size=1, max_size=4))
@settings(max_examples=20)
def test_each_piece_of_the_surface_is_found_whole_or_slips_between_coarse_points(balls):
    """Against evaluating everything: nothing is invented, nothing broken off, and no coarse cell that is cut stays empty."""
    field, levels = union(*balls), 2
    occupied = everything(field, finer(BOX, levels)) > 0.5
    found = set(map(tuple, surface_cells(field.probability, BOX, 0.5, levels).cells.tolist()))
    pieces = surface_pieces(occupied)
    assert found <= set().union(*pieces)
    assert all(piece <= found or not piece & found for piece in pieces)
    parents = {tuple(n >> levels for n in cell) for cell in found}
    assert cut_cells(occupied[(slice(None, None, 2**levels),) * 3]) <= parents


def test_thin_things_are_followed_from_where_they_are_seen():
    """A rod of a tenth of a cell's width between coarse points sticks out of a ball that is seen."""

    def distance_m(p):
        rod = np.maximum(np.hypot(p[:, 1] - 0.5, p[:, 2] - 0.5) - 0.1, np.abs(p[:, 0]) - 3.4)
        return np.minimum(rod, np.linalg.norm(p - np.array([-3.0, 0.5, 0.5]), axis=1) - 0.9)

    field = DistanceField(distance_m)
    found = surface_cells(field.probability, BOX, 0.5, 4)
    assert set(map(tuple, found.cells.tolist())) == cut_cells(everything(field, finer(BOX, 4)) > 0.5)
    assert found.cells[:, 0].max() >= (3.3 + 4) * 16


def test_a_speck_between_coarse_points_is_missed():
    """The documented limit; and the reason why the coarse cells are to be no larger than what matters."""
    speck = ball(0.3, (0.5, 0.5, 0.5))
    assert len(surface_cells(speck.probability, BOX, 0.5, 3).cells) == 0
    assert (
        len(surface_cells(speck.probability, finer(BOX, 1), 0.5, 2).cells) > 0
    )  # a corner of these lies in its middle


def test_evaluations_grow_with_the_surface():
    """Per level dense evaluation takes eight times as many points, MISE four."""
    counts = [surface_cells(ball(3.0).probability, BOX, 0.5, levels).evaluations for levels in (3, 4, 5)]
    exponents = np.log2(np.diff(counts)[1] / np.diff(counts)[0]), np.log2(counts[2] / counts[1])
    assert exponents[0] == pytest.approx(2.0, abs=0.1) and 1.7 < exponents[1] < 2.1
    assert counts[-1] * 20 < np.prod([n + 1 for n in finer(BOX, 5).shape])


def test_every_point_is_evaluated_about_once_and_no_batch_is_large():
    field = ball(3.0)
    found = surface_cells(field.probability, BOX, 0.5, 5)
    assert sum(field.calls) == found.evaluations
    assert max(field.calls) <= POINTS_AT_A_TIME


def test_the_search_stops_when_told():
    asked = []

    def go_on(level, cells):
        asked.append((level, cells))
        return level < 3

    found = surface_cells(ball(2.0).probability, BOX, 0.5, 5, go_on=go_on)
    assert found.level == 2 and found.grid.voxel_size_m == 0.25
    assert [level for level, _ in asked] == [1, 2, 3] and asked[-1][1] == len(found.cells)


def test_a_budget_makes_the_surface_coarser_and_not_late():
    """A clock that ticks once per evaluated point: levels of 729, then 1,000 and 4,000 or so."""
    ticks = {}
    for budget in (5_000, 10_000, 40_000, 1e9):
        field = ball(3.0)
        found = surface_cells(field.probability, BOX, 0.5, 4, go_on=within_budget(budget, lambda f=field: sum(f.calls)))
        ticks[budget] = (found.level, found.evaluations)
        assert found.evaluations <= budget
    levels = [level for level, _ in ticks.values()]
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] == 4 and len(set(levels)) >= 3


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


@pytest.mark.parametrize("answer", [lambda p: np.zeros((len(p), 1)), lambda p: np.full(len(p), np.nan)])
def test_a_field_that_does_not_answer_properly(answer):
    with pytest.raises(EngineError, match="it must give one probability for each"):
        surface_cells(answer, BOX, 0.5, 1)
