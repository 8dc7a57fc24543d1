# SPDX-License-Identifier: Apache-2.0
"""The whole drive as a mesh and as voxels: surfaces in closed form, objects where their boxes are."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh

from occflownet_core import poses
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import COLORS_RGB, FREE, OCCUPIED_CLASSES
from occflownet_core.mesh import Mesh
from occflownet_core.renderer import Rays
from training.scene import Scene, Track, with_bays
from training.scene_mesh import drive_labels, drive_mesh, write_drive
from training.voxel_fitting import FitSettings, FittedVoxels, voxel_activation

CAR, ROAD = 4, 11
STATIC = VoxelGrid((-4, 0, -1), (8, 8, 3), 0.5)
DENSE_PER_M, START_PER_M = 20.0, FitSettings.initial_density_per_m
CAR_SIZE_M = np.array([3.0, 1.0, 1.0])
QUARTER_TURN = (math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5))
CAR_POSE = poses.pose((3.0, 4.0, 1.0), QUARTER_TURN)  # at the second of three keyframes


def scene_of(tracks: list[Track]) -> Scene:
    grid, boxes = with_bays(STATIC, tracks)
    rays = Rays.from_numpy(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros(0))
    return Scene((SimpleNamespace(),) * 3, poses.pose((5, 6, 7), QUARTER_TURN), grid, rays, boxes, STATIC)


def fitted_to(scene: Scene, *things: tuple[np.ndarray, int]) -> FittedVoxels:
    """Dense cells where bool [X, Y, Z] masks are true, each with its label; all others as nobody asked about them."""
    settings, shape = FitSettings(), scene.grid.shape[::-1]
    density, logits = torch.full((1, *shape), START_PER_M), torch.zeros((1, OCCUPIED_CLASSES, *shape))
    for mask, label in things:
        cells = torch.from_numpy(mask.transpose(2, 1, 0).copy())
        density[0, cells] = DENSE_PER_M
        logits[0, label, cells] = 1.0
    activation = voxel_activation(settings).requires_grad_(False)
    pre_density = torch.expm1(density / activation.config.density_scale_per_m).log()
    return FittedVoxels(scene.grid, pre_density, logits, density > START_PER_M, activation, {})


def road(scene: Scene) -> np.ndarray:
    """Everything below z = 0, bays included."""
    return np.broadcast_to(scene.grid.axis_centres_m(2) < 0, scene.grid.shape)


def car_in_bay(scene: Scene) -> np.ndarray:
    """The cells whose centres lie in the first box's bay."""
    offset_m = scene.grid.centres() - scene.boxes.ego_from_box_now[0, :3, 3].numpy()
    return (np.abs(offset_m) <= CAR_SIZE_M / 2).all(axis=-1)


def is_closed(mesh: Mesh) -> bool:
    return trimesh.Trimesh(mesh.vertices_m, mesh.triangles, process=False).is_watertight


@pytest.mark.parametrize("resolution_m", [0.5, 0.25, 0.1])
def test_a_road_is_a_closed_slab_whose_top_is_where_the_density_says(resolution_m):
    """At 0.5, 0.4 m are opaque at ln 2 / 0.4 = 1.733 per metre: 0.354 of the way from 20 to 0.02 per metre in logarithms,
    from the last dense centre at z = -0.25 to the first free one."""
    scene = scene_of([])
    mesh = drive_mesh(scene, fitted_to(scene, (road(scene), ROAD)), 0, 0.5, resolution_m)
    inner = ((mesh.vertices_m[:, :2] > (-3.5, 0.5)) & (mesh.vertices_m[:, :2] < (7.5, 7.5))).all(axis=1)
    top = inner & (mesh.vertices_m[:, 2] > -0.5)
    assert top.sum() > 200
    np.testing.assert_allclose(mesh.vertices_m[top, 2], -0.25 + 0.5 * math.log(20 / 1.7329) / math.log(1000), atol=0.02)
    assert set(mesh.labels) == {ROAD} and is_closed(mesh)
    # Half a cell around the box, in which the density falls to zero, is the most by which the slab may reach beyond it.
    assert (mesh.vertices_m >= np.array(STATIC.lower_m) - 0.25).all() and mesh.cells.grid.voxel_size_m <= resolution_m
    assert (mesh.vertices_m <= np.array(STATIC.upper_m) + 0.25).all()


