# SPDX-License-Identifier: Apache-2.0
"""When to send the next message: a clock that runs at a rate and can stand still, and flow control for slow consumers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Waits are cut into slices so that a signal handler needs to set a flag only.
_SLICE_S = 0.05


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """Raised out of a wait when playback is to end."""


class StopFlag:
    """Set by a signal handler, looked at by everything that waits."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def set(self, signal_number: int) -> None:
        self.signal = signal_number

    def check(self) -> None:
        """Raises ``Stopped`` once the flag is set."""
        if self.signal is not None:
            raise Stopped


class PlaybackClock:
    """Bag time as a function of monotonic time: it runs ``rate`` times as fast, and stands still while held.

    Args:
        rate: bag seconds per second, positive.
        stop: ends every wait.
        monotonic_ns: the clock underneath.
    """

    def __init__(self, rate: float, stop: StopFlag, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._rate = rate
        self._stop = stop
        self._monotonic_ns = monotonic_ns
        self._changed = threading.Condition()
        self._holds: set[str] = set()
        self._bag_ns = 0  # bag time at ...
        self._since_ns = monotonic_ns()  # ... this moment

    def set(self, bag_ns: int) -> None:
        """Jump to a bag time."""
        with self._changed:
            self._bag_ns, self._since_ns = bag_ns, self._monotonic_ns()
            self._changed.notify_all()

    def now_ns(self) -> int:
        """The current bag time."""
        with self._changed:
            return self._now_ns()

    def hold(self, reason: str) -> None:
        """Stand still until every reason to is released."""
        with self._changed:
            self._bag_ns, self._since_ns = self._now_ns(), self._monotonic_ns()
            self._holds.add(reason)

    def release(self, reason: str) -> None:
        """Run again, unless another reason to stand still remains."""
        with self._changed:
            self._bag_ns, self._since_ns = self._now_ns(), self._monotonic_ns()
            self._holds.discard(reason)
            self._changed.notify_all()

    def held(self, reason: str) -> bool:
        with self._changed:
            return reason in self._holds

    def wait_until(self, bag_ns: int) -> float:
        """Wait for a bag time to come.

        Returns:
            how late it is now, in seconds of wall time.

        Raises:
            Stopped: playback is to end.
        """
        with self._changed:
            while True:
                self._stop.check()
                missing_s = (bag_ns - self._now_ns()) / 1e9 / self._rate
                if not self._holds and missing_s <= 0:
                    return -missing_s
                self._changed.wait(_SLICE_S if self._holds else min(missing_s, _SLICE_S))

    def _now_ns(self) -> int:
        if self._holds:
            return self._bag_ns
        return self._bag_ns + round((self._monotonic_ns() - self._since_ns) * self._rate)


class FlowControl:
    """Lets only so many anchor messages be unanswered: how a consumer slower than real time gets every one.

    A consumer that drops a message would stop playback for good; after ``timeout_s`` without an answer everything in
    flight counts as unanswered, and playback goes on.

    Args:
        max_in_flight: anchors that may be sent and not answered yet, at least 1.
        timeout_s: longest wait for one answer.
        stop: ends every wait.
    """

    def __init__(self, max_in_flight: int, timeout_s: float, stop: StopFlag) -> None:
        self._max_in_flight = max_in_flight
        self._timeout_s = timeout_s
        self._stop = stop
        self._changed = threading.Condition()
        self._in_flight = 0
        self.answered = 0
        self.unanswered = 0

    def sent(self) -> None:
        """An anchor was published."""
        with self._changed:
            self._in_flight += 1

    def answer(self) -> None:
        """A result has come; an answer that comes after it was given up counts, and frees nothing."""
        with self._changed:
            self.answered += 1
            self._in_flight = max(0, self._in_flight - 1)
            self._changed.notify_all()

    def has_room(self) -> bool:
        with self._changed:
            return self._in_flight < self._max_in_flight

    def wait_for_room(self) -> None:
        """Wait until another anchor may be sent."""
        self._wait_until_below(self._max_in_flight)

    def drain(self) -> None:
        """Wait for the last answers."""
        self._wait_until_below(1)

    def _wait_until_below(self, limit: int) -> None:
        with self._changed:
            give_up_s = time.monotonic() + self._timeout_s
            answered = self.answered
            while self._in_flight >= limit:
                self._stop.check()
                if self.answered != answered:
                    answered, give_up_s = self.answered, time.monotonic() + self._timeout_s
                if time.monotonic() >= give_up_s:
                    self.unanswered += self._in_flight
                    self._in_flight = 0
                    return
                self._changed.wait(_SLICE_S)
