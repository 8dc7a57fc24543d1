# SPDX-License-Identifier: Apache-2.0
"""Learned flow: content moves by velocity times time, and velocity learns from what rays see."""

import pytest
import torch

from occflownet_core.motion import LearnedFlow, StaticWorld
from occflownet_core.renderer import RenderConfig
from tests.core.motion_scenes import EXACT, moved_scene, seen_along
from tests.core.rendering_twins import random_rays, yaw_pose


def constant_flow(velocity) -> LearnedFlow:
    return LearnedFlow(lambda points, batch: velocity.to(points).expand(len(points), 3))


@pytest.mark.parametrize("config", [EXACT, RenderConfig(method="sampled")])
def test_a_learned_flow_moves_content_by_velocity_times_time(config):
    # 2 m/s along x for two keyframes of 0.5 s: four cells of 0.5 m.
    field, _, _ = moved_scene(yaw_pose(-1, -1, 0), yaw_pose(1, 1, 0))
    for volume in field:
        volume[..., -5:] = 0
        volume[..., :5] = 0
    placed = tuple(volume.roll(4, dims=-1) for volume in field)
    rays = random_rays(50, seed=1, times=(2,))
    ours = seen_along(field, rays, constant_flow(torch.tensor([2.0, 0, 0])), config)
    expected = seen_along(placed, rays, constant_flow(torch.zeros(3)), config)
    torch.testing.assert_close(ours.range_m, expected.range_m, atol=1e-7, rtol=0)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-7, rtol=0)


def test_a_learned_flow_leaves_the_present_alone():
    field, _, _ = moved_scene(yaw_pose(-1, -1, 0), yaw_pose(1, 1, 0))
    rays = random_rays(20, times=(0,))
    ours = seen_along(field, rays, constant_flow(torch.ones(3)))
    assert torch.equal(ours.range_m, seen_along(field, rays, StaticWorld()).range_m)


def test_fixed_point_steps_find_where_content_comes_from():
    # v = a p: p = p0 (1 + a dt), so p0 = p / (1 + a dt); each step gains a factor of |a dt| = 0.1.
    flow = LearnedFlow(lambda points, batch: 0.2 * points, steps=8)
    points = torch.tensor([[1.0, -2.0, 0.5]]).double()
    now, present = flow.content(points, torch.tensor([1]), torch.tensor([0]), field=None)
    torch.testing.assert_close(now, points / 1.1, atol=1e-8, rtol=0)
    assert present.all()


def test_velocity_learns_from_ranges():
    field, _, _ = moved_scene(yaw_pose(-1, -1, 0), yaw_pose(1, 1, 0))
    rays = random_rays(6, seed=1, reach_m=0.9, times=(1, -1))

    def ranges(velocity):
        return seen_along(field, rays, constant_flow_of(velocity)).range_m

    def constant_flow_of(velocity):
        return LearnedFlow(lambda points, batch: velocity.expand(len(points), 3), steps=2)

    velocity = torch.tensor([0.313, -0.207, 0.05]).double().requires_grad_()
    assert torch.autograd.gradcheck(ranges, (velocity,), atol=1e-5)
    ranges(velocity).sum().backward()
    assert velocity.grad.abs().min() > 1e-3
