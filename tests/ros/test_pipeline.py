# SPDX-License-Identifier: Apache-2.0
"""The pipeline's threads around an engine that writes down what it is given: waiting, failing, masking, recalibrating."""

from __future__ import annotations

import array
import threading
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from sensor_msgs.msg import CompressedImage

from occflownet_core.errors import CalibrationError, EngineError
from occflownet_ros import conversions
from occflownet_ros.calibration_source import anchor_index
from occflownet_ros.camera_model import CameraModel
from occflownet_ros.publishers import STAGES
from tests.ros.pipeline_bench import GRID, HEIGHT_PX, MS, WIDTH_PX, Bench, message, rig


@pytest.fixture
def make(tmp_path):
    made = []

    def build(**settings) -> Bench:
        made.append(Bench(tmp_path, **settings))
        return made[-1]

    yield build
    for each in made:
        each.pipeline.stop()


def test_images_reach_the_engine_in_their_camera_s_place_and_stages_add_up(make):
    it = make()
    it.pipeline.set_rig(rig())
    it.sweep(100)
    it.until(lambda: it.outputs.latencies)
    images, previous_from_current, missing = it.engine.calls[0]
    assert images.shape == (2, HEIGHT_PX, WIDTH_PX, 3) and images.dtype == np.uint8
    assert (images[0] == 10).all() and (images[1] == 20).all()
    assert previous_from_current is None and missing == ()
    frame, latency_ms = it.outputs.frames[0], it.outputs.latencies[0]
    assert (frame.stamp_ns, frame.frame_id, frame.grid) == (100 * MS, "base_link", GRID)
    assert set(latency_ms) == set(STAGES) and min(latency_ms.values()) >= 0
    parts = sum(latency_ms[stage] for stage in ("busy", "decode", "wait", "engine", "publish"))
    assert parts == pytest.approx(latency_ms["total"], abs=1e-6)


def test_sets_wait_for_calibration_and_the_newest_is_not_lost(make):
    it = make()
    it.sweep(100)
    it.sweep(200)
    time.sleep(0.05)
    assert it.engine.calls == []
    it.pipeline.set_rig(rig())
    it.until(lambda: it.outputs.frames)
    assert [f.stamp_ns for f in it.outputs.frames] == [200 * MS]
    assert it.pipeline.report().images[0]["superseded"] == 1


def test_tables_are_built_when_and_only_when_the_rig_changes(make):
    it = make()
    first, second = rig(), rig(60.0)
    it.pipeline.set_rig(first)
    it.until(lambda: it.engine.rigs == [first])  # before any image
    for k in (1, 2):
        it.sweep(100 * k)
        it.until(lambda k=k: len(it.outputs.frames) == k)
    assert it.engine.rigs == [first]
    it.pipeline.set_rig(second)
    it.sweep(300)
    it.until(lambda: len(it.outputs.frames) == 3)
    assert it.engine.rigs == [first, second]


def test_a_rig_that_the_engine_refuses_stops_output_until_another_comes(make):
    it = make()
    it.pipeline.set_rig(rig(666.0))
    it.sweep(100)
    it.until(lambda: it.pipeline.report().calibration_problem == "LEFT looks the wrong way")
    assert it.engine.calls == [] and ("calibration", "LEFT looks the wrong way") in it.said
    it.pipeline.set_rig(rig())
    it.until(lambda: it.outputs.frames)
    assert it.pipeline.report().calibration_problem == ""


def test_images_that_were_decoded_for_another_size_are_decoded_again(make):
    it = make()
    it.pipeline.set_rig(rig(width_px=128))
    it.pipeline.add_image(0, 100 * MS, message(10))  # refused for the announced 128 px
    it.until(lambda: it.pipeline.report().images[0]["undecodable"] == 1)
    it.pipeline.set_rig(rig())
    it.until(lambda: len(it.engine.rigs) == 2)
    it.pipeline.add_image(1, 100 * MS, message(20))
    it.until(lambda: it.outputs.frames)
    assert (it.engine.calls[0][0][0] == 10).all()


