# SPDX-License-Identifier: Apache-2.0
"""The node for a long time at full rate: does it hold more and more memory, file handles or threads?"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.node_load import Load, Sample, add_load_options, node_parameters, put_under_load
from benchmarks.report import Figure, publish
from occflownet_core.command_line import exit_status
from occflownet_core.errors import OccflownetError

WARM_UP_S = 60.0
MOST_GROWTH_MB = 10.0
_WINDOW_S = 30.0  # means of so long: single samples see buffers that come and go


def soak_figures(load: Load) -> list[Figure]:
    """Growth after the first minute.

    Raises:
        OccflownetError: the run was too short.
    """
    warm = [sample for sample in load.samples if sample.at_s >= WARM_UP_S]
    if not warm or warm[-1].at_s - WARM_UP_S < 2 * _WINDOW_S:
        raise OccflownetError(f"{load.seconds:g} s are too short; give at least {WARM_UP_S + 3 * _WINDOW_S:g}")
    begin, end = _mean(warm, warm[0].at_s), _mean(warm, warm[-1].at_s - _WINDOW_S)
    most_handles = max(sample.handles for sample in warm) - warm[0].handles
    most_threads = max(sample.threads for sample in warm) - warm[0].threads
    return [
        Figure("resident memory, growth", end - begin, MOST_GROWTH_MB, "MB", "at most"),
        Figure("resident memory, last 30 s", end, begin, "MB", "30 s after the first minute"),
        Figure("file handles, most", warm[0].handles + most_handles, warm[0].handles, "", "after the first minute"),
        Figure("threads, most", warm[0].threads + most_threads, warm[0].threads, "", "after the first minute"),
        Figure("images received", sum(load.sent.values()) - load.lost, sum(load.sent.values()), "", "sent"),
    ]


def _mean(samples: list[Sample], from_s: float) -> float:
    """Resident memory, MB, over a window."""
    return float(np.mean([s.resident_mb for s in samples if from_s <= s.at_s < from_s + _WINDOW_S]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, metavar="M", help="how long (default: 20)")
    parser.add_argument("--transport", choices=("compressed", "raw"), default="compressed")
    add_load_options(parser)
    return exit_status("benchmarks.soak", lambda: _run(parser.parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    parameters, seconds = node_parameters(options), 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch, Console().status("") as status:
        say = lambda at_s: status.update(f"{at_s / 60:.1f} of {options.minutes:g} min")  # noqa: E731
        load = put_under_load(options.bag, parameters, Path(scratch), options.transport, options.rate, seconds, say)
    found = {"sets": load.replay.set_counts(), "samples": [asdict(sample) for sample in load.samples]}
    publish(f"{options.minutes:g} minutes", soak_figures(load), options.out / "soak.json", found)


if __name__ == "__main__":
    sys.exit(main())
