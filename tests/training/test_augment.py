# SPDX-License-Identifier: Apache-2.0
"""After any augmentation a ray still hits its voxel, and a voxel still reads the pixel that shows it."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core.boxes import MovingBoxes
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import DatasetError
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec, LiftTables, build_lift_tables
from occflownet_core.preprocess import ImageTransform
from occflownet_core.renderer.rays import Rays
from training.data.augment import (
    Augmentation,
    AugmentationDraw,
    GridFlip,
    ImageDraw,
    ImageWarp,
    warped_tables,
)

SOURCE_PX, NETWORK_PX = (400, 240), (192, 96)
# Off centre on purpose: a flip is about the grid's middle, not about the vehicle.
GRID = VoxelGrid((-4.0, -8.0, -1.0), (12.0, 8.0, 2.2), 0.8)
SPEC = LiftSpec(GRID, DepthBins(1.0, 13.0, 0.5), feature_height=12, feature_width=24, slots=2)
FLIPS = [GridFlip(x, y) for x in (False, True) for y in (False, True)]


def looking(yaw_deg: float, name: str) -> Camera:
    yaw = np.radians(yaw_deg)
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]])
    pose = np.eye(4)
    pose[:3, :3] = turn @ np.array([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]])
    pose[:3, 3] = 0.5, 0.2, 1.2
    return Camera(name, *SOURCE_PX, np.array([[230.0, 0.3, 203], [0, 228, 117], [0, 0, 1]]), pose)


RIG = CameraRig((looking(10, "LEFT"), looking(-35, "RIGHT")))


def warp_of(draw: ImageDraw) -> ImageWarp:
    return draw.warp(*SOURCE_PX, *NETWORK_PX)


draws = st.builds(
    ImageDraw,
    scale_change=st.floats(-0.06, 0.11),
    left=st.floats(0, 1),
    roll_rad=st.floats(-0.1, 0.1),
    mirrored=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(draw=draws, seed=st.integers(0, 2**32 - 1))
def test_the_warped_camera_sees_points_where_the_warp_puts_their_pixels(draw, seed):
    points_m = np.random.default_rng(seed).uniform((1, -4, -1), (12, 4, 2), (50, 3))
    warp, camera = warp_of(draw), RIG[0]
    source, source_depth_m = camera.project(points_m)
    pixel, depth_m = warp.camera(camera).project(points_m)
    if draw.mirrored:  # which no camera can do
        pixel[:, 0] = NETWORK_PX[0] - pixel[:, 0]
    assert pixel == pytest.approx(warp.pixels(source), abs=1e-6)
    assert depth_m == pytest.approx(source_depth_m)


def smooth_image() -> np.ndarray:
    """Colours that say where a pixel is: red grows with u, green with v."""
    v, u = np.mgrid[: SOURCE_PX[1], : SOURCE_PX[0]] + 0.5
    return np.stack([u / SOURCE_PX[0] * 255, v / SOURCE_PX[1] * 255, 0 * u], axis=-1).round().astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(draw=draws)
def test_pixels_move_as_the_image_does(draw):
    warp = warp_of(draw)
    image = warp.image(smooth_image()).astype(float)
    source = np.random.default_rng(0).uniform((20, 20), (380, 220), (200, 2))
    # What the crop cut off is black, also where the roll brings it back into the window.
    cropped = ImageWarp(warp.transform).pixels(source)
    column, row = np.floor(warp.pixels(source)).astype(int).T
    ends = np.stack([cropped.min(1), (NETWORK_PX - cropped).min(1), column, NETWORK_PX[0] - 1 - column, row])
    inside = (np.vstack([ends, NETWORK_PX[1] - 1 - row]) >= 2).all(axis=0)
    expected = source[inside] / SOURCE_PX * 255
    # Within one network pixel (up to 2.6 source pixels of 400 and 240) and rounding.
    difference = np.abs(image[row[inside], column[inside], :2] - expected)
    assert inside.sum() > 20 and (difference < (2.5, 3.5)).all()


def test_no_augmentation_is_the_vehicles_pipeline():
    fit = ImageTransform.fit(*SOURCE_PX, *NETWORK_PX)
    draw = AugmentationDraw.none(2)
    warp = warp_of(draw.images[0])
    assert warp.transform == fit and np.array_equal(warp.image(smooth_image()), fit.image(smooth_image()))
    plain = build_lift_tables(CameraRig(tuple(fit.camera(camera) for camera in RIG)), SPEC)
    tables = warped_tables(RIG, [warp, warp], draw.flip, SPEC)
    for field in dataclasses.fields(LiftTables):
        assert np.array_equal(getattr(tables, field.name), getattr(plain, field.name))


@settings(max_examples=20, deadline=None)
@given(left=draws, right=draws, flip=st.sampled_from(FLIPS))
def test_a_voxel_reads_the_pixels_that_show_it(left, right, flip):
    """The slow twin: every slot of every voxel of the flipped grid, from the flipped-back centre and the source pixel."""
    warps = [warp_of(left), warp_of(right)]
    tables = warped_tables(RIG, warps, flip, SPEC)
    centres_m = GRID.centres().transpose(2, 1, 0, 3).reshape(-1, 3)
    mirror = flip.matrix(GRID)
    there_m = centres_m @ mirror[:3, :3].T + mirror[:3, 3]
    height, width, bins = SPEC.feature_height, SPEC.feature_width, SPEC.depth_bins.count
    read = np.zeros(len(centres_m), int)
    for c, (warp, camera) in enumerate(zip(warps, RIG, strict=True)):
        source, depth_m = camera.project(there_m)
        with np.errstate(invalid="ignore"):
            cell = warp.pixels(source) * (width / NETWORK_PX[0])
            edge = np.abs(cell - np.round(cell)).min(axis=1) < 1e-6
            seen = (depth_m >= 1) & (depth_m < 13) & (cell >= 0).all(axis=1) & (cell < (width, height)).all(axis=1)
        slot_voxel, slot = np.nonzero(tables.camera_index == c)
        assert np.array_equal(np.unique(slot_voxel[~edge[slot_voxel]]), np.flatnonzero(seen & ~edge))
        column, row = np.floor(cell[slot_voxel]).astype(int).T
        sure = ~edge[slot_voxel]
        assert np.array_equal(tables.pixel_index[slot_voxel, slot][sure], ((c * height + row) * width + column)[sure])
        # The two bins' mean depth, by their weights, is the voxel's depth (apart from the outermost half bins).
        index, weight = tables.depth_index[slot_voxel, slot], tables.depth_weight[slot_voxel, slot]
        bin_index, pixel = np.divmod(index - c * bins * height * width, height * width)
        assert np.array_equal(pixel[sure, 0], (row * width + column)[sure])
        mean_m = (SPEC.depth_bins.centres_m()[bin_index] * weight).sum(1) / weight.sum(1)
        middle = (depth_m[slot_voxel] > 1.25) & (depth_m[slot_voxel] < 12.75)
        assert mean_m[middle] == pytest.approx(depth_m[slot_voxel][middle], abs=1e-4)
        read[slot_voxel] += 1
    shared = tables.depth_weight.sum(axis=(1, 2))
    assert shared == pytest.approx((read > 0).astype(float), abs=1e-5)


def make_rays(rng: np.random.Generator, count: int = 60) -> Rays:
    origin_m = rng.uniform((-3, -7, 0), (3, 7, 2), (count, 3))
    end_m = rng.uniform(np.array(GRID.lower_m) + 0.01, np.array(GRID.upper_m) - 0.01, (count, 3))
    length_m = np.linalg.norm(end_m - origin_m, axis=1)
    return Rays.from_numpy(
        origin_m,
        (end_m - origin_m) / length_m[:, None],
        length_m,
        rng.integers(0, 17, count),
        axis_cosine=np.full(count, 0.9),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("flip", FLIPS)
def test_a_ray_still_hits_its_voxel(flip):
    rng = np.random.default_rng(1)
    rays = make_rays(rng)
    labels = rng.integers(0, 18, GRID.shape, dtype=np.uint8)
    cell, _ = GRID.cells(rays.end_m.numpy())
    flipped = flip.rays(rays, GRID)
    flipped.check()
    flipped_cell, inside = GRID.cells(flipped.end_m.numpy())
    assert inside.all()
    assert np.array_equal(flip.voxels(labels)[tuple(flipped_cell.T)], labels[tuple(cell.T)])
    assert (cell != flipped_cell).any() == (flip.x or flip.y)
    assert torch.equal(flipped.label, rays.label) and torch.equal(flipped.range_m, rays.range_m)


def test_flips_by_hand():
    both = GridFlip(x=True, y=True)
    # The grid's middle is (4, 0): x becomes 8 - x, y becomes -y.
    assert both.matrix(GRID) @ [1, 2, 3, 1] == pytest.approx([7, -2, 3, 1])
    labels = np.zeros(GRID.shape, np.uint8)
    labels[0, 1, 2] = 5
    assert both.voxels(labels)[-1, -2, 2] == 5


def rigid(rng: np.random.Generator) -> np.ndarray:
    yaw, tilt = rng.uniform(-3, 3), rng.uniform(-0.1, 0.1)
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = about_z @ about_x, rng.uniform(-5, 5, 3)
    return pose


@pytest.mark.parametrize("flip", FLIPS)
def test_boxes_hold_the_mirrored_content_and_move_it_alike(flip):
    rng = np.random.default_rng(2)
    now, then = np.array([rigid(rng) for _ in range(4)]), np.array([rigid(rng) for _ in range(4)])
    then[3] = np.nan
    size_m = rng.uniform(1, 4, (4, 3))
    boxes = MovingBoxes.from_numpy(now, then, size_m, np.full(4, 4), np.full(4, -1))
    flipped = flip.boxes(boxes, GRID)
    mirror = flip.matrix(GRID)
    assert np.isnan(flipped.ego_from_box_then[3]).any()
    within = rng.uniform(-0.5, 0.5, (4, 20, 3)) * size_m[:, None] * 1.5  # some inside, some not
    for b in range(4):
        for poses, flipped_poses in ((now, flipped.ego_from_box_now), (then, flipped.ego_from_box_then)):
            if np.isnan(poses[b]).any():
                continue
            pose = flipped_poses[b].numpy()
            assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
            world = within[b] @ poses[b][:3, :3].T + poses[b][:3, 3]
            mirrored = world @ mirror[:3, :3].T + mirror[:3, 3]
            back = (mirrored - pose[:3, 3]) @ pose[:3, :3]
            assert np.array_equal(
                (np.abs(back) <= size_m[b] / 2).all(axis=1), (np.abs(within[b]) <= size_m[b] / 2).all(axis=1)
            )
    moved = boxes.to_now(torch.from_numpy(within[:3, 0]), torch.arange(3)).numpy()
    start = within[:3, 0] @ mirror[:3, :3].T + mirror[:3, 3]
    moved_flipped = flipped.to_now(torch.from_numpy(start), torch.arange(3)).numpy()
    assert moved_flipped == pytest.approx(moved @ mirror[:3, :3].T + mirror[:3, 3])


@pytest.mark.parametrize("flip", FLIPS)
def test_ego_motion_between_flipped_frames(flip):
    rng = np.random.default_rng(3)
    motion, mirror = rigid(rng), flip.matrix(GRID)
    point = np.append(rng.uniform(-5, 5, 3), 1)
    assert flip.motion(motion, GRID) @ (mirror @ point) == pytest.approx(mirror @ (motion @ point))


def test_draws_stay_in_their_ranges():
    augmentation = Augmentation(scale=(-0.05, 0.1), roll_deg=3)
    rng = np.random.default_rng(0)
    drawn = [augmentation.draw(rng, 6) for _ in range(60)]
    images = [image for draw in drawn for image in draw.images]
    assert len(images) == 360
    scales = [image.scale_change for image in images]
    assert -0.05 <= min(scales) < -0.04 and 0.09 < max(scales) <= 0.1
    assert 2.5 < np.degrees(max(abs(image.roll_rad) for image in images)) <= 3
    for share in (np.mean([i.mirrored for i in images]), np.mean([d.flip.x for d in drawn])):
        assert 0.3 < share < 0.7
    still = Augmentation((0, 0), 0, False, False, False).draw(rng, 1)
    assert (still.images[0].roll_rad, still.images[0].mirrored, still.flip) == (0, False, GridFlip())


@pytest.mark.parametrize("source_px", [(1600, 900), (480, 270)])
def test_a_change_of_scale_means_the_same_for_every_image_size(source_px):
    """+ 25 % of 352 px across are 440 px, whatever the image on disk has."""
    transform = ImageDraw(scale_change=0.25).warp(*source_px, 352, 128).transform
    assert (transform.resized_width_px, transform.resized_height_px) == (440, 248)
    assert (transform.left_px, transform.top_px) == (44, 120)  # in the middle, at the bottom


def test_bad_strengths():
    with pytest.raises(DatasetError, match="scale"):
        Augmentation(scale=(0.1, -0.1))
    with pytest.raises(DatasetError, match="roll_deg is 90"):
        Augmentation(roll_deg=90)
