# SPDX-License-Identifier: Apache-2.0
"""Lifting by splatting: against explicit loops, by painting points, and the form of it that graphs run."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.camera_matrices import CameraMatrices
from occflownet_core.encoder.lift import LiftTensors, SplatTensors, stacked_tables
from occflownet_core.encoder.splat import SortedSplat, splat
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec, build_lift_tables
from occflownet_core.splat_tables import SplatTables

GRID = VoxelGrid((-4, -3, -1), (4, 3, 1), 0.5)  # 16 x 12 x 4 cells
BINS = DepthBins(0.5, 4.5, 0.5)
SPEC = LiftSpec(GRID, BINS, feature_height=4, feature_width=8, method="splat", knows_cameras=True)
SHAPE = GRID.shape[::-1]


def camera(name: str, sign: int, focal_px: float = 32.0) -> Camera:
    """Looks forward (1) or backward (-1), 0.3 m ahead of the ego frame's origin, a bit to the left."""
    ego_from_camera = np.eye(4)
    ego_from_camera[:3, :3] = [[0, 0, sign], [-sign, 0, 0], [0, -1, 0]]
    ego_from_camera[:3, 3] = 0.3, 0.1, 0.2
    return Camera(name, 64, 32, np.array([[focal_px, 0, 32], [0, focal_px, 16], [0, 0, 1]]), ego_from_camera)


RIG = CameraRig((camera("front", 1), camera("back", -1)))


def splat_slowly(context, depth, voxel_index, cells):
    """[V, C]: one point after the other."""
    cameras, bins, height, width = depth.shape
    rows = [torch.zeros(context.shape[1], dtype=context.dtype) for _ in range(cells)]
    for n in range(cameras):
        for d in range(bins):
            for r in range(height):
                for c in range(width):
                    v = int(voxel_index[n, d, r, c])
                    if v < cells:
                        rows[v] = rows[v] + depth[n, d, r, c] * context[n, :, r, c]
    return torch.stack(rows)


def random_case(seed: int, batch: int = 2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(batch, 2, 3, 2, 5, generator=generator, dtype=dtype, requires_grad=True)
    depth = torch.rand(batch, 2, 4, 2, 5, generator=generator, dtype=dtype, requires_grad=True)
    voxel = torch.randint(0, 2 * 3 * 2 + 1, (batch, 2, 4, 2, 5), generator=generator, dtype=torch.int32)
    return context, depth, voxel


@pytest.mark.parametrize("at_once", [1 << 17, 7])
def test_splat_equals_explicit_loops_in_value_and_gradient(monkeypatch, at_once):
    monkeypatch.setattr("occflownet_core.encoder.splat._POINTS_AT_ONCE", at_once)
    context, depth, voxel = random_case(0)
    fast = splat(context, depth, voxel, (2, 3, 2))
    slow = torch.stack([splat_slowly(*sample, 12) for sample in zip(context, depth, voxel, strict=True)])
    slow = slow.transpose(1, 2).reshape(2, 3, 2, 3, 2)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(fast)
    for ours, expected in zip(
        torch.autograd.grad((fast * weight).sum(), (context, depth)),
        torch.autograd.grad((slow * weight).sum(), (context, depth)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_certain_depth_paints_points():
    """One-hot depth: each voxel holds the sum of the contexts of the points that NumPy counts into it."""
    rng = np.random.default_rng(0)
    tables = build_lift_tables(RIG, SPEC)
    chosen = rng.integers(0, BINS.count, (2, 4, 8))
    context = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    expected = np.zeros((*GRID.shape, 3), np.float32)
    painted = 0
    for n, cam in enumerate(RIG):
        for r in range(4):
            for c in range(8):
                point = cam.unproject(np.array([8 * c + 4, 8 * r + 4]), BINS.centres_m()[chosen[n, r, c]])
                cell, inside = GRID.cells(point)
                if inside:
                    expected[tuple(cell)] += context[n, :, r, c]
                    painted += 1
    assert 20 < painted < 64  # some lie outside the grid
    depth = torch.nn.functional.one_hot(torch.from_numpy(chosen), BINS.count).permute(0, 3, 1, 2).float()
    volume = stacked_tables([tables]).lift(torch.from_numpy(context)[None], depth[None], SHAPE)[0]
    np.testing.assert_allclose(volume.permute(3, 2, 1, 0).numpy(), expected, atol=1e-5)


def test_points_lie_where_the_camera_puts_them_at_a_reference_focal_length():
    """With a reference of 16 px a camera of 32 px counts 2 m as 1 m: the bin at 0.75 m holds what is at 1.5 m."""
    spec = LiftSpec(GRID, BINS, 4, 8, reference_focal_px=16.0, method="splat")
    voxel = build_lift_tables(CameraRig((camera("front", 1),)), spec).voxel_index[0, 0, 1, 4]
    point = camera("front", 1).unproject(np.array([36.0, 12.0]), 1.5)
    (i, j, k), inside = GRID.cells(point)
    assert inside
    assert voxel == (k * 12 + j) * 16 + i


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 5, 256]))
def test_the_sorted_form_is_the_same_sum(seed, row):
    context, depth, voxel = random_case(seed, batch=1)
    arrays = SplatTables(voxel[0].numpy(), 12).arrays()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("occflownet_core.encoder.splat._ROW", row)
        found = SortedSplat(*map(torch.from_numpy, arrays.values())).lift(context, depth, (2, 3, 2))
    torch.testing.assert_close(found, splat(context, depth, voxel, (2, 3, 2)), atol=1e-5, rtol=1e-5)


