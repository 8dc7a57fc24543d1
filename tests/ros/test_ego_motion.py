# SPDX-License-Identifier: Apache-2.0
"""Pose buffer and memory resets, with numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from occflownet_core import poses
from occflownet_core.errors import GeometryError
from occflownet_ros.ego_motion import EgoMotion, PoseBuffer

S = 1_000_000_000
IDENTITY = (1.0, 0.0, 0.0, 0.0)


def at(x_m: float, yaw_rad: float = 0.0) -> np.ndarray:
    return poses.pose(np.array([x_m, 0, 0]), np.array([np.cos(yaw_rad / 2), 0, 0, np.sin(yaw_rad / 2)]))


def test_interpolates_between_and_extrapolates_beyond():
    buffer = PoseBuffer(max_gap_ms=200)
    buffer.add(1 * S, (10, 0, 0), IDENTITY)
    buffer.add(1 * S + S // 10, (11, 0, 0), (np.cos(0.1), 0, 0, np.sin(0.1)))  # 0.2 rad to the left
    middle = buffer.at(1 * S + S // 20)
    assert middle[:3, 3] == pytest.approx((10.5, 0, 0))
    assert poses.yaw(middle) == pytest.approx(0.1)
    ahead = buffer.at(1 * S + S // 5)  # 100 ms beyond the newest
    assert ahead[:3, 3] == pytest.approx((12, 0, 0))
    assert poses.yaw(ahead) == pytest.approx(0.4)
    assert np.array_equal(buffer.at(1 * S), at(10))


def test_no_pose_where_none_is_near():
    buffer = PoseBuffer(max_gap_ms=200)
    assert buffer.at(0) is None
    buffer.add(1 * S, (0, 0, 0), IDENTITY)
    assert buffer.at(1 * S) is not None
    assert buffer.at(1 * S + 1) is None  # one pose gives no motion
    buffer.add(2 * S, (1, 0, 0), IDENTITY)
    assert buffer.at(S * 3 // 2) is None  # gap of a second
    assert buffer.at(2 * S) is not None  # an exact hit needs no neighbour
    assert buffer.at(0) is None  # before the oldest
    buffer.add(2 * S + S // 10, (1, 0, 0), IDENTITY)
    assert buffer.at(2 * S + S // 10 + S // 5) is not None
    assert buffer.at(2 * S + S // 10 + S // 5 + 1) is None


def test_sets_are_counted_and_told_why_there_is_no_pose():
    buffer = PoseBuffer(max_gap_ms=200)
    assert buffer.look_up(5 * S) == (None, "none has come")
    buffer.add(1 * S, (0, 0, 0), IDENTITY)
    assert buffer.look_up(5 * S) == (None, "there is one, 4.000 s earlier")
    buffer.add(2 * S, (1, 0, 0), IDENTITY)
    assert buffer.look_up(S * 3 // 2) == (None, "the two next to it are 1000 ms apart, more than 200 ms")
    assert buffer.look_up(2 * S + S // 10) == (None, "the two next to it are 1000 ms apart, more than 200 ms")
    assert buffer.look_up(0) == (None, "the oldest kept is 1.000 s later")
    buffer.add(2 * S + S // 10, (1, 0, 0), IDENTITY)
    assert buffer.look_up(1_000_000 * S) == (None, "the newest is 999997.900 s earlier")
    assert buffer.counters == {"received": 3}
    for stamp_ns in (2 * S, 2 * S + S // 20, 2 * S + S // 5):
        pose, why = buffer.look_up(stamp_ns)
        assert pose[0, 3] == pytest.approx(1) and why == ""
    assert buffer.counters == {"received": 3, "interpolated": 2, "extrapolated": 1}


def test_bad_poses_are_refused_and_counted():
    buffer = PoseBuffer(max_gap_ms=200)
    with pytest.raises(GeometryError):
        buffer.add(0, (np.nan, 0, 0), IDENTITY)
    with pytest.raises(GeometryError):
        buffer.add(0, (0, 0, 0), (0, 0, 0, 0))
    assert buffer.newest_ns is None
    assert buffer.counters == {"received": 2, "refused": 2}


def test_out_of_order_is_dropped_and_a_clock_reset_starts_over():
    buffer = PoseBuffer(max_gap_ms=200)
    buffer.add(100 * S, (0, 0, 0), IDENTITY)
    buffer.add(100 * S - 1, (5, 0, 0), IDENTITY)
    assert buffer.newest_ns == 100 * S
    buffer.add(3 * S, (7, 0, 0), IDENTITY)
    assert buffer.newest_ns == 3 * S and buffer.at(100 * S) is None
    assert buffer.counters == {"received": 3, "out_of_order": 1, "time_jumps": 1}


def test_buffer_keeps_twenty_seconds():
    buffer = PoseBuffer(max_gap_ms=200)
    for k in range(300):
        buffer.add(k * S // 10, (k, 0, 0), IDENTITY)
    assert buffer.at(5 * S) is None
    assert buffer.at(15 * S)[0, 3] == 150


def make() -> EgoMotion:
    return EgoMotion(max_gap_s=2.0, max_speed_mps=60.0, max_yaw_rate_rps=3.0)


def test_previous_from_current():
    motion = make()
    assert motion.step(0, at(10)) is None
    assert motion.resets == {"first_set": 1}
    # Turned 90 degrees left at x = 10, then 2 m ahead along its own x axis: 2 m to the left of the previous frame.
    odom_from_base = poses.pose(np.array([10.0, 2.0, 0]), np.array([np.cos(np.pi / 4), 0, 0, np.sin(np.pi / 4)]))
    previous_from_current = motion.step(1 * S, odom_from_base)
    assert previous_from_current[:3, 3] == pytest.approx((0, 2, 0))
    assert poses.yaw(previous_from_current) == pytest.approx(np.pi / 2)
    assert motion.last_reason == ""


@pytest.mark.parametrize(
    ("stamp_s", "pose_then", "cause", "says"),
    [
        (0.5, None, "no_odometry", "no pose of the vehicle at 10.500 s; memory forgotten"),
        (-0.5, at(0), "time_jump", "time jumped back by 0.500 s"),
        (2.1, at(0), "gap", "2.10 s since the last set, more than 2 s"),
        (0.5, at(30.6), "pose_jump", "moved 30.6 m and turned 0 degrees in 0.50 s"),  # 60 m/s * 0.5 s + 0.5 m
        (0.5, at(0, 1.6), "pose_jump", "turned 92 degrees in 0.50 s"),  # 3 rad/s * 0.5 s
    ],
)
def test_resets_say_why(stamp_s, pose_then, cause, says):
    motion = make()
    motion.step(10 * S, at(0))
    assert motion.step(int((10 + stamp_s) * S), pose_then) is None
    assert motion.resets == {"first_set": 1, cause: 1}
    assert says in motion.last_reason
    # The step after it goes on from the new pose, unless that was unknown.
    following = motion.step(int((10.5 + stamp_s) * S), at(1) if pose_then is None else pose_then)
    assert (following is None) == (pose_then is None)


def test_just_below_the_limits_nothing_is_forgotten():
    motion = make()
    motion.step(0, at(0))
    assert motion.step(S // 2, at(30.4, 1.4)) is not None
    assert motion.step(S // 2 + 2 * S, at(30.4, 1.4)) is not None


def test_engine_failure_forgets():
    motion = make()
    motion.step(0, at(0))
    motion.forget("engine", "the engine failed")
    assert motion.step(S // 10, at(0)) is None
    assert motion.resets == {"first_set": 2, "engine": 1}
