# SPDX-License-Identifier: Apache-2.0
"""FrameAssembler: worked-out scenarios, and invariants over random streams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from occflownet_ros.frame_assembler import DROP, IMAGE_OUTCOMES, MASK, FrameAssembler

MS = 1_000_000
PERIOD = 83 * MS


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(cameras=3, max_diff_ms=60.0, deadline_ms=100.0, missing=DROP, **more):
    clock = Clock()
    return FrameAssembler(cameras, 0, max_diff_ms, deadline_ms, missing, clock, **more), clock


def test_nuscenes_sweeps_come_out_one_by_one():
    # Offsets of a real keyframe: CAM_FRONT is the anchor, the others fire from 8 ms before it to 35 ms after it.
    offsets = [0, -8 * MS, 8 * MS, 16 * MS, 25 * MS, 35 * MS]
    assembler, clock = make(cameras=6)
    arrivals = sorted((k * PERIOD + o, c) for k in range(6) for c, o in enumerate(offsets))
    taken = []
    for stamp, camera in arrivals:
        clock.now_s = 100 + stamp / 1e9
        assembler.add(camera, stamp, (camera, stamp))
        if (image_set := assembler.take()) is not None:
            taken.append((image_set, stamp))
    assert [s.stamp_ns for s, _ in taken] == [k * PERIOD for k in range(6)]
    for image_set, at in taken[1:]:
        k = image_set.stamp_ns
        assert image_set.stamps_ns == tuple(k + o for o in offsets)
        assert image_set.images == tuple((c, k + o) for c, o in enumerate(offsets))
        # Done with the sweep's last image, not at the deadline and not with the next sweep's.
        assert at == k + 35 * MS
    assert assembler.sets["complete"] == 6 and assembler.sets["dropped"] == 0


def test_an_image_of_the_sweep_before_is_not_taken_while_the_right_one_can_come():
    # The camera lags 35 ms, so the sweep before's image lies 48 ms before the anchor: inside the window, yet wrong.
    assembler, _ = make(cameras=2)
    assembler.add(1, 35 * MS - PERIOD * 2, "older")
    assembler.add(1, 35 * MS - PERIOD, "wrong")
    assembler.add(0, 0, "anchor")
    assert assembler.take() is None
    assembler.add(1, 35 * MS, "right")
    assert assembler.take().images == ("anchor", "right")
    assert assembler.images[1] == {"received": 3, "unmatched": 2, "used": 1}


def test_the_image_before_is_used_at_the_deadline_if_the_right_one_was_lost():
    assembler, clock = make(cameras=2)
    assembler.add(1, -131 * MS, "older")
    assembler.add(1, -48 * MS, "second best")
    assembler.add(0, 0, "anchor")
    clock.now_s += 0.099
    assert assembler.take() is None
    clock.now_s += 0.002
    assert assembler.take().images == ("anchor", "second best")


@pytest.mark.parametrize(("missing", "images"), [(DROP, None), (MASK, ("a", None))])
def test_incomplete_set_at_the_deadline(missing, images):
    assembler, clock = make(cameras=2, missing=missing)
    assembler.add(0, 0, "a")
    assert assembler.next_deadline_s() == pytest.approx(100.1)
    clock.now_s += 0.1
    image_set = assembler.take()
    assert (image_set.images if image_set else None) == images
    assert assembler.next_deadline_s() is None
    # The image that the set waited for arrives after all.
    assembler.add(1, 5 * MS, "b")
    assembler.add(0, PERIOD, "a2")
    assembler.add(1, PERIOD + 5 * MS, "b2")
    assert assembler.take().images == ("a2", "b2")
    assert assembler.images[1] == {"received": 2, "absent": 1, "late": 1, "used": 1}
    if missing == DROP:
        assert assembler.images[0] == {"received": 2, "incomplete": 1, "used": 1}
        assert assembler.sets == {"opened": 2, "dropped": 1, "complete": 1, "taken": 1}
    else:
        assert image_set.missing == (1,)
        assert assembler.sets == {"opened": 2, "masked": 1, "complete": 1, "taken": 2}


def test_window_is_inclusive_and_never_exceeded():
    for offset, expected in ((60 * MS, ("a", "b")), (60 * MS + 1, None)):
        assembler, clock = make(cameras=2)
        assembler.add(0, 1000 * MS, "a")
        assembler.add(1, 1000 * MS + offset, "b")
        clock.now_s += 1
        image_set = assembler.take()
        assert (image_set.images if image_set else None) == expected


def test_newest_set_wins():
    assembler, _ = make(cameras=1)
    for k in range(3):
        assembler.add(0, k * PERIOD, k)
    assert assembler.take().images == (2,)
    assert assembler.take() is None
    assert assembler.images[0] == {"received": 3, "superseded": 2, "used": 1}
    assert assembler.sets["superseded"] == 2


def test_images_that_no_set_will_have_are_handed_back_at_once():
    unused = []
    assembler, clock = make(cameras=2, on_unused=unused.append)
    for camera, stamp, image in [
        (0, 0, "a0"),
        (1, 0, "b0"),
        (1, 0, "b0 again"),
        (1, 50 * MS, "b between"),
        (0, PERIOD, "a1"),
    ]:
        assembler.add(camera, stamp, image)
    assert unused == ["b0 again"]
    assembler.add(1, PERIOD, "b1")
    assert unused == ["b0 again", "b between", "a0", "b0"]  # of no sweep; of a set that the next one replaced
    assert assembler.take().images == ("a1", "b1")
    assembler.add(0, 2 * PERIOD, "a2")
    clock.now_s += 0.2
    assert assembler.take() is None and unused[4:] == ["a2"]  # of a set that stayed incomplete


def test_duplicates_and_overtaken_images_are_counted():
    assembler, _ = make(cameras=1)
    for stamp in (5 * MS, 5 * MS, 4 * MS, 6 * MS):
        assembler.add(0, stamp, stamp)
    assert assembler.take().stamp_ns == 6 * MS
    assert assembler.images[0] == {"received": 4, "duplicate": 1, "out_of_order": 1, "superseded": 1, "used": 1}


def test_bag_loop_starts_over_without_losing_the_first_set():
    assembler, clock = make(cameras=2)
    for stamp in (10_000 * MS, 10_083 * MS):
        assembler.add(0, stamp, stamp)
        assembler.add(1, stamp + 5 * MS, stamp)
        assembler.take()
    assembler.add(0, 10_166 * MS, "open when the bag ended")
    assembler.add(1, -3 * MS, "b")  # the other camera jumps before the anchor does
    assembler.add(0, 0, "a")
    clock.now_s += 0.2
    image_set = assembler.take()
    assert (image_set.epoch, image_set.images) == (1, ("a", "b"))
    assert assembler.images[0]["cleared"] == 1 and assembler.sets["time_jumps"] == 1


def test_one_absurd_stamp_does_not_silence_a_camera():
    assembler, _ = make(cameras=2)
    year = 10**9 * 86400 * 365
    assembler.add(1, year, "absurd")
    assembler.add(0, 0, "a")
    assembler.add(1, 1 * MS, "b")
    assert assembler.take().images == ("a", "b")
    assert assembler.images[1]["cleared"] == 1


def test_a_camera_without_partner_does_not_pile_up():
    assembler, _ = make(cameras=2)
    for k in range(500):
        assembler.add(1, k * PERIOD, k)
    assert assembler.waiting(1) <= 32
    assert assembler.images[1]["unmatched"] == 500 - assembler.waiting(1)


streams = st.lists(
    st.tuples(
        st.integers(0, 2),  # camera
        st.one_of(st.integers(0, 1500), st.integers(0, 8000)),  # stamp, ms
        st.sampled_from([0.0, 0.005, 0.05, 0.2]),  # time that passes before it arrives
        st.booleans(),  # does the consumer take a set afterwards?
    ),
    max_size=80,
)


@given(streams, st.sampled_from([DROP, MASK]), st.sampled_from([5.0, 45.0, 200.0]))
def test_invariants_over_random_streams(stream, missing, max_diff_ms):
    unused = []
    assembler, clock = make(max_diff_ms=max_diff_ms, missing=missing, on_unused=unused.append)
    received, taken = [0, 0, 0], []
    for camera, stamp_ms, delay_s, takes in stream:
        clock.now_s += delay_s
        received[camera] += 1
        assembler.add(camera, stamp_ms * MS, (camera, stamp_ms * MS))
        if takes and (image_set := assembler.take()) is not None:
            taken.append(image_set)
    for image_set in taken:
        for camera, (image, stamp) in enumerate(zip(image_set.images, image_set.stamps_ns, strict=True)):
            assert image == (None if stamp is None else (camera, stamp))  # the right camera's image, in its place
            assert stamp is None or abs(stamp - image_set.stamp_ns) <= max_diff_ms * MS
        assert image_set.stamps_ns[0] == image_set.stamp_ns
        assert missing == MASK or not image_set.missing
    order = [(s.epoch, s.stamp_ns) for s in taken]
    assert order == sorted(set(order))
    for camera in range(3):
        used = [(s.epoch, s.stamps_ns[camera]) for s in taken if s.stamps_ns[camera] is not None]
        assert len(used) == len(set(used))
        counters = assembler.images[camera]
        assert set(counters) <= {*IMAGE_OUTCOMES, "received", "absent"}
        in_ready = assembler.ready is not None and assembler.ready.stamps_ns[camera] is not None
        accounted = sum(counters[outcome] for outcome in IMAGE_OUTCOMES) + assembler.waiting(camera) + in_ready
        assert accounted == counters["received"] == received[camera]
        assert (
            sum(image[0] == camera for image in unused)
            == accounted - counters["used"] - assembler.waiting(camera) - in_ready
        )
    sets = assembler.sets
    assert sets["taken"] == len(taken)
    assert sets["complete"] + sets["masked"] == sets["taken"] + sets["superseded"] + (assembler.ready is not None)


@given(st.lists(st.integers(-20, 20), min_size=24, max_size=24), st.lists(st.integers(-38, 38), min_size=2, max_size=2))
def test_every_sweep_is_found_whatever_the_phase_and_the_jitter(jitter_tenths_ms, phase_ms):
    # Three cameras of one rate, any phase below half a period, 2 ms jitter: no set may be lost or mixed up.
    offsets = [0, *phase_ms]
    images = [
        (k * PERIOD + offsets[c] * MS + jitter_tenths_ms[k * 3 + c] * MS // 10, c, k)
        for k in range(8)
        for c in range(3)
    ]
    assembler, clock = make(max_diff_ms=60.0, deadline_ms=300.0)
    sweeps = []
    for stamp, camera, k in sorted(images):
        clock.now_s = 100 + stamp / 1e9
        assembler.add(camera, stamp, k)
        if (image_set := assembler.take()) is not None:
            sweeps.append(image_set.images)
    clock.now_s += 1
    if (image_set := assembler.take()) is not None:
        sweeps.append(image_set.images)
    assert sweeps[-6:] == [(k, k, k) for k in range(2, 8)]  # the first sweeps teach it the period
