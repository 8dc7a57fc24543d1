# SPDX-License-Identifier: Apache-2.0
"""FrameAssembler against message_filters' approximate synchroniser, where that is installed: cost, and which sets are right.

Six cameras with nuScenes' offsets within a sweep, jitter of stamps and arrivals, and lost images. A set is right if all its
images are of one sweep; a sweep whose six images all came has a set to find.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import Figure, publish
from occflownet_core.command_line import exit_status
from occflownet_ros.frame_assembler import DROP, FrameAssembler

MOST_OF_A_CORE_PERCENT = 10.0
_OFFSETS_S = np.array([0.0, -0.008, 0.008, 0.025, -0.017, 0.017])  # of a 12 Hz sweep: the first is the anchor's
_SWEEP_S = 1 / 12
_WINDOW = 0.7  # of a period


@dataclass(frozen=True)
class Arrival:
    """One image.

    Attributes:
        at_s: when it arrives.
        camera, sweep: whose, and which.
        stamp_ns: of its message.
    """

    at_s: float
    camera: int
    sweep: int
    stamp_ns: int


@dataclass
class Outcome:
    """What a synchroniser made of the arrivals.

    Attributes:
        right, wrong: sets of one sweep; sets that mix sweeps.
        delays_ms: from the arrival of each right set's last image until it came out.
        busy_s: time spent in it.
    """

    right: int
    wrong: int
    delays_ms: list[float]
    busy_s: float


def arrivals(rate_hz: float, seconds: float, lost: float, seed: int = 0) -> tuple[list[Arrival], int]:
    """Images in order of arrival, and how many sweeps came whole."""
    rng = np.random.default_rng(seed)
    period_s, sweeps = 1 / rate_hz, int(seconds * rate_hz)
    scale = period_s / _SWEEP_S
    found, whole = [], 0
    for sweep in range(sweeps):
        kept = rng.random(len(_OFFSETS_S)) >= lost
        whole += bool(kept.all())
        stamps_s = 1.0 + sweep * period_s + scale * (_OFFSETS_S + rng.normal(0, 1e-3, len(_OFFSETS_S)))
        came_s = stamps_s + scale * (0.01 + rng.gamma(2.0, 1.5e-3, len(_OFFSETS_S)))
        found += [Arrival(float(came_s[c]), int(c), sweep, round(stamps_s[c] * 1e9)) for c in np.flatnonzero(kept)]
    return sorted(found, key=lambda arrival: arrival.at_s), whole


def run_ours(images: list[Arrival], rate_hz: float) -> Outcome:
    clock_s = [0.0]
    window_ms = 1e3 * _WINDOW / rate_hz
    assembler: FrameAssembler[Arrival] = FrameAssembler(
        len(_OFFSETS_S), 0, window_ms, 1.2e3 / rate_hz, DROP, lambda: clock_s[0]
    )
    sets = []
    started_s = time.perf_counter()
    for image in images:
        clock_s[0] = image.at_s
        assembler.add(image.camera, image.stamp_ns, image)
        if (taken := assembler.take()) is not None:
            sets.append((taken.images, image.at_s))
    return outcome(sets, time.perf_counter() - started_s)


def run_message_filters(images: list[Arrival], rate_hz: float) -> Outcome:
    """Python's ApproximateTimeSynchronizer, the class that a node written with rclpy takes.

    Raises:
        ImportError: it is not installed.
    """
    import message_filters
    from std_msgs.msg import Header

    from occflownet_ros.conversions import time_message

    class Message:
        def __init__(self, image: Arrival) -> None:
            self.image = image
            self.header = Header(stamp=time_message(image.stamp_ns))

    filters = [message_filters.SimpleFilter() for _ in _OFFSETS_S]
    synchroniser = message_filters.ApproximateTimeSynchronizer(filters, 8, _WINDOW / rate_hz)
    sets, clock_s = [], [0.0]
    synchroniser.registerCallback(lambda *found: sets.append((tuple(m.image for m in found), clock_s[0])))
    messages = [Message(image) for image in images]
    started_s = time.perf_counter()
    for message in messages:
        clock_s[0] = message.image.at_s
        filters[message.image.camera].signalMessage(message)
    return outcome(sets, time.perf_counter() - started_s)


def outcome(sets: list[tuple[tuple[Arrival, ...], float]], busy_s: float) -> Outcome:
    """Sort sets into right and wrong."""
    right = [(images, at_s) for images, at_s in sets if len({image.sweep for image in images}) == 1]
    delays_ms = [1e3 * (at_s - max(image.at_s for image in images)) for images, at_s in right]
    return Outcome(len(right), len(sets) - len(right), delays_ms, busy_s)


def figures(rate_hz: float, seconds: float, lost: float, other: Callable | None) -> list[Figure]:
    """One setting's rows."""
    images, whole = arrivals(rate_hz, seconds, lost)
    ours = run_ours(images, rate_hz)
    theirs = other(images, rate_hz) if other else None
    name = f"6 x {rate_hz:g} Hz, {100 * lost:g} % lost"
    share = 100 * ours.busy_s / seconds
    rows = [Figure(f"{name}: share of a core", share, MOST_OF_A_CORE_PERCENT, "%", "at most")]
    rows.append(Figure(f"{name}: right sets", ours.right, whole, "", "sweeps that came whole", more_is_better=True))
    if theirs is not None:
        per_image = (1e6 * ours.busy_s / len(images), 1e6 * theirs.busy_s / len(images))
        rows += [
            Figure(f"{name}: per image", *per_image, "us", "message_filters"),
            Figure(f"{name}: right sets", ours.right, theirs.right, "", "message_filters", more_is_better=True),
            Figure(f"{name}: sets that mix sweeps", ours.wrong, theirs.wrong, "", "message_filters"),
            Figure(
                f"{name}: last image to set, p95",
                float(np.percentile(ours.delays_ms, 95)),
                float(np.percentile(theirs.delays_ms, 95)),
                "ms",
                "message_filters",
            ),
        ]
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.assembler", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of images (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON (default: out/bench)")
    return exit_status("benchmarks.assembler", lambda: _run(parser.parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    try:
        import message_filters  # noqa: F401

        other = run_message_filters
    except ImportError:
        other = None
        print("message_filters is not installed: no comparison (a ROS installation has it)", file=sys.stderr)
    rows = []
    for rate_hz, lost in ((12.0, 0.0), (12.0, 0.02), (100.0, 0.0), (100.0, 0.02)):
        rows += figures(rate_hz, options.seconds, lost, other)
    publish("sets of six cameras", rows, options.out / "assembler.json")


if __name__ == "__main__":
    sys.exit(main())