def test_images_are_rectified_with_the_model_of_the_day(make):
    """A sensor whose image is the rectified one moved 16 px to the right; after recalibration it is not."""
    it = make()
    columns = np.repeat(np.arange(WIDTH_PX, dtype=np.uint8)[None, :, None] * 3, HEIGHT_PX, axis=0).repeat(3, axis=2)
    image = CompressedImage(format="png", data=array.array("B", cv2.imencode(".png", columns)[1].tobytes()))
    shifted = CameraModel(
        "LEFT", WIDTH_PX, HEIGHT_PX, "plumb_bob", (0.0,) * 5, (50.0, 0, 48, 0, 50, 16, 0, 0, 1), (0.0,) * 9,
        (50.0, 0, 32, 0, 0, 50, 16, 0, 0, 0, 1, 0),
    )  # fmt: skip
    it.pipeline.set_rig(rig(), (shifted, None))
    it.sweep(100, image, image)
    it.until(lambda: len(it.outputs.frames) == 1)
    left, right = it.engine.calls[0][0]
    assert (right[:, :, 0] == columns[:, :, 0]).all() and (left[:, :-16] == columns[:, 16:]).all()
    it.pipeline.set_rig(rig(), (None, None))
    it.sweep(200, image, image)
    it.until(lambda: len(it.outputs.frames) == 2)
    assert (it.engine.calls[1][0][0] == columns).all()


def test_rectification_tables_are_made_once_per_calibration(make, monkeypatch):
    made = []
    real = CameraModel.network_maps
    monkeypatch.setattr(CameraModel, "network_maps", lambda self, t: made.append(self.distortion[0]) or real(self, t))

    def bent(k1: float) -> CameraModel:
        matrix = (50.0, 0.0, 32.0, 0.0, 50.0, 16.0, 0.0, 0.0, 1.0)
        return CameraModel("LEFT", WIDTH_PX, HEIGHT_PX, "plumb_bob", (k1, 0, 0, 0, 0), matrix, (0.0,) * 9, (0.0,) * 12)

    it = make(decode_threads=1)
    for k, models in enumerate([(bent(-0.1), None), (bent(-0.1), None), (bent(-0.2), None), (bent(-0.2), None)]):
        it.pipeline.set_rig(rig(), models)
        for sweep in range(2):
            it.sweep(100 * (2 * k + sweep + 1))
            it.until(lambda wanted=2 * k + sweep + 1: len(it.outputs.frames) == wanted)
    assert made == [-0.1, -0.2]


@pytest.mark.parametrize("policy", ["drop", "mask"])
def test_undecodable_images_follow_the_policy_for_missing_cameras(make, policy):
    it = make(missing_cameras=policy)
    it.pipeline.set_rig(rig())
    it.sweep(100, message(10), CompressedImage(format="jpeg", data=array.array("B", b"garbage")))
    it.until(lambda: it.pipeline.report().images[1]["undecodable"] == 1)
    if policy == "mask":
        it.until(lambda: it.outputs.frames)
        images, _, missing = it.engine.calls[0]
        assert missing == (1,) and not images[1].any()
    else:
        it.until(lambda: it.pipeline.report().sets["undecodable"] == 1)
        assert it.engine.calls == []
    assert it.said[0][0] == "image 1" and it.said[0][1].startswith("RIGHT: 7 bytes do not decode")


def test_a_masked_set_comes_at_the_deadline(make):
    it = make(missing_cameras="mask", deadline_ms=30.0)
    it.pipeline.set_rig(rig())
    it.pipeline.add_image(0, 100 * MS, message(10))
    it.until(lambda: it.outputs.frames)
    assert it.engine.calls[0][2] == (1,)


def test_deadlines_are_counted_on_the_given_clock(make):
    now = [50.0]
    it = make(clock_s=lambda: now[0], missing_cameras="mask", deadline_ms=20.0)
    it.pipeline.set_rig(rig())
    it.pipeline.add_image(0, 100 * MS, message(10))
    time.sleep(0.1)
    assert it.engine.calls == []  # a bag that is paused
    now[0] = 50.03
    it.until(lambda: it.outputs.frames)


