# SPDX-License-Identifier: Apache-2.0
"""Ego motion between image sets, from a buffer of poses; and when the network's memory must be forgotten. Pure Python."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from occflownet_core import poses
from occflownet_core.errors import GeometryError

_BUFFER_NS = 20_000_000_000
_TIME_JUMP_NS = 1_000_000_000
_POSITION_NOISE_M = 0.5
_FARTHEST_M = 1e9


class PoseBuffer:
    """The last seconds of a pose stream, in order of time.

    Args:
        max_gap_ms: poses further apart than this are not interpolated between, nor extrapolated beyond.

    Attributes:
        counters: received, refused (not a pose), out_of_order, time_jumps; and of sets, interpolated, extrapolated.
    """

    def __init__(self, max_gap_ms: float) -> None:
        self.max_gap_ms = max_gap_ms
        self.counters: Counter[str] = Counter()
        self._stamps_ns: deque[int] = deque()
        self._poses: deque[np.ndarray] = deque()

    def add(self, stamp_ns: int, position_m: np.ndarray, quaternion_wxyz: np.ndarray) -> None:
        """Append ``odom_from_base`` at a moment; a step back of more than a second empties the buffer first.

        Raises:
            GeometryError: the position or quaternion is no pose (NaN, all zero, not on Earth); the buffer is left as it
                was.
        """
        self.counters["received"] += 1
        try:
            odom_from_base = poses.pose(position_m, quaternion_wxyz)
            if np.abs(position_m).max() > _FARTHEST_M:
                raise GeometryError(f"position {position_m.tolist()} m is not on Earth; check what publishes it")
        except GeometryError:
            self.counters["refused"] += 1
            raise
        if self._stamps_ns and stamp_ns <= self._stamps_ns[-1]:
            if self._stamps_ns[-1] - stamp_ns <= _TIME_JUMP_NS:
                self.counters["out_of_order"] += 1
                return
            self.counters["time_jumps"] += 1
            self._stamps_ns.clear()
            self._poses.clear()
        self._stamps_ns.append(stamp_ns)
        self._poses.append(odom_from_base)
        while stamp_ns - self._stamps_ns[0] > _BUFFER_NS:
            self._stamps_ns.popleft()
            self._poses.popleft()

    def look_up(self, stamp_ns: int) -> tuple[np.ndarray | None, str]:
        """``at`` a set's stamp, counted; and in words why there is no pose, where there is none."""
        odom_from_base = self.at(stamp_ns)
        if odom_from_base is None:
            return None, _gap_sentence(self._stamps_ns, stamp_ns, self.max_gap_ms)
        self.counters["interpolated" if stamp_ns <= self._stamps_ns[-1] else "extrapolated"] += 1
        return odom_from_base, ""

    @property
    def newest_ns(self) -> int | None:
        """Stamp of the newest pose, None while there is none."""
        return self._stamps_ns[-1] if self._stamps_ns else None

    def reaches(self, stamp_ns: int) -> bool:
        """Whether there is a pose of this moment or a later one."""
        return self.newest_ns is not None and self.newest_ns >= stamp_ns

    def at(self, stamp_ns: int) -> np.ndarray | None:
        """``odom_from_base`` [4, 4] at a moment, interpolated; None where no pose is near enough.

        Beyond the newest pose the motion between the last two is continued, for at most ``max_gap_ms``.
        """
        after = bisect_left(self._stamps_ns, stamp_ns)
        if after < len(self._stamps_ns) and self._stamps_ns[after] == stamp_ns:
            return self._poses[after]
        if after == 0 or len(self._stamps_ns) < 2:
            return None
        after = min(after, len(self._stamps_ns) - 1)
        first_ns, second_ns = self._stamps_ns[after - 1], self._stamps_ns[after]
        if max(second_ns - first_ns, stamp_ns - second_ns) > self.max_gap_ms * 1e6:
            return None
        fraction = (stamp_ns - first_ns) / (second_ns - first_ns)
        return poses.interpolate(self._poses[after - 1], self._poses[after], fraction)


