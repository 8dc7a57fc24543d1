# SPDX-License-Identifier: Apache-2.0
"""Transforms as they arrive: looked up by hand, against tf2 where it is installed, and what is said when one is missing."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from geometry_msgs.msg import TransformStamped
from hypothesis import given
from hypothesis import strategies as st

from occflownet_core import poses
from occflownet_core.errors import CalibrationError, GeometryError
from occflownet_ros import conversions, tf_adapter
from occflownet_ros.live_transforms import LiveTransforms, PlainTransforms, TfExtrinsics
from occflownet_ros.tf_adapter import Tf2Transforms

MS, S = 1_000_000, 1_000_000_000
IDENTITY = (1.0, 0.0, 0.0, 0.0)
QUARTER_LEFT = (np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5))


def transform(
    parent: str, child: str, position_m=(0.0, 0.0, 0.0), quaternion_wxyz=IDENTITY, stamp_ns: int = 0
) -> TransformStamped:
    message = TransformStamped(child_frame_id=child)
    message.header.frame_id = parent
    message.header.stamp = conversions.time_message(stamp_ns)
    t, q = message.transform.translation, message.transform.rotation
    t.x, t.y, t.z = map(float, position_m)
    q.w, q.x, q.y, q.z = map(float, quaternion_wxyz)
    return message


@pytest.fixture(params=[PlainTransforms, Tf2Transforms])
def transforms(request) -> LiveTransforms:
    if request.param is Tf2Transforms:
        pytest.importorskip("tf2_ros", reason="tf2_ros comes with a ROS installation and is not installed here")
    return request.param()


def fix(to: LiveTransforms, *arguments) -> None:
    to.add(transform(*arguments), is_static=True)


def move(to: LiveTransforms, *arguments, stamp_ns: int) -> None:
    to.add(transform(*arguments, stamp_ns=stamp_ns), is_static=False)


def test_static_transforms_compose_along_the_tree(transforms):
    """The mast stands 2 m ahead, turned left; the camera 1 m ahead of it along its own x: at (2, 1) in the base frame."""
    fix(transforms, "/base_link", "mast", (2, 0, 0), QUARTER_LEFT)
    fix(transforms, "mast", "camera", (1, 0, 0))
    stamp_ns, base_from_camera = transforms.newest("base_link", "camera")
    assert stamp_ns == 0
    np.testing.assert_allclose(base_from_camera.matrix[:3, 3], (2, 1, 0), atol=1e-12)
    camera_from_base = transforms.fixed("camera", "/base_link").matrix
    np.testing.assert_allclose(camera_from_base @ base_from_camera.matrix, np.eye(4), atol=1e-12)
    fix(transforms, "mast", "camera", (3, 0, 0))  # calibrated anew
    np.testing.assert_allclose(transforms.fixed("base_link", "camera").matrix[:3, 3], (2, 3, 0), atol=1e-12)


def test_the_latest_common_stamp_is_that_of_the_slowest_link(transforms):
    """odom -> footprint comes at 0 and 100 ms, footprint -> base at 60 ms: at 60 ms the footprint is 60 % of the way."""
    move(transforms, "odom", "footprint", (10, 0, 0), stamp_ns=S)
    move(transforms, "footprint", "base_link", (0, 0, 0.5), stamp_ns=S + 60 * MS)
    assert transforms.newest("odom", "base_link") is None or transforms.newest("odom", "base_link")[0] == S
    move(transforms, "odom", "footprint", (12, 0, 0), stamp_ns=S + 100 * MS)
    stamp_ns, pose = transforms.newest("odom", "base_link")
    assert stamp_ns == S + 60 * MS
    np.testing.assert_allclose(pose.translation_m, (11.2, 0, 0.5), atol=1e-9)
    assert transforms.fixed("odom", "base_link") is None
    assert transforms.fixed("base_link", "/base_link").translation_m == (0, 0, 0)


def test_a_clock_reset_forgets_what_moved_and_keeps_what_is_fixed(transforms):
    fix(transforms, "base_link", "camera", (1, 0, 0))
    move(transforms, "odom", "base_link", (50, 0, 0), stamp_ns=100 * S)
    move(transforms, "odom", "base_link", (49, 0, 0), stamp_ns=100 * S - 500 * MS)  # late, not reset
    assert transforms.newest("odom", "base_link")[0] == 100 * S
    move(transforms, "odom", "base_link", (1, 0, 0), stamp_ns=3 * S)
    stamp_ns, pose = transforms.newest("odom", "base_link")
    assert stamp_ns == 3 * S and pose.translation_m[0] == 1
    assert transforms.fixed("base_link", "camera").translation_m[0] == 1


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (transform("base_link", "camera", (np.nan, 0, 0)), "'camera' in 'base_link' is refused: translation"),
        (transform("base_link", "camera", (0, 0, 0), (0, 0, 0, 0)), "'camera' in 'base_link' is refused: quaternion"),
        (transform("base_link", "camera", (0, 0, 0), (0.5, 0, 0, 0)), "refused: its quaternion has length 0.5; give 1"),
        (transform("camera", "/camera"), "give two different frames"),
        (transform("", "camera"), "give two different frames"),
    ],
)
def test_what_is_no_transform_is_refused_and_changes_nothing(transforms, message, says):
    fix(transforms, "base_link", "camera", (1, 0, 0))
    with pytest.raises(GeometryError, match=says):
        transforms.add(message, is_static=True)
    assert transforms.fixed("base_link", "camera").translation_m == (1, 0, 0)


def trouble(transforms: LiveTransforms, *cameras: str) -> str:
    assert all(TfExtrinsics(transforms, "base_link", "/tf_static").of(camera) is None for camera in cameras)
    return TfExtrinsics(transforms, "base_link", "/tf_static").problem(cameras)


def test_what_is_missing_is_named(transforms):
    assert trouble(transforms, "left", "right") == (
        "no transform from base_link to left, right: nothing has been published on /tf_static; "
        "publish it, or set the parameter calibration_file"
    )
    fix(transforms, "chassis_1", "left_optical")
    assert "/tf_static has no frame 'base_link', 'left' (it has chassis_1, left_optical); " in trouble(
        transforms, "left"
    )
    fix(transforms, "chassis_1", "base_lnk")
    assert "has no frame 'base_link' (did you mean 'base_lnk'?)" in trouble(transforms, "left_optical")
    fix(transforms, "chassis", "base_link")
    assert (
        "no transform on /tf_static connects 'left_optical' (below 'chassis_1') with 'base_link' (below 'chassis')"
    ) in trouble(transforms, "left_optical")
    move(transforms, "base_link", "turret", stamp_ns=S)
    fix(transforms, "turret", "left")
    assert "'left' and 'base_link' are joined by /tf, which moves, and not by /tf_static alone" in trouble(
        transforms, "left"
    )
    assert transforms.trouble("odom", ["base_link"], "/tf", fixed=False).startswith("/tf has no frame 'odom' (it has ")
    fix(transforms, "odom", "chassis")
    assert "joined by /tf_static alone, so nothing moves" in transforms.trouble(
        "odom", ["base_link"], "/tf", fixed=False
    )
    assert transforms.trouble("odom", ["turret"], "/tf", fixed=False) == ""


anything = st.floats(allow_nan=True, allow_infinity=True)
names = st.sampled_from(["base_link", "/base_link", "odom", "camera", "a b", "", "/", "\u00e9", "x" * 300])


@given(st.lists(st.tuples(names, names, st.tuples(*[anything] * 7), st.integers(0, 2**31 - 1), st.booleans())))
@pytest.mark.parametrize("kind", [PlainTransforms, Tf2Transforms])
def test_whatever_is_sent_is_kept_or_refused(kind, sent):
    """Cycles, slashes, empty names, infinities, time that jumps about: a GeometryError or a transform, nothing else."""
    if kind is Tf2Transforms:
        pytest.importorskip("tf2_ros", reason="tf2_ros comes with a ROS installation and is not installed here")
    transforms = kind()
    for parent, child, numbers, stamp_s, is_static in sent:
        with contextlib.suppress(GeometryError):
            transforms.add(transform(parent, child, numbers[:3], numbers[3:], stamp_s * S), is_static)
    for target, source in (("base_link", "camera"), ("odom", "base_link"), ("camera", "odom")):
        with contextlib.suppress(GeometryError), np.errstate(all="ignore"):
            found = transforms.newest(target, source)
            assert found is None or np.isfinite(found[1].matrix).all()
        for fixed in (True, False):
            assert "\n" not in transforms.trouble(target, [source], "/tf", fixed)


quaternions = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1)
positions = st.tuples(*[st.floats(-100, 100)] * 3)


@given(st.data())
def test_agrees_with_tf2(data):
    """Random trees of moving and fixed frames, each moving one with a few poses: the same stamp, the same transform."""
    pytest.importorskip("tf2_ros", reason="tf2_ros comes with a ROS installation and is not installed here")
    ours, theirs = PlainTransforms(), Tf2Transforms()
    count = data.draw(st.integers(2, 6))
    for child in range(1, count):
        parent = data.draw(st.integers(0, child - 1))
        stamps = data.draw(st.lists(st.integers(1, 900), max_size=4, unique=True))
        for stamp_ms in stamps or [0]:
            quaternion = np.array(data.draw(quaternions))
            arguments = (f"f{parent}", f"f{child}", data.draw(positions), quaternion / np.linalg.norm(quaternion))
            for each in (ours, theirs):
                each.add(transform(*arguments, stamp_ns=100 * S + stamp_ms * MS), is_static=not stamps)
    for target in range(count):
        for source in set(range(count)) - {target}:
            mine, other = (each.newest(f"f{target}", f"f{source}") for each in (ours, theirs))
            assert (mine is None) == (other is None)
            if mine is not None:
                assert mine[0] == other[0]
                np.testing.assert_allclose(mine[1].matrix, other[1].matrix, atol=2e-5 * (1 + 100 * count))


def test_poses_of_a_buffer_survive_the_way_through_transforms(transforms):
    """What tf says of a moving base is what was sent, to the last digits."""
    rng = np.random.default_rng(3)
    for k in range(20):
        quaternion = rng.normal(size=4)
        quaternion /= np.linalg.norm(quaternion)
        position_m = rng.uniform(-500, 500, 3)
        move(transforms, "odom", "base_link", position_m, quaternion, stamp_ns=S + k * 10 * MS)
        stamp_ns, pose = transforms.newest("odom", "base_link")
        assert stamp_ns == S + k * 10 * MS
        np.testing.assert_allclose(pose.matrix, poses.pose(position_m, quaternion), atol=1e-9)


def test_without_tf2_msgs_the_node_says_what_to_do():
    try:
        import tf2_msgs.msg  # noqa: F401
    except ImportError:
        with pytest.raises(
            CalibrationError, match="extrinsics come from tf, but tf2_msgs is not installed; do else, or"
        ):
            tf_adapter.require_tf("extrinsics come from tf", "do else")
    else:
        pytest.skip("tf2_msgs is installed here")
