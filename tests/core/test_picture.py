# SPDX-License-Identifier: Apache-2.0
"""Pictures: what must be where, by hand; how they look is for eyes."""

import numpy as np
import trimesh

from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.labels import COLORS_RGB, FREE, label_of
from occflownet_core.picture import (
    BACKGROUND_RGB,
    View,
    draw_mesh,
    draw_voxels,
    legend,
    mosaic,
    side_by_side,
    stacked,
    titled,
    view_from_above,
    view_from_behind,
)

GRID = VoxelGrid((-5, -5, 0), (5, 5, 5), 1.0)
DOWN = View((0.0, 0.0, 100.0), (0.0, 0.0, 0.0), (1, 0, 0), 10.0, 101, 101)


def labels_with(*voxels):
    labels = np.full(GRID.shape, FREE, np.uint8)
    for index, name in voxels:
        labels[index] = label_of(name)
    return labels


def looks_like(pixel, name):
    """The class's colour, lit by less than full light: the same hue at 60 to 100 % brightness."""
    color = COLORS_RGB[label_of(name)].astype(float)
    ratio = pixel[color > 0] / color[color > 0]
    return ratio.min() > 0.6 and np.ptp(ratio) < 0.1


def test_forward_is_up_and_left_is_left():
    # The voxel at x = 3.5, y = 3.5 (ahead and to the left) must be in the upper left of the picture.
    picture = draw_voxels(labels_with(((8, 8, 0), "car")), GRID, DOWN, ego=False)
    drawn = np.argwhere((picture != np.round(BACKGROUND_RGB).astype(np.uint8)).any(axis=-1))
    row, column = drawn.mean(axis=0)
    # Pinhole by hand: 50.5 / tan(5 deg) / 99 m = 5.83 px per metre at the voxel's top, 3.5 m off centre.
    np.testing.assert_allclose((row, column), (50 - 20.4, 50 - 20.4), atol=0.7)
    assert looks_like(picture[round(row), round(column)].astype(float), "car")


def test_near_voxels_hide_far_ones():
    above = draw_voxels(labels_with(((5, 5, 0), "car"), ((5, 5, 4), "vegetation")), GRID, DOWN, ego=False)
    assert looks_like(above[47, 47].astype(float), "vegetation")


def test_the_ego_vehicle_is_drawn_even_into_an_empty_world():
    empty = np.full(OCC3D_GRID.shape, FREE, np.uint8)
    for view in (view_from_above(OCC3D_GRID), view_from_behind(OCC3D_GRID)):
        without, with_ego = (draw_voxels(empty, OCC3D_GRID, view, ego=ego) for ego in (False, True))
        assert with_ego.shape == (view.height_px, view.width_px, 3)
        assert len(np.unique(without)) <= 2
        assert 50 < (with_ego != without).any(axis=-1).sum() < with_ego.size / 30


def test_nothing_behind_the_eye_is_drawn():
    looking_away = View((0.0, 0.0, 100.0), (0.0, 0.0, 200.0), (1, 0, 0), 60.0, 50, 50)
    picture = draw_voxels(labels_with(((5, 5, 0), "car")), GRID, looking_away)
    assert len(np.unique(picture)) <= 2


def test_the_legend_has_a_row_per_class_present():
    one, three = (
        legend(labels_with(*(((i, 0, 0), name) for i, name in enumerate(names))), 300)
        for names in (["car"], ["car", "bus", "terrain"])
    )
    assert three.shape[0] - one.shape[0] == 2 * 30
    assert (one == COLORS_RGB[label_of("car")]).all(axis=-1).any()


def test_mosaic_and_joins_keep_every_pixel():
    images = {name: np.full((90, 160, 3), value, np.uint8) for value, name in enumerate("abcdef", 40)}
    joined = mosaic(images, 486, columns=3, gap_px=3)
    assert joined.shape == (2 * 90 + 3, 486, 3)
    assert joined[80, 80].tolist() == [40] * 3
    assert joined[170, 400].tolist() == [45] * 3
    assert stacked([joined, joined], 10).shape == (2 * 183 + 10, 486, 3)
    assert side_by_side([joined, titled(joined, "A title", "a note")]).shape == (183 + 38, 2 * 486 + 14, 3)


def test_a_voxel_as_triangles_looks_like_a_voxel():
    """Same silhouette, same light on every face; only the drawn edges of cubes differ."""
    grid = VoxelGrid((-2, -2, 0), (2, 2, 2), 1.0)
    labels = np.full(grid.shape, FREE, dtype=np.uint8)
    labels[2, 1, 0] = 4
    view = View((-4.0, -3.0, 4.0), (0.5, -0.5, 0.5), (0, 0, 1), 40.0, 120, 90)
    box = trimesh.creation.box(extents=(1, 1, 1))
    corners_m = box.vertices + grid.centres()[2, 1, 0]
    colors = np.tile(COLORS_RGB[4], (len(corners_m), 1))
    cube = draw_voxels(labels, grid, view, ego=False).astype(int)
    mesh = draw_mesh(corners_m, box.faces, colors, view, ego=False).astype(int)
    sky = BACKGROUND_RGB.astype(int)
    assert ((cube == sky).all(axis=2) == (mesh == sky).all(axis=2)).mean() > 0.99
    assert 0.03 < (mesh != sky).any(axis=2).mean() < 0.9
    assert np.median(np.abs(cube - mesh)[(mesh != sky).any(axis=2)]) <= 8


def test_a_mesh_without_triangles_is_the_background():
    view = View((-4.0, 0.0, 4.0), (0.0, 0.0, 0.0), (0, 0, 1), 60.0, 40, 30)
    nothing = draw_mesh(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3), np.uint8), view, ego=False)
    assert nothing.shape == (30, 40, 3) and (nothing == BACKGROUND_RGB).all()
