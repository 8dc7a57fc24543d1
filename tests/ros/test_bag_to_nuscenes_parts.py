# SPDX-License-Identifier: Apache-2.0
"""The parts of bag_to_nuscenes on their own: poses over time, choosing keyframes, clouds, tables."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from occflownet_core.nuscenes_tables import NuscenesTables
from occflownet_core.poses import RecordedPose
from occflownet_ros.drive_plan import choose_stamps
from occflownet_ros.drive_recording import SensorStamps
from occflownet_ros.point_cloud import sweep_of_cloud
from occflownet_ros.topic_map import LidarTopic
from occflownet_ros.transform_tree import PoseTrack, TransformTree

MILLISECOND = 1_000_000
coordinates = st.floats(-1e3, 1e3, allow_nan=False, width=32)
angles = st.floats(-3, 3, allow_nan=False, width=32)


@st.composite
def recorded_poses(draw) -> RecordedPose:
    turn = Rotation.from_euler("ZYX", [draw(angles), draw(angles), draw(angles)])
    return RecordedPose([draw(coordinates) for _ in range(3)], np.roll(turn.as_quat(), 1))


@st.composite
def tracks(draw) -> dict[int, RecordedPose]:
    stamps = draw(st.lists(st.integers(0, 10**10), min_size=2, max_size=6, unique=True))
    return {stamp: draw(recorded_poses()) for stamp in sorted(stamps)}


# Poses over time


@given(tracks(), st.randoms())
def test_a_track_gives_recorded_poses_as_recorded(track, random):
    shuffled = list(track.items())
    random.shuffle(shuffled)
    poses_over_time = PoseTrack(shuffled, max_gap_ns=1)
    for stamp, pose in track.items():
        assert poses_over_time.at(stamp) is pose  # to the last bit, whatever the gaps
    stamps = list(track)
    assert poses_over_time.range_ns == (stamps[0], stamps[-1])
    assert poses_over_time.at(stamps[0] - 1) is None
    assert poses_over_time.at(stamps[-1] + 1) is None


@given(tracks(), st.floats(0, 1))
def test_a_track_interpolates_as_scipy_does(track, share):
    first, second = list(track)[:2]
    stamp = first + int(share * (second - first))
    assume(first < stamp < second)
    a, b = track[first], track[second]
    rotations = Rotation.from_matrix([a.matrix[:3, :3], b.matrix[:3, :3]])
    assume((rotations[0].inv() * rotations[1]).magnitude() < 3.1)  # half a turn can go either way
    fraction = (stamp - first) / (second - first)
    pose = PoseTrack(track.items(), max_gap_ns=10**10).at(stamp)
    between = Slerp([0, 1], rotations)(fraction).as_matrix()
    np.testing.assert_allclose(pose.matrix[:3, :3], between, atol=1e-6)
    np.testing.assert_allclose(
        pose.translation_m, (1 - fraction) * a.matrix[:3, 3] + fraction * b.matrix[:3, 3], atol=1e-9
    )


def test_a_track_does_not_bridge_gaps():
    still = RecordedPose((0, 0, 0), (1, 0, 0, 0))
    track = PoseTrack([(0, still), (100, still), (201, still)], max_gap_ns=100)
    assert track.at(50) is not None
    assert track.at(150) is None


@given(recorded_poses(), recorded_poses(), recorded_poses())
def test_a_tree_composes_up_and_down(world_from_base, base_from_arm, base_from_camera):
    tree = TransformTree()
    tree.add("world", "base", PoseTrack([(5, world_from_base)], 1))
    tree.add("base", "/arm", base_from_arm)  # old drivers write a slash
    tree.add("base", "camera", base_from_camera)
    assert tree.path("base", "camera").at(0) is base_from_camera
    world, arm, camera = (pose.matrix for pose in (world_from_base, base_from_arm, base_from_camera))
    scale = 1e-9 * (1 + np.abs(camera[:3, 3]).max() + np.abs(arm[:3, 3]).max())
    np.testing.assert_allclose(tree.path("arm", "camera").at(0).matrix, np.linalg.inv(arm) @ camera, atol=scale)
    np.testing.assert_allclose(tree.path("world", "camera").at(5).matrix, world @ camera, atol=scale)
    np.testing.assert_allclose(
        tree.path("camera", "world").at(5).matrix, np.linalg.inv(world @ camera), atol=scale * 10
    )
    assert tree.path("world", "camera").at(6) is None
    assert tree.path("world", "camera").range_ns == (5, 5)
    assert tree.path("world", "moon") is None
    assert tree.path("base", "camera").is_static
    assert not tree.path("world", "base").is_static


def test_frames_in_a_circle_do_not_hang():
    tree = TransformTree()
    still = RecordedPose((0, 0, 0), (1, 0, 0, 0))
    tree.add("a", "b", still)
    tree.add("b", "a", still)
    assert tree.path("c", "a") is None


# Choosing keyframes


@given(st.integers(10, 200), st.integers(20, 2000), st.integers(2, 200))
def test_stamps_are_chosen_at_the_rate(period_ms, interval_ms, count):
    stamps = [period_ms * MILLISECOND * i for i in range(count)]
    chosen = choose_stamps(stamps, interval_ms * MILLISECOND)
    assert chosen[0] == stamps[0]
    assert set(chosen) <= set(stamps)
    gaps = np.diff(chosen)
    assert (gaps >= interval_ms * MILLISECOND / 2).all()
    if interval_ms >= period_ms:
        # Even in time: nowhere further from the moments that are due than half a period of the sensor.
        due = np.arange(len(chosen)) * interval_ms * MILLISECOND
        assert np.abs(np.array(chosen) - due).max() <= period_ms * MILLISECOND / 2 + 1
    else:
        assert chosen == stamps


def test_keyframes_that_are_all_there_is_are_all_chosen():
    stamps = (np.array([0, 0.49, 1.0, 1.52, 1.99, 2.5]) * 1e9).astype(int).tolist()
    assert choose_stamps(stamps, 500 * MILLISECOND) == stamps
    assert choose_stamps([7], 1) == [7]
    assert choose_stamps([], 1) == []


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(-50, 1050), st.integers(0, 300))
def test_nearest_stamp_is_the_nearest(stamps_ms, asked_ms, limit_ms):
    sensor = SensorStamps("/x", [ms * MILLISECOND for ms in stamps_ms])
    sensor.finish()
    found = sensor.nearest(asked_ms * MILLISECOND, limit_ms)
    distances = [abs(ms - asked_ms) for ms in stamps_ms if ms > 0]  # a stamp of 0 is none
    if not distances or min(distances) > limit_ms:
        assert found is None
    else:
        assert abs(found // MILLISECOND - asked_ms) == min(distances)


# Point clouds

_CODES = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 8: "d"}


@given(st.data())
def test_clouds_of_any_layout_are_read_as_struct_reads_them(data):
    names = ["x", "y", "z", *data.draw(st.lists(st.sampled_from(["intensity", "ring", "extra"]), unique=True))]
    kinds = [data.draw(st.sampled_from([7, 8] if name in "xyz" else sorted(_CODES))) for name in names]
    order = data.draw(st.sampled_from("<>"))
    offsets, at = [], 0
    for kind in kinds:
        at += data.draw(st.integers(0, 3))
        offsets.append(at)
        at += struct.calcsize(_CODES[kind])
    step = at + data.draw(st.integers(0, 4))
    width, height, padding = (data.draw(st.integers(low, 4)) for low in (1, 1, 0))
    row_step = width * step + padding
    buffer, expected = bytearray(row_step * height), []
    for row in range(height):
        for column in range(width):
            point = {name: data.draw(st.integers(1, 100)) for name in names}
            for name, kind, offset in zip(names, kinds, offsets, strict=True):
                struct.pack_into(order + _CODES[kind], buffer, row * row_step + column * step + offset, point[name])
            expected.append([point.get(name, 0) for name in ("x", "y", "z", "intensity", "ring")])
    fields = [SimpleNamespace(name=n, offset=o, datatype=k) for n, o, k in zip(names, offsets, kinds, strict=True)]
    message = SimpleNamespace(
        fields=fields, is_bigendian=order == ">", point_step=step, row_step=row_step, width=width, height=height
    )
    message.data = np.frombuffer(bytes(buffer), np.uint8)
    sweep = sweep_of_cloud(message, 0, LidarTopic("/points"))
    np.testing.assert_array_equal(sweep.points, np.array(expected, dtype=np.float32))
    assert sweep.points.dtype == np.float32
    assert sweep.dropped == 0


def small_cloud(**columns: np.ndarray) -> SimpleNamespace:
    table = np.zeros(len(columns["x"]), dtype=[(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        table[name] = values
    codes = {
        np.dtype(kind): code for code, kind in enumerate(("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"), start=1)
    }
    fields = [
        SimpleNamespace(name=name, offset=table.dtype.fields[name][1], datatype=codes[table.dtype.fields[name][0]])
        for name in table.dtype.names
    ]
    size = table.dtype.itemsize
    return SimpleNamespace(
        fields=fields,
        is_bigendian=False,
        point_step=size,
        row_step=size * len(table),
        width=len(table),
        height=1,
        data=np.frombuffer(table.tobytes(), np.uint8),
    )


@pytest.mark.parametrize(
    ("times", "unit_s"),
    [
        (np.array([-0.05, 0.0, 0.02], dtype="f4"), 1.0),  # Velodyne: seconds before the stamp
        (np.array([0, 20_000_000, 50_000_000], dtype="u4"), 1e-9),  # Ouster: nanoseconds after it
        (np.array([1.7e9 + 5, 1.7e9 + 5.02, 1.7e9 + 5.05]), 1.0),  # Hesai: since the epoch
    ],
)
def test_times_are_relative_or_absolute(times, unit_s):
    one = np.ones(3, dtype="f4")
    stamp_ns = 1_700_000_005_000_000_000
    sweep = sweep_of_cloud(small_cloud(x=one, y=one, z=one, t=times), stamp_ns, LidarTopic("/p", "", {}, "t", unit_s))
    seconds = times * unit_s if times.max() * unit_s < 1e6 else times - 1.7e9 - 5
    np.testing.assert_allclose((sweep.time_ns - stamp_ns) / 1e9, seconds, atol=1e-6)


# Tables


def test_rows_of_a_chain_know_their_neighbours(tmp_path):
    tables = NuscenesTables("test")
    tables.add_scene("s", "scene", "log", [("k0", 1), ("k1", 2), ("k2", 3)])
    tables.add_scene("t", "other", "log", [("l0", 4)])
    for token, chain in (("a", 1), ("b", 2), ("c", 1)):
        tables.add_measurement(token, "k0", "m", 1, "x.jpg", (0, 0, 0), (1, 0, 0, 0), chain)
    links = {row["token"]: (row["prev"], row["next"]) for row in tables.rows["sample"] + tables.rows["sample_data"]}
    assert links == {
        "k0": ("", "k1"),
        "k1": ("k0", "k2"),
        "k2": ("k1", ""),
        "l0": ("", ""),
        "a": ("", "c"),
        "b": ("", ""),
        "c": ("a", ""),
    }
    tables.write(tmp_path, "v")
    written = {path.stem for path in (tmp_path / "v").iterdir()}
    assert len(written) == 13
    assert "lidarseg" not in written
