# SPDX-License-Identifier: Apache-2.0
"""The node under load: six 1600 x 900 streams at 12 Hz through drivers, DDS, node and subscriber, JPEG and raw.

The limit outside the engine, per set, on two cores: JPEG, six entropy decodings (about 2.4 ms each at quarter size: 7 ms);
raw, 26 MB that are deserialised (1 ms an image, under the GIL) and read once when they become small. The voxels are laid
out once (640 kB of labels, about 1 MB of cloud). Everything else is overhead.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from benchmarks.node_load import Load, add_load_options, node_parameters, put_under_load
from benchmarks.report import Figure, publish
from occflownet_core.command_line import exit_status
from occflownet_core.runtime.bundle import load_bundle

LEAST_RATE_HZ = 4.0
MOST_OUTSIDE_MS = {"compressed": 35.0, "raw": 30.0}
NAMES = {"compressed": "JPEG", "raw": "raw"}
MOST_RESIDENT_MB = 600.0
MOST_SECONDS_TO_ACTIVE = 3.0


HEARD = {
    "labels": ("labels",),
    "labels and mesh": ("labels", "mesh"),
    "all outputs": ("labels", "occupancy", "voxels", "costmap"),
}


def node_figures(load: Load, transport: str, heard: str) -> list[Figure]:
    """What the node must keep."""
    name = f"{NAMES[transport]}, {heard}"
    outside_ms = float(np.percentile(load.outside_engine_ms(), 95))
    rate_hz = load.replay.set_counts()["processed"] / load.seconds
    return [
        Figure(f"{name}: outside the engine, p95", outside_ms, MOST_OUTSIDE_MS[transport], "ms", "at most"),
        Figure(f"{name}: sets per second", rate_hz, LEAST_RATE_HZ, "Hz", "at least", more_is_better=True),
        Figure(f"{name}: images received", sum(load.sent.values()) - load.lost, sum(load.sent.values()), "", "sent"),
        Figure(f"{name}: peak resident memory", load.replay.node_resident_mb, MOST_RESIDENT_MB, "MB", "at most"),
    ]


def mesh_figures(with_mesh: Load, without: Load, transport: str) -> list[Figure]:
    """What meshes that somebody looks at cost the labels, in the same run."""
    name, figures = f"{NAMES[transport]}, labels while meshes are built", []
    for stage, percentile in (("total", 50), ("total", 95), ("engine", 50)):
        ms, plain_ms = (np.percentile(load.replay.latency_ms[stage], percentile) for load in (with_mesh, without))
        figures.append(Figure(f"{name}: {stage}, p{percentile}", float(ms), float(plain_ms), "ms", "without meshes"))
    rates_hz = [load.replay.set_counts()["processed"] / load.seconds for load in (with_mesh, without)]
    return [*figures, Figure(f"{name}: sets per second", *rates_hz, "Hz", "without meshes", more_is_better=True)]


def details(load: Load) -> dict:
    """What the figures came from."""
    return {
        "sent": load.sent,
        "streams_late_ms_p99": load.late_ms_p99,
        "sets": load.replay.set_counts(),
        "meshes": load.replay.diagnostics.get("mesh", {}),
        "latency_ms_p50_p95_p99": load.replay.latency_percentiles((50, 95, 99)),
    }


def measure_decoding(bag: Path, bundle_path: Path) -> Figure:
    """One set of JPEGs to network images: ours against decoding at full size and resizing, both on one thread."""
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import CompressedImage

    from occflownet_ros.bag import Bag

    with Bag(bag) as opened:
        jpegs = []
        for message in opened.messages():
            if message.topic.endswith("_compressed"):
                jpegs.append(np.frombuffer(deserialize_message(message.data, CompressedImage).data, np.uint8))
            if len(jpegs) == 6:
                break
    height, width = cv2.imdecode(jpegs[0], cv2.IMREAD_COLOR).shape[:2]
    transform = load_bundle(bundle_path).image_transform(width, height)
    cv2.setNumThreads(1)

    def ours() -> None:
        for jpeg in jpegs:
            transform.jpeg(jpeg)

    def plain() -> None:
        for jpeg in jpegs:
            transform.image(cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))

    return Figure("six JPEGs to network images", *median_ms(ours, plain), "ms", "full decode, then resize")


def median_ms(*functions, rounds: int = 15) -> list[float]:
    """Median milliseconds of each, taken in turn so that a drift of the machine meets all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, spent in zip(functions, times, strict=True):
            started_s = time.perf_counter()
            function()
            spent.append(1e3 * (time.perf_counter() - started_s))
    return [float(np.median(spent)) for spent in times]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--transport", nargs="+", choices=("compressed", "raw"), default=["compressed", "raw"])
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of each run (default: 20)")
    parser.add_argument("--threads", type=int, default=0, help="of the engine; 0 lets it choose (default: 0)")
    add_load_options(parser)
    return exit_status("benchmarks.pipeline", lambda: _run(parser.parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    parameters = {**node_parameters(options), "threads": options.threads}
    figures, found, loads = [], {}, {}
    with tempfile.TemporaryDirectory() as scratch, Console().status("") as status:
        for transport, heard in itertools.product(options.transport, HEARD):
            name = f"{NAMES[transport]}, {heard} heard"
            logs = Path(scratch) / name
            logs.mkdir()
            load = put_under_load(
                options.bag,
                parameters,
                logs,
                transport,
                options.rate,
                options.seconds,
                lambda at_s, name=name: status.update(f"{name}: {at_s:.0f} s"),
                HEARD[heard],
            )
            loads[heard] = load
            figures += node_figures(load, transport, heard)
            found[name] = details(load)
            if heard == "labels and mesh":
                figures += mesh_figures(load, loads["labels"], transport)
    seconds = load.replay.seconds_to_active
    figures.append(Figure("process start to active", seconds, MOST_SECONDS_TO_ACTIVE, "s", "at most"))
    figures.append(measure_decoding(options.bag, options.bundle))
    publish("node under load", figures, options.out / "pipeline.json", found)


if __name__ == "__main__":
    sys.exit(main())
