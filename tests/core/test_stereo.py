# SPDX-License-Identifier: Apache-2.0
"""The plane sweep: worlds whose depth is known, an explicit loop, and what must match nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.camera_matrices import CameraMatrices
from occflownet_core.encoder.stereo import (
    StereoConfig,
    StereoMatcher,
    StereoView,
    cost_volume,
    places_before,
    unit_groups,
)
from occflownet_core.errors import ConfigError
from occflownet_core.lift_tables import DepthBins

WIDTH_PX, HEIGHT_PX, LEVEL_STRIDE = 96, 64, 4
BINS = DepthBins(2.0, 18.0, 1.0)
CHANNELS = 24


def camera(yaw: float = 0.0) -> Camera:
    """At (0.5, 0.2, 1.5) m, looking forward, turned left by ``yaw``."""
    ego_from_camera = np.eye(4)
    forward, right = (math.cos(yaw), math.sin(yaw), 0), (math.sin(yaw), -math.cos(yaw), 0)
    ego_from_camera[:3, :3] = np.stack([right, (0, 0, -1), forward], axis=1)
    ego_from_camera[:3, 3] = 0.5, 0.2, 1.5
    intrinsic = np.array([[80.0, 0, 48], [0, 80, 32], [0, 0, 1]])
    return Camera("a", WIDTH_PX, HEIGHT_PX, intrinsic, ego_from_camera)


def texture(points_m: np.ndarray) -> np.ndarray:
    """Features [..., C] of places in the world, of waves of about twelve metres; no two near places are alike."""
    rng = np.random.default_rng(0)
    waves, phase = rng.normal(size=(3, CHANNELS)) * 0.5, rng.uniform(0, 2 * np.pi, CHANNELS)
    return np.sin(points_m @ waves + phase)


def features_of(surface, cam: Camera, world_from_ego: np.ndarray, stride: int = LEVEL_STRIDE) -> torch.Tensor:
    """[1, C, h, w]: what a camera sees of a surface, a function of rays (origin, direction in the world) to points."""
    u, v = np.meshgrid(np.arange(stride / 2, WIDTH_PX, stride), np.arange(stride / 2, HEIGHT_PX, stride), indexing="xy")
    far = poses.transform_points(world_from_ego, cam.unproject(np.stack([u, v], -1), np.ones_like(u)))
    origin = poses.transform_points(world_from_ego, cam.ego_from_camera[:3, 3])
    return torch.from_numpy(texture(surface(origin, far - origin))).permute(2, 0, 1)[None].float()


def wall(x_m: float):
    """A plane across the road, x = x_m in the world."""
    return lambda origin, ray: origin + ray * ((x_m - origin[0]) / ray[..., :1])


def ground(origin, ray):
    """z = 0 in the world, and a wall at 60 m above the horizon."""
    down = np.where(ray[..., 2:] < -1e-3, ray[..., 2:], np.nan)
    distance = np.fmin(-origin[2] / down, (60 - origin[0]) / ray[..., :1])
    return origin + ray * distance


def sweep(surface, cam: Camera, previous_from_current: np.ndarray, bins: DepthBins = BINS, stride: int = LEVEL_STRIDE):
    """Agreement [D, h, w] in a world whose frame is the previous ego frame, and where the lookups are well inside."""
    now = unit_groups(features_of(surface, cam, previous_from_current, stride), 1)
    then = unit_groups(features_of(surface, cam, np.eye(4), stride), 1)
    matrices = CameraMatrices.of(CameraRig((cam,)))
    image_from_ego = matrices.tables().image_from_ego
    there = torch.from_numpy(image_from_ego @ previous_from_current @ matrices.ego_from_image).float()
    depths_m = torch.from_numpy(bins.centres_m()).float()
    agreement = cost_volume(now, then, there, depths_m, stride, stride)[0, 0]
    place = places_before(now.shape[-2:], stride, there, depths_m, WIDTH_PX, HEIGHT_PX)[0]
    cell = torch.tensor([2 * stride / WIDTH_PX, 2 * stride / HEIGHT_PX])
    return agreement, (place.abs() < 1 - cell).all(-1)


def motion(x_m: float, y_m: float, yaw: float) -> np.ndarray:
    return poses.pose(np.array([x_m, y_m, 0]), np.array([math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)]))


@pytest.mark.parametrize("depth_m", [4.5, 8.5, 12.5])
def test_a_wall_agrees_best_at_its_own_depth(depth_m):
    """The car moved 1.2 m sideways and 0.3 m ahead; the wall stands where a bin's middle is."""
    agreement, inside = sweep(wall(0.5 + 0.3 + depth_m), camera(), motion(0.3, 1.2, 0.0))
    expected = int(depth_m - 2.0)
    inside = inside[expected]
    assert inside.float().mean() > 0.6
    assert (agreement.argmax(0)[inside] == expected).all()
    assert agreement[expected][inside].min() > 0.99


