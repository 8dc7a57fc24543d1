# SPDX-License-Identifier: Apache-2.0
"""A whole log in one field: its frame, the bays of what moves, and labels at every keyframe."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from occflownet_core import poses
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.labels import FREE
from occflownet_core.motion import StaticWorld
from occflownet_core.renderer import Rays, RenderConfig, render
from occflownet_core.voxel_field import VoxelField
from training import fit_scene
from training.scene import Scene, Track, grid_around, keyframe_labels, median_range_m, moving_objects, with_bays
from training.voxel_fitting import FitSettings, fit_voxels

CAR, WALL = 4, 15
LEVEL = (1.0, 0.0, 0.0, 0.0)  # quaternion


def at(x_m: float, y_m: float = 0.0, z_m: float = 0.0) -> np.ndarray:
    return poses.pose((x_m, y_m, z_m), LEVEL)


def keyframe(x_m: float, boxes=None) -> SimpleNamespace:
    return SimpleNamespace(global_from_ego=at(x_m), boxes=boxes, token=f"at{x_m:g}")


def test_the_grid_of_one_keyframe_is_the_label_grid_and_grows_with_the_drive():
    assert grid_around([keyframe(7.0)], at(-7.0), 0.4) == OCC3D_GRID
    grid = grid_around([keyframe(0.0), keyframe(9.9)], at(0.0), 0.4)
    assert grid.lower_m == OCC3D_GRID.lower_m and grid.shape == (225, 200, 16)  # 9.9 m are 24.75 cells, so 25 more


def test_objects_that_stay_are_part_of_the_scene():
    def boxes(parked_x_m: float, driving_x_m: float, bar_length_m: float = 0.0) -> SimpleNamespace:
        return SimpleNamespace(
            label=np.array([CAR, CAR, WALL]),
            size_m=np.array([[4.0, 2.0, 1.5], [4.0, 2.0, 1.5], [1.0, 1.0, 1.0]]),
            instance=np.array([5, 8, 9]),
            global_from_box=np.stack([at(parked_x_m), at(driving_x_m), at(driving_x_m)]),
        )

    frames = [keyframe(0.0, boxes(3.0, 10.0)), keyframe(1.0, boxes(3.1, 12.0))]
    (track,) = moving_objects(frames, at(-1.0))
    assert track.label == CAR and sorted(track.poses) == [1, 2]
    assert [pose[0, 3] for pose in track.poses.values()] == [9.0, 11.0]


def test_bays_lie_beside_the_scene_and_apart_from_each_other():
    static = VoxelGrid((0, 0, 0), (20, 8, 4), 0.5)
    tracks = [Track({1: at(2.0), 2: at(4.0)}, np.array([4.0, 2.0, 1.5]), CAR) for _ in range(5)]
    tracks.append(Track({2: at(9.0)}, np.array([12.0, 2.5, 4.0]), 10))
    grid, boxes = with_bays(static, tracks)
    assert len(boxes) == 11 and (boxes.time_index > 0).all()
    assert grid.lower_m == static.lower_m and grid.upper_m[2] >= 1.15 * 4.0
    half_m = 1.15 * boxes.size_m[:, :2] / 2
    centre_m = boxes.ego_from_box_now[:, :2, 3]
    lower_m, upper_m = (centre_m - half_m).numpy(), (centre_m + half_m).numpy()
    assert (lower_m[:, 0] >= 20).all() and (upper_m[:, 0] <= grid.upper_m[0]).all() and (upper_m[:, 1] <= 8).all()
    corners = np.unique(np.hstack([lower_m, upper_m]).round(6), axis=0)
    assert len(corners) == 6
    for a, one in enumerate(corners):
        assert not any((one[:2] < other[2:]).all() and (other[:2] < one[2:]).all() for other in corners[:a])


def test_a_scene_without_anything_that_moves_has_no_bays():
    grid, boxes = with_bays(OCC3D_GRID, [])
    assert grid == OCC3D_GRID and len(boxes) == 0


def driving_car_scene() -> Scene:
    """A wall at x = 9 and a cube of a car that is at x = 2 at the first keyframe and at x = 5 at the second; rays
    along x at every height and breadth, from x = 0.05. The car's box is wider than the car, as annotated ones are."""
    static = VoxelGrid((0, 0, 0), (10, 4, 2), 0.5)
    track = Track({1: at(2.25, 2.0, 0.75), 2: at(5.25, 2.0, 0.75)}, np.array([1.6, 1.6, 1.4]), CAR)
    grid, boxes = with_bays(static, [track])
    rows = []
    for time, front_m in ((1, 1.75), (2, 4.75)):
        for y_m in np.arange(0.125, 4, 0.25):
            for z_m in np.arange(0.125, 2, 0.25):
                hits = 1.5 < y_m < 2.5 and 0.25 < z_m < 1.25
                rows.append((y_m, z_m, (front_m if hits else 9.0) - 0.05, CAR if hits else WALL, time))
    y_m, z_m, range_m, label, time = map(np.array, zip(*rows, strict=True))
    origin_m = np.stack([np.full(len(rows), 0.05), y_m, z_m], axis=1)
    rays = Rays.from_numpy(origin_m, np.tile([1.0, 0, 0], (len(rows), 1)), range_m, label, time)
    return Scene((keyframe(0.0), keyframe(0.0)), np.eye(4), grid, rays, boxes, static)


