# SPDX-License-Identifier: Apache-2.0
"""Images that never came, counted by stamps: worked-out streams, and random losses against the true count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occflownet_ros.cadence import UNKNOWN_CADENCE, CameraStamps

MS = 1_000_000
START_NS = 1_532_402_927_612_460_000


def cadence_of(stamps_ms):
    stamps = CameraStamps()
    for stamp_ms in stamps_ms:
        stamps.add(START_NS + int(stamp_ms * MS))
    return stamps.cadence()


def test_nothing_is_claimed_of_too_few_images():
    assert CameraStamps().cadence() == UNKNOWN_CADENCE
    few = cadence_of([0, 100, 200, 900])
    assert (few.period_s, few.missed, few.newest_ns) == (None, 0, START_NS + 900 * MS)


def test_gaps_are_counted_and_told():
    # 20 images at 10 Hz without numbers 7, 11, 12 and 13.
    cadence = cadence_of([100 * k for k in range(20) if k not in (7, 11, 12, 13)])
    assert (cadence.period_s, cadence.received, cadence.missed, cadence.expected) == (0.1, 16, 4, 20)
    assert cadence.sentence == "about 4 of the last 20 images (one every 100 ms)"


def test_a_camera_that_was_off_has_missed_nothing():
    assert cadence_of([*range(0, 1000, 100), *range(3000, 4000, 100)]).missed == 0
    assert cadence_of([*range(0, 1000, 100), *range(1900, 2900, 100)]).missed == 9  # ten periods are still a gap


def test_duplicates_and_overtaken_images_are_no_gaps():
    assert cadence_of([0, 100, 200, 200, 200, 400, 300, 500, 600, 700, 800, 900]).missed == 0


def test_a_bag_that_loops_starts_anew():
    stamps = [*range(0, 3000, 100), *range(17, 3017, 100)]
    cadence = cadence_of(stamps)
    assert (cadence.period_s, cadence.received, cadence.missed) == (0.1, 30, 0)


def test_only_the_last_images_count():
    cadence = cadence_of([*range(0, 1000, 100), 1500, *range(2000, 2000 + 100 * 200, 100)])
    assert (cadence.received, cadence.missed) == (64, 0)


@given(
    st.integers(10, 500),
    st.sampled_from([0.0, 0.1, 0.3, 0.5]),
    st.sampled_from([0.0, 0.05]),
    st.integers(0, 2**32 - 1),
)
def test_random_losses_are_found_whatever_the_rate(period_ms, lost_share, jitter_share, seed):
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(rng.random(200) >= lost_share)[:64]
    jitter = rng.uniform(-jitter_share, jitter_share, len(kept)) * period_ms
    cadence = cadence_of(kept * period_ms + jitter)
    gaps = np.diff(kept)
    missed = int((gaps[gaps <= 10] - 1).sum())
    if len(kept) > 60:
        assert cadence.period_s == pytest.approx(period_ms / 1e3, rel=0.11)
        # The period is a little short where stamps jitter, so that very long gaps may be taken for one image more.
        assert abs(cadence.missed - missed) <= (0 if jitter_share == 0 else 0.1 * missed + 1)
