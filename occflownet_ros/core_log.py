# SPDX-License-Identifier: Apache-2.0
"""What the core has to say (which engine and why, progress of a build, stale files) in the node's own log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rclpy.impl.rcutils_logger import RcutilsLogger

_CORE = "occflownet_core"


@contextmanager
def core_messages(logger: RcutilsLogger) -> Iterator[None]:
    """Pass the core's messages of level INFO and above to a ROS logger, for as long as the block runs."""
    core, handler = logging.getLogger(_CORE), _ToRos(logger)
    before = core.level, core.propagate
    core.addHandler(handler)
    core.setLevel(logging.INFO)
    core.propagate = False
    try:
        yield
    finally:
        core.removeHandler(handler)
        core.setLevel(before[0])
        core.propagate = before[1]


class _ToRos(logging.Handler):
    """Each level at a call of its own: rclpy refuses a severity that changes at one line of code."""

    def __init__(self, logger: RcutilsLogger) -> None:
        super().__init__(logging.INFO)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            self._logger.error(message)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(message)
        else:
            self._logger.info(message)
