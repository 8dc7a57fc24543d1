# SPDX-License-Identifier: Apache-2.0
"""The node's states over and over: memory, files and threads stay where they are, and what fails leaves no trace.

A node of this process with a real engine. What rclpy itself keeps is measured in the same run on a bare lifecycle node
that makes and destroys as many publishers, subscriptions and timers per cycle.
"""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import dataclass

import psutil
import pytest
import rclpy
from counting_bundle import write_counting_bundle
from fault_drive import IMAGE, IMAGE_SIZE_PX, START_NS, rig_of
from rclpy.clock import Clock, ClockType
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.parameter import Parameter
from ros_processes import Vehicle, ros_environment
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import Float64, UInt8MultiArray

from occflownet_core.errors import EngineError
from occflownet_core.rig_file import save_rig
from occflownet_ros import node as node_module
from occflownet_ros.node import OccflownetNode

CAMERAS = ("FRONT", "LEFT", "RIGHT")
WARM_UP_CYCLES, CYCLES = 20, 100
KEPT_BYTES = 3e6
"""How much more than rclpy a hundred cycles may keep: the allocator's own unrest; a leaked engine or image set is more."""

SUCCESS, FAILURE, ERROR = (
    TransitionCallbackReturn.SUCCESS,
    TransitionCallbackReturn.FAILURE,
    TransitionCallbackReturn.ERROR,
)


@dataclass(frozen=True)
class Footprint:
    memory_bytes: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        process = psutil.Process()
        return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


@pytest.fixture(scope="module")
def context(graph_environment):
    ros_environment()
    context = Context()
    rclpy.init(context=context)
    yield context
    rclpy.shutdown(context=context)


@pytest.fixture
def node(context, tmp_path):
    bundle = write_counting_bundle(tmp_path / "bundle", CAMERAS)
    save_rig(rig_of(CAMERAS), tmp_path / "rig.yaml")
    values = {"bundle": str(bundle), "calibration_file": str(tmp_path / "rig.yaml"), "threads": 1}
    values |= {"image_reliability": "reliable", "odom_topic": "", "intrinsics_source": "calibration_file"}
    overrides = [Parameter(name, value=value) for name, value in values.items()]
    node = OccflownetNode(context=context, parameter_overrides=overrides)
    yield node
    node.release()
    node.destroy_node()


class BareNode(LifecycleNode):
    """Makes and destroys what an occflownet node does, and does nothing with it."""

    def __init__(self, like: OccflownetNode, **kwargs) -> None:
        super().__init__("bare", **kwargs)
        self._counts = len(list(like.publishers)), len(list(like.subscriptions))
        self._made: list = []

    def on_configure(self, state):
        self._made = [self.create_lifecycle_publisher(Float64, f"~/p{k}", 2) for k in range(self._counts[0])]
        return super().on_configure(state)

    def on_activate(self, state):
        self._heard = [
            self.create_subscription(CompressedImage, f"~/s{k}", lambda message: None, 4)
            for k in range(self._counts[1])
        ]
        self._timer = self.create_timer(1.0, lambda: None, clock=Clock(clock_type=ClockType.STEADY_TIME))
        return super().on_activate(state)

    def on_deactivate(self, state):
        for subscription in self._heard:
            self.destroy_subscription(subscription)
        self.destroy_timer(self._timer)
        return super().on_deactivate(state)

    def on_cleanup(self, state):
        for publisher in self._made:
            self.destroy_lifecycle_publisher(publisher)
        return SUCCESS


def cycle(node: LifecycleNode) -> None:
    for step in (node.trigger_configure, node.trigger_activate, node.trigger_deactivate, node.trigger_cleanup):
        assert step() == SUCCESS


def growth(node: LifecycleNode) -> tuple[Footprint, Footprint]:
    for _ in range(WARM_UP_CYCLES):
        cycle(node)
    before = Footprint.now()
    for _ in range(CYCLES):
        cycle(node)
    return before, Footprint.now()


