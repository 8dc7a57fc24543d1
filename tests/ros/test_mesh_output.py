# SPDX-License-Identifier: Apache-2.0
"""~/mesh of a real lifecycle node and the demo model's field: lazy, newest wins, ends at once, says why there is none."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from itertools import islice

import numpy as np
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from visualization_msgs.msg import Marker

from occflownet_core.mesh import extract_mesh
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_core.runtime.bundle import load_bundle
from occflownet_core.runtime.factory import create_engine
from occflownet_core.runtime.field_query import FieldQuery
from occflownet_ros import mesh_output
from occflownet_ros.engine_inputs import bag_inputs
from occflownet_ros.newest_worker import NewestWorker
from occflownet_ros.parameters import Settings
from occflownet_ros.publishers import Outputs
from occflownet_ros.share import share_path

STAMP_NS = 1_532_402_927_612_460_001
EVERY_SET = Settings(mesh_max_rate_hz=0.0, mesh_budget_ms=60_000.0, mesh_cell_m=0.8)


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(share_path("demo", "bundle"))


@pytest.fixture(scope="module")
def frame(bundle) -> OccupancyFrame:
    """The first set of the demo drive."""
    engine = create_engine(bundle, "onnxruntime", threads=1)
    engine.keep_field = True
    (inputs,) = islice(bag_inputs(share_path("demo", "bag"), bundle), 1)
    engine.calibrate(inputs.rig)
    seen = engine.infer(inputs.images, None)
    return OccupancyFrame(STAMP_NS, "base_link", bundle.grid, seen.labels, field_features=seen.field_features)


class Graph:
    """Outputs of a lifecycle node, and a listener that need not listen."""

    def __init__(self, bundle, settings: Settings = EVERY_SET) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=1 + os.getpid() % 100)
        self.node, self.listener = LifecycleNode("talker", context=self.context), Node("ear", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.listener)
        self.said: list[tuple[str, str]] = []
        self.heard: list[Marker] = []
        self.outputs = Outputs(self.node, settings, bundle, lambda *said: self.said.append(said))
        self.node.trigger_configure()
        self.node.trigger_activate()

    def listen(self) -> None:
        self.listener.create_subscription(Marker, "/talker/mesh", self.heard.append, 10)
        self.until(self.outputs._mesh._publisher.get_subscription_count)

    def until(self, condition) -> None:
        until_s = time.monotonic() + 20
        while not condition() and time.monotonic() < until_s:
            self.executor.spin_once(timeout_sec=0.02)
        assert condition()

    def close(self) -> None:
        self.outputs.close()
        self.executor.shutdown()
        self.listener.destroy_node()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    made = []

    def build(*arguments) -> Graph:
        made.append(Graph(*arguments))
        return made[-1]

    yield build
    for graph in made:
        graph.close()


def mesh_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mesh"]


def test_a_mesh_is_built_for_who_listens_and_is_the_fields_surface(make, bundle, frame):
    it = make(bundle)
    assert not it.outputs.wants_field() and not mesh_threads()
    it.listen()
    assert it.outputs.wants_field()
    it.outputs.publish(dataclasses.replace(frame, field_features=None))  # a set that was not asked for
    assert not mesh_threads()
    it.outputs.publish(frame)
    it.until(lambda: it.heard)
    (marker,) = it.heard
    assert (marker.type, marker.action, marker.header.frame_id) == (Marker.TRIANGLE_LIST, Marker.ADD, "base_link")
    assert marker.header.stamp.sec * 10**9 + marker.header.stamp.nanosec == STAMP_NS
    field = FieldQuery(bundle).field(frame.field_features)
    mesh = extract_mesh(field, bundle.lift.grid, bundle.occupancy_threshold, levels=0)
    corners_m, colors_rgb = mesh.triangle_soup()
    np.testing.assert_array_equal(np.float32([(p.x, p.y, p.z) for p in marker.points]), corners_m)
    colors = np.array([(c.r, c.g, c.b) for c in marker.colors])
    np.testing.assert_array_equal((255 * colors).round().astype(np.uint8), colors_rgb)
    it.until(lambda: it.outputs.mesh_report().triangles)
    report = it.outputs.mesh_report()
    assert (report.counters, report.cell_m, report.triangles) == ({"built": 1}, 0.8, len(mesh.triangles))
    assert report.is_heard and report.took_ms > 0


def test_no_more_meshes_than_the_rate_allows(make, bundle):
    it = make(bundle, Settings(mesh_max_rate_hz=0.001))
    it.listen()
    assert [it.outputs.wants_field() for _ in range(3)] == [True, False, False]
    it.outputs.settings = EVERY_SET
    assert [it.outputs.wants_field() for _ in range(3)] == [True] * 3


def test_the_threshold_is_that_of_the_labels_and_a_mesh_that_cannot_be_deletes_the_one_before(make, bundle, frame):
    """At 0.99 less is occupied than at 0.1. At 1 nothing is, which no surface says: the search refuses it."""
    it = make(bundle)
    it.listen()
    sizes = []
    for threshold in (-1.0, 0.99, 1.0):
        it.outputs.settings = dataclasses.replace(EVERY_SET, occupancy_threshold=threshold)
        it.outputs.publish(frame)
        it.until(lambda: len(it.heard) == len(sizes) + 1)
        sizes.append(len(it.heard[-1].points))
    assert sizes[0] > 1.2 * sizes[1] > 0 and sizes[2] == 0 and it.heard[-1].action == Marker.DELETE
    ((subject, sentence),) = it.said
    assert subject == "mesh" and "threshold is 1.0; give a probability between 0 and 1" in sentence
    assert "Traceback" not in sentence and it.outputs.mesh_report().counters["failed"] == 1


def test_what_is_built_is_given_up_when_the_node_stops(make, bundle, frame, monkeypatch):
    it = make(bundle)
    it.listen()
    begun = threading.Event()

    def endless(field, *arguments, **keywords):
        while True:
            field.probability(np.zeros((1, 3)))
            begun.set()

    with monkeypatch.context() as patch:
        patch.setattr(mesh_output, "extract_mesh", endless)
        for _ in range(2):
            it.outputs.publish(frame)
        assert begun.wait(20)
        began_s = time.monotonic()
        it.outputs.stop()
        assert time.monotonic() - began_s < 2 and not mesh_threads()
    assert it.heard == [] and it.said == []
    it.outputs.publish(frame)  # active again
    it.until(lambda: it.heard)


def without_scikit_image(monkeypatch, bundle):
    find = mesh_output.importlib.util.find_spec
    monkeypatch.setattr(mesh_output.importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    return bundle, "they need scikit-image, which is not installed; run: pip install scikit-image"


def without_field(monkeypatch, bundle):
    return dataclasses.replace(bundle, field_channels=0), "was exported without its field; export it again"


@pytest.mark.parametrize("lacking", [without_scikit_image, without_field])
def test_why_there_is_no_mesh_is_said_once_and_to_whom_listens(make, bundle, monkeypatch, lacking):
    described, words = lacking(monkeypatch, bundle)
    it = make(described)
    assert not it.outputs.wants_field() and it.said == []
    it.listen()
    assert [it.outputs.wants_field() for _ in range(3)] == [False] * 3
    ((subject, sentence),) = it.said
    assert subject == "mesh" and sentence.startswith("there are no meshes: ") and sentence.endswith(words)
    assert it.outputs.mesh_report().problem == sentence


def test_the_newest_task_wins():
    """While one is worked on three come: the last of them is next, two are dropped."""
    done, may_go_on, begun = [], threading.Event(), threading.Event()

    def work(task, is_wanted):
        begun.set()
        assert may_go_on.wait(20) and is_wanted()
        done.append(task)

    worker = NewestWorker("newest", work)
    assert not worker.submit(1)
    assert begun.wait(20)
    assert [worker.submit(task) for task in (2, 3, 4)] == [False, True, True]
    may_go_on.set()
    until_s = time.monotonic() + 20
    while len(done) < 2 and time.monotonic() < until_s:
        time.sleep(0.005)
    worker.stop()
    assert done == [1, 4]
