# SPDX-License-Identifier: Apache-2.0
"""What the node says about itself: throttled sentences, latency statistics, and the statuses of /diagnostics."""

from __future__ import annotations

import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from occflownet_core.errors import OccflownetError
from occflownet_ros.cadence import UNKNOWN_CADENCE, Cadence

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR

CAMERA_TIMEOUT_S = 1.0
POSE_TIMEOUT_S = 1.0
CLOCKS_DIFFER_S = 1.0
"""Stamps this far, and three periods, from the anchor camera's are of another clock: no camera is that late."""
_REPEAT_S = 10.0
_LATENCY_WINDOW = 200
_TROUBLE = ("undecodable", "late", "duplicate", "out_of_order", "cleared")
_MISSED_SHARE = 0.02


class Complaints:
    """Passes a sentence on at most once in ten seconds per subject, with how often it was held back. Thread-safe."""

    def __init__(self, warn: Callable[[str], None], now_s: Callable[[], float]) -> None:
        self._warn = warn
        self._now_s = now_s
        self._lock = threading.Lock()
        self._said_s: dict[str, float] = {}
        self._held_back: Counter[str] = Counter()

    def __call__(self, subject: str, sentence: str) -> None:
        with self._lock:
            now_s = self._now_s()
            if now_s - self._said_s.get(subject, -np.inf) < _REPEAT_S:
                self._held_back[subject] += 1
                return
            self._said_s[subject] = now_s
            held_back = self._held_back.pop(subject, 0)
        self._warn(f"{sentence} ({held_back} more like this since)" if held_back else sentence)


def traced(error: Exception) -> str:
    """Where an error came from, if it is none of those that a sentence explains; to be put behind one."""
    return "" if isinstance(error, OccflownetError) else "\n" + "".join(traceback.format_exception(error))


class LatencyWindow:
    """Latencies per stage of the last sets."""

    def __init__(self) -> None:
        self._ms: dict[str, deque[float]] = {}

    def add(self, latency_ms: Mapping[str, float]) -> None:
        for stage, value in latency_ms.items():
            self._ms.setdefault(stage, deque(maxlen=_LATENCY_WINDOW)).append(value)

    def median_ms(self, stage: str) -> float:
        """The median of a stage, 0 before its first set."""
        return float(np.median(self._ms[stage])) if stage in self._ms else 0.0

    def summary(self) -> dict[str, str]:
        """``{"latency engine p50 / p95 [ms]": "81.2 / 90.4", ...}``."""
        return {
            f"latency {stage} p50 / p95 [ms]": " / ".join(f"{v:.1f}" for v in np.percentile(values, (50, 95)))
            for stage, values in self._ms.items()
        }


@dataclass(frozen=True)
class Status:
    """One entry of /diagnostics."""

    name: str
    level: bytes
    message: str
    values: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class CameraReport:
    """What is known of a camera at one moment.

    Attributes:
        name: in the bundle.
        topic: of its images.
        silent_s: since its last image, None before the first.
        rate_hz: images since the report before, per second.
        counters: outcomes of its images so far.
        recent: the same, since the report before.
        cadence: what its stamps say about images that never came.
        ahead_s: its newest stamp minus the anchor camera's, 0 while one of them is unknown.
    """

    name: str
    topic: str
    silent_s: float | None
    rate_hz: float
    counters: Mapping[str, int]
    recent: Mapping[str, int]
    cadence: Cadence = UNKNOWN_CADENCE
    ahead_s: float = 0.0


def camera_status(report: CameraReport) -> Status:
    """Silence, a frozen image and another clock are errors: no set gets an image of this camera any more."""
    level, message = OK, f"{report.rate_hz:.1f} Hz"
    duplicates = report.recent.get("duplicate", 0)
    if report.silent_s is None:
        level, message = ERROR, f"no image yet on {report.topic}"
    elif report.silent_s > CAMERA_TIMEOUT_S:
        level, message = ERROR, f"no image for {report.silent_s:.1f} s on {report.topic}"
    elif duplicates and duplicates == report.recent.get("received"):
        level, message = ERROR, f"frozen: {duplicates} images of one and the same stamp in the last second"
    elif abs(report.ahead_s) > max(CLOCKS_DIFFER_S, 3 * (report.cadence.period_s or 0.0)):
        side = "ahead of" if report.ahead_s > 0 else "behind"
        level, message = ERROR, f"stamps are {abs(report.ahead_s):.1f} s {side} the anchor camera's; set its clock"
    elif trouble := _camera_trouble(report):
        level, message = WARN, trouble
    cadence = {"missed": report.cadence.sentence} if report.cadence.period_s else {}
    return Status(f"camera {report.name}", level, message, {"topic": report.topic, **report.counters, **cadence})