def test_a_car_that_drives_is_fitted_once_and_is_where_it_is_at_each_keyframe():
    scene = driving_car_scene()
    motion = scene.motion
    assert motion.keeps(scene.rays, scene.grid).all()
    settings = FitSettings(steps=60, rays_per_step=10_000, current_share=None)
    fitted = fit_voxels(scene.rays, motion, scene.grid, settings)
    grid = VoxelGrid((0, 0, 0), (10, 4, 2), 0.5)
    for k, front in ((0, 3), (1, 9)):  # the cells that begin at 1.5 m and at 4.5 m
        labels = keyframe_labels(scene, fitted, k, grid).labels_at(0.3)
        assert (labels[front, 4, 1:2] == CAR).all()
        assert (labels[[c for c in range(1, 16) if not front <= c <= front + 3]] == FREE).all()
        assert (labels[18, :2] == WALL).all()  # the first cell behind 9 m
    # The car's content lies in its bay, not on the road.
    everything = fitted.labels_at(0.3)
    assert (everything[:16] == FREE).all() and (everything[20:] == CAR).any()


def test_levels_fill_what_no_ray_asked_about():
    """Rays from above meet the ground in every fourth column; flat levels tell the columns between them, fine ones cannot."""
    grid = VoxelGrid((0, 0, 0), (8, 8, 4), 0.5)
    x_m, y_m = (v.ravel() for v in np.meshgrid(np.arange(0.25, 8, 2.0), np.arange(0.25, 8, 0.5)))
    origin_m = np.stack([x_m, y_m, np.full(len(x_m), 3.75)], axis=1)
    rays = Rays.from_numpy(
        origin_m, np.tile([0, 0, -1.0], (len(x_m), 1)), np.full(len(x_m), 3.3), np.full(len(x_m), 11)
    )
    settings = FitSettings(steps=40, rays_per_step=10_000, current_share=None)
    flat = FitSettings(
        steps=40,
        rays_per_step=10_000,
        current_share=None,
        density_levels=((1, 1, 1), (4, 4, 1)),
        logit_levels=((4, 4, 1),),
    )
    fine, levelled = (fit_voxels(rays, StaticWorld(), grid, s) for s in (settings, flat))
    assert (fine.labels_at(0.3)[::4, :, 0] == 11).all() and (levelled.labels_at(0.3)[::4, :, 0] == 11).all()
    assert (fine.labels_at(0.3)[1::4, :, 0] == FREE).all()
    assert (levelled.labels_at(0.05)[:, :, 0] == 11).mean() > 0.9
    assert (levelled.labels_at(0.05)[:, :, 2:] == FREE).all()
    assert fine.seen[0, 0, :, ::4].all() and not fine.seen[0, 0, :, 1::4].any()