@pytest.mark.parametrize(("failure", "traced"), [(EngineError("out of memory"), False), (RuntimeError("bug"), True)])
def test_an_engine_failure_is_said_and_the_next_set_starts_without_memory(make, failure, traced):
    it = make()
    it.pipeline.set_rig(rig())
    for k in range(4):
        it.pipeline.add_pose((100 + 100 * k) * MS, np.array([k, 0, 0]), np.array([1.0, 0, 0, 0]))
    it.sweep(100)
    it.until(lambda: len(it.outputs.frames) == 1)
    it.engine.fail_with = failure
    it.sweep(200)
    it.until(lambda: it.pipeline.report().sets["failed"] == 1)
    for stamp_ms, frames in ((300, 2), (400, 3)):
        it.sweep(stamp_ms)
        it.until(lambda frames=frames: len(it.outputs.frames) == frames)
    motions = [motion for _, motion, _ in it.engine.calls]
    assert [m is None for m in motions] == [True, False, True, False]
    assert motions[1][:3, 3].tolist() == [1, 0, 0]
    subject, sentence = it.said[0]
    assert subject == "engine" and str(failure) in sentence and ("Traceback" in sentence) == traced
    assert it.pipeline.report().resets == {"first_set": 2, "engine": 1}


def test_a_set_waits_a_little_for_odometry(make):
    it = make(odom_wait_ms=1000.0)
    it.pipeline.set_rig(rig())
    it.pipeline.add_pose(90 * MS, np.zeros(3), np.array([1.0, 0, 0, 0]))
    it.sweep(100)
    time.sleep(0.05)
    assert it.engine.calls == []
    it.pipeline.add_pose(110 * MS, np.ones(3), np.array([1.0, 0, 0, 0]))
    it.until(lambda: it.outputs.frames, 0.5)
    assert it.outputs.latencies[0]["wait"] > 40


def test_the_first_set_waits_for_the_first_poses_and_one_after_a_long_gap_too(make):
    """Keyframes one by one: each set's images may come before its pose, and the last pose is seconds old."""
    it = make(odom_wait_ms=1000.0)
    it.pipeline.set_rig(rig())
    for k, stamp_ms in enumerate((1000, 2500)):
        it.sweep(stamp_ms)
        time.sleep(0.05)
        assert len(it.engine.calls) == k
        it.pipeline.add_pose(stamp_ms * MS, np.full(3, k), np.array([1.0, 0, 0, 0]))
        it.until(lambda frames=k + 1: len(it.outputs.frames) == frames, 0.9)
    assert it.engine.calls[0][1] is None and it.engine.calls[1][1][:3, 3].tolist() == [1, 1, 1]
    assert it.pipeline.report().resets == {"first_set": 1}


def test_odometry_that_does_not_come_is_waited_for_once(make):
    it = make(odom_wait_ms=500.0)
    it.pipeline.set_rig(rig())
    for k, stamp_ms in enumerate((100, 200, 300)):
        it.sweep(stamp_ms)
        it.until(lambda frames=k + 1: len(it.outputs.frames) == frames)
    assert [latency["wait"] > 450 for latency in it.outputs.latencies] == [True, False, False]
    it.pipeline.add_pose(250 * MS, np.zeros(3), np.array([1.0, 0, 0, 0]))
    it.sweep(400)
    it.until(lambda: len(it.outputs.frames) == 4)
    assert it.outputs.latencies[3]["wait"] > 450
    no_source = make(odom_wait_ms=500.0, ego_motion="none")
    no_source.pipeline.set_rig(rig())
    no_source.sweep(100)
    no_source.until(lambda: no_source.outputs.frames)
    assert no_source.outputs.latencies[0]["wait"] < 450


def test_thresholds_and_policies_change_while_running(make):
    it = make()
    assert it.engine.occupancy_threshold == 0.4  # the bundle's
    it.pipeline.apply(replace(it.settings, occupancy_threshold=0.7, missing_cameras="mask", deadline_ms=10.0))
    assert it.engine.occupancy_threshold == 0.7
    it.pipeline.set_rig(rig())
    it.pipeline.add_image(0, 100 * MS, message(10))
    it.until(lambda: it.outputs.frames)
    it.pipeline.apply(it.settings)
    assert it.engine.occupancy_threshold == 0.4


