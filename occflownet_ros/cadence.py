# SPDX-License-Identifier: Apache-2.0
"""How regularly a camera's images come, and how many of them never came, judged by their stamps alone. Pure Python."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from occflownet_ros.frame_assembler import TIME_JUMP_NS

_REMEMBERED = 64
_FEWEST_INTERVALS = 8
_LONGEST_GAP_PERIODS = 10


@dataclass(frozen=True)
class Cadence:
    """What the last stamps of a camera tell.

    Attributes:
        period_s: between two images, None while too few have come.
        received: images that these stamps are of.
        missed: images that should lie between them; about, for stamps jitter.
        newest_ns: the newest stamp, None before the first.
    """

    period_s: float | None
    received: int
    missed: int
    newest_ns: int | None

    @property
    def expected(self) -> int:
        """How many would have come, had none been missed."""
        return self.received + self.missed

    @property
    def sentence(self) -> str:
        return f"about {self.missed} of the last {self.expected} images (one every {1e3 * (self.period_s or 0):.0f} ms)"


UNKNOWN_CADENCE = Cadence(None, 0, 0, None)


class CameraStamps:
    """The last stamps of one camera, in the order of their arrival."""

    def __init__(self) -> None:
        self._stamps_ns: deque[int] = deque(maxlen=_REMEMBERED)

    def add(self, stamp_ns: int) -> None:
        """Remember a stamp; one more than a second back is a clock that was reset, and all before it is forgotten."""
        if self._stamps_ns and self._stamps_ns[-1] - stamp_ns > TIME_JUMP_NS:
            self._stamps_ns.clear()
        self._stamps_ns.append(stamp_ns)

    def cadence(self) -> Cadence:
        """Period and gaps.

        The period is the lower quartile of the intervals: a gap only ever lengthens an interval, so it holds while up
        to three images in four are lost. An interval of more than ten periods is a camera that was off, not one whose
        images were lost on the way.
        """
        newest_ns = self._stamps_ns[-1] if self._stamps_ns else None
        stamps_ns = np.unique(np.fromiter(self._stamps_ns, dtype=np.int64))  # duplicates are no images
        if len(stamps_ns) <= _FEWEST_INTERVALS:
            return Cadence(None, len(stamps_ns), 0, newest_ns)
        intervals_ns = np.diff(stamps_ns)
        period_ns = np.quantile(intervals_ns, 0.25)
        periods = np.rint(intervals_ns / period_ns)
        gaps = periods[(periods > 1) & (periods <= _LONGEST_GAP_PERIODS)]
        return Cadence(period_ns / 1e9, len(stamps_ns), int((gaps - 1).sum()), newest_ns)
