# SPDX-License-Identifier: Apache-2.0
"""The node under load: six 1600 x 900 JPEG streams at 12 Hz through player, DDS, node and subscriber.

The limit: per set, six JPEGs must be entropy-decoded (about 2.4 ms each at quarter size, on two cores 7 ms) and the
voxels laid out once (640 kB of labels, about 1 MB of cloud); everything else outside the engine is overhead.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from benchmarks.report import Figure, publish
from occflownet_core.errors import OccflownetError
from occflownet_core.runtime.bundle import load_bundle
from occflownet_ros.share import share_path

IMAGE_RATE_HZ = 12.0
SECONDS = 20.0
LEAST_RATE_HZ = 4.0
MOST_OVERHEAD_MS = 60.0
MOST_RESIDENT_MB = 600.0
MOST_SECONDS_TO_ACTIVE = 3.0
_STAMP = slice(4, 12)  # of a message that begins with a header, after CDR's encapsulation


def dense_bag(source: Path, target: Path, seconds: float = SECONDS, rate_hz: float = IMAGE_RATE_HZ) -> int:
    """Write a bag whose camera sets follow each other at ``rate_hz``, from the keyframes of another bag.

    The keyframes are repeated in order, with new stamps; within a set the cameras keep their distances in time.

    Returns:
        the number of sets.
    """
    from rosbags.rosbag2 import StoragePlugin, Writer

    from occflownet_ros.bag import Bag
    from occflownet_ros.nuscenes_messages import typestore

    with Bag(source) as bag:
        messages = [m for m in bag.messages() if m.topic.endswith(("_compressed", "/camera_info", "/odom"))]
        types = dict(bag.topics)
    anchors_ns = [m.time_ns for m in messages if m.topic == "/CAM_FRONT/image_rect_compressed"]
    nearest = [min(range(len(anchors_ns)), key=lambda k: abs(anchors_ns[k] - m.time_ns)) for m in messages]
    sets = int(seconds * rate_hz)
    start_ns = anchors_ns[0]
    restamped = []
    for position in range(sets):
        keyframe = position % len(anchors_ns)
        shift_ns = start_ns + round(position * 1e9 / rate_hz) - anchors_ns[keyframe]
        for message, owner in zip(messages, nearest, strict=True):
            if owner == keyframe:
                time_ns = message.time_ns + shift_ns
                stamp = struct.pack("<iI", time_ns // 10**9, time_ns % 10**9)
                data = message.data[: _STAMP.start] + stamp + message.data[_STAMP.stop :]
                restamped.append((time_ns, message.topic, data))
    restamped.sort(key=lambda entry: entry[0])
    with Writer(target, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for time_ns, topic, data in restamped:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, types[topic].msgtype, typestore=typestore())
            writer.write(connections[topic], time_ns, data)
    return sets


def measure_node(bag: Path, bundle: Path, calibration: Path, sets: int, logs: Path) -> tuple[list[Figure], dict]:
    """Play the bag through the node and compare its figures with what they must keep."""
    from occflownet_ros.replay import process_environment, replay_bag

    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("ROS_DOMAIN_ID", str(random.randrange(120, 200)))
    os.environ.update(process_environment())
    parameters = {"bundle": str(bundle), "calibration_file": str(calibration), "anchor_camera": "CAM_FRONT"}
    replay = replay_bag(bag, parameters, logs, ("--no-progress",))
    counts = replay.set_counts()
    overhead_ms = np.array(replay.latency_ms["total"]) - np.array(replay.latency_ms["engine"])
    figures = [
        Figure("sets per second", counts["processed"] / SECONDS, LEAST_RATE_HZ, "Hz", "at least", more_is_better=True),
        Figure("outside the engine, p95", float(np.percentile(overhead_ms, 95)), MOST_OVERHEAD_MS, "ms", "at most"),
        Figure("node's peak resident memory", replay.node_resident_mb, MOST_RESIDENT_MB, "MB", "at most"),
        Figure("process start to active", replay.seconds_to_active, MOST_SECONDS_TO_ACTIVE, "s", "at most"),
    ]
    details = {
        "sets_sent": sets,
        "sets": counts,
        "latency_ms_p50_p95_p99": replay.latency_percentiles((50, 95, 99)),
        "player": replay.player_output,
    }
    return figures, details


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
    parser.add_argument("--bag", type=Path, help="bag with six 1600 x 900 JPEG topics (default: the demo drive)")
    parser.add_argument("--bundle", type=Path, help="model bundle (default: the demo model)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON (default: out/bench)")
    arguments = parser.parse_args(argv)
    try:
        source = arguments.bag or share_path("demo", "bag")
        bundle = arguments.bundle or share_path("demo", "bundle")
        with tempfile.TemporaryDirectory() as scratch, Console().status("playing six 12 Hz streams through the node"):
            bag = Path(scratch) / "dense"
            sets = dense_bag(source, bag)
            figures, details = measure_node(bag, bundle, source / "calibration.yaml", sets, Path(scratch))
            figures.append(measure_decoding(source, bundle))
    except OccflownetError as error:
        print(f"benchmarks.pipeline: {error}", file=sys.stderr)
        return 2
    publish("node under load", figures, arguments.out / "pipeline.json", details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
