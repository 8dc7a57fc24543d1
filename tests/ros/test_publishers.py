# SPDX-License-Identifier: Apache-2.0
"""Outputs of a real lifecycle node: lazy, limited in rate, changed by parameters, deleting markers when classes vanish."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import rclpy
from hypothesis import given
from hypothesis import strategies as st
from nav_msgs.msg import OccupancyGrid
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image, PointCloud2
from std_msgs.msg import Float64, UInt8MultiArray
from visualization_msgs.msg import Marker, MarkerArray

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.depth_tables import DepthTable
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE
from occflownet_core.lift_tables import DepthBins, LiftSpec
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_core.runtime.bundle import Bundle
from occflownet_ros import conversions, depth_images, publishers
from occflownet_ros.parameters import Settings
from occflownet_ros.publishers import STAGES, Outputs, RateLimit

GRID = VoxelGrid((0, 0, 0), (4, 4, 4), 1.0)
KINDS = {"occupancy": PointCloud2, "labels": UInt8MultiArray, "costmap": OccupancyGrid, "voxels": MarkerArray}
CAMERAS = ("LEFT", "RIGHT-2")
FORWARD = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0.5], [0, -1, 0, 0.5], [0, 0, 0, 1]])  # at y = z = 0.5, looking along x
INF = np.inf


def rig(x_m: float = -1.0) -> CameraRig:
    """Two cameras of 6 x 6 pixels and a focal length of 6, at the given x, both looking along the row of voxels y = z = 0."""
    pose = FORWARD.copy()
    pose[0, 3] = x_m
    intrinsic = np.array([[6.0, 0, 3], [0, 6, 3], [0, 0, 1]])
    return CameraRig(tuple(Camera(name, 6, 6, intrinsic, pose) for name in CAMERAS))


def frame_with(*labels: int) -> OccupancyFrame:
    voxels = np.full(GRID.shape, FREE, dtype=np.uint8)
    for column, label in enumerate(labels):
        voxels[column, 0, 0] = label
    return OccupancyFrame(0, "base_link", GRID, voxels)


@pytest.fixture
def graph(monkeypatch, tmp_path):
    """A lifecycle node with outputs, and a listener, in one private graph."""
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=1 + os.getpid() % 100)
    node, listener = LifecycleNode("talker", context=context), Node("listener", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    executor.add_node(listener)
    lift = LiftSpec(GRID, DepthBins(1.0, 5.0, 1.0), feature_height=2, feature_width=4)
    bundle = Bundle(tmp_path, "by hand", CAMERAS, 64, 32, GRID, lift, occupancy_threshold=0.4)
    outputs = Outputs(node, Settings(voxels_max_rate_hz=0.0, depth_max_rate_hz=0.0), bundle, print)
    node.trigger_configure()
    node.trigger_activate()

    def spin_until(condition):
        until_s = time.monotonic() + 5
        while not condition() and time.monotonic() < until_s:
            executor.spin_once(timeout_sec=0.02)
        assert condition()

    yield node, listener, outputs, spin_until
    outputs.close()
    executor.shutdown()
    listener.destroy_node()
    node.destroy_node()
    rclpy.shutdown(context=context)


@pytest.mark.parametrize("name", [*KINDS, "depth"])
def test_nothing_is_built_that_nobody_hears(graph, monkeypatch, name):
    _, listener, outputs, spin_until = graph
    outputs.set_cameras(rig(), CAMERAS)
    built = built_by(outputs, monkeypatch)
    outputs.publish(frame_with(4))
    assert built == []
    publisher = outputs._depth._images[1] if name == "depth" else {o.name: o.publisher for o in outputs._outputs}[name]
    topic = "depth/RIGHT_2/image" if name == "depth" else name
    heard = []
    subscription = listener.create_subscription(KINDS.get(name, Image), f"/talker/{topic}", heard.append, 10)
    spin_until(lambda: publisher.get_subscription_count() == 1)
    spin_until(lambda: outputs.publish(frame_with(4)) or heard)
    assert set(built) == {name}
    listener.destroy_subscription(subscription)
    spin_until(lambda: publisher.get_subscription_count() == 0)
    built.clear()
    outputs.publish(frame_with(4))
    assert built == []


def test_latency_that_nobody_hears_is_not_published(graph, monkeypatch):
    _, _, outputs, _ = graph
    published = []
    for stage, publisher in outputs._latency.items():
        monkeypatch.setattr(publisher, "publish", lambda message, s=stage: published.append(s))
    outputs.publish_latency(dict.fromkeys(STAGES, 1.0))
    assert published == []


def test_markers_are_deleted_when_and_only_when_a_class_vanishes(graph):
    _, listener, outputs, spin_until = graph
    heard = []
    listener.create_subscription(MarkerArray, "/talker/voxels", heard.append, 10)
    spin_until(lambda: outputs._outputs[-1].publisher.get_subscription_count() == 1)
    shown = []
    for labels in ((4, 11), (4, 11), (4, 11, 16), (4, 16), (), (4,)):
        outputs.publish(frame_with(*labels))
        spin_until(lambda: len(heard) == len(shown) + 1)
        shown.append([m.ns if m.action == Marker.ADD else "delete all" for m in heard[-1].markers])
    assert shown == [
        ["delete all", "car", "driveable_surface"],  # what an earlier run may have left
        ["car", "driveable_surface"],
        ["car", "driveable_surface", "vegetation"],
        ["delete all", "car", "vegetation"],
        ["delete all"],
        ["car"],
    ]
    outputs.restart()
    outputs.publish(frame_with(4))
    spin_until(lambda: len(heard) == 7)
    assert heard[-1].markers[0].action == Marker.DELETEALL


def test_latency_goes_out_per_stage(graph):
    _, listener, outputs, spin_until = graph
    heard = {stage: [] for stage in STAGES}
    for stage in STAGES:
        listener.create_subscription(Float64, f"/talker/latency/{stage}", heard[stage].append, 10)
    spin_until(lambda: all(p.get_subscription_count() for p in outputs._latency.values()))
    outputs.publish_latency({stage: float(k) for k, stage in enumerate(STAGES)})
    spin_until(lambda: all(heard.values()))
    assert [heard[stage][0].data for stage in STAGES] == list(range(len(STAGES)))


def test_closing_destroys_every_publisher(graph):
    node, _, outputs, _ = graph
    before = len(list(node.publishers))
    outputs.close()
    assert before - len(list(node.publishers)) == 5 + len(STAGES) + 2 * len(CAMERAS)


def test_five_hertz_of_a_twelve_hertz_stream():
    limit = RateLimit()
    passed = sum(limit.allows(k / 12, 5.0) for k in range(120))  # ten seconds
    assert passed in (50, 51)


def test_no_limit_lets_all_through():
    limit = RateLimit()
    assert all(limit.allows(k / 100, 0.0) for k in range(10))


@given(st.lists(st.floats(0.001, 3.0), min_size=1, max_size=60), st.floats(0.5, 50.0))
def test_rate_limit_holds_over_any_stretch(gaps_s, max_rate_hz):
    limit, now_s, passed_s = RateLimit(), 0.0, []
    for gap_s in gaps_s:
        now_s += gap_s
        if limit.allows(now_s, max_rate_hz):
            passed_s.append(now_s)
    assert passed_s[0] == gaps_s[0]  # the first always passes
    for first in range(len(passed_s)):
        for last in range(first + 1, len(passed_s)):
            # Within any stretch at most one more than the rate allows.
            assert last - first <= (passed_s[last] - passed_s[first]) * max_rate_hz + 1 + 1e-6


def test_the_publishers_names_are_those_that_are_documented(graph):
    node, *_ = graph
    topics = {topic for topic, _ in node.get_topic_names_and_types()}
    expected = {"occupancy", "labels", "voxels", "costmap", "mesh", *(f"latency/{stage}" for stage in STAGES)}
    expected |= {f"depth/{camera}/{end}" for camera in ("LEFT", "RIGHT_2") for end in ("image", "camera_info")}
    assert {f"/talker/{name}" for name in expected} <= topics


@pytest.mark.parametrize(
    ("camera", "topic"),
    [("CAM_FRONT", "CAM_FRONT"), ("front-left", "front_left"), ("0", "_0"), ("caméra/2", "cam_ra_2")],
)
def test_depth_topics_are_valid_names(camera, topic):
    assert depth_images.topic(camera) == f"~/depth/{topic}"


def built_by(outputs, monkeypatch) -> list[str]:
    """Names of what the outputs build, from now on."""
    built = []
    for output in outputs._outputs:
        build = output.build
        monkeypatch.setattr(output, "build", lambda f, b=build, n=output.name: (built.append(n), b(f))[1])
    publish = outputs._depth.publish
    monkeypatch.setattr(outputs._depth, "publish", lambda *a: (built.append("depth"), publish(*a)))
    return built


def heard_by(listener, spin_until, outputs) -> dict[str, list]:
    """Lists that fill with what each output says; all are matched when this returns."""
    heard = {name: [] for name in KINDS}
    for name, kind in KINDS.items():
        listener.create_subscription(kind, f"/talker/{name}", heard[name].append, 50)
    heard["depth"] = hear_depth(listener, "LEFT")[0]
    spin_until(lambda: all(o.publisher.get_subscription_count() for o in outputs._outputs))
    spin_until(lambda: outputs._depth._images[0].get_subscription_count())
    return heard


def hear_depth(listener, topic: str) -> tuple[list, list]:
    images, infos = [], []
    listener.create_subscription(Image, f"/talker/depth/{topic}/image", images.append, 50)
    listener.create_subscription(CameraInfo, f"/talker/depth/{topic}/camera_info", infos.append, 50)
    return images, infos


def depth_of(message: Image) -> list:
    """The image's rows as a subscriber reads them."""
    assert (message.encoding, message.is_bigendian, message.step) == ("32FC1", False, 4 * message.width)
    return np.frombuffer(message.data, "<f4").reshape(message.height, message.width).tolist()


