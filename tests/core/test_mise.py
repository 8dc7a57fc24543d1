# SPDX-License-Identifier: Apache-2.0
"""MISE against evaluating everything: what is found, what may be missed, and what it costs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from occflownet_core.errors import ConfigError, EngineError, GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.mise import CORNERS, SparseLattice, levels_to, surface_cells
from occflownet_core.query import POINTS_AT_A_TIME
from tests.core.surface_twins import BOX, DistanceField, ball, cut_cells, everything, finer, union

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


@pytest.mark.parametrize(("finest_m", "levels"), [(1.6, 0), (0.8, 0), (0.7, 1), (0.4, 1), (0.1, 3), (0.09, 4)])
def test_cells_are_halved_until_they_are_small_enough(finest_m, levels):
    assert levels_to(VoxelGrid((0, 0, 0), (8, 8, 8), 0.8), finest_m) == levels


@pytest.mark.parametrize("finest_m", [0.0, -1.0, float("nan"), float("inf")])
def test_sizes_that_are_none(finest_m):
    with pytest.raises(GeometryError, match=r"the resolution is .*; give a size in metres"):
        levels_to(VoxelGrid((0, 0, 0), (8, 8, 8), 0.8), finest_m)


@pytest.mark.parametrize("answer", [lambda p: np.zeros((len(p), 1)), lambda p: np.full(len(p), np.nan)])
def test_a_field_that_does_not_answer_properly(answer):
    with pytest.raises(EngineError, match="it must give one probability for each"):
        surface_cells(answer, BOX, 0.5, 1)


@pytest.mark.parametrize("threshold", [0.0, 1.0, math.nan])
def test_thresholds_that_no_probability_crosses(threshold):
    with pytest.raises(ConfigError, match="give a probability between 0 and 1"):
        surface_cells(ball(2.0).probability, BOX, threshold, 1)
