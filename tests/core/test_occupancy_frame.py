# SPDX-License-Identifier: Apache-2.0
"""OccupancyFrame and the surface of a labelled volume."""

import numpy as np
import pytest

from occflownet_core.errors import GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE
from occflownet_core.occupancy_frame import OccupancyFrame, surface_voxels

GRID = VoxelGrid((0, 0, 0), (5, 5, 5), 1.0)


def test_a_solid_block_shows_its_shell():
    labels = np.full(GRID.shape, FREE, np.uint8)
    labels[1:4, 1:4, 1:4] = 4
    expected = labels == 4
    expected[2, 2, 2] = False  # the one voxel with six occupied neighbours
    np.testing.assert_array_equal(surface_voxels(labels), expected)


def test_voxels_at_the_border_are_seen_from_outside():
    surface = surface_voxels(np.zeros(GRID.shape, np.uint8))
    assert surface.sum() == 5**3 - 3**3


def test_surface_agrees_with_a_loop_on_random_volumes():
    labels = np.where(np.random.default_rng(0).random((6, 5, 4)) < 0.7, 11, FREE).astype(np.uint8)
    padded = np.pad(labels, 1, constant_values=FREE)
    for i, j, k in np.ndindex(labels.shape):
        neighbours = [
            padded[i, j + 1, k + 1],
            padded[i + 2, j + 1, k + 1],
            padded[i + 1, j, k + 1],
            padded[i + 1, j + 2, k + 1],
            padded[i + 1, j + 1, k],
            padded[i + 1, j + 1, k + 2],
        ]
        assert surface_voxels(labels)[i, j, k] == (labels[i, j, k] != FREE and FREE in neighbours)


def test_arrays_of_another_shape_are_refused():
    with pytest.raises(GeometryError, match="probability has shape"):
        OccupancyFrame(0, "base_link", GRID, np.zeros(GRID.shape, np.uint8), probability=np.zeros((5, 5, 4)))
