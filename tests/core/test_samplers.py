# SPDX-License-Identifier: Apache-2.0
"""Positions along rays: the segment in the grid, bins, inverse-CDF draws, intervals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core.grid import VoxelGrid
from occflownet_core.renderer import Rays
from occflownet_core.renderer.samplers import grid_segment, intervals, merged, resampled, uniform
from tests.core.rendering_twins import SMALL_GRID, exit_m, random_rays

UNIT_GRID = VoxelGrid((0, 0, 0), (4, 4, 4), 1.0)


@pytest.mark.parametrize(
    ("origin", "direction", "near", "far"),
    [
        ((-1, 0.5, 0.5), (1, 0, 0), 1, 5),  # from outside, through
        ((1, 0.5, 0.5), (1, 0, 0), 0, 3),  # from inside
        ((1, 0.5, 0.5), (-1, 0, 0), 0, 1),
        ((-1, 4.5, 0.5), (1, 0, 0), 0, 0),  # beside
        ((5, 0.5, 0.5), (1, 0, 0), 0, 0),  # behind it
        ((-1, 0, 0.5), (1, 0, 0), 1, 5),  # along a lower face: in the box
        ((-1, 4, 0.5), (1, 0, 0), 0, 0),  # along an upper face: not
        ((-1, -1, 2), (math.sqrt(0.5), math.sqrt(0.5), 0), math.sqrt(2), 5 * math.sqrt(2)),
        ((-1, 1, 2), (math.sqrt(0.5), -math.sqrt(0.5), 0), 0, 0),  # touches the edge x = y = 0 in one point
    ],
)
def test_segment_in_the_grid(origin, direction, near, far):
    rays = Rays.from_numpy([origin], [direction], [1.0], [0], dtype=torch.float64)
    near_m, far_m = grid_segment(rays, UNIT_GRID)
    assert (near_m.item(), far_m.item()) == pytest.approx((near, far), abs=1e-12)


def test_segments_end_where_the_twin_leaves_the_grid():
    rays = random_rays(200)
    far = [exit_m(o, d, SMALL_GRID) for o, d in zip(rays.origin_m, rays.direction, strict=True)]
    torch.testing.assert_close(
        grid_segment(rays, SMALL_GRID)[1], torch.tensor(far, dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_uniform_bins():
    assert uniform(torch.tensor([1.0]), torch.tensor([3.0]), 4).tolist() == [[1.0, 1.5, 2.0, 2.5, 3.0]]


def test_draws_follow_the_weights():
    # Cumulative 0, 0.25, 0.25, 1: one draw of four in the first metre, three evenly in the third.
    edges = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).double()
    drawn = resampled(edges, torch.tensor([[0.25, 0.0, 0.75]]).double(), 4)
    expected = torch.tensor([[0.5, 2 + 1 / 6, 2.5, 2 + 5 / 6]]).double()
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=0)


def test_a_ray_through_nothing_is_drawn_evenly():
    drawn = resampled(torch.tensor([[0.0, 1.0, 2.0]]), torch.zeros(1, 2), 4)
    torch.testing.assert_close(drawn, torch.tensor([[0.25, 0.75, 1.25, 1.75]]))


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1), min_size=2, max_size=20),
    count=st.integers(1, 30),
    stratified=st.booleans(),
)
def test_draws_ascend_within_the_bins_and_carry_no_gradient(weights, count, stratified):
    weight = torch.tensor([weights], dtype=torch.float64, requires_grad=True)
    edges = uniform(torch.tensor([1.0]).double(), torch.tensor([5.0]).double(), len(weights))
    drawn = resampled(edges, weight, count, stratified, torch.Generator().manual_seed(0))
    assert drawn.shape == (1, count) and not drawn.requires_grad
    assert (drawn >= 1).all() and (drawn <= 5).all() and (drawn.diff(dim=1) >= 0).all()


def test_intervals_meet_halfway_and_fill_the_segment():
    t = merged(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.5]]))
    start, length = intervals(t, torch.tensor([0.5]), torch.tensor([4.0]))
    assert t.tolist() == [[1.0, 2.5, 3.0]]
    assert start.tolist() == [[0.5, 1.75, 2.75]] and length.tolist() == [[1.25, 1.0, 1.25]]
