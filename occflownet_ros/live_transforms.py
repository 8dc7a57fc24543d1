# SPDX-License-Identifier: Apache-2.0
"""Transforms between frames as they arrive while the vehicle drives; and in words why two frames are not connected.

The plain implementation is here; the one of tf2_ros is in ``tf_adapter``. A test holds them against each other.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from occflownet_core.errors import GeometryError
from occflownet_core.poses import RecordedPose
from occflownet_ros.transform_tree import LiveTrack, TransformTree, bare

_TIME_JUMP_NS = 1_000_000_000
_UNIT_TOLERANCE = 0.01  # of the squared length, as tf2's
_MANY = 6


class LiveTransforms(ABC):
    """What /tf_static and /tf have said so far. Frames are named without a slash in front.

    Attributes:
        keeper: what keeps them, for diagnostics.
    """

    keeper: str

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}
        self._moving: set[str] = set()
        self._newest_ns = 0

    def add(self, message: object, is_static: bool) -> None:
        """Take over a geometry_msgs/TransformStamped; time that steps back by more than a second forgets what moved.

        Raises:
            GeometryError: it is no transform between two frames; what was known stays.
        """
        parent, child = bare(message.header.frame_id), bare(message.child_frame_id)
        if not parent or not child or parent == child:
            raise GeometryError(f"a transform from '{child}' to '{parent}' was sent; give two different frames")
        t, q = message.transform.translation, message.transform.rotation
        try:
            pose = RecordedPose((t.x, t.y, t.z), (q.w, q.x, q.y, q.z))
        except GeometryError as error:
            raise GeometryError(f"the transform of '{child}' in '{parent}' is refused: {error}") from None
        length = math.hypot(q.w, q.x, q.y, q.z)
        if abs(length**2 - 1) > _UNIT_TOLERANCE:
            raise GeometryError(
                f"the transform of '{child}' in '{parent}' is refused: its quaternion has length {length:.3g}; give 1"
            )
        stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        if not is_static:
            if self._newest_ns - stamp_ns > _TIME_JUMP_NS:
                self._forget_motion()
                self._newest_ns = stamp_ns
            self._newest_ns = max(self._newest_ns, stamp_ns)
        self._parents[child] = parent
        (self._moving.discard if is_static else self._moving.add)(child)
        self._take(message, parent, child, stamp_ns, pose, is_static)

    @abstractmethod
    def newest(self, target: str, source: str) -> tuple[int, RecordedPose] | None:
        """``target_from_source`` and the latest stamp for which all that moves between the two is known.

        The stamp is 0 where nothing between them moves. None while they are not connected, or not at one time.
        """

    def fixed(self, target: str, source: str) -> RecordedPose | None:
        """``target_from_source`` where nothing between the two moves, else None."""
        if bare(target) == bare(source):
            return RecordedPose((0, 0, 0), (1, 0, 0, 0))
        found = self.newest(target, source)
        return found[1] if found is not None and found[0] == 0 else None

    def trouble(self, target: str, sources: Sequence[str], topic: str, fixed: bool) -> str:
        """One clause on why sources cannot be expressed in the target frame; empty if nothing seems to be missing.

        Args:
            target: frame.
            sources: frames.
            topic: where transforms are awaited, for the sentence.
            fixed: whether they are to be fixed to each other; else something has to move.
        """
        target, sources = bare(target), [bare(source) for source in sources]
        if not self._parents:
            return f"nothing has been published on {topic}"
        unknown = [frame for frame in (target, *sources) if frame not in self._frames]
        if unknown:
            return f"{topic} has no frame {_quoted(unknown)} {self._those_there_are(unknown[0])}"
        root = self._root(target)
        apart = [source for source in sources if self._root(source) != root]
        if apart:
            return (
                f"no transform on {topic} connects {_quoted(apart)} (below '{self._root(apart[0])}') "
                f"with '{target}' (below '{root}')"
            )
        loose = [source for source in sources if self._is_moving(target, source) == fixed]
        if loose and fixed:
            return f"{_quoted(loose)} and '{target}' are joined by /tf, which moves, and not by /tf_static alone"
        if loose:
            return f"{_quoted(loose)} and '{target}' are joined by /tf_static alone, so nothing moves"
        return ""

    @abstractmethod
    def _take(
        self, message: object, parent: str, child: str, stamp_ns: int, pose: RecordedPose, is_static: bool
    ) -> None:
        """Keep a checked transform."""

    @abstractmethod
    def _forget_motion(self) -> None:
        """Forget all transforms that are not static."""

    @property
    def _frames(self) -> set[str]:
        return {*self._parents, *self._parents.values()}

    def _those_there_are(self, missing: str) -> str:
        frames = sorted(self._frames)
        near = difflib.get_close_matches(missing, frames, n=1)
        shown = ", ".join(frames[:_MANY]) + (", ..." if len(frames) > _MANY else "")
        return f"(did you mean '{near[0]}'?)" if near else f"(it has {shown})"

    def _ancestors(self, frame: str) -> list[str]:
        """The frame, its parent and so on, until the root or a frame met before."""
        line = [frame]
        while (parent := self._parents.get(line[-1])) is not None and parent not in line:
            line.append(parent)
        return line

    def _root(self, frame: str) -> str:
        return self._ancestors(frame)[-1]

    def _is_moving(self, first: str, second: str) -> bool:
        """Whether a transform between two frames of one tree is on /tf."""
        between = set(self._ancestors(first)) ^ set(self._ancestors(second))
        return bool(between & self._moving)


class PlainTransforms(LiveTransforms):
    """Transforms kept in NumPy and plain Python."""

    keeper = "the node"

    def __init__(self) -> None:
        super().__init__()
        self._tree = TransformTree()
        self._tracks: dict[tuple[str, str], LiveTrack] = {}

    def newest(self, target: str, source: str) -> tuple[int, RecordedPose] | None:
        path = self._tree.path(target, source)
        if path is None:
            return None
        if path.is_static:
            stamp_ns = 0
        elif path.range_ns is None:
            return None
        else:
            stamp_ns = path.range_ns[1]
        return stamp_ns, path.at(stamp_ns)

    def _take(
        self, message: object, parent: str, child: str, stamp_ns: int, pose: RecordedPose, is_static: bool
    ) -> None:
        if is_static:
            self._tree.add(parent, child, pose)
            return
        track = self._tracks.get((parent, child))
        if track is None:
            track = self._tracks[parent, child] = LiveTrack()
        track.add(stamp_ns, pose)
        self._tree.add(parent, child, track)

    def _forget_motion(self) -> None:
        for parent, child in self._tracks:
            self._tree.add(parent, child, LiveTrack())
        self._tracks.clear()


class TfExtrinsics:
    """Where cameras are on the vehicle, as transforms say.

    Args:
        transforms: what was received so far.
        base_frame: the ego frame.
        topic: where they are awaited, for sentences.
    """

    def __init__(self, transforms: LiveTransforms, base_frame: str, topic: str) -> None:
        self._transforms = transforms
        self._base_frame = base_frame
        self._topic = topic

    def of(self, frame_id: str) -> np.ndarray | None:
        """``base_from_camera`` [4, 4] of an optical frame; None while the two are not known to be fixed to each other."""
        pose = self._transforms.fixed(self._base_frame, frame_id)
        return None if pose is None else pose.matrix

    def problem(self, frame_ids: Sequence[str]) -> str:
        """One sentence on why these optical frames have no place on the vehicle."""
        why = self._transforms.trouble(self._base_frame, frame_ids, self._topic, fixed=True)
        return (
            f"no transform from {self._base_frame} to {', '.join(frame_ids)}: {why or 'it has not come yet'}; "
            "publish it, or set the parameter calibration_file"
        )


def _quoted(frames: Sequence[str]) -> str:
    return ", ".join(f"'{frame}'" for frame in frames)
