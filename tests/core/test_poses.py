# SPDX-License-Identifier: Apache-2.0
"""Rigid transforms against pyquaternion (nuScenes' own) and SciPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occflownet_core import poses
from occflownet_core.errors import GeometryError

metres = st.floats(-1e3, 1e3)
angle = st.floats(-3.1, 3.1)


def quaternions():
    return st.lists(st.floats(-1, 1), min_size=4, max_size=4).map(np.array).filter(lambda q: np.linalg.norm(q) > 0.1)


rigid = st.builds(lambda x, y, z, q: poses.pose(np.array([x, y, z]), q), metres, metres, metres, quaternions())


def yawed(angle_rad, x=0.0, y=0.0):
    return poses.pose(np.array([x, y, 0.0]), np.array([np.cos(angle_rad / 2), 0, 0, np.sin(angle_rad / 2)]))


@given(quaternions())
def test_rotation_agrees_with_scipy(q):
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    expected = rotation.from_quat(np.roll(q, -1)).as_matrix()
    np.testing.assert_allclose(poses.rotation_from_quaternion(q), expected, atol=1e-12)


@given(quaternions())
def test_quaternion_round_trip_keeps_the_rotation(q):
    rotation = poses.rotation_from_quaternion(q)
    back = poses.quaternion_from_rotation(rotation)
    assert back[0] >= 0
    np.testing.assert_allclose(poses.rotation_from_quaternion(back), rotation, atol=1e-9)


@pytest.mark.parametrize("q", [(0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_half_turns_have_no_scalar_part(q):
    np.testing.assert_allclose(np.abs(poses.quaternion_from_rotation(poses.rotation_from_quaternion(q))), q, atol=1e-12)


@given(rigid)
def test_inverse_undoes(target_from_source):
    np.testing.assert_allclose(poses.inverse(target_from_source) @ target_from_source, np.eye(4), atol=1e-9)


@given(rigid, st.tuples(metres, metres, metres))
def test_inverse_agrees_with_linear_algebra_on_points(target_from_source, point):
    expected = np.linalg.solve(target_from_source, [*point, 1])[:3]
    np.testing.assert_allclose(poses.transform_points(poses.inverse(target_from_source), point), expected, atol=1e-6)


def test_inverse_of_many_poses_at_once():
    stack = np.stack([yawed(0.3, 1, 2), yawed(-2, 5, 6)])
    np.testing.assert_allclose(poses.inverse(stack) @ stack, np.tile(np.eye(4), (2, 1, 1)), atol=1e-12)


def test_a_quarter_turn_by_hand():
    ego_from_sensor = yawed(np.pi / 2, 10, 0)
    np.testing.assert_allclose(poses.transform_points(ego_from_sensor, [1.0, 0.0, 0.0]), (10, 1, 0), atol=1e-12)
    np.testing.assert_allclose(poses.rotate_vectors(ego_from_sensor, [1.0, 0.0, 0.0]), (0, 1, 0), atol=1e-12)
    assert poses.yaw(ego_from_sensor) == pytest.approx(np.pi / 2)


@given(angle, angle, st.floats(0, 1))
def test_interpolation_goes_the_short_way_at_constant_speed(start, turn, fraction):
    middle = poses.interpolate(yawed(start), yawed(start + turn, 8.0), fraction)
    np.testing.assert_allclose(middle, yawed(start + turn * fraction, 8.0 * fraction), atol=2e-5)


def test_extrapolation_continues():
    np.testing.assert_allclose(poses.interpolate(np.eye(4), yawed(0.2, 1.0), 2.0), yawed(0.4, 2.0), atol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        (np.eye(3), "shape"),
        (np.zeros((4, 4)), "not a rigid"),
        (np.diag([1.0, 1.0, -1.0, 1.0]), "not a rigid"),
        (np.diag([2.0, 1.0, 1.0, 1.0]), "not a rigid"),
        (np.full((4, 4), np.nan), "not a rigid"),
    ],
)
def test_what_is_not_rigid_is_refused(matrix, says):
    with pytest.raises(GeometryError, match=says):
        poses.require_rigid(matrix, "base_link_from_CAM_FRONT")


def test_bad_numbers_are_refused():
    with pytest.raises(GeometryError, match="gives no rotation"):
        poses.pose(np.zeros(3), np.zeros(4))
    with pytest.raises(GeometryError, match="not finite"):
        poses.pose(np.array([0, np.inf, 0]), np.array([1, 0, 0, 0]))
