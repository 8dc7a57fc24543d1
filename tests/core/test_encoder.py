# SPDX-License-Identifier: Apache-2.0
"""Lift, warp and networks of the encoder, against explicit loops and cases worked out by hand."""

import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.encoder.backbone import BackboneConfig, ImageEncoder
from occflownet_core.encoder.depth import DepthConfig, DepthNet
from occflownet_core.encoder.lift import LiftTensors, lift
from occflownet_core.encoder.temporal import warp_planar
from occflownet_core.encoder.volume import VolumeConfig, VolumeEncoder
from occflownet_core.errors import ConfigError
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec, LiftTables, build_lift_tables

GRID = VoxelGrid((-4, -3, 0), (4, 3, 2), 1.0)  # 8 x 6 x 2 cells


def looking_forward(focal_px: float = 32.0) -> Camera:
    ego_from_camera = np.eye(4)
    ego_from_camera[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    return Camera("front", 64, 32, np.array([[focal_px, 0, 32], [0, focal_px, 16], [0, 0, 1]]), ego_from_camera)


def random_tables(rng: np.random.Generator, voxels: int, pixels: int, bins: int) -> LiftTables:
    return LiftTables(
        rng.integers(0, pixels, (voxels, 2)).astype(np.int32),
        rng.integers(0, pixels * bins, (voxels, 2, 2)).astype(np.int32),
        rng.uniform(0, 1, (voxels, 2, 2)).astype(np.float32),
        np.zeros((voxels, 2), np.int32),
    )


def lifted_slowly(context: torch.Tensor, depth: torch.Tensor, tables: list[LiftTables], shape) -> torch.Tensor:
    volumes = []
    for b, table in enumerate(tables):
        pixels = context[b].permute(0, 2, 3, 1).reshape(-1, context.shape[2])
        bins = depth[b].flatten()
        rows = []
        for v in range(len(table.pixel_index)):
            row = torch.zeros(context.shape[2])
            for s in range(2):
                share = sum(bins[table.depth_index[v, s, k]] * table.depth_weight[v, s, k].item() for k in range(2))
                row = row + share * pixels[table.pixel_index[v, s]]
            rows.append(row)
        volumes.append(torch.stack(rows, dim=1).reshape(-1, *shape))
    return torch.stack(volumes)


def test_lift_equals_explicit_loops_in_value_and_gradient():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    shape = (2, 3, 4)
    tables = [random_tables(rng, math.prod(shape), 3 * 2 * 5, 7) for _ in range(2)]
    context = torch.randn(2, 3, 4, 2, 5, requires_grad=True)
    depth = torch.rand(2, 3, 7, 2, 5, requires_grad=True)
    fast = lift(context, depth, LiftTensors.from_tables(tables), shape)
    slow = lifted_slowly(context, depth, tables, shape)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(fast)
    for ours, expected in zip(
        torch.autograd.grad((fast * weight).sum(), (context, depth)),
        torch.autograd.grad((slow * weight).sum(), (context, depth)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


def test_a_certain_depth_lifts_a_pixel_to_the_voxel_it_shows():
    """The pixel at (u, v) = (36, 12) of stride 8 shows (x, y, z) = (d, -d/8, d/8): at 2.5 m, cell (6, 2, 0)."""
    grid = VoxelGrid((-4, -3, 0), (4, 3, 2), 1.0)
    spec = LiftSpec(grid, DepthBins(0.0, 4.0, 1.0), feature_height=4, feature_width=8)
    tables = build_lift_tables(CameraRig((looking_forward(),)), spec)
    context = torch.zeros(1, 1, 1, 4, 8)
    context[0, 0, 0, 1, 4] = 7.0
    depth = torch.zeros(1, 1, 4, 4, 8)
    depth[:, :, 2] = 1.0  # 2 to 3 m, centre 2.5 m
    volume = lift(context, depth, LiftTensors.from_tables([tables]), (2, 6, 8))[0, 0]
    # Cell centre (2.5, -0.5, 0.5) projects to u = 32 + 32 * 0.5 / 2.5 = 38.4, v = 16 - 6.4 = 9.6: feature (4, 1).
    assert volume[0, 2, 6] == 7.0
    volume[0, 2, 6] = 0
    # Of the cells with the same feature pixel none has its depth in the bin at 2.5 m.
    assert (volume == 0).all()


def test_depth_is_counted_as_a_camera_of_the_reference_focal_length_sees_it():
    """At twice the focal length a thing looks twice as large: 6 m away as 3 m away for the reference."""
    assert LiftSpec(GRID, DepthBins(0, 4, 1), 4, 8, reference_focal_px=32.0).network_depth_m(6.0, 64.0) == 3.0
    assert LiftSpec(GRID, DepthBins(0, 4, 1), 4, 8).network_depth_m(6.0, 64.0) == 6.0

    spec = LiftSpec(VoxelGrid((5.5, -0.5, -0.5), (6.5, 0.5, 0.5), 1.0), DepthBins(0.5, 4.5, 1.0), 4, 8, 1, 32.0)
    tables = build_lift_tables(CameraRig((looking_forward(focal_px=64.0),)), spec)
    used = tables.depth_index[0, 0][tables.depth_weight[0, 0] > 0]
    assert (used // (4 * 8)).tolist() == [2]  # the bin from 2.5 to 3.5 m, at its very centre


def warped_slowly(state: np.ndarray, previous_from_current: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """[C, Y, X]: bilinear between cell centres, cells outside count as zero."""
    result = np.zeros_like(state)
    cells_x, cells_y, _ = grid.shape
    for iy in range(cells_y):
        for ix in range(cells_x):
            x, y, _ = grid.metric_from_index(np.array([ix + 0.5, iy + 0.5, 0]))
            there = previous_from_current[:2, :2] @ (x, y) + previous_from_current[:2, 3]
            px, py = grid.index_from_metric(np.array([*there, 0]))[:2] - 0.5
            for jy in (math.floor(py), math.floor(py) + 1):
                for jx in (math.floor(px), math.floor(px) + 1):
                    if 0 <= jx < cells_x and 0 <= jy < cells_y:
                        result[:, iy, ix] += (1 - abs(px - jx)) * (1 - abs(py - jy)) * state[:, jy, jx]
    return result


def planar(x_m: float, y_m: float, yaw: float) -> np.ndarray:
    pose = np.eye(4)
    pose[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
    pose[:2, 3] = x_m, y_m
    return pose


@settings(max_examples=20, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-math.pi, math.pi))
def test_warp_equals_explicit_loops(x_m, y_m, yaw):
    state = np.random.default_rng(0).normal(size=(3, 6, 8))
    pose = planar(x_m, y_m, yaw)
    warped = warp_planar(torch.from_numpy(state)[None], torch.from_numpy(pose)[None], GRID)
    np.testing.assert_allclose(warped[0].numpy(), warped_slowly(state, pose, GRID), atol=1e-9)


def test_driving_two_cells_forward_moves_the_world_two_cells_back():
    state = torch.arange(48.0).view(1, 1, 6, 8)
    warped = warp_planar(state, torch.from_numpy(planar(2, 0, 0))[None], GRID)[0, 0]
    torch.testing.assert_close(warped[:, :6], state[0, 0, :, 2:], atol=1e-4, rtol=0)
    assert (warped[:, 6:] == 0).all()


def test_turning_left_turns_the_world_right():
    """After a quarter turn to the left, what was ahead lies to the right (y < 0)."""
    grid = VoxelGrid((-3, -3, 0), (3, 3, 1), 1.0)
    state = torch.zeros(1, 1, 6, 6)
    state[0, 0, 2, 5] = 1  # x = 2.5, y = -0.5 in the previous frame
    warped = warp_planar(state, torch.from_numpy(planar(0, 0, math.pi / 2))[None], grid)[0, 0]
    # previous = (-y, x) of current, so current = (y, -x) of previous = (-0.5, -2.5): column 2, row 0.
    assert warped[0, 2] == pytest.approx(1, abs=1e-5)
    assert warped.sum() == pytest.approx(1, abs=1e-4)


def test_standing_still_changes_nothing_and_each_sample_has_its_own_motion():
    state = torch.randn(2, 3, 6, 8)
    poses = torch.from_numpy(np.stack([np.eye(4), planar(100, 0, 0)]))
    warped = warp_planar(state, poses, GRID)
    torch.testing.assert_close(warped[0], state[0], atol=1e-5, rtol=0)
    assert (warped[1] == 0).all()


def test_images_are_normalised_as_imagenet():
    encoder = ImageEncoder(BackboneConfig("mobilenetv4_conv_small_050", False, (2, 3), 8))
    mean, std = (torch.tensor(v) for v in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD))
    torch.testing.assert_close(encoder.mean_rgb.flatten(), 255 * mean)
    torch.testing.assert_close(encoder.std_rgb.flatten(), 255 * std)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    image = torch.randint(0, 256, (1, 32, 64, 3), dtype=torch.uint8)
    features = encoder.eval()(image)
    assert features.shape == (1, 8, 4, 8)
    assert encoder.stride == 8
    torch.testing.assert_close(seen[0][0, :, 3, 5], (image[0, 3, 5] / 255 - mean) / std)


@pytest.mark.parametrize(
    ("name", "levels"),
    [("no_such_net", (2, 3)), ("mobilenetv4_conv_small_050", (2, 9)), ("mobilenetv4_conv_small_050", (1, 3))],
)
def test_backbones_that_cannot_be_made(name, levels):
    with pytest.raises(ConfigError, match=f"backbone '{name}'"):
        ImageEncoder(BackboneConfig(name, False, levels, 8))


def test_depth_logits_and_context_lie_side_by_side():
    net = DepthNet(6, DepthConfig(DepthBins(1, 6, 1), context_channels=3))
    depth, context = net(torch.randn(2, 6, 4, 5))
    assert depth.shape == (2, 5, 4, 5)
    assert context.shape == (2, 3, 4, 5)


def test_depth_bins_that_are_none():
    with pytest.raises(ConfigError, match="gives 0 bins"):
        DepthNet(6, DepthConfig(DepthBins(5, 5, 1)))


@pytest.mark.parametrize("size", [(25, 13), (8, 8), (1, 3)])
def test_the_volume_network_keeps_any_size(size):
    net = VolumeEncoder(6, 10, VolumeConfig(widths=(8, 12, 16), blocks=(1, 2, 1))).eval()
    assert net(torch.randn(1, 6, *size)).shape == (1, 10, *size)


def test_widths_and_blocks_belong_together():
    with pytest.raises(ConfigError, match="differ in number"):
        VolumeEncoder(6, 10, VolumeConfig(widths=(8, 12), blocks=(1,)))
