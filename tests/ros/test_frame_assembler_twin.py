# SPDX-License-Identifier: Apache-2.0
"""FrameAssembler against its slow, obvious twin: plain lists, everything looked at anew after every arrival.

The streams are random, and random streams with a rhythm: cameras of one rate, with jitter, losses, repeats, images that
overtake each other, pauses, and clocks that are set back.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_ros.frame_assembler import DROP, MASK, FrameAssembler

MS = 1_000_000
JUMP_NS = 1_000 * MS
CAMERAS = 3


class SlowAssembler:
    """What FrameAssembler says it does, in its own words: camera 0 is the anchor.

    Attributes:
        alive: per camera, stamps of images whose fate is open.
        outcomes: per camera, how many images ended how.
        taken: (epoch, stamp, stamps per camera) of the sets that were taken.
    """

    def __init__(self, window_ms: float, deadline_ms: float, missing: str) -> None:
        self.window_ns, self.deadline_s, self.missing = int(window_ms * MS), deadline_ms / 1e3, missing
        self.alive: list[list[int]] = [[] for _ in range(CAMERAS)]
        self.newest: list[int | None] = [None] * CAMERAS
        self.intervals: list[list[int]] = [[] for _ in range(CAMERAS)]
        self.outcomes: list[Counter[str]] = [Counter() for _ in range(CAMERAS)]
        self.missed: list[int | None] = [None] * CAMERAS
        self.open: list[tuple[int, float]] = []  # anchors: stamp, deadline
        self.ready: tuple | None = None
        self.taken: list[tuple] = []
        self.epoch = 0

    def add(self, now_s: float, camera: int, stamp: int) -> None:
        newest = self.newest[camera]
        if newest is not None and newest - stamp > JUMP_NS:
            self.start_over(camera, stamp)
            newest = None
        if newest is not None and stamp <= newest:
            self.outcomes[camera]["duplicate" if stamp == newest else "out_of_order"] += 1
            return
        if newest is not None:
            self.intervals[camera] = [*self.intervals[camera], stamp - newest][-4:]
        self.newest[camera] = stamp
        self.alive[camera].append(stamp)
        if camera == 0:
            self.open.append((stamp, now_s + self.deadline_s))
        self.close(now_s)

    def take(self, now_s: float) -> None:
        self.close(now_s)
        if self.ready is not None:
            self.taken.append(self.ready)
            self.end(self.ready, "used")
            self.ready = None

    def start_over(self, camera: int, stamp: int) -> None:
        if camera == 0:
            self.epoch += 1
            self.open = []
        for other in range(CAMERAS) if camera == 0 else [camera]:
            kept = [s for s in self.alive[other] if other != camera and s - stamp <= JUMP_NS]
            self.outcomes[other]["cleared"] += len(self.alive[other]) - len(kept)
            self.alive[other], self.missed[other] = kept, None
        self.intervals[camera] = []

    def close(self, now_s: float) -> None:
        due = [k for k in range(len(self.open)) if self.open[k][1] <= now_s or self.is_settled(k)]
        for _ in range(max(due, default=-1) + 1):
            self.close_oldest()

    def is_settled(self, k: int) -> bool:
        """No image nearer to anchor k can come, nor an anchor nearer to its images."""
        anchor = self.open[k][0]
        for camera in range(1, CAMERAS):
            chosen = self.nearest(camera, k)
            if chosen is None:
                return False
            newest = self.alive[camera][-1]
            if newest < anchor:
                half = min(self.intervals[camera]) // 2 if self.intervals[camera] else self.window_ns // 2
                if anchor - newest > half:
                    return False
            elif k == len(self.open) - 1:
                half = min(self.intervals[0]) // 2 if self.intervals[0] else self.window_ns
                if chosen - anchor > half:
                    return False
        return True

    def nearest(self, camera: int, k: int) -> int | None:
        anchor = self.open[k][0]
        if camera == 0:
            return anchor
        following = self.open[k + 1][0] if k + 1 < len(self.open) else None
        mine = [
            s
            for s in self.alive[camera]
            if abs(s - anchor) <= self.window_ns and (following is None or abs(s - following) >= abs(s - anchor))
        ]
        return min(reversed(mine), key=lambda s: abs(s - anchor), default=None)

    def close_oldest(self) -> None:
        chosen = [self.nearest(camera, 0) for camera in range(CAMERAS)]
        anchor = self.open.pop(0)[0]
        next_anchor = self.open[0][0] if self.open else anchor + 1
        for camera, stamp in enumerate(chosen):
            if stamp is None:
                self.missed[camera] = anchor
            for old in list(self.alive[camera]):
                if old < next_anchor - self.window_ns or (stamp is not None and old <= stamp):
                    self.alive[camera].remove(old)
                    if old != stamp:
                        late = self.missed[camera] is not None and abs(old - self.missed[camera]) <= self.window_ns
                        self.outcomes[camera]["late" if late else "unmatched"] += 1
        image_set = (self.epoch, anchor, tuple(chosen))
        if None in chosen and self.missing == DROP:
            self.end(image_set, "incomplete")
            return
        if self.ready is not None:
            self.end(self.ready, "superseded")
        self.ready = image_set

    def end(self, image_set: tuple, outcome: str) -> None:
        for camera, stamp in enumerate(image_set[2]):
            if stamp is not None:
                self.outcomes[camera][outcome] += 1


@st.composite
def rhythmic(draw) -> list[tuple[float, int, int, bool]]:
    """Arrivals (time in seconds, camera, stamp in ms, whether a set is taken then) of cameras that mean well."""
    period_ms = draw(st.sampled_from([33, 83, 100, 500]))
    phases_ms = [0, draw(st.integers(-period_ms, period_ms)), draw(st.integers(-period_ms, period_ms))]
    rates = [1, draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 3]))]
    arrivals, clock_ms = [], 10_000
    for _ in range(draw(st.integers(1, 14))):
        clock_ms += draw(st.sampled_from([period_ms] * 8 + [7 * period_ms, -5_000]))
        for camera in range(CAMERAS):
            for part in range(rates[camera]):
                stamp_ms = clock_ms + phases_ms[camera] + part * period_ms // rates[camera]
                stamp_ms += draw(st.sampled_from([0, 0, 0, -3, 2]))
                copies = draw(st.sampled_from([1] * 10 + [0, 2]))
                arrivals += [(stamp_ms + draw(st.integers(0, 60)), camera, stamp_ms)] * copies
    order = sorted(range(len(arrivals)), key=lambda k: (k // 12, arrivals[k][0]))  # clocks that were set back stay last
    now_s, result = 100.0, []
    for k in order:
        now_s += draw(st.sampled_from([0.0, 0.002, 0.01, 0.06]))
        result.append((now_s, arrivals[k][1], arrivals[k][2], draw(st.booleans())))
    return result


@st.composite
def chaotic(draw) -> list[tuple[float, int, int, bool]]:
    now_s, result = 100.0, []
    for _ in range(draw(st.integers(0, 60))):
        now_s += draw(st.sampled_from([0.0, 0.005, 0.05, 0.2]))
        stamp_ms = 5 * draw(st.one_of(st.integers(0, 30), st.integers(0, 800)))  # coarse, so that distances are equal
        result.append((now_s, draw(st.integers(0, CAMERAS - 1)), stamp_ms, draw(st.booleans())))
    return result


@settings(max_examples=200)
@given(
    st.one_of(rhythmic(), chaotic()),
    st.sampled_from([DROP, MASK]),
    st.sampled_from([5.0, 45.0, 200.0]),
    st.sampled_from([10.0, 100.0]),
)
def test_both_make_the_same_sets_and_the_same_counts(arrivals, missing, window_ms, deadline_ms):
    now = [100.0]
    slow = SlowAssembler(window_ms, deadline_ms, missing)
    fast = FrameAssembler(CAMERAS, 0, window_ms, deadline_ms, missing, lambda: now[0])
    taken = []
    for now_s, camera, stamp_ms, takes in arrivals:
        now[0] = now_s
        fast.add(camera, stamp_ms * MS, None)
        slow.add(now_s, camera, stamp_ms * MS)
        assert fast.waiting(camera) < 32, "the limit on waiting images is not the twin's"
        if takes:
            image_set = fast.take()
            taken += [] if image_set is None else [(image_set.epoch, image_set.stamp_ns, image_set.stamps_ns)]
            slow.take(now_s)
    assert taken == slow.taken
    for camera in range(CAMERAS):
        counted = {k: n for k, n in fast.images[camera].items() if k not in ("received", "absent") and n}
        assert counted == {k: n for k, n in slow.outcomes[camera].items() if n}
        assert fast.waiting(camera) == len(slow.alive[camera])
    for _, stamp, stamps in taken:
        assert all(s is None or abs(s - stamp) <= window_ms * MS for s in stamps) and stamps[0] == stamp
    order = [(epoch, stamp) for epoch, stamp, _ in taken]
    assert order == sorted(set(order))