def test_half_of_a_ray_ends_before_its_median_range():
    """Cells of 1 m with opacity 0.25, 0.5, then 1: after two cells 0.625 have ended, half of them 0.667 into the second."""
    density = -torch.log1p(-torch.tensor([0.25, 0.5, 1 - 1e-9], dtype=torch.float64)).float()
    field = VoxelField(density.view(1, 1, 1, 3), torch.zeros(1, 17, 1, 1, 3), VoxelGrid((0, 0, 0), (3, 1, 1), 1.0))
    rays = Rays.from_numpy(
        [[0, 0.5, 0.5], [0, 0.5, 0.5], [1, 0.5, 0.5]], [[1.0, 0, 0], [-1.0, 0, 0], [1.0, 0, 0]], [1, 1, 1], [0, 0, 0]
    )
    rendered = render(field, rays, field.grid, config=RenderConfig())
    found_m = median_range_m(rendered, 3)
    assert found_m[0].item() == pytest.approx(1 + 0.25 / 0.375, abs=1e-5)
    assert found_m[1].item() == np.inf  # leaves the grid at once
    assert found_m[2].item() == pytest.approx(1.0, abs=1e-5)  # half ends in the first of its cells


def run(root, *more) -> int:
    options = {"--dataroot": root.path, "--scenes": "tiny-0002", "--out": root.path / "fitted", "--threads": 1}
    options |= {"--steps": 3, "--rays-per-step": 500}
    return fit_scene.main([*(str(part) for option in options.items() for part in option), *more])


def test_the_command_writes_labels_for_every_keyframe_and_a_report(tiny_root, capsys):
    assert run(tiny_root, "--hold-out", "0.25", "--pictures", "1") == 0
    folder = tiny_root.path / "fitted" / "tiny-0002"
    for token in ("tiny-0002-0", "tiny-0002-1"):
        with np.load(folder / token / "labels.npz") as found:
            assert {name: found[name].shape for name in found} == dict.fromkeys(
                ("semantics", "mask_camera", "mask_lidar"), OCC3D_GRID.shape
            )
            assert found["semantics"].max() <= FREE and found["mask_camera"].any()
    with np.load(folder / "drive.npz") as drive:
        assert drive["semantics"].shape >= OCC3D_GRID.shape and drive["seen"].any()
    assert (folder / "drive.glb").read_bytes()[:4] == b"glTF"
    report = json.loads((folder / "fit.json").read_text())
    assert report["mesh"]["cell_m"] == 0.2 and report["mesh"]["keyframe"] == 1
    assert report["labels"] == "lidarseg" and report["keyframes"] == 2 and report["moving_objects"] >= 1
    assert report["ranges"]["rays"] > 100 and report["against_truth"]["samples"] == 2
    assert len(list(folder.glob("*_field.png"))) == 1 and len(list(folder.glob("*.png"))) == 2
    assert "labels against ground truth" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--hold-out", "1"], "--hold-out is 1; give a share"),
        (["--threshold", "1.5"], "--threshold is 1.5; give a probability between 0 and 1"),
        (["--mesh", "-0.1"], "--mesh is -0.1; give the size of its cells"),
        (["--mesh-threshold", "0.005"], "--mesh-threshold is 0.005; give a probability between 0.008"),
        (["--mesh-keyframe", "2"], "--mesh-keyframe is 2; give one of 0 to 1"),
        (["--mesh-file", "drive.obj"], "drive.obj is no mesh format that can be written"),
        (["--mesh-file", "a/drive.ply"], "--mesh-file is a/drive.ply; give a name without folders"),
        (["--scenes", "tiny-0009"], "has no scene tiny-0009"),
    ],
)
def test_mistakes_get_a_sentence(tiny_root, capsys, more, sentence):
    assert run(tiny_root, *more) == 2
    assert sentence in capsys.readouterr().err