def test_newest_set_wins_while_the_engine_is_busy_and_stopping_waits_for_the_set_at_hand(make):
    it = make()
    it.engine.seconds = 0.1
    it.pipeline.set_rig(rig())
    it.sweep(100)
    it.until(lambda: it.engine.calls)
    for stamp_ms in (200, 300, 400):
        it.sweep(stamp_ms)
    it.until(lambda: len(it.engine.calls) == 2)
    it.pipeline.stop()
    assert [f.stamp_ns for f in it.outputs.frames] == [100 * MS, 400 * MS]
    assert it.pipeline.report().sets["superseded"] == 2
    # The last set arrived while the engine slept for 100 ms over the first, which began a moment before.
    first_ms, last_ms = (latency_ms["busy"] for latency_ms in it.outputs.latencies)
    assert first_ms < 30 and 50 < last_ms < 110


def test_images_of_sets_that_a_busy_engine_will_skip_are_not_decoded(make, monkeypatch):
    """Sets every 50 ms, an engine that takes a second: of eight that come in its first half, the last one is decoded."""
    decoded = []
    plain = conversions.network_image
    monkeypatch.setattr(
        conversions, "network_image", lambda m, *more: (decoded.append(int(m.format)), plain(m, *more))[1]
    )
    it = make(max_camera_time_diff_ms=20.0)
    it.pipeline.set_rig(rig())
    it.engine.seconds = 1.0

    def sweep(number: int) -> None:
        pair = message(10), message(20)
        for image in pair:
            image.format = str(number)
        it.sweep(100 + 50 * number, *pair)

    sweep(0)
    it.until(lambda: it.outputs.frames)  # now it is known how long the engine takes
    sweep(1)
    it.until(lambda: len(it.engine.calls) == 2)
    for number in range(2, 10):
        sweep(number)
        time.sleep(0.05)
    it.until(lambda: len(it.outputs.frames) == 3)
    counts = it.pipeline.report()
    assert counts.sets["superseded"] == 7 and counts.sets["processed"] == 3
    assert decoded == [0, 0, 1, 1, 9, 9]
    assert [frame.stamp_ns // MS for frame in it.outputs.frames] == [100, 150, 550]


def test_images_of_sets_that_newer_ones_replaced_are_not_decoded_before_those(make, monkeypatch):
    """One decoder, held up by the first image: of four sets the first is at hand and the last is next."""
    decoded, go_on = [], threading.Event()
    plain = conversions.network_image

    def slow(image, *more):
        go_on.wait(5.0)
        decoded.append(int(image.format))
        return plain(image, *more)

    monkeypatch.setattr(conversions, "network_image", slow)
    it = make(decode_threads=1)
    it.pipeline.set_rig(rig())
    it.until(lambda: it.engine.rigs)
    for number in range(4):
        pair = message(10), message(20)
        for image in pair:
            image.format = str(number)
        it.sweep(100 * (1 + number), *pair)
        if number == 0:
            it.until(lambda: it.pipeline.report().sets["taken"] == 1)
    go_on.set()
    it.until(lambda: len(it.outputs.frames) == 2)
    assert decoded == [0, 0, 3, 3]


def test_anchor_by_name():
    assert anchor_index(("A", "B"), "") == 0
    assert anchor_index(("A", "B"), "B") == 1
    with pytest.raises(CalibrationError, match="anchor_camera is 'C', but the bundle's cameras are A, B"):
        anchor_index(("A", "B"), "C")


def test_the_engine_hands_out_the_field_for_the_sets_that_are_to_become_meshes_and_no_others(make):
    it = make()
    it.outputs.meshes_every = 2
    it.pipeline.set_rig(rig())
    for number in range(4):
        it.sweep(100 * (number + 1))
        it.until(lambda n=number: len(it.outputs.frames) == n + 1)
    assert it.engine.kept_field == [False, True, False, True]
    assert [frame.field_features is not None for frame in it.outputs.frames] == it.engine.kept_field
