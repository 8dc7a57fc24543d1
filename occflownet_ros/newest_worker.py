# SPDX-License-Identifier: Apache-2.0
"""NewestWorker: a thread that works on the newest of what it is given; what waits when something newer comes is dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Task = TypeVar("Task")

_STOP_TIMEOUT_S = 10.0


class NewestWorker(Generic[Task]):
    """Runs from construction to ``stop``.

    Args:
        name: of the thread.
        work: takes a task, and what tells whether it is still wanted; catches what may go wrong.
    """

    def __init__(self, name: str, work: Callable[[Task, Callable[[], bool]], None]) -> None:
        self._work = work
        self._is_stopping = False
        self._waiting: Task | None = None
        self._changed = threading.Condition()
        # A daemon, so that a process that ends without stop() does not wait for it.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> bool:
        """Work on this next; whether another task that waited is dropped for it."""
        with self._changed:
            is_replacing = self._waiting is not None
            self._waiting = task
            self._changed.notify()
        return is_replacing

    def stop(self) -> None:
        """Drop what waits, and return when what is being worked on has ended."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping or self._waiting is not None)
                if self._is_stopping:
                    return
                task, self._waiting = self._waiting, None
            self._work(task, lambda: not self._is_stopping)
            del task  # megabytes, which would be kept until the next one comes