def test_ground_agrees_at_its_own_depth_while_the_car_drives_and_turns():
    """Each pixel below the horizon has its own depth: 1.5 m x f / (v - cy)."""
    bins = DepthBins(2.0, 14.0, 0.5)
    agreement, inside = sweep(ground, camera(), motion(2.0, 0.3, 0.1), bins, stride=1)
    errors = []
    for row in range(36, HEIGHT_PX):
        depth_m = 1.5 * 80 / (row + 0.5 - 32)
        if 4.0 < depth_m < 10.0:
            nearest = int(bins.index(depth_m))
            errors += (agreement[:, row].argmax(0) - nearest)[inside[nearest, row]].abs().tolist()
    assert len(errors) > 1000
    assert np.mean(np.array(errors) <= 1) > 0.99
    assert np.mean(np.array(errors) == 0) > 0.7


def test_standing_still_says_nothing_about_depth():
    agreement, _ = sweep(wall(9.0), camera(), np.eye(4))
    torch.testing.assert_close(agreement, torch.ones_like(agreement), atol=1e-3, rtol=0)


def slowly(now, then, matrix, depths_m, level_stride, stride, groups):
    """The definition, one place and depth after the other, with a bilinear lookup by hand."""
    _, channels, height, width = then.shape
    factor = stride // level_stride
    rows, columns = now.shape[-2] // factor, now.shape[-1] // factor
    result = torch.zeros(len(now), groups, len(depths_m), rows, columns, dtype=now.dtype)
    size = channels // groups
    for m in range(len(now)):
        for r in range(rows):
            for c in range(columns):
                block = now[m, :, r * factor : (r + 1) * factor, c * factor : (c + 1) * factor].mean((1, 2))
                if factor > 1:
                    block = torch.cat([part / part.norm() for part in block.split(size)])
                for d, depth in enumerate(depths_m.tolist()):
                    x, y, z, _ = (
                        matrix[m] @ torch.tensor([(c + 0.5) * stride * depth, (r + 0.5) * stride * depth, depth, 1.0])
                    ).tolist()
                    if z <= 1e-3:
                        continue
                    column, row = x / z / level_stride - 0.5, y / z / level_stride - 0.5
                    found = torch.zeros(channels, dtype=now.dtype)
                    for j in (math.floor(row), math.floor(row) + 1):
                        for i in (math.floor(column), math.floor(column) + 1):
                            if 0 <= i < width and 0 <= j < height:
                                found = found + (1 - abs(row - j)) * (1 - abs(column - i)) * then[m, :, j, i]
                    result[m, :, d, r, c] = (block * found).view(groups, size).sum(1) / (
                        found.view(groups, size).square().sum(1) + 1e-4
                    ).sqrt()
    return result


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([4, 8]), st.sampled_from([1 << 26, 1]))
def test_cost_volume_equals_explicit_loops_in_value_and_gradient(seed, groups, stride, at_once):
    generator = torch.Generator().manual_seed(seed)
    now, then = (unit_groups(torch.randn(2, 4, 4, 6, generator=generator), groups).requires_grad_() for _ in range(2))
    cam = Camera("a", 24, 16, np.array([[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]), camera().ego_from_camera)
    matrices = CameraMatrices.of(CameraRig((cam,)))
    forward = matrices.tables().image_from_ego @ motion(1.0, 0.4, 0.2) @ matrices.ego_from_image
    # The second image's camera has turned about: some places lie behind it.
    behind = matrices.tables().image_from_ego @ motion(-3.0, 0.0, 1.5) @ matrices.ego_from_image
    there = torch.from_numpy(np.concatenate([forward, behind])).float()
    arguments = there, torch.tensor([1.5, 3.0, 6.0]), 4, stride, groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("occflownet_core.encoder.stereo._AT_ONCE", at_once)
        fast = cost_volume(now, then, *arguments)
    slow = slowly(now, then, *arguments)
    torch.testing.assert_close(fast, slow, atol=2e-4, rtol=1e-3)
    weight = torch.randn(fast.shape, generator=generator)
    for ours, expected in zip(
        torch.autograd.grad((fast * weight).sum(), (now, then)),
        torch.autograd.grad((slow * weight).sum(), (now, then)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


def matcher(stride: int = 4, groups: int = 2) -> StereoMatcher:
    torch.manual_seed(0)
    config = StereoConfig(level=0, channels=8, groups=groups, stride=stride)
    return StereoMatcher(5, 4, 16, tuple(BINS.centres_m()), 6, config)


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_what_the_depth_net_gets_has_the_pyramids_size(stride):
    net = matcher(stride).eval()
    eye = torch.eye(4).expand(1, 2, 4, 4)
    view = net.view(torch.randn(1, 2, 5, 16, 24), eye)
    assert view.features.shape == (1, 2, 8, 16, 24)
    torch.testing.assert_close(view.features.unflatten(2, (2, 4)).norm(dim=3), torch.ones(1, 2, 2, 16, 24))
    assert net(view.features, eye, torch.eye(4)[None], view).shape == (2, 6, 4, 6)


def test_no_view_is_no_agreement():
    """Zeros for features, or for the matrices alone (a reset, or a missing camera's), match nothing."""
    then = torch.randn(1, 8, 16, 24)
    found = cost_volume(then, then, torch.zeros(1, 4, 4), torch.tensor([2.0, 5.0]), 4, 4)
    assert (found == 0).all()
    found = cost_volume(then, torch.zeros_like(then), torch.eye(4)[None], torch.tensor([2.0, 5.0]), 4, 4)
    assert (found == 0).all()


def test_gradients_reach_the_matched_features_with_and_without_checkpointing():
    net = matcher()
    matrices = CameraMatrices.of(CameraRig((camera(),))).tables()
    image_from_ego, ego_from_image = (
        torch.from_numpy(t)[None] for t in (matrices.image_from_ego, matrices.ego_from_image)
    )
    level, before = torch.randn(2, 1, 1, 5, 16, 24)
    gradients = []
    for checkpointing in (False, True):
        net.checkpointing = checkpointing
        net.zero_grad()
        with torch.no_grad():
            then = net.view(before, image_from_ego)
        now = net.view(level, image_from_ego)
        moved = torch.from_numpy(motion(1.0, 0.5, 0.0)).float()[None]
        net(now.features, ego_from_image, moved, StereoView(*then)).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
        assert all(g.abs().sum() > 0 for g in gradients[-1] if g.ndim > 1)
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize(("changes", "words"), [({"stride": 6}, "stride 6"), ({"groups": 3}, "3 groups")])
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=words):
        StereoMatcher(5, 4, 16, (1.0, 2.0), 6, StereoConfig(**{"channels": 8, "groups": 1, "stride": 4} | changes))
