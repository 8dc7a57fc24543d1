# SPDX-License-Identifier: Apache-2.0
"""VoxelGrid: corners and centres by hand, round trips by property."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occflownet_core.errors import GeometryError
from occflownet_core.grid import OCC3D_GRID, VoxelGrid

inside_m = st.tuples(st.floats(-39.99, 39.99), st.floats(-39.99, 39.99), st.floats(-0.99, 5.39))


def test_the_benchmark_grid_has_the_published_shape():
    assert OCC3D_GRID.shape == (200, 200, 16)
    assert OCC3D_GRID.size == 640_000


def test_cell_centres_lie_half_a_voxel_inside():
    centres = OCC3D_GRID.centres()
    np.testing.assert_allclose(centres[0, 0, 0], (-39.8, -39.8, -0.8))
    np.testing.assert_allclose(centres[199, 199, 15], (39.8, 39.8, 5.2))
    # The ego origin is the corner shared by cells 99 and 100, and 2.5 cells above the bottom.
    np.testing.assert_allclose(OCC3D_GRID.index_from_metric((0.0, 0.0, 0.0)), (100, 100, 2.5))


def test_lower_faces_belong_to_a_cell_and_upper_faces_do_not():
    cell, inside = OCC3D_GRID.cells(np.array([[-40.0, -40.0, -1.0], [40.0, 0.0, 0.0], [0.0, 0.0, 5.4]]))
    assert cell[0].tolist() == [0, 0, 0]
    assert inside.tolist() == [True, False, False]


def test_nan_points_are_outside():
    assert not OCC3D_GRID.contains(np.array([np.nan, 0.0, 0.0]))


@given(inside_m)
def test_index_and_metric_are_inverse(point_m):
    back = OCC3D_GRID.metric_from_index(OCC3D_GRID.index_from_metric(point_m))
    np.testing.assert_allclose(back, point_m, atol=1e-9)


@given(inside_m)
def test_a_point_is_within_half_a_voxel_of_its_cells_centre(point_m):
    cell, inside = OCC3D_GRID.cells(np.array(point_m))
    assert inside
    centre = OCC3D_GRID.metric_from_index(cell + 0.5)
    assert np.abs(centre - point_m).max() <= 0.2 + 1e-9


def test_coarsening_keeps_the_box():
    coarse = OCC3D_GRID.coarsened(2)
    assert coarse.shape == (100, 100, 8)
    np.testing.assert_allclose(coarse.centres()[0, 0, 0], (-39.6, -39.6, -0.6))
    with pytest.raises(GeometryError, match="coarsened by 3"):
        OCC3D_GRID.coarsened(3)


def test_plain_values_round_trip():
    assert VoxelGrid(**OCC3D_GRID.to_dict()) == OCC3D_GRID


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((0, 0, 0), (1, 1, 1), 0.3), "choose a size that divides"),
        (((0, 0, 0), (1, 1, -1), 0.5), "empty"),
        (((0, 0, 0), (1, 1, 1), 0.0), "voxel_size_m is 0.0"),
        (((0, 0, 0), (1, 1, 1), float("nan")), "voxel_size_m is nan"),
        (((0, 0), (1, 1), 0.5), "three axes"),
    ],
)
def test_impossible_grids_are_refused(arguments, says):
    with pytest.raises(GeometryError, match=says):
        VoxelGrid(*arguments)
