# SPDX-License-Identifier: Apache-2.0
"""Where frames were at a moment: recorded transforms, standing still or interpolated, composed along a tree."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from occflownet_core import poses
from occflownet_core.poses import RecordedPose

_LIVE_NS = 10_000_000_000


class PoseTrack:
    """Poses of a frame in its parent over time.

    Args:
        recorded: (stamp in nanoseconds, pose) in any order; of equal stamps the first counts.
        max_gap_ns: poses further apart are not interpolated between.
    """

    def __init__(self, recorded: Iterable[tuple[int, RecordedPose]], max_gap_ns: int) -> None:
        by_stamp: dict[int, RecordedPose] = {}
        for stamp_ns, recorded_pose in recorded:
            by_stamp.setdefault(stamp_ns, recorded_pose)
        self._stamps_ns = sorted(by_stamp)
        self._poses = [by_stamp[stamp_ns] for stamp_ns in self._stamps_ns]
        self._max_gap_ns = max_gap_ns

    def __len__(self) -> int:
        return len(self._stamps_ns)

    @property
    def range_ns(self) -> tuple[int, int] | None:
        """First and last stamp; None of an empty track."""
        return (self._stamps_ns[0], self._stamps_ns[-1]) if self._stamps_ns else None

    def at(self, stamp_ns: int) -> RecordedPose | None:
        """``parent_from_child`` at a moment: as recorded where there is a pose of that very stamp, else interpolated.

        None before the first pose, after the last, and inside a gap.
        """
        after = bisect_left(self._stamps_ns, stamp_ns)
        if after == len(self._stamps_ns):
            return None
        if self._stamps_ns[after] == stamp_ns:
            return self._poses[after]
        if after == 0:
            return None
        first_ns, second_ns = self._stamps_ns[after - 1 : after + 1]
        if second_ns - first_ns > self._max_gap_ns:
            return None
        fraction = (stamp_ns - first_ns) / (second_ns - first_ns)
        return recorded(poses.interpolate(self._poses[after - 1].matrix, self._poses[after].matrix, fraction))


class LiveTrack(PoseTrack):
    """A track that grows while its transforms arrive, and forgets what is older than ten seconds, as tf2 does."""

    def __init__(self) -> None:
        super().__init__((), max_gap_ns=_LIVE_NS)

    def add(self, stamp_ns: int, recorded_pose: RecordedPose) -> None:
        """Take over a pose; of equal stamps the first counts."""
        place = bisect_left(self._stamps_ns, stamp_ns)
        if place < len(self._stamps_ns) and self._stamps_ns[place] == stamp_ns:
            return
        self._stamps_ns.insert(place, stamp_ns)
        self._poses.insert(place, recorded_pose)
        old = bisect_left(self._stamps_ns, self._stamps_ns[-1] - _LIVE_NS)
        del self._stamps_ns[:old], self._poses[:old]


def recorded(target_from_source: np.ndarray) -> RecordedPose:
    """A pose that was computed, in the numbers that tables hold."""
    return RecordedPose(target_from_source[:3, 3], poses.quaternion_from_rotation(target_from_source))


@dataclass(frozen=True)
class _Step:
    """From a child to its parent (up) or back."""

    motion: RecordedPose | PoseTrack
    up: bool

    def at(self, stamp_ns: int) -> RecordedPose | None:
        moment = self.motion.at(stamp_ns) if isinstance(self.motion, PoseTrack) else self.motion
        if moment is None or self.up:
            return moment
        return recorded(poses.inverse(moment.matrix))


@dataclass(frozen=True)
class FramePath:
    """How to get from one frame to another, step by step from the source; made by ``TransformTree.path``."""

    steps: Sequence[_Step]

    @classmethod
    def fixed(cls, target_from_source: RecordedPose) -> FramePath:
        """A path of one transform that never changes."""
        return cls((_Step(target_from_source, up=True),))

    def then_up(self, motion: PoseTrack) -> FramePath:
        """The path to the parent of the target, in which the target moves."""
        return FramePath((*self.steps, _Step(motion, up=True)))

    @property
    def is_static(self) -> bool:
        return all(isinstance(step.motion, RecordedPose) for step in self.steps)

    @property
    def range_ns(self) -> tuple[int, int] | None:
        """From when to when everything that moves on the way is recorded; None where nothing moves, or never at once."""
        ranges = [step.motion.range_ns for step in self.steps if isinstance(step.motion, PoseTrack)]
        if not ranges or None in ranges:
            return None
        first_ns, last_ns = max(r[0] for r in ranges), min(r[1] for r in ranges)
        return (first_ns, last_ns) if first_ns <= last_ns else None

    def at(self, stamp_ns: int) -> RecordedPose | None:
        """``target_from_source`` at a moment, None where a frame on the way has no pose then.

        A path of one recorded transform gives its very numbers.
        """
        moments = [step.at(stamp_ns) for step in self.steps]
        if any(moment is None for moment in moments):
            return None
        if len(moments) == 1:
            return moments[0]
        result = np.eye(4)
        for moment in moments:  # from the source upwards
            result = moment.matrix @ result
        return recorded(result)


class TransformTree:
    """Frames and their parents, as /tf and /tf_static tell them."""

    def __init__(self) -> None:
        self._parents: dict[str, tuple[str, RecordedPose | PoseTrack]] = {}

    @property
    def frames(self) -> set[str]:
        """Every frame that is a parent or a child."""
        return {*self._parents, *(parent for parent, _ in self._parents.values())}

    def add(self, parent: str, child: str, motion: RecordedPose | PoseTrack) -> None:
        """Put a frame below another; a later word about the same child wins."""
        self._parents[bare(child)] = bare(parent), motion

    def path(self, target: str, source: str) -> FramePath | None:
        """How to express the source's coordinates in the target frame; None where nothing connects them."""
        down, up = self._ancestors(bare(target)), self._ancestors(bare(source))
        common = next((frame for frame in up if frame in down), None)
        if common is None:
            return None
        rising = [_Step(self._parents[frame][1], up=True) for frame in up[: up.index(common)]]
        falling = [_Step(self._parents[frame][1], up=False) for frame in reversed(down[: down.index(common)])]
        return FramePath((*rising, *falling))

    def _ancestors(self, frame: str) -> list[str]:
        """The frame, its parent and so on, until the root or a frame met before."""
        line = [frame]
        while line[-1] in self._parents and self._parents[line[-1]][0] not in line:
            line.append(self._parents[line[-1]][0])
        return line


def bare(frame: str) -> str:
    """Without the slash in front that old drivers give."""
    return frame.lstrip("/")