def _camera_trouble(report: CameraReport) -> str:
    counts = [f"{report.recent[what]} {what.replace('_', ' ')}" for what in _TROUBLE if report.recent.get(what)]
    if report.recent.get("absent"):
        counts.append(f"absent from {report.recent['absent']} sets")
    parts = [f"{', '.join(counts)} in the last second"] if counts else []
    if report.cadence.missed > _MISSED_SHARE * report.cadence.expected:
        parts.append(f"missed {report.cadence.sentence}")
    return "; ".join(parts)


def engine_status(name: str, sets: Mapping[str, int], recent: Mapping[str, int], latency: LatencyWindow) -> Status:
    """Sets and latencies; ``recent`` counts since the report before."""
    values = {"engine": name, **{f"sets {k}": v for k, v in sets.items()}, **latency.summary()}
    if recent.get("failed"):
        return Status("engine", ERROR, f"failed on {recent['failed']} sets in the last second", values)
    if not recent.get("processed"):
        return Status("engine", WARN, "no set in the last second", values)
    dropped = recent.get("dropped", 0) + recent.get("undecodable", 0)
    if dropped:
        return Status("engine", WARN, f"{dropped} sets dropped in the last second", values)
    return Status("engine", OK, f"{recent['processed']} sets in the last second", values)


def calibration_status(problem: str, changes: int, sources: Mapping[str, str]) -> Status:
    """``sources`` says where each part comes from."""
    values = {**sources, "tables built": changes}
    return Status("calibration", ERROR if problem else OK, problem or "complete", values)


@dataclass(frozen=True)
class EgoMotionReport:
    """What is known of the ego motion at one moment.

    Attributes:
        source: where poses come from, in words; empty where none are followed.
        trouble: what is missing, should no pose have come yet.
        silent_s: since the last pose, None before the first.
        counters: the pose buffer's.
        recent: the same, since the report before.
        resets: of the network's memory, by cause.
        recent_resets: the same, since the report before.
        reason: of the latest reset.
    """

    source: str
    trouble: str
    silent_s: float | None
    counters: Mapping[str, int]
    recent: Mapping[str, int]
    resets: Mapping[str, int]
    recent_resets: Mapping[str, int]
    reason: str


def ego_motion_status(report: EgoMotionReport) -> Status:
    """Without poses the network works, but forgets: never more than a warning."""
    values = {
        "source": report.source,
        **report.counters,
        **{f"reset {cause}": n for cause, n in report.resets.items()},
    }
    refused = report.recent.get("refused", 0)
    level, message = WARN, ""
    if not report.source:
        level, message = OK, "off: ego_motion is none, or odom_topic is empty"
    elif refused:
        message = f"{refused} poses refused in the last second"
    elif report.silent_s is None:
        message = f"{report.trouble}; the network runs without memory"
    elif report.silent_s > POSE_TIMEOUT_S:
        message = f"no {report.source} for {report.silent_s:.1f} s; the network runs without memory"
    elif any(n for cause, n in report.recent_resets.items() if cause != "first_set"):
        message = report.reason or "memory was reset in the last second"
    else:
        level, message = OK, f"following {report.source}"
    return Status("ego motion", level, message, values)


@dataclass(frozen=True)
class MeshReport:
    """What became of meshes so far.

    Attributes:
        problem: why there are none, empty if there may be.
        is_heard: whether someone subscribes.
        counters: ``built``; ``late``, of these, took longer than the budget; ``replaced`` by a newer set before they were
            begun; ``failed``.
        took_ms, cell_m, triangles: of the last one.
    """

    problem: str = ""
    is_heard: bool = False
    counters: Counter[str] = field(default_factory=Counter)
    took_ms: float = 0.0
    cell_m: float = 0.0
    triangles: int = 0


def mesh_status(report: MeshReport, recent: Mapping[str, int]) -> Status:
    """A mesh is for looking at: never more than a warning, and none where nobody looks."""
    values = {f"meshes {what}": count for what, count in report.counters.items()}
    last = f"{report.triangles} triangles in cells of {report.cell_m:g} m, {report.took_ms:.0f} ms"
    if report.counters.get("built"):
        values["last mesh"] = last
    if report.problem:
        return Status("mesh", WARN if report.is_heard else OK, report.problem, values)
    if recent.get("failed"):
        return Status("mesh", WARN, f"failed on {recent['failed']} meshes in the last second", values)
    if not report.is_heard:
        return Status("mesh", OK, "nobody listens", values)
    return Status("mesh", OK, last if report.counters.get("built") else "no mesh yet", values)


def diagnostic_array(stamp, node_name: str, hardware_id: str, statuses: Sequence[Status]) -> DiagnosticArray:
    """The message; ``stamp`` is a builtin_interfaces/Time."""
    message = DiagnosticArray()
    message.header.stamp = stamp
    for status in statuses:
        message.status.append(
            DiagnosticStatus(
                level=status.level,
                name=f"{node_name}: {status.name}",
                message=status.message,
                hardware_id=hardware_id,
                values=[KeyValue(key=key, value=str(value)) for key, value in status.values.items()],
            )
        )
    return message