def _gap_sentence(stamps_ns: Sequence[int], stamp_ns: int, max_gap_ms: float) -> str:
    """Why a buffer has no pose at a moment, where it has none."""
    if not stamps_ns:
        return "none has come"
    if stamp_ns < stamps_ns[0]:
        return f"the oldest kept is {(stamps_ns[0] - stamp_ns) / 1e9:.3f} s later"
    if len(stamps_ns) == 1:
        return f"there is one, {(stamp_ns - stamps_ns[0]) / 1e9:.3f} s earlier"
    if stamp_ns - stamps_ns[-1] > max_gap_ms * 1e6:
        return f"the newest is {(stamp_ns - stamps_ns[-1]) / 1e9:.3f} s earlier"
    after = min(bisect_left(stamps_ns, stamp_ns), len(stamps_ns) - 1)
    apart_ms = (stamps_ns[after] - stamps_ns[after - 1]) / 1e6
    return f"the two next to it are {apart_ms:.0f} ms apart, more than {max_gap_ms:g} ms"


class EgoMotion:
    """The motion from one processed set to the next, or the reason why there is none.

    Args:
        max_gap_s: a longer time between sets forgets the memory.
        max_speed_mps: faster motion between sets is a jump of the localisation, not motion.
        max_yaw_rate_rps: likewise for turning, radians per second.

    Attributes:
        resets: how often the memory was forgotten, by cause: first_set, time_jump, gap, no_odometry, pose_jump, engine.
        last_reason: one sentence about the latest reset that was more than a beginning; empty while there was none.
    """

    def __init__(self, max_gap_s: float, max_speed_mps: float, max_yaw_rate_rps: float) -> None:
        self.max_gap_s = max_gap_s
        self.max_speed_mps = max_speed_mps
        self.max_yaw_rate_rps = max_yaw_rate_rps
        self.resets: Counter[str] = Counter()
        self.last_reason = ""
        self._previous: tuple[int, np.ndarray | None] | None = None

    def step(self, stamp_ns: int, odom_from_base: np.ndarray | None, why_none: str = "") -> np.ndarray | None:
        """``previous_from_current`` [4, 4] for the set of this stamp, or None: then the memory is to be forgotten.

        Args:
            stamp_ns: the set's stamp.
            odom_from_base: the vehicle's pose at that moment, None where it is unknown.
            why_none: what ``PoseBuffer.look_up`` says then.
        """
        cause, reason = self._reset_cause(stamp_ns, odom_from_base, why_none)
        previous, self._previous = self._previous, (stamp_ns, odom_from_base)
        if cause:
            self.resets[cause] += 1
            self.last_reason = self.last_reason if cause == "first_set" else reason
            return None
        return poses.inverse(previous[1]) @ odom_from_base

    def forget(self, cause: str, reason: str) -> None:
        """The engine lost its memory (it failed, or was made anew): the next step starts from nothing."""
        self.resets[cause] += 1
        self.last_reason = reason
        self._previous = None

    def _reset_cause(self, stamp_ns: int, odom_from_base: np.ndarray | None, why_none: str) -> tuple[str, str]:
        if odom_from_base is None:
            because = f": {why_none}" if why_none else ""
            return "no_odometry", f"no pose of the vehicle at {stamp_ns / 1e9:.3f} s{because}; memory forgotten"
        if self._previous is None or self._previous[1] is None:
            return "first_set", ""
        elapsed_s = (stamp_ns - self._previous[0]) / 1e9
        if elapsed_s <= 0:
            return "time_jump", f"time jumped back by {-elapsed_s:.3f} s; memory forgotten"
        if elapsed_s > self.max_gap_s:
            return "gap", f"{elapsed_s:.2f} s since the last set, more than {self.max_gap_s:g} s; memory forgotten"
        previous_from_current = poses.inverse(self._previous[1]) @ odom_from_base
        distance_m = float(np.linalg.norm(previous_from_current[:3, 3]))
        turn_rad = abs(poses.yaw(previous_from_current))
        too_far = distance_m > self.max_speed_mps * elapsed_s + _POSITION_NOISE_M
        if too_far or turn_rad > self.max_yaw_rate_rps * elapsed_s:
            return "pose_jump", (
                f"odometry moved {distance_m:.1f} m and turned {np.degrees(turn_rad):.0f} degrees in "
                f"{elapsed_s:.2f} s; memory forgotten"
            )
        return "", ""
