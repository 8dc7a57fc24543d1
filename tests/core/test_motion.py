# SPDX-License-Identifier: Apache-2.0
"""Motion: points and ray pieces against plain loops, and what neighbour frames see of things that moved."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core.boxes import MovingBoxes
from occflownet_core.errors import GeometryError
from occflownet_core.interpolate import nearest
from occflownet_core.motion import BoxFlow, DynamicFilter, LearnedFlow, StaticWorld
from occflownet_core.renderer import Rays, RenderConfig, render
from occflownet_core.voxel_field import VoxelField
from tests.core.motion_scenes import (
    ABSENT,
    CAR,
    EXACT,
    GRID,
    ROAD,
    WALL,
    boxes,
    content_by_loops,
    empty_field,
    moved_scene,
    one_ray,
    put,
    seen_along,
)
from tests.core.rendering_twins import random_rays, render_by_tiny_steps, yaw_pose


def random_boxes(seed: int, count: int = 4) -> MovingBoxes:
    random = np.random.default_rng(seed)

    def pose():
        return yaw_pose(*random.uniform((-3, -3, -0.5), (3, 3, 0.5)), random.uniform(-3, 3))

    rows = [
        (
            ABSENT if i == 1 and seed % 3 == 0 else pose(),
            ABSENT if i == 2 and seed % 2 == 0 else pose(),
            random.uniform(0.5, 3.0, 3),
        )
        for i in range(count)
    ]
    return MovingBoxes.cat([boxes(*rows[:2], time=1), boxes(*rows[2:], time=random.choice([1, -2]))])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_points_move_as_the_plain_loop_says(seed):
    flow_boxes = random_boxes(seed)
    motion = BoxFlow(flow_boxes, still_m=0.0)
    random = np.random.default_rng(seed + 1)
    points = random.uniform(-4, 4, (60, 3)) * (1, 1, 0.25)
    times = random.choice([0, 1, -2, 3], 60)
    moved, present = motion.content(
        torch.tensor(points), torch.tensor(times), torch.zeros(60, dtype=torch.long), field=None
    )
    for point, time, ours, there in zip(points, times, moved, present, strict=True):
        expected = content_by_loops(flow_boxes, 1.15, point, time)
        assert bool(there) == (expected is not None)
        if there:
            np.testing.assert_allclose(ours, expected, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_pieces_of_rays_say_the_same_as_points(seed):
    motion = BoxFlow(random_boxes(seed), still_m=0.0)
    rays = random_rays(20, seed=seed, reach_m=3.0, times=(0, 1, -2))
    pieces = motion.pieces(rays)
    assert (pieces.ray.diff() >= 0).all() and (pieces.end_m > pieces.start_m).all()
    distance = torch.rand(20, 15, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 8
    for ray in range(20):
        points = rays.origin_m[ray] + distance[ray, :, None] * rays.direction[ray]
        zero = torch.zeros(15, dtype=torch.long)
        moved, present = motion.content(points, rays.time_index[ray].expand(15), zero, field=None)
        own = (pieces.ray == ray).nonzero()[:, 0]
        for t, expected, there in zip(distance[ray], moved, present, strict=True):
            covering = own[(pieces.start_m[own] < t) & (t < pieces.end_m[own])]
            assert len(covering) == int(there)
            if there:
                ours = pieces.origin_m[covering[0]] + t * pieces.direction[covering[0]]
                torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "then",
    [
        yaw_pose(1.0, 1.5, 0.0),  # whole voxels
        yaw_pose(1.5, 1.0, 0.0, math.pi / 2),  # and a quarter turn
        yaw_pose(0.0, -1.0, 0.0),  # overlapping where it is now
    ],
)
def test_a_box_that_moved_is_seen_where_it_was_at_that_time(then):
    field, placed, motion = moved_scene(yaw_pose(-1.0, -1.0, 0.0), then)
    rays = random_rays(150, seed=2, reach_m=4.0, times=(1,))
    ours, expected = seen_along(field, rays, motion), seen_along(placed, rays, StaticWorld())
    for name in ("range_m", "logits", "opacity"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), atol=1e-7, rtol=0)
    still = seen_along(field, rays, StaticWorld())
    assert (still.range_m - ours.range_m).abs().max() > 0.1


def test_a_turned_box_is_traversed_exactly_in_its_own_frame():
    field, _, motion = moved_scene(yaw_pose(-1.0, -1.0, 0.0, 0.3), yaw_pose(1.13, 0.7, 0.1, 1.1))
    rays = random_rays(12, seed=4, reach_m=3.0, times=(1,))
    seen = seen_along(field, rays, motion)
    zero, one = torch.zeros(20_000, dtype=torch.long), torch.ones(20_000, dtype=torch.long)

    def lookup(volume):
        def at(points):
            moved, present = motion.content(points, one, zero, field=None)
            return nearest(volume, GRID, moved, zero) * present[:, None]

        return at

    for i in range(12):
        _, logits, opacity = render_by_tiny_steps(
            lambda p: lookup(field[0][:, None])(p)[:, 0], lookup(field[1]), rays.origin_m[i], rays.direction[i], 12.0
        )
        assert seen.opacity[i].item() == pytest.approx(opacity.item(), abs=3e-3)
        torch.testing.assert_close(seen.logits[i], logits, atol=1e-2, rtol=0)


def car_before_wall():
    """A car at x = 1..2 on the line of sight, a wall from x = 3; a second ago the car stood aside, at y = 3."""
    field = empty_field()
    put(field, (1, -0.5, -0.5), (2, 0.5, 0.5), 1e4, CAR)
    put(field, (3, -4, -1), (4, 4, 1), 1e4, WALL)
    return field, boxes((yaw_pose(1.5, 0, 0), yaw_pose(1.5, 3, 0), (1.0, 1.0, 1.0)))


@pytest.mark.parametrize("method", ["traversal", "sampled"])
@pytest.mark.parametrize("require_class", [False, True])
def test_what_was_hidden_appears_where_the_car_is_now(method, require_class):
    field, flow_boxes = car_before_wall()
    # Interpolated, the car reaches half a voxel further; so must the box.
    motion = BoxFlow(flow_boxes, scale=1.15 if method == "traversal" else 1.6, require_class=require_class)
    config = RenderConfig(method=method)
    tolerance = 0.01 if method == "traversal" else 0.3
    for y, time, range_m, label in [(0.2, 0, 1, CAR), (0.2, 1, 3, WALL), (3.2, 1, 1, CAR), (3.2, 0, 3, WALL)]:
        seen = seen_along(field, one_ray((0, y, 0.2), (1, 0, 0), time), motion, config)
        assert seen.range_m.item() == pytest.approx(range_m, abs=tolerance)
        assert seen.logits.argmax().item() == label


def test_two_boxes_that_cross_each_keep_their_own_content():
    field = empty_field()
    put(field, (-2, -3, -0.5), (-1, -2, 0.5), 1e4, CAR)
    put(field, (1, 2, -0.5), (2, 3, 0.5), 1e4, 10)
    # At t they have changed places.
    there, here = yaw_pose(1.5, 2.5, 0), yaw_pose(-1.5, -2.5, 0)
    motion = BoxFlow(boxes((here, there, (1, 1, 1)), (there, here, (1, 1, 1), 10)), scale=1.0)
    for y, x, now, then in [(-2.4, -2, CAR, 10), (2.6, 1, 10, CAR)]:
        for time, label in ((0, now), (1, then)):
            seen = seen_along(field, one_ray((-4, y, 0.2), (1, 0, 0), time), motion)
            assert seen.range_m.item() == pytest.approx(x + 4, abs=0.01)
            assert seen.logits.argmax().item() == label


def test_where_boxes_overlap_the_smaller_one_speaks():
    field = empty_field()
    put(field, (-2, -2, -0.5), (-1, -1, 0.5), 1e4, CAR)
    put(field, (1, 1, -0.5), (2, 2, 0.5), 1e4, 7)
    meeting = yaw_pose(0.5, 0, 0)
    rows = [(yaw_pose(-1.5, -1.5, 0), meeting, (1.2, 1.2, 1), CAR), (yaw_pose(1.5, 1.5, 0), meeting, (1, 1, 1), 7)]
    for order in (rows, rows[::-1]):
        seen = seen_along(field, one_ray((-4, 0.2, 0.2), (1, 0, 0)), BoxFlow(boxes(*order), scale=1.0))
        assert seen.logits.argmax().item() == 7


def test_a_box_that_enters_the_grid_is_seen_outside_of_it():
    # Now at x = 3, at t still beyond the border at x = 6: its content is in the current field all the same.
    field = empty_field()
    put(field, (2.5, -0.5, -0.5), (3.5, 0.5, 0.5), 1e4, CAR)
    motion = BoxFlow(boxes((yaw_pose(3, 0, 0), yaw_pose(6, 0, 0), (1, 1, 1))))
    seen = seen_along(field, one_ray((0, 0.2, 0.2), (1, 0, 0)), motion)
    assert seen.range_m.item() == pytest.approx(5.5, abs=0.01) and seen.logits.argmax().item() == CAR


def test_a_box_that_left_the_grid_teaches_nothing():
    # Inside at t, outside now: the field has no content to show there.
    motion = BoxFlow(boxes((yaw_pose(6, 0, 0), yaw_pose(3, 0, 0), (1, 1, 1))))
    rays = Rays.cat([one_ray((2.1, y, 0), (1, 0, 0)) for y in (0.0, 2.0)])
    assert motion.keeps(rays, GRID).tolist() == [False, True]
    assert motion.keeps(one_ray((2.1, 0, 0), (1, 0, 0), time=0), GRID).tolist() == [True]


def test_boxes_without_partner():
    field, _ = car_before_wall()
    gone = BoxFlow(boxes((yaw_pose(1.5, 0, 0), ABSENT, (1, 1, 1))))
    assert seen_along(field, one_ray((0, 0.2, 0.2), (1, 0, 0)), gone).range_m.item() == pytest.approx(3, abs=0.01)
    # Only there at t: nothing known moves; what ended in it is dropped.
    came = BoxFlow(boxes((ABSENT, yaw_pose(1.5, 3, 0), (1, 1, 1))))
    assert seen_along(field, one_ray((0, 3.2, 0.2), (1, 0, 0)), came).range_m.item() == pytest.approx(3, abs=0.01)
    assert came.keeps(one_ray((0.5, 3.2, 0.2), (1, 0, 0)), GRID).tolist() == [False]
    assert came.keeps(one_ray((0.5, 0.2, 0.2), (1, 0, 0)), GRID).tolist() == [True]


def test_no_boxes_are_a_static_world():
    field, _ = car_before_wall()
    rays = random_rays(20, times=(0, 1))
    for flow_boxes in (MovingBoxes.empty(), MovingBoxes.cat([])):
        motion = BoxFlow(flow_boxes)
        ours, still = seen_along(field, rays, motion), seen_along(field, rays, StaticWorld())
        assert torch.equal(ours.range_m, still.range_m) and motion.keeps(rays, GRID).all()


def test_the_ground_in_a_box_stays_when_the_class_must_agree():
    field = empty_field()
    put(field, (1, -0.5, -0.5), (2, 0.5, 0.5), 1e4, CAR)
    put(field, (-4, -4, -1), (4, 4, -0.5), 1e4, ROAD)
    # Half a metre deeper than the car, as enlarged boxes are.
    flow_boxes = boxes((yaw_pose(1.5, 0, -0.25), yaw_pose(1.5, 3, -0.25), (1.0, 1.0, 1.5)))
    down = one_ray((1.4, 0.2, 0.9), (0, 0, -1))
    with_ground = seen_along(field, down, BoxFlow(flow_boxes, scale=1.0, require_class=True))
    assert with_ground.range_m.item() == pytest.approx(1.4, abs=0.01)
    assert with_ground.logits.argmax().item() == ROAD
    without = seen_along(field, down, BoxFlow(flow_boxes, scale=1.0))
    assert without.opacity.item() == pytest.approx(0.0)


def test_still_boxes_are_left_alone_unless_a_moving_one_touches_them():
    still, mover = yaw_pose(0, 0, 0), (yaw_pose(1, 0, 0), yaw_pose(3, 0, 0))
    jitter = yaw_pose(0.02, 0, 0)
    far = (yaw_pose(0, 3.5, 0), yaw_pose(0.02, 3.5, 0))
    rows = boxes((still, jitter, (1, 1, 1)), (*mover, (1, 1, 1)), (*far, (1, 1, 1)))
    assert rows.moving(0.05).ego_from_box_now[:, 0, 3].tolist() == [0.0, 1.0]


def test_dynamic_filter_sees_through_predicted_cars_in_neighbour_frames():
    field, _ = car_before_wall()
    for method in ("traversal", "sampled"):
        tolerance = 0.01 if method == "traversal" else 0.5
        for time, range_m in ((0, 1), (1, 3), (-3, 3)):
            ray = one_ray((0, 0.2, 0.2), (1, 0, 0), time)
            seen = seen_along(field, ray, DynamicFilter(), RenderConfig(method=method))
            assert seen.range_m.item() == pytest.approx(range_m, abs=tolerance)
    rays = Rays.cat([one_ray((0, 0, 0), (1, 0, 0), time) for time in (0, 1)])
    assert DynamicFilter().keeps(rays, GRID).tolist() == [True, False]
    assert DynamicFilter(classes=(0,)).keeps(rays, GRID).tolist() == [True, True]


def test_dynamic_filter_gives_filtered_voxels_no_gradient_from_neighbours():
    field, _ = car_before_wall()
    density = field[0].clone().clamp(max=1.0).requires_grad_()
    rays = one_ray((0, 0.2, 0.2), (1, 0, 0))
    render(VoxelField(density, field[1], GRID), rays, GRID, DynamicFilter(), EXACT).range_m.sum().backward()
    x, y, z = GRID.cells(np.array([1.2, 0.2, 0.2]))[0]
    assert density.grad[0, z, y, x] == 0 and density.grad[0, z, y, 15] != 0


def test_mixed_rays_come_back_in_their_own_order():
    field, flow_boxes = car_before_wall()
    motion = BoxFlow(flow_boxes, require_class=True)
    rays = Rays.cat([one_ray((0, y, 0.2), (1, 0, 0), t) for y, t in [(0.2, 1), (2.0, 1), (3.2, 1), (0.2, 0)]])
    seen = seen_along(field, rays, motion)
    assert seen.range_m.tolist() == pytest.approx([3, 3, 1, 1], abs=0.01)
    total = torch.zeros(4).double().index_add(0, seen.samples.ray, seen.samples.weight)
    torch.testing.assert_close(total, seen.opacity)
    assert (seen.samples.ray.diff() >= 0).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((yaw_pose(0, 0, 0), yaw_pose(0, 0, 0), (1, 0, 1)), "a size is 0 m"),
        ((ABSENT, ABSENT, (1, 1, 1)), "neither now nor then"),
    ],
)
def test_impossible_boxes_are_refused(row, message):
    with pytest.raises(GeometryError, match=message):
        boxes(row)


def test_boxes_at_time_zero_and_odd_settings_are_refused():
    with pytest.raises(GeometryError, match="time_index 0"):
        boxes((yaw_pose(0, 0, 0), yaw_pose(0, 0, 0), (1, 1, 1)), time=0)
    with pytest.raises(GeometryError, match="box scale is 0"):
        BoxFlow(MovingBoxes.empty(), scale=0)
    with pytest.raises(GeometryError, match="0 fixed-point steps"):
        LearnedFlow(lambda p, b: p, steps=0)
