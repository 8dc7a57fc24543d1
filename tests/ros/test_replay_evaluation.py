# SPDX-License-Identifier: Apache-2.0
"""Replay evaluation without processes: which images make a keyframe, what is sent for it, what is packed, what is refused."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occflownet_core.errors import CalibrationError
from occflownet_core.evaluation import INVENTED, MISSED, RIGHT, WRONG_CLASS, difference
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE, label_of
from occflownet_ros import nuscenes_messages as messages
from occflownet_ros.bag import BagMessage
from occflownet_ros.bag_keyframes import NodeInputs, keyframe_messages, keyframes_of
from occflownet_ros.cdr import header_stamp_ns

pytest.importorskip("rclpy", reason="rclpy is not installed (extra 'ros')")

MS = 1_000_000
# nuScenes' trigger times, relative to the LiDAR's stamp; the next sweep of each camera comes 83 ms later.
FRONT_LEFT_NS, FRONT_NS, BACK_LEFT_NS = -43_107_000, -35_491_000, -528_000
INPUTS = NodeInputs(
    ("/L/image_rect_compressed", "/F/image_rect_compressed"), ("/L/camera_info",), "/odom", "compressed"
)


def test_a_keyframe_is_made_of_its_own_sweep_though_a_later_image_lies_nearer_to_the_lidar():
    start = 10**12
    lidar_ns = [start, start + 498 * MS]  # six camera periods later
    stamps = [
        [start + offset + k * 83 * MS for k in range(-3, 10)] for offset in (FRONT_LEFT_NS, FRONT_NS, BACK_LEFT_NS)
    ]
    # CAM_FRONT_LEFT's next image comes 40 ms after the LiDAR's stamp: nearer than its own, 43 ms before.
    assert abs(stamps[0][4] - start) < abs(stamps[0][3] - start)
    # The front camera fires in the middle of the sweep, so the nearest images to its own are those of the sweep.
    first, second = keyframes_of([(lidar_ns[1], "b"), (lidar_ns[0], "a")], stamps, 1, 60)
    assert (first.token, second.token) == ("a", "b")
    assert first.image_stamps_ns == tuple(start + o for o in (FRONT_LEFT_NS, FRONT_NS, BACK_LEFT_NS))
    assert first.set_stamp_ns == start + FRONT_NS
    assert second.image_stamps_ns == tuple(s + 498 * MS for s in first.image_stamps_ns)


def test_a_keyframe_lacks_what_is_not_there_or_belongs_to_an_earlier_one():
    keyframes = keyframes_of(
        [(100 * MS, "a"), (105 * MS, "b"), (900 * MS, "c")], [[90 * MS], [95 * MS, 880 * MS]], 1, 60
    )
    assert [k.image_stamps_ns for k in keyframes] == [(90 * MS, 95 * MS), (None, None), (None, 880 * MS)]
    assert [k.is_complete for k in keyframes] == [True, False, False]
    assert [k.set_stamp_ns for k in keyframes] == [95 * MS, None, 880 * MS]


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=8, unique=True),
    st.lists(st.lists(st.integers(0, 3000), max_size=25, unique=True).map(sorted), min_size=2, max_size=4),
    st.integers(0, 200),
)
def test_no_image_is_in_two_keyframes_and_none_is_beyond_the_window(markers, stamps_ms, window_ms):
    stamps_ns = [[s * MS for s in camera] for camera in stamps_ms]
    keyframes = keyframes_of([(m * MS, str(m)) for m in markers], stamps_ns, 0, window_ms)
    assert [k.stamp_ns for k in keyframes] == sorted(m * MS for m in markers)
    for camera in range(len(stamps_ns)):
        used = [k.image_stamps_ns[camera] for k in keyframes if k.image_stamps_ns[camera] is not None]
        assert used == sorted(set(used)) and set(used) <= set(stamps_ns[camera])
    for keyframe in keyframes:
        assert keyframe.set_stamp_ns == keyframe.image_stamps_ns[0]
        if keyframe.set_stamp_ns is not None:
            assert abs(keyframe.set_stamp_ns - keyframe.stamp_ns) <= 100 * MS
            others = [s for s in keyframe.image_stamps_ns if s is not None]
            assert all(abs(s - keyframe.set_stamp_ns) <= window_ms * MS for s in others)


def message(topic: str, stamp_ns: int) -> BagMessage:
    return BagMessage(topic, "any", stamp_ns, messages.header(stamp_ns, "frame"))


def test_a_stamp_is_read_without_decoding_in_both_byte_orders():
    little = messages.header(1_532_402_927_612_460_000, "CAM_FRONT")
    assert header_stamp_ns(little) == 1_532_402_927_612_460_000
    big = b"\x00\x00\x00\x00" + (1_532_402_927).to_bytes(4, "big") + (612_460_000).to_bytes(4, "big")
    assert header_stamp_ns(big) == 1_532_402_927_612_460_000


def test_each_keyframe_is_sent_with_calibration_its_poses_and_its_own_images_only():
    left, front = INPUTS.images
    keyframes = keyframes_of(
        [(50 * MS, "a"), (550 * MS, "b")], [[10 * MS, 90 * MS, 510 * MS], [15 * MS, 98 * MS, 515 * MS]], 1, 60
    )
    bag = [message("/L/camera_info", 5 * MS)]
    for base in (0, 80, 500):
        bag += [message("/odom", (base + 10) * MS), message(left, (base + 10) * MS)]
        bag += [message(front, (base + (18 if base == 80 else 15)) * MS), message("/odom", (base + 17) * MS)]
    sent = list(keyframe_messages(bag, keyframes, INPUTS))
    assert [keyframe.token for keyframe, _ in sent] == ["a", "b"]
    summary = [[(m.topic, m.time_ns // MS) for m in own] for _, own in sent]
    assert summary[0] == [("/L/camera_info", 5), ("/odom", 10), ("/odom", 17), (left, 10), (front, 15)]
    # The images of the sweep between them, at 90 and 98 ms, are sent never; its poses are part of the motion.
    assert summary[1][-2:] == [(left, 510), (front, 515)]
    assert [t for topic, t in summary[1] if topic == "/odom"] == [90, 97, 510, 517]


def test_a_keyframe_waits_for_a_pose_that_reaches_it_but_not_for_ever():
    keyframes = keyframes_of([(50 * MS, "a"), (550 * MS, "b")], [[10 * MS, 510 * MS], [15 * MS, 515 * MS]], 1, 60)
    images = [message(topic, s * MS) for s, topic in zip((10, 15, 510, 515), INPUTS.images * 2, strict=True)]
    sent = list(keyframe_messages([message("/odom", 1 * MS), *images], keyframes, INPUTS))
    assert [[m.time_ns // MS for m in own] for _, own in sent] == [[1, 10, 15], [510, 515]]


def test_packed_voxels_are_the_surface_in_planes_of_bytes():
    from occflownet_ros.report.page import pack_voxels

    labels = np.full((5, 4, 3), FREE, dtype=np.uint8)
    labels[1:4, 0:3, 0:3] = label_of("manmade")  # touches the border at y = 0 and z = 0, 2: only (2, 1, 1) is buried
    labels[4, 3, 2] = label_of("car")
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(pack_voxels(labels))), dtype=np.uint8)
    x, y, z, label = numbers.reshape(4, -1)
    assert len(x) == 27 - 1 + 1
    assert (2, 1, 1) not in set(zip(x.tolist(), y.tolist(), z.tolist(), strict=True))
    assert (x[-1], y[-1], z[-1], label[-1]) == (4, 3, 2, label_of("car"))
    assert (label[:-1] == label_of("manmade")).all()


def test_difference_names_each_kind():
    car, road = label_of("car"), label_of("driveable_surface")
    prediction = np.array([car, car, FREE, car, FREE, car], dtype=np.uint8).reshape(6, 1, 1)
    truth = np.array([car, road, car, FREE, FREE, road], dtype=np.uint8).reshape(6, 1, 1)
    mask = np.array([1, 1, 1, 1, 1, 0], dtype=bool).reshape(6, 1, 1)
    expected = [RIGHT, WRONG_CLASS, MISSED, INVENTED, FREE, FREE]
    assert difference(prediction, truth, mask).ravel().tolist() == expected


def test_a_missed_keyframe_counts_as_free_in_iou_and_rays():
    from occflownet_ros.ground_truth import TrueKeyframe, evaluate_keyframes, total

    grid = VoxelGrid((-4.0, -4.0, -1.0), (4.0, 4.0, 1.0), 1.0)
    truth = np.full(grid.shape, FREE, dtype=np.uint8)
    truth[:, :, 0] = label_of("driveable_surface")
    keyframes = [TrueKeyframe(t, 0, truth, np.ones(grid.shape, bool), np.array([[0.0, 0.0, 0.5]])) for t in ("a", "b")]
    answered, missed = evaluate_keyframes(keyframes, [truth, None], grid)
    assert answered.to_dict()["rays"]["ray_iou"] == 1 and missed.to_dict()["rays"]["ray_iou"] == 0
    scores = total([answered, missed], with_rays=True)
    # Half of the road is found, and nothing else is claimed: IoU 1/2 in voxels and along rays.
    assert scores["camera_mask"]["iou"]["driveable_surface"] == 0.5
    assert scores["rays"]["ray_iou"] == 0.5
    assert scores["samples"] == 2


# What is refused, each with one sentence


@pytest.fixture(scope="module")
def keyframe_bag():
    """The demo drive: twelve keyframes, with ground truth and calibration."""
    from occflownet_ros.share import share_path

    return share_path("demo", "bag")


def without_topics(bag, folder, *dropped):
    """A copy of a bag that lacks some topics."""
    from rosbags.rosbag2 import StoragePlugin, Writer

    from occflownet_ros.bag import Bag

    with Bag(bag) as source, Writer(folder, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        kept = {name: topic for name, topic in source.topics.items() if name not in dropped}
        connections = {
            name: writer.add_connection(name, topic.msgtype, typestore=messages.typestore())
            for name, topic in kept.items()
        }
        for message in source.messages(set(kept)):
            writer.write(connections[message.topic], message.time_ns, message.data)
    return folder


def refused(capsys, *arguments) -> str:
    from occflownet_ros.replay_evaluation import main

    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("replay_evaluation: ") and "\n" not in said
    return said


@pytest.fixture
def demo_bundle():
    from occflownet_ros.share import share_path

    return share_path("demo", "bundle")


def test_a_bag_without_keyframe_markers_is_refused_in_lockstep_and_with_ground_truth(
    keyframe_bag, demo_bundle, tmp_path, capsys
):
    plain = without_topics(keyframe_bag, tmp_path / "plain", "/keyframe")
    (tmp_path / "plain" / "calibration.yaml").write_text((keyframe_bag / "calibration.yaml").read_text())
    common = ("--bag", plain, "--bundle", demo_bundle, "--out", tmp_path / "out")
    assert "has no keyframe markers (topic /keyframe)" in refused(capsys, *common)
    assert "--gt cannot be matched" in refused(capsys, *common, "--mode", "realtime", "--gt", tmp_path)


def test_ground_truth_of_other_scenes_is_refused(keyframe_bag, demo_bundle, tmp_path, capsys):
    (tmp_path / "other" / "gts" / "scene-0061" / "ca9a282c9e77460f8360f564131a8af5").mkdir(parents=True)
    arguments = ("--bag", keyframe_bag, "--bundle", demo_bundle, "--out", tmp_path / "out", "--gt")
    assert "none of the 12 keyframes of bag" in refused(capsys, *arguments, tmp_path / "other")
    assert "has no folder gts" in refused(capsys, *arguments, tmp_path)


def test_a_bundle_of_other_cameras_is_refused(keyframe_bag, demo_bundle, tmp_path, capsys):
    bag = without_topics(keyframe_bag, tmp_path / "five", "/CAM_BACK/image_rect_compressed")
    said = refused(capsys, "--bag", bag, "--bundle", demo_bundle, "--out", tmp_path / "out")
    assert "has no images (image_rect_compressed or image_rect) in /CAM_BACK, which" in said


def test_a_bag_without_intrinsics_needs_a_calibration(keyframe_bag, demo_bundle, tmp_path, capsys):
    bag = without_topics(keyframe_bag, tmp_path / "bare", "/CAM_FRONT/camera_info")
    said = refused(capsys, "--bag", bag, "--bundle", demo_bundle, "--out", tmp_path / "out")
    assert "has no camera_info of every camera" in said


def test_a_bags_own_transforms_are_its_calibration(keyframe_bag, tmp_path):
    from occflownet_core.rig_file import load_rig
    from occflownet_ros.bag import Bag
    from occflownet_ros.bag_calibration import save_bags_rig
    from occflownet_ros.bag_keyframes import find_inputs

    expected = load_rig(keyframe_bag / "calibration.yaml")
    with Bag(keyframe_bag) as bag:
        inputs = find_inputs(bag, expected.names)
    save_bags_rig(keyframe_bag, inputs, expected.names, "base_link", tmp_path / "rig.yaml")
    assert load_rig(tmp_path / "rig.yaml") == expected  # bit for bit: Camera compares arrays exactly
    with pytest.raises(CalibrationError, match="no transform from chassis to CAM_BACK, CAM_BACK_LEFT"):
        save_bags_rig(keyframe_bag, inputs, expected.names, "chassis", tmp_path / "none.yaml")


def test_what_lies_in_out_is_not_replaced_unasked(keyframe_bag, demo_bundle, tmp_path, capsys):
    common = ("--bag", keyframe_bag, "--bundle", demo_bundle, "--out")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "report.json").write_text("{}")
    assert "holds an evaluation already" in refused(capsys, *common, tmp_path / "older")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "holds thesis.tex" in refused(capsys, *common, tmp_path / "mine", "--force")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("deadline_ms", "is not NAME:=VALUE"),
        ("deadline:=3", "there is no parameter 'deadline'"),
        ("deadline_ms:=soon", "deadline_ms is 'soon'"),
        ("anchor_camera:=CAM_TOP", "anchor_camera is 'CAM_TOP'"),
    ],
)
def test_parameters_are_checked_before_anything_runs(keyframe_bag, demo_bundle, tmp_path, capsys, assignment, sentence):
    common = ("--bag", keyframe_bag, "--bundle", demo_bundle, "--out", tmp_path / "out")
    assert sentence in refused(capsys, *common, "--param", assignment)


def test_a_rate_belongs_to_real_time(capsys):
    from occflownet_ros.replay_evaluation import main

    with pytest.raises(SystemExit) as ended:
        main(["--bag", "b", "--bundle", "m", "--out", "o", "--rate", "2"])
    assert ended.value.code == 2 and "--mode realtime" in capsys.readouterr().err


def test_the_page_is_one_file_and_its_data_cannot_end_its_element():
    from occflownet_ros.report import content, page

    grid = VoxelGrid((-4.0, -4.0, -1.0), (4.0, 4.0, 1.0), 1.0)
    record = content.FrameRecord("</script><b>", 10**18, 10**18, True, "", {}, 0, None)
    report = content.ReplayReport(
        content.ModelSource("m", "m", "0", "onnxruntime", 0.5, {}),
        content.BagSource("b", "0", 0, 1, "none"),
        content.ReplayMode("lockstep", None, "A", {}),
        content.this_machine(),
        "settings",
        None,
        None,
        [record],
        {},
        {},
        {},
        {},
        1.0,
    )
    labels = np.full(grid.shape, FREE, dtype=np.uint8)
    image = np.zeros((6, 8, 3), dtype=np.uint8)
    html = page.build_page(report, grid, ("A",), [page.PageFrame(0, labels, None, None, {"A": image})])
    data = re.search(r'<script type="application/json" id="content">(.*?)</script>', html, re.DOTALL).group(1)
    assert json.loads(data)["report"]["frames"][0]["token"] == "</script><b>"
    # Nothing is loaded: no element refers to anything but itself or data.
    markup = re.sub(r"<script.*?</script>|<style.*?</style>", "", html, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!data:)', markup)
    assert not re.findall(r"url\((?!data:)|@import", "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL)))
