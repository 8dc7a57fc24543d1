# SPDX-License-Identifier: Apache-2.0
"""The player's clock and flow control, without ROS: time is set by hand where it matters."""

import signal
import threading
import time

import pytest

from occflownet_ros.playback import FlowControl, PlaybackClock, StopFlag, Stopped


class HandClock:
    def __init__(self) -> None:
        self.ns = 5_000

    def __call__(self) -> int:
        return self.ns


def test_bag_time_runs_at_the_rate_and_stands_still_while_held():
    hand = HandClock()
    clock = PlaybackClock(0.5, StopFlag(), hand)
    clock.set(1_000_000)
    hand.ns += 2_000
    assert clock.now_ns() == 1_001_000
    clock.hold("a")
    hand.ns += 10_000
    clock.hold("b")
    assert clock.now_ns() == 1_001_000
    clock.release("a")
    hand.ns += 10_000
    assert clock.now_ns() == 1_001_000  # b still holds
    assert (clock.held("a"), clock.held("b")) == (False, True)
    clock.release("b")
    hand.ns += 4_000
    assert clock.now_ns() == 1_003_000
    clock.set(7)  # a loop begins again
    assert clock.now_ns() == 7


def test_lateness_is_in_wall_seconds():
    hand = HandClock()
    clock = PlaybackClock(4.0, StopFlag(), hand)
    clock.set(0)
    hand.ns += 3_000_000_000  # bag time 12 s
    assert clock.wait_until(4_000_000_000) == pytest.approx(2.0)


def test_waiting_takes_the_time_it_should():
    clock = PlaybackClock(2.0, StopFlag())
    clock.set(0)
    begin = time.monotonic()
    late_s = clock.wait_until(200_000_000)
    assert 0.1 <= time.monotonic() - begin < 0.6
    assert 0 <= late_s < 0.5


def test_a_hold_in_another_thread_delays_a_wait():
    clock = PlaybackClock(1.0, StopFlag())
    clock.set(0)
    clock.hold("user")
    threading.Timer(0.15, clock.release, ["user"]).start()
    begin = time.monotonic()
    clock.wait_until(50_000_000)
    assert 0.2 <= time.monotonic() - begin < 1.0


def test_stop_ends_every_wait():
    stop = StopFlag()
    clock, flow = PlaybackClock(1.0, stop), FlowControl(1, 60.0, stop)
    clock.set(0)
    flow.sent()
    threading.Timer(0.1, stop.set, [signal.SIGINT]).start()
    begin = time.monotonic()
    with pytest.raises(Stopped):
        clock.wait_until(60_000_000_000)
    with pytest.raises(Stopped):
        flow.wait_for_room()
    assert time.monotonic() - begin < 2.0
    assert stop.signal == signal.SIGINT


def test_flow_control_counts_what_is_in_flight():
    flow = FlowControl(2, 60.0, StopFlag())
    assert flow.has_room()
    flow.sent()
    flow.sent()
    assert not flow.has_room()
    flow.answer()
    flow.wait_for_room()  # returns at once
    assert flow.has_room()
    assert (flow.answered, flow.unanswered) == (1, 0)


def test_flow_control_gives_up_and_ignores_a_late_answer():
    flow = FlowControl(2, 0.1, StopFlag())
    flow.sent()
    flow.sent()
    begin = time.monotonic()
    flow.wait_for_room()
    assert 0.1 <= time.monotonic() - begin < 0.8
    assert flow.unanswered == 2
    flow.answer()  # of one given up: must not make room for three
    flow.sent()
    flow.sent()
    assert not flow.has_room()


def test_each_answer_restarts_the_time_out():
    flow = FlowControl(3, 0.2, StopFlag())
    for _ in range(3):
        flow.sent()
    for delay_s in (0.15, 0.3):
        threading.Timer(delay_s, flow.answer).start()
    begin = time.monotonic()
    flow.drain()
    assert 0.5 <= time.monotonic() - begin < 1.5
    assert (flow.answered, flow.unanswered) == (2, 1)
