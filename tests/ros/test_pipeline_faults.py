# SPDX-License-Identifier: Apache-2.0
"""A pipeline whose engine breaks in ways that its contract does not foresee, and sets that hold no image at all."""

from __future__ import annotations

import array
import time

import pytest
from counting_bundle import write_counting_bundle
from fault_drive import IMAGE, rig_of
from sensor_msgs.msg import CompressedImage

from occflownet_core.runtime.bundle import load_bundle
from occflownet_core.runtime.engine import warm_up
from occflownet_core.runtime.factory import create_engine
from occflownet_ros.parameters import Settings
from occflownet_ros.pipeline import Pipeline

CAMERAS = ("FRONT", "LEFT", "RIGHT")
MS = 1_000_000
WELL = CompressedImage(format="jpeg", data=array.array("B", IMAGE))
BROKEN = CompressedImage(format="jpeg", data=array.array("B", IMAGE[:100]))


class Outputs:
    is_alive = True

    def __init__(self) -> None:
        self.stamps_ms: list[int] = []

    def wants_field(self) -> bool:
        return False

    def publish(self, frame) -> None:
        self.stamps_ms.append(frame.stamp_ns // MS)

    def publish_latency(self, latency_ms) -> None:
        pass


class Bench:
    def __init__(self, folder, **settings) -> None:
        self.said: list[tuple[str, str]] = []
        self.engine = create_engine(load_bundle(write_counting_bundle(folder, CAMERAS)), "onnxruntime", 1)
        warm_up(self.engine)
        self.outputs = Outputs()
        self.pipeline = Pipeline(
            self.engine, Settings(odom_topic="", **settings), 0, self.outputs, lambda *said: self.said.append(said)
        )
        self.pipeline.start()

    def send(self, stamp_ms: int, message: CompressedImage = WELL) -> None:
        for camera in range(len(CAMERAS)):
            self.pipeline.add_image(camera, stamp_ms * MS, message)

    def until(self, condition) -> None:
        until_s = time.monotonic() + 10
        while not condition() and time.monotonic() < until_s:
            time.sleep(0.005)
        assert condition()


@pytest.fixture
def make(tmp_path):
    made = []

    def build(**settings) -> Bench:
        made.append(Bench(tmp_path / "bundle", **settings))
        return made[-1]

    yield build
    for bench in made:
        bench.pipeline.stop()


def test_a_calibration_that_breaks_the_engine_is_tried_once(make, monkeypatch):
    it = make()
    calls = []

    def broken(rig) -> None:
        calls.append(rig)
        raise ZeroDivisionError("nobody thought of this camera")

    with monkeypatch.context() as patch:
        patch.setattr(it.engine, "calibrate", broken)
        it.pipeline.set_rig(rig_of(CAMERAS))
        it.send(100)
        it.until(lambda: it.pipeline.report().calibration_problem == "nobody thought of this camera")
        time.sleep(0.1)
        assert len(calls) == 1 and it.outputs.stamps_ms == []
    assert [subject for subject, _ in it.said] == ["calibration"] and "Traceback" in it.said[0][1]
    it.pipeline.set_rig(rig_of(CAMERAS))  # another rig, though it looks the same
    it.until(lambda: it.outputs.stamps_ms == [100])
    assert it.pipeline.report().calibration_problem == ""


def test_a_set_without_any_usable_image_is_no_set(make):
    """Whatever the policy: a network that sees nothing makes something up."""
    it = make(missing_cameras="mask")
    it.pipeline.set_rig(rig_of(CAMERAS))
    it.send(100, BROKEN)
    it.until(lambda: it.pipeline.report().sets["undecodable"] == 1)
    it.send(200)
    it.until(lambda: it.outputs.stamps_ms == [200])
    assert [counter["undecodable"] for counter in it.pipeline.report().images] == [1, 1, 1]


def test_publishing_that_fails_costs_one_set(make, monkeypatch):
    it = make()
    it.pipeline.set_rig(rig_of(CAMERAS))
    with monkeypatch.context() as patch:
        patch.setattr(it.outputs, "publish", lambda frame: 1 // 0)
        it.send(100)
        it.until(lambda: it.pipeline.report().sets["failed"] == 1)
    it.send(200)
    it.until(lambda: it.outputs.stamps_ms == [200])
    assert "ZeroDivisionError" in it.said[0][1]
