# SPDX-License-Identifier: Apache-2.0
"""What augmented training tells the network about its cameras: matrices, splatting, and stereo's third keyframe."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
from full_networks import PAPER, reduced  # noqa: E402

from occflownet_core import poses  # noqa: E402
from occflownet_core.camera import Camera, CameraRig  # noqa: E402
from occflownet_core.errors import ConfigError  # noqa: E402
from occflownet_core.grid import VoxelGrid  # noqa: E402
from occflownet_core.lift_tables import DepthBins, LiftSpec  # noqa: E402
from occflownet_core.renderer import RenderConfig  # noqa: E402
from training.data.augment import Augmentation, GridFlip, ImageDraw, warped_tables  # noqa: E402
from training.data.batch import collate  # noqa: E402
from training.loaders import OccupancyData  # noqa: E402
from training.module import OccupancyLearner  # noqa: E402
from training.settings import (  # noqa: E402
    DataSettings,
    MotionSettings,
    SupervisionSettings,
    TrainerSettings,
    TrainingConfig,
)

SOURCE_PX, NETWORK_PX = (400, 240), (192, 96)
GRID = VoxelGrid((-4.0, -8.0, -1.0), (12.0, 8.0, 2.2), 0.8)  # off centre: a flip is about the grid's middle
SPEC = LiftSpec(GRID, DepthBins(1.0, 13.0, 1.0), 6, 12, method="splat", knows_cameras=True)

draws = st.builds(
    ImageDraw,
    scale_change=st.floats(-0.06, 0.11),
    left=st.floats(0, 1),
    roll_rad=st.floats(-0.1, 0.1),
    mirrored=st.booleans(),
)
flips = st.builds(GridFlip, st.booleans(), st.booleans())


def camera(name: str, yaw: float) -> Camera:
    pose = poses.pose(np.array([0.5, 0.2, 1.2]), np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]))
    pose[:3, :3] = pose[:3, :3] @ np.array([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]])
    return Camera(name, *SOURCE_PX, np.array([[230.0, 0.3, 203], [0, 228, 117], [0, 0, 1]]), pose)


RIG = CameraRig((camera("LEFT", 0.2), camera("RIGHT", -0.6)))
MOTION = poses.pose(np.array([1.5, 0.2, 0.03]), np.array([np.cos(0.05), 0, 0, np.sin(0.05)]))


@settings(max_examples=40, deadline=None)
@given(st.tuples(draws, draws), flips, st.integers(0, 1000))
def test_matrices_put_points_where_the_warp_puts_their_pixels_now_and_before(images, flip, seed):
    """A point that stands still: its pixel now, at its depth, is moved to its pixel in the previous image."""
    points_m = np.random.default_rng(seed).uniform((3, -3, -1), (12, 3, 2), (20, 3))
    warps = [draw.warp(*SOURCE_PX, *NETWORK_PX) for draw in images]
    cameras = warped_tables(RIG, warps, flip, SPEC).cameras
    motion = flip.motion(MOTION, GRID)
    for c, (warp, source) in enumerate(zip(warps, RIG, strict=True)):
        pixel, depth_m = source.project(points_m)
        before, depth_before_m = source.project(poses.transform_points(MOTION, points_m))
        now = np.concatenate([warp.pixels(pixel) * depth_m[:, None], depth_m[:, None], np.ones((20, 1))], axis=1)
        flipped = poses.transform_points(flip.matrix(GRID), points_m)
        np.testing.assert_allclose((now @ cameras.ego_from_image[c].T.astype(float))[:, :3], flipped, atol=1e-3)
        then = now @ (cameras.image_from_ego[c].astype(float) @ motion @ cameras.ego_from_image[c]).T
        ahead = depth_before_m > 0.5
        np.testing.assert_allclose(then[ahead, 2], depth_before_m[ahead], atol=1e-3)
        np.testing.assert_allclose(then[ahead, :2] / then[ahead, 2:3], warp.pixels(before[ahead]), atol=0.05)


@settings(max_examples=20, deadline=None)
@given(st.tuples(draws, draws), flips)
def test_splatted_points_lie_where_the_matrices_put_them(images, flip):
    tables = warped_tables(RIG, [draw.warp(*SOURCE_PX, *NETWORK_PX) for draw in images], flip, SPEC)
    x, y, _ = GRID.shape
    rng = np.random.default_rng(0)
    for _ in range(50):
        c, b, r, w = (int(rng.integers(n)) for n in tables.voxel_index.shape)
        depth_m = 1.5 + b
        image = np.array([(w + 0.5) * 16 * depth_m, (r + 0.5) * 16 * depth_m, depth_m, 1])
        point_m = (tables.cameras.ego_from_image[c].astype(float) @ image)[:3]
        (i, j, k), inside = GRID.cells(point_m)
        near_a_face = np.abs(GRID.index_from_metric(point_m) - np.round(GRID.index_from_metric(point_m))).min() < 1e-3
        expected = (k * y + j) * x + i if inside else GRID.size
        assert near_a_face or tables.voxel_index[c, b, r, w] == expected


def run_config(root: Path, out: Path, **changes) -> TrainingConfig:
    return TrainingConfig(
        model=reduced(PAPER),
        data=DataSettings(str(root), train_split="train", val_split="train", horizon=1, augmentation=Augmentation()),
        motion=MotionSettings("box_flow"),
        rendering=RenderConfig(),
        supervision=SupervisionSettings(**{"kind": "2d", "rays_per_step": 256} | changes),
        trainer=TrainerSettings(out=str(out), checkpoint_activations=True),
    )


def test_a_step_of_the_published_network_on_keyframes(tiny_root, tmp_path):
    """Three keyframes, augmented; every part of the network learns from rays, and stereo from the depth loss."""
    torch.manual_seed(0)
    config = run_config(tiny_root.path, tmp_path)
    learner = OccupancyLearner(config)
    data = OccupancyData(dataclasses.replace(config), learner.model.lift_spec)
    window = collate([data.train[0, 0]])
    assert len(window) == config.window == 3
    assert [bool(moment.has_previous) for moment in window] == [False, True, True]
    losses = learner.objective(learner(window), window[-1], learner.step_generator(0))
    assert {"range", "semantic", "depth"} <= set(losses)
    sum(losses.values()).backward()
    for part in ("image_encoder", "stereo", "depth_net", "frame_block", "volume_encoder", "decoder"):
        gradients = [p.grad for p in getattr(learner.model, part).parameters() if p.grad is not None]
        assert gradients, part
        assert all(torch.isfinite(g).all() for g in gradients), part
        assert any(g.abs().sum() > 0 for g in gradients), part


@torch.no_grad()
def test_a_memory_that_is_not_kept_is_not_matched(tiny_root, tmp_path):
    torch.manual_seed(0)
    config = run_config(tiny_root.path, tmp_path)
    learner = OccupancyLearner(config).eval()
    window = collate([OccupancyData(config, learner.model.lift_spec).train[0, 0]])
    forgotten = learner(window, keep_memory=torch.tensor([False])).seen.depth_logits
    alone = learner.model.observe(window[-1].images, window[-1].tables).depth_logits
    torch.testing.assert_close(forgotten, alone)
    assert (learner(window).seen.depth_logits - alone).abs().max() > 1e-6


def test_windows_are_as_long_as_the_network_remembers(tmp_path):
    stereo = run_config(tmp_path, tmp_path)
    plain = dataclasses.replace(
        stereo, model=dataclasses.replace(stereo.model, depth=dataclasses.replace(stereo.model.depth, stereo=None))
    )
    assert (stereo.window, plain.window) == (3, 2)
    images = SupervisionSettings(kind="images")
    assert dataclasses.replace(stereo, supervision=images).window == 2
    assert dataclasses.replace(plain, supervision=images).window == 1


def test_stereo_without_cameras_is_refused_in_a_configuration():
    with pytest.raises(ConfigError, match="knows_camera"):
        TrainingConfig.from_dict({"model": {"depth": {"stereo": {"level": 0}}}})