@pytest.mark.timeout(120)
def test_a_hundred_cycles_keep_nothing(node, context, record_property):
    assert node.trigger_configure() == node.trigger_activate() == SUCCESS
    bare = BareNode(node, context=context)
    assert node.trigger_deactivate() == node.trigger_cleanup() == SUCCESS
    before, after = growth(node)
    bare_before, bare_after = growth(bare)
    bare.destroy_node()
    kept = after.memory_bytes - before.memory_bytes
    kept_by_rclpy = bare_after.memory_bytes - bare_before.memory_bytes
    record_property("kept_bytes", kept)
    record_property("kept_by_rclpy_bytes", kept_by_rclpy)
    print(f"kept in {CYCLES} cycles: {kept / 1e6:.2f} MB, of which rclpy alone {kept_by_rclpy / 1e6:.2f} MB")
    assert (after.files, after.threads) == (before.files, before.threads)
    assert kept - max(kept_by_rclpy, 0) < KEPT_BYTES


def entities(node: OccflownetNode) -> tuple[int, int, int, int]:
    return tuple(len(list(of)) for of in (node.publishers, node.subscriptions, node.timers, node.guards))


def failing(error: Exception, at_call: int, plain):
    """Stands in for a part: works until the given call, which raises."""
    calls = 0

    def call(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise error
        return plain(*arguments, **keywords)

    return call


BUG, MISTAKE = RuntimeError("a bug"), EngineError("the engine cannot be made; make it")


@pytest.mark.parametrize(
    ("part", "at_call", "error", "result", "state"),
    [
        ("create_engine", 1, MISTAKE, FAILURE, "unconfigured"),
        ("create_engine", 1, BUG, ERROR, "unconfigured"),
        ("warm_up", 1, BUG, ERROR, "unconfigured"),
        ("create_lifecycle_publisher", 3, BUG, ERROR, "unconfigured"),
        ("create_subscription", 3, BUG, ERROR, "unconfigured"),
        ("create_subscription", 3, MISTAKE, FAILURE, "inactive"),
        ("create_timer", 1, BUG, ERROR, "unconfigured"),
    ],
)
def test_a_transition_that_fails_leaves_nothing_behind(node, monkeypatch, part, at_call, error, result, state):
    cycle(node)
    made_at_construction, before = entities(node), Footprint.now()
    where = node_module if hasattr(node_module, part) else node
    for _ in range(10):
        with monkeypatch.context() as patch:
            patch.setattr(where, part, failing(error, at_call, getattr(where, part)))
            results = [node.trigger_configure()]
            if results == [SUCCESS]:
                results.append(node.trigger_activate())
        assert results[-1] == result and node._state_machine.current_state[1] == state
        if state == "inactive":
            assert node.trigger_cleanup() == SUCCESS
        assert entities(node) == made_at_construction
    after = Footprint.now()
    assert (after.files, after.threads) == (before.files, before.threads)
    cycle(node)


def test_an_engine_is_let_go_and_every_set_goes_through_the_newest(node, context, monkeypatch):
    engines = []
    plain = node_module.create_engine

    def remembered(*arguments):
        engine = plain(*arguments)
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(node_module, "create_engine", remembered)
    vehicle, executor = Vehicle(CAMERAS, IMAGE_SIZE_PX), SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        for k in range(3):
            assert node.trigger_configure() == node.trigger_activate() == SUCCESS
            labels = vehicle.hear(UInt8MultiArray, "/occflownet/labels")
            until_s = time.monotonic() + 30
            while not labels and time.monotonic() < until_s:
                vehicle.send_images(START_NS + k * 10**9, IMAGE)
                vehicle.wait(lambda: False, 0.02)
                for _ in range(10):
                    executor.spin_once(timeout_sec=0.01)
            assert labels
            assert node.trigger_deactivate() == node.trigger_cleanup() == SUCCESS
            gc.collect()
            assert [engine() for engine in engines] == [None] * (k + 1)
    finally:
        executor.remove_node(node)
        executor.shutdown()
        vehicle.close()