def test_running_sums_keep_their_digits():
    """Twenty thousand points of about 100, two to a voxel, some of them on both sides of a row's end.

    One running sum over all of them reaches two million, where float32 counts in quarters.
    """
    voxel = np.concatenate([[0], np.arange(20000) // 2 + 1]).astype(np.int32)
    context = 100 + torch.rand(1, 1, 1, 1, voxel.size)
    arrays = SplatTables(voxel.reshape(1, 1, 1, -1), 10001).arrays()
    found = SortedSplat(*map(torch.from_numpy, arrays.values())).lift(context, torch.ones_like(context), (1, 1, 10001))
    exact = np.bincount(voxel, context.flatten().double().numpy())
    np.testing.assert_allclose(found.flatten().numpy(), exact, atol=0.01)


def test_a_missing_camera_lifts_nothing_and_is_not_matched():
    tables = build_lift_tables(RIG, SPEC)
    without = tables.without([1])
    assert (without.voxel_index[1] == GRID.size).all()
    np.testing.assert_array_equal(without.voxel_index[0], tables.voxel_index[0])
    assert (without.cameras.image_from_ego[1] == 0).all()
    np.testing.assert_array_equal(without.cameras.image_from_ego[0], tables.cameras.image_from_ego[0])
    gathered = build_lift_tables(RIG, LiftSpec(GRID, BINS, 4, 8, knows_cameras=True)).without([0])
    assert (gathered.cameras.image_from_ego[0] == 0).all()


def test_inputs_are_named_as_the_arrays():
    for method in ("gather", "splat"):
        for knows in (False, True):
            spec = LiftSpec(GRID, BINS, 4, 8, method=method, knows_cameras=knows)
            assert tuple(build_lift_tables(RIG, spec).arrays()) == spec.inputs


def test_tables_stack_by_their_method():
    splats = stacked_tables([build_lift_tables(RIG, SPEC)] * 2)
    assert isinstance(splats, SplatTensors)
    assert splats.voxel_index.shape == (2, 2, BINS.count, 4, 8)
    assert splats.cameras.image_from_ego.shape == (2, 2, 4, 4)
    assert splats.cameras.camera_parameters.shape == (2, 2, 17)
    gathers = stacked_tables([build_lift_tables(RIG, LiftSpec(GRID, BINS, 4, 8))])
    assert isinstance(gathers, LiftTensors)
    assert gathers.cameras is None


def test_matrices_project_as_the_camera_does():
    matrices = CameraMatrices.of(RIG, reference_focal_px=16.0).tables()
    point = np.array([2.0, 0.3, -0.4])
    uv, depth_m = RIG[0].project(point)
    image = matrices.image_from_ego[0] @ (*point, 1)
    np.testing.assert_allclose(image, (*uv * depth_m / 2, depth_m / 2, 1), rtol=1e-5)
    np.testing.assert_allclose(matrices.ego_from_image[0] @ image, (*point, 1), atol=1e-5)


def test_camera_parameters_are_intrinsics_in_image_widths_and_the_pose():
    parameters = CameraMatrices.of(RIG, reference_focal_px=16.0).tables().camera_parameters[0]
    np.testing.assert_allclose(parameters[:5], (0.5, 0, 0.5, 0.5, 0.25))  # fx, skew, cx, fy, cy over 64 px
    np.testing.assert_allclose(parameters[5:].reshape(3, 4), RIG[0].ego_from_camera[:3], atol=1e-6)


def test_mirrored_images_and_mirrored_worlds_have_matrices():
    mirror_y = np.diag([1.0, -1, 1, 1])
    turned = CameraMatrices.of(RIG).mirrored([True, False]).in_frame(mirror_y)
    point = np.array([2.0, 0.3, -0.4])
    for n, column in ((0, lambda u: 64 - u), (1, lambda u: u)):
        uv, depth_m = RIG[n].project(point)
        image = turned.tables().image_from_ego[n] @ (*(mirror_y[:3, :3] @ point), 1)
        np.testing.assert_allclose(image[:2] / image[2], (column(uv[0]), uv[1]), rtol=1e-5)
        assert image[2] == pytest.approx(depth_m, rel=1e-5)
