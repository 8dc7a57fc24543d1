# SPDX-License-Identifier: Apache-2.0
"""FrameAssembler: which images of N unsynchronised cameras make one set. Pure Python: no ROS, no threads, no clock.

An image of the *anchor* camera opens a set; every other camera contributes its image nearest in time to it. A set
closes when no nearer image can come any more, or at its deadline. The newest closed set wins.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

DROP, MASK = "drop", "mask"
MISSING_CAMERA_POLICIES = (DROP, MASK)

IMAGE_OUTCOMES = ("used", "superseded", "incomplete", "unmatched", "late", "duplicate", "out_of_order", "cleared")
"""What becomes of an image; every received one ends in exactly one of these (or still waits).

used: in a set that was taken. superseded: in a set that a newer one replaced before it was taken. incomplete: in a set
dropped for another camera's absence. late: came after the set it belongs to had closed without it. unmatched: no
anchor image near enough, or another image of its camera was nearer. duplicate: its camera sent that stamp before.
out_of_order: older than its camera's newest. cleared: thrown away when time jumped back.
"""

TIME_JUMP_NS = 1_000_000_000
"""A stamp further back than this is a clock that was reset (bag loop), not an image that was overtaken."""

_WAITING_LIMIT = 32
_REMEMBERED_INTERVALS = 4


@dataclass(frozen=True)
class ImageSet(Generic[T]):
    """Images of one moment.

    Attributes:
        stamp_ns: the anchor image's stamp.
        epoch: how often time had jumped back; (epoch, stamp_ns) grows strictly from set to set.
        images: one per camera, None where the camera is missing.
        stamps_ns: their stamps.
        closed_s: when the set was closed, on the assembler's clock.
    """

    stamp_ns: int
    epoch: int
    images: tuple[T | None, ...]
    stamps_ns: tuple[int | None, ...]
    closed_s: float

    @property
    def missing(self) -> tuple[int, ...]:
        """Indices of the cameras without an image."""
        return tuple(camera for camera, stamp in enumerate(self.stamps_ns) if stamp is None)


@dataclass(frozen=True)
class _Waiting(Generic[T]):
    stamp_ns: int
    image: T


@dataclass(frozen=True)
class _Anchor:
    stamp_ns: int
    arrived_s: float


class FrameAssembler(Generic[T]):
    """Sorts arriving images into sets.

    Not thread-safe: callers share one lock. Policies may be assigned at any time.

    Args:
        cameras: how many there are.
        anchor: index of the camera whose images open sets.
        max_diff_ms: an image further than this from the anchor image's stamp never joins its set. Best below the
            cameras' period, so that a lost image is not replaced by a neighbour sweep's.
        deadline_ms: how long after the anchor image's arrival a set waits for the others.
        missing_cameras: what happens to a set that is incomplete at its deadline: ``drop`` it, or hand it on with the
            absent cameras empty (``mask``).
        now_s: monotonic clock, seconds.
        on_unused: told each image as soon as it is clear that no set that is taken will have it.

    Attributes:
        images: outcome counters per camera (see ``IMAGE_OUTCOMES``), plus ``received``, and ``absent``: sets that
            closed without an image of this camera.
        sets: counters: opened, complete, masked, dropped (incomplete), superseded, taken, time_jumps.
    """

    def __init__(
        self,
        cameras: int,
        anchor: int,
        max_diff_ms: float,
        deadline_ms: float,
        missing_cameras: str,
        now_s: Callable[[], float],
        on_unused: Callable[[T], object] = lambda image: None,
    ) -> None:
        self.max_diff_ms = max_diff_ms
        self.deadline_ms = deadline_ms
        self.missing_cameras = missing_cameras
        self.images: list[Counter[str]] = [Counter() for _ in range(cameras)]
        self.sets: Counter[str] = Counter()
        self._anchor_camera = anchor
        self._now_s = now_s
        self._on_unused = on_unused
        self._waiting: list[deque[_Waiting[T]]] = [deque() for _ in range(cameras)]
        self._newest_ns: list[int | None] = [None] * cameras
        self._intervals_ns: list[deque[int]] = [deque(maxlen=_REMEMBERED_INTERVALS) for _ in range(cameras)]
        self._missed_ns: list[int | None] = [None] * cameras
        self._anchors: deque[_Anchor] = deque()
        self._closed_ns: int | None = None
        self._ready: ImageSet[T] | None = None
        self._epoch = 0

    def add(self, camera: int, stamp_ns: int, image: T) -> None:
        """Take an image in; sets that it completes become ready."""
        self.images[camera]["received"] += 1
        self._notice_time_jump(camera, stamp_ns)
        newest_ns = self._newest_ns[camera]
        if newest_ns is not None and stamp_ns <= newest_ns:
            self.images[camera]["duplicate" if stamp_ns == newest_ns else "out_of_order"] += 1
            self._on_unused(image)
            return
        if newest_ns is not None:
            self._intervals_ns[camera].append(stamp_ns - newest_ns)
        self._newest_ns[camera] = stamp_ns
        self._waiting[camera].append(_Waiting(stamp_ns, image))
        if camera == self._anchor_camera:
            self.sets["opened"] += 1
            self._anchors.append(_Anchor(stamp_ns, self._now_s()))
        if len(self._waiting[camera]) > _WAITING_LIMIT:
            self._make_room(camera)
        self._close_what_can_be()

    def take(self) -> ImageSet[T] | None:
        """The newest ready set, once; None while there is none."""
        self._close_what_can_be()
        ready, self._ready = self._ready, None
        if ready is not None:
            self.sets["taken"] += 1
            self._count(ready, "used")
        return ready

    def next_deadline_s(self) -> float | None:
        """When ``take`` may next have something without a new image, on the injected clock; None if nothing waits."""
        return self._anchors[0].arrived_s + self.deadline_ms / 1e3 if self._anchors else None

    @property
    def anchor_period_s(self) -> float | None:
        """The anchor camera's period, as far as it is known."""
        intervals_ns = self._intervals_ns[self._anchor_camera]
        return min(intervals_ns) / 1e9 if intervals_ns else None

    def waiting(self, camera: int) -> int:
        """Images of a camera that are neither counted in an outcome nor in the ready set."""
        return len(self._waiting[camera])

    @property
    def ready(self) -> ImageSet[T] | None:
        """The set that ``take`` would hand out, left where it is."""
        return self._ready

    def _close_what_can_be(self) -> None:
        """Close every set up to the newest that is settled or due.

        An older set that still waits is closed with it: its missing images could only come out of order.
        """
        arrived_before_s = self._now_s() - self.deadline_ms / 1e3
        closable = 0
        for position, anchor in enumerate(self._anchors):
            if anchor.arrived_s <= arrived_before_s or self._is_settled(position):
                closable = position + 1
        for _ in range(closable):
            self._close()

    def _is_settled(self, position: int) -> bool:
        return all(self._camera_is_settled(camera, position) for camera in range(len(self._waiting)))

    def _camera_is_settled(self, camera: int, position: int) -> bool:
        """True if the camera has an image for this anchor and neither a nearer image nor a nearer anchor can come."""
        if camera == self._anchor_camera:
            return True
        chosen = self._nearest(camera, position)
        if chosen is None:
            return False
        window_ns = int(self.max_diff_ms * 1e6)
        anchor_ns = self._anchors[position].stamp_ns
        newest_ns = self._waiting[camera][-1].stamp_ns
        if newest_ns < anchor_ns:
            return anchor_ns - newest_ns <= self._half_period_ns(camera, if_unknown=window_ns // 2)
        is_last_anchor = position == len(self._anchors) - 1
        half_period_ns = self._half_period_ns(self._anchor_camera, if_unknown=window_ns)
        return not is_last_anchor or chosen.stamp_ns - anchor_ns <= half_period_ns

    def _half_period_ns(self, camera: int, if_unknown: int) -> int:
        # The least of several intervals, for a lost image makes one long and nothing makes one short.
        return min(self._intervals_ns[camera]) // 2 if self._intervals_ns[camera] else if_unknown

    def _nearest(self, camera: int, position: int) -> _Waiting[T] | None:
        """The camera's image nearest to an open anchor, within the window, and not nearer to the next anchor."""
        anchor_ns = self._anchors[position].stamp_ns
        if camera == self._anchor_camera:
            return next(w for w in self._waiting[camera] if w.stamp_ns == anchor_ns)
        has_next = position + 1 < len(self._anchors)
        next_ns = self._anchors[position + 1].stamp_ns if has_next else None
        best, best_ns = None, int(self.max_diff_ms * 1e6)
        for waiting in self._waiting[camera]:
            difference_ns = abs(waiting.stamp_ns - anchor_ns)
            belongs_to_next = next_ns is not None and abs(waiting.stamp_ns - next_ns) < difference_ns
            if difference_ns <= best_ns and not belongs_to_next:
                best, best_ns = waiting, difference_ns
        return best

    def _close(self) -> None:
        """Close the oldest open set: hand it on or drop it, and let go of images that no later set can use."""
        chosen = [self._nearest(camera, 0) for camera in range(len(self._waiting))]
        anchor = self._anchors.popleft()
        self._closed_ns = anchor.stamp_ns
        image_set = ImageSet(
            anchor.stamp_ns,
            self._epoch,
            tuple(w.image if w else None for w in chosen),
            tuple(w.stamp_ns if w else None for w in chosen),
            self._now_s(),
        )
        for camera, waiting in enumerate(chosen):
            if waiting is None:
                self._missed_ns[camera] = anchor.stamp_ns
                self.images[camera]["absent"] += 1
            self._forget(camera, waiting)
        if image_set.missing and self.missing_cameras == DROP:
            self.sets["dropped"] += 1
            self._give_up(image_set, "incomplete")
            return
        self.sets["masked" if image_set.missing else "complete"] += 1
        if self._ready is not None:
            self.sets["superseded"] += 1
            self._give_up(self._ready, "superseded")
        self._ready = image_set

    def _forget(self, camera: int, chosen: _Waiting[T] | None) -> None:
        """Take the chosen image out, and discard those that are older or too old for any later anchor."""
        next_anchor_ns = self._anchors[0].stamp_ns if self._anchors else self._closed_ns + 1
        oldest_useful_ns = next_anchor_ns - int(self.max_diff_ms * 1e6)
        if chosen is not None:
            oldest_useful_ns = max(oldest_useful_ns, chosen.stamp_ns + 1)
        waiting = self._waiting[camera]
        while waiting and waiting[0].stamp_ns < oldest_useful_ns:
            image = waiting.popleft()
            if image is not chosen:
                self._discard(camera, image)

    def _discard(self, camera: int, waiting: _Waiting[T]) -> None:
        missed_ns = self._missed_ns[camera]
        is_late = missed_ns is not None and abs(waiting.stamp_ns - missed_ns) <= self.max_diff_ms * 1e6
        self.images[camera]["late" if is_late else "unmatched"] += 1
        self._on_unused(waiting.image)

    def _make_room(self, camera: int) -> None:
        if camera == self._anchor_camera:
            self._close()
        else:
            self._discard(camera, self._waiting[camera].popleft())

    def _give_up(self, image_set: ImageSet[T], outcome: str) -> None:
        self._count(image_set, outcome)
        for image in image_set.images:
            if image is not None:
                self._on_unused(image)

    def _count(self, image_set: ImageSet[T], outcome: str) -> None:
        for camera, stamp_ns in enumerate(image_set.stamps_ns):
            if stamp_ns is not None:
                self.images[camera][outcome] += 1

    def _notice_time_jump(self, camera: int, stamp_ns: int) -> None:
        """Start over where a clock was set back; the anchor camera's clock counts for all."""
        newest_ns = self._newest_ns[camera]
        if newest_ns is None or newest_ns - stamp_ns <= TIME_JUMP_NS:
            return
        if camera == self._anchor_camera:
            self._epoch += 1
            self._closed_ns = None
            self._anchors.clear()
            self.sets["time_jumps"] += 1
        for other in range(len(self._waiting)) if camera == self._anchor_camera else (camera,):
            # Cameras that jumped before the anchor did already wait with images of the new time: those stay.
            kept: deque[_Waiting[T]] = deque()
            for waiting in self._waiting[other]:
                if other != camera and waiting.stamp_ns - stamp_ns <= TIME_JUMP_NS:
                    kept.append(waiting)
                else:
                    self.images[other]["cleared"] += 1
                    self._on_unused(waiting.image)
            self._waiting[other] = kept
            self._missed_ns[other] = None
        self._newest_ns[camera] = None
        self._intervals_ns[camera].clear()
