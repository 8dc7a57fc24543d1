# SPDX-License-Identifier: Apache-2.0
"""Outputs of a real lifecycle node: lazy, limited in rate, deleting markers when classes vanish."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import rclpy
from hypothesis import given
from hypothesis import strategies as st
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from std_msgs.msg import Float64
from visualization_msgs.msg import Marker, MarkerArray

from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_ros.parameters import Settings
from occflownet_ros.publishers import STAGES, Outputs, RateLimit

GRID = VoxelGrid((0, 0, 0), (4, 4, 4), 1.0)


def frame_with(*labels: int) -> OccupancyFrame:
    voxels = np.full(GRID.shape, FREE, dtype=np.uint8)
    for column, label in enumerate(labels):
        voxels[column, 0, 0] = label
    return OccupancyFrame(0, "base_link", GRID, voxels)


@pytest.fixture
def graph(monkeypatch):
    """A lifecycle node with outputs, and a listener, in one private graph."""
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=1 + os.getpid() % 100)
    node, listener = LifecycleNode("talker", context=context), Node("listener", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    executor.add_node(listener)
    outputs = Outputs(node, Settings(voxels_max_rate_hz=0.0))
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


def test_nothing_is_built_that_nobody_hears(graph, monkeypatch):
    _, listener, outputs, spin_until = graph
    built = []
    for output in outputs._outputs:
        build = output.build
        monkeypatch.setattr(output, "build", lambda f, b=build, n=output.name: (built.append(n), b(f))[1])
    outputs.publish(frame_with(4))
    assert built == []
    heard = []
    listener.create_subscription(MarkerArray, "/talker/voxels", heard.append, 10)
    spin_until(lambda: outputs._outputs[-1].publisher.get_subscription_count() == 1)
    outputs.publish(frame_with(4))
    spin_until(lambda: heard)
    assert built == ["voxels"]


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
    assert before - len(list(node.publishers)) == 4 + len(STAGES)
    outputs._outputs, outputs._latency = [], {}


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
    expected = {"occupancy", "labels", "voxels", "costmap", *(f"latency/{stage}" for stage in STAGES)}
    assert {f"/talker/{name}" for name in expected} <= topics