def test_one_voxel_alone_does_not_slip_through():
    scene = scene_of([])
    lone = np.zeros(scene.grid.shape, dtype=bool)
    lone[7, 8, 5] = True
    mesh = drive_mesh(scene, fitted_to(scene, (lone, CAR)), 0, 0.5, 0.5)
    centre_m = scene.grid.metric_from_index([7.5, 8.5, 5.5])
    assert len(mesh.triangles) == 8 and is_closed(mesh)  # an octahedron
    assert (np.linalg.norm(mesh.vertices_m - centre_m, axis=1) < 0.5).all()


def test_a_moving_object_is_where_its_box_is_and_bays_are_gone():
    parked_first = Track({1: poses.pose((0, 2, 1), (1, 0, 0, 0)), 2: CAR_POSE}, CAR_SIZE_M, CAR)
    scene = scene_of([parked_first])
    fitted = fitted_to(scene, (road(scene) & (scene.grid.centres()[..., 0] < 8), ROAD), (car_in_bay(scene), CAR))
    for k, half_m, centre_m in ((0, (1.5, 0.5, 0.5), (0, 2, 1)), (1, (0.5, 1.5, 0.5), (3, 4, 1))):
        mesh = drive_mesh(scene, fitted, k, 0.5, 0.25)
        car = mesh.vertices_m[mesh.labels == CAR]
        # Where the cells' faces are, half a cell around the outermost centres; those lie within the box.
        assert (np.abs(car - centre_m).max(axis=0) <= np.array(half_m) + 0.25).all()
        assert (np.abs(car - centre_m).max(axis=0) >= np.array(half_m) - 0.5).all()
        assert mesh.vertices_m[:, 0].max() <= STATIC.upper_m[0] + 0.25  # the bay itself begins there
        assert (mesh.labels == ROAD).sum() > 1000
    # At the third keyframe nobody sees it.
    assert set(drive_mesh(scene, fitted, 2, 0.5, 0.25).labels) == {ROAD}


def test_what_no_ray_asked_about_has_no_surface_and_an_empty_mesh_is_a_file(tmp_path):
    scene = scene_of([Track({1: CAR_POSE, 2: CAR_POSE}, CAR_SIZE_M, CAR)])
    fitted = fitted_to(scene)
    options = SimpleNamespace(threshold=0.05, mesh=0.25, mesh_threshold=0.02, mesh_keyframe=0, mesh_file="all.ply")
    report = write_drive(scene, fitted, options, tmp_path)
    assert report["mesh"]["triangles"] == 0 and (tmp_path / "all.ply").is_file()
    with np.load(tmp_path / "drive.npz") as drive:
        assert (drive["semantics"] == FREE).all() and not drive["seen"].any()


def test_voxels_of_the_drive_are_the_scenes_without_bays():
    scene = scene_of([Track({1: CAR_POSE, 2: CAR_POSE}, CAR_SIZE_M, CAR)])
    drive = drive_labels(scene, fitted_to(scene, (road(scene), ROAD), (car_in_bay(scene), CAR)), 0.05)
    assert drive["semantics"].shape == drive["seen"].shape == STATIC.shape
    assert (drive["semantics"][:, :, :2] == ROAD).all() and (drive["semantics"][:, :, 2:] == FREE).all()
    assert drive["seen"][:, :, :2].all() and not drive["seen"][:, :, 2:].any()
    assert drive["origin_m"].tolist() == [-4, 0, -1] and drive["voxel_size_m"] == 0.5
    np.testing.assert_array_equal(drive["scene_from_global"], scene.scene_from_global)


def test_a_file_has_the_classes_colours_in_the_scenes_frame(tmp_path):
    scene = scene_of([])
    options = SimpleNamespace(threshold=0.05, mesh=0.5, mesh_threshold=0.5, mesh_keyframe=None, mesh_file="drive.ply")
    report = write_drive(scene, fitted_to(scene, (road(scene), ROAD)), options, tmp_path)
    shape = trimesh.load(tmp_path / "drive.ply", process=False)
    assert report["mesh"] == {
        "file": "drive.ply",
        "cell_m": 0.5,
        "keyframe": 1,
        "threshold": 0.5,
        "triangles": len(shape.faces),
        "vertices": len(shape.vertices),
    }
    assert (shape.visual.vertex_colors[:, :3] == COLORS_RGB[ROAD]).all()
    assert shape.bounds[1][2] < 0.25 and -4.25 < shape.bounds[0][0] < -3.75