def test_every_output_keeps_its_own_limit_and_takes_a_new_one(graph, monkeypatch):
    """Ten seconds of 12 Hz: each output in turn is held to 5 Hz while the others publish every set."""
    _, listener, outputs, spin_until = graph
    outputs.set_cameras(rig(), CAMERAS)
    heard_by(listener, spin_until, outputs)
    built, now_s = built_by(outputs, monkeypatch), [0.0]
    monkeypatch.setattr(publishers, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    names = [*KINDS, "depth"]
    for limited in names:
        rates_hz = {f"{name}_max_rate_hz": 5.0 if name == limited else 0.0 for name in names}
        outputs.settings = Settings(**rates_hz)
        built.clear()
        for _ in range(120):
            outputs.publish(frame_with(4))
            now_s[0] += 1 / 12
        assert {name: built.count(name) for name in names if name != limited} == dict.fromkeys(
            set(names) - {limited}, 120
        )
        assert built.count(limited) in (50, 51)


def test_depth_is_rendered_for_cameras_that_someone_listens_to(graph, monkeypatch):
    """LEFT looks along x from x = -1 at a voxel that begins at x = 2: 3 m. Nobody listens to RIGHT."""
    _, listener, outputs, spin_until = graph
    made = []
    build = DepthTable.build
    monkeypatch.setattr(DepthTable, "build", lambda *a: (made.append(a[0].name), build(*a))[1])
    outputs.settings = Settings(depth_max_rate_hz=0.0, depth_width_px=8)
    frame = OccupancyFrame(7_000_000_009, "base_link", GRID, frame_with().labels)
    frame.labels[2, 0, 0] = 4
    outputs.set_cameras(rig(), ("left_optical", "right_optical"))
    outputs.publish(frame)
    assert made == []
    images, infos = hear_depth(listener, "LEFT")
    spin_until(lambda: outputs._depth._images[0].get_subscription_count())
    spin_until(lambda: outputs._depth._infos[0].get_subscription_count())

    def told() -> bool:
        outputs.publish(frame)
        return images and infos

    spin_until(told)
    assert made == ["LEFT"]
    image, info = images[-1], infos[-1]
    assert (image.width, image.height) == (info.width, info.height) == (6, 6)  # never larger than the camera's own
    expected = np.full((6, 6), INF)
    expected[2:4, 2:4] = (
        3.0  # half a pixel is a twelfth of a metre per metre: 0.25 m at 3 m, inside; the next is 0.75 m
    )
    assert depth_of(image) == expected.tolist()
    for message in (image, info):
        assert conversions.nanoseconds(message.header.stamp) == 7_000_000_009
        assert message.header.frame_id == "left_optical"
    assert info.k.tolist() == [6, 0, 3, 0, 6, 3, 0, 0, 1]
    assert info.p.tolist() == [6, 0, 3, 0, 0, 6, 3, 0, 0, 0, 1, 0]
    assert (info.distortion_model, list(info.d), info.r.tolist()) == ("plumb_bob", [0] * 5, np.eye(3).ravel().tolist())


def test_depth_tables_follow_calibration_and_size_and_nothing_else(graph, monkeypatch):
    _, listener, outputs, spin_until = graph
    made = []
    build = DepthTable.build
    monkeypatch.setattr(DepthTable, "build", lambda *a: (made.append(a[0]), build(*a))[1])
    images, infos = hear_depth(listener, "LEFT")
    spin_until(lambda: outputs._depth._images[0].get_subscription_count())
    wall = frame_with()
    wall.labels[2] = 4

    def seen_next() -> list:
        images.clear()
        spin_until(lambda: outputs.publish(wall) or images)
        return np.unique(depth_of(images[-1])).tolist()

    outputs.publish(wall)
    assert not made  # calibration is not known yet
    outputs.set_cameras(rig(), CAMERAS)
    assert seen_next() == [3.0, INF]
    outputs.set_cameras(rig(), CAMERAS)  # said again
    assert seen_next() == [3.0, INF] and len(made) == 1
    outputs.set_cameras(rig(x_m=-0.5), CAMERAS)
    images.clear()
    spin_until(lambda: outputs.publish(wall) or len(made) == 2)
    spin_until(lambda: seen_next() == [2.5, INF])
    outputs.settings = Settings(depth_max_rate_hz=0.0, depth_width_px=8)
    assert seen_next() == [2.5, INF] and len(made) == 2  # both are larger than the camera's own
    outputs.set_cameras(None, ())
    images.clear(), infos.clear()
    for _ in range(3):
        outputs.publish(wall)
    spin_until(lambda: True)
    assert images == infos == [] and len(made) == 2


def test_parameters_of_the_looks_take_effect_at_once(graph):
    """Each: what to set, the output, how to read it, before and after."""
    _, listener, outputs, spin_until = graph
    camera = Camera("LEFT", 32, 16, np.array([[8.0, 0, 16], [0, 8, 8], [0, 0, 1]]), FORWARD)
    outputs.set_cameras(CameraRig((camera, Camera("RIGHT-2", 32, 16, camera.intrinsic, FORWARD))), CAMERAS)
    heard = heard_by(listener, spin_until, outputs)
    frame = frame_with(4)  # a car's voxel, centre at 0.5 m
    every_set = {f"{name}_max_rate_hz": 0.0 for name in heard}
    cases = [
        ({"voxel_alpha": 0.25}, "voxels", lambda m: m.markers[-1].color.a, pytest.approx(0.9), 0.25),
        ({"voxel_coloring": "height"}, "voxels", lambda m: len(m.markers[-1].colors), 0, 1),
        ({"costmap_min_height_m": 0.6}, "costmap", lambda m: m.data[0], 100, 0),
        ({"costmap_max_height_m": 0.4}, "costmap", lambda m: m.data[0], 100, 0),
        ({"costmap_blocking_classes": ["bus", "truck"]}, "costmap", lambda m: m.data[0], 100, 0),
        ({"depth_width_px": 16}, "depth", lambda m: (m.width, m.height), (32, 16), (16, 8)),
    ]
    for change, name, read, before, after in cases:
        for values, expected in ((every_set, before), ({**every_set, **change}, after), (every_set, before)):
            outputs.settings = Settings.from_values(values)
            messages = heard[name]
            messages.clear()
            spin_until(lambda m=messages: m or outputs.publish(frame))
            spin_until(lambda m=messages, r=read, e=expected: outputs.publish(frame) or r(m[-1]) == e)
