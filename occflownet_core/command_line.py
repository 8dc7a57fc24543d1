# SPDX-License-Identifier: Apache-2.0
"""How every command ends: 0 when done, 2 with one sentence on a user's mistake, 130 when interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable

from occflownet_core.errors import OccflownetError


def exit_status(program: str, action: Callable[[], object]) -> int:
    """Carry out a command and say how it ended.

    Args:
        program: its name, before the sentence.
        action: what it does.
    """
    try:
        action()
    except OccflownetError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
