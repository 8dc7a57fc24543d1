# SPDX-License-Identifier: Apache-2.0
"""Camera drivers, calibration and odometry in a process of its own: a bag's images again and again, with new stamps.

python -m benchmarks.camera_streams --bag demo/bag --transport raw --rate 12 --seconds 20
"""

from __future__ import annotations

import argparse
import heapq
import json
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import rclpy
from nav_msgs.msg import Odometry
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from occflownet_core.command_line import exit_status
from occflownet_core.errors import BagError, OccflownetError
from occflownet_ros.bag import Bag
from occflownet_ros.conversions import time_message

ANCHOR = "CAM_FRONT"
ODOMETRY_RATE_HZ = 50.0
SPEED_MPS = 5.0
_STAMP = slice(4, 12)  # of a message that begins with a header, after CDR's encapsulation
_WAIT_FOR_LISTENERS_S = 15.0
_SUFFIX = "/image_rect_compressed"
_MOST_KEYFRAMES = 4  # six raw images are 26 MB


@dataclass(frozen=True)
class Recorded:
    """One camera's image of one keyframe.

    Attributes:
        topic: that it is sent on.
        offset_s: its stamp after the anchor camera's.
        image, info: serialised Image or CompressedImage, and CameraInfo.
    """

    topic: str
    offset_s: float
    image: bytes
    info: bytes


def read_sets(bag: Path, transport: str) -> list[list[Recorded]]:
    """The first keyframes' images of a bag of compressed ones, as they are or decoded.

    Raises:
        BagError: it has no such images of an anchor camera.
    """
    images: dict[str, list[tuple[int, bytes]]] = {}
    infos: dict[str, bytes] = {}
    with Bag(bag) as opened:
        for message in opened.messages():
            camera = message.topic.split("/")[1]
            if message.topic.endswith(_SUFFIX):
                images.setdefault(camera, []).append((message.time_ns, message.data))
            elif message.topic.endswith("/camera_info"):
                infos.setdefault(camera, message.data)
    if ANCHOR not in images:
        raise BagError(f"{bag} has no images on /{ANCHOR}{_SUFFIX}; take the demo drive's bag")
    sets = []
    for anchor_ns, _ in images[ANCHOR][:_MOST_KEYFRAMES]:
        nearest = {name: min(taken, key=lambda one: abs(one[0] - anchor_ns)) for name, taken in images.items()}
        sets.append(
            [
                Recorded(f"/{name}", (time_ns - anchor_ns) / 1e9, _as_sent(data, transport), infos[name])
                for name, (time_ns, data) in nearest.items()
            ]
        )
    return sets


def _as_sent(serialised: bytes, transport: str) -> bytes:
    if transport == "compressed":
        return serialised
    message = deserialize_message(serialised, CompressedImage)
    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    height, width = pixels.shape[:2]
    raw = Image(header=message.header, height=height, width=width, encoding="rgb8", step=3 * width)
    raw.data.frombytes(pixels.data.cast("B"))
    return serialize_message(raw)


def stamped(serialised: bytes, stamp_ns: int) -> bytes:
    """A serialised message with another stamp."""
    stamp = struct.pack("<iI", stamp_ns // 10**9, stamp_ns % 10**9)
    return b"".join((serialised[: _STAMP.start], stamp, memoryview(serialised)[_STAMP.stop :]))


def schedule(sets: list[list[Recorded]], rate_hz: float, seconds: float) -> Iterator[tuple[float, Recorded | None]]:
    """What is sent when, in order, seconds from the start; None stands for odometry."""

    def images() -> Iterator[tuple[float, Recorded]]:
        for k in range(int(seconds * rate_hz)):
            for recorded in sorted(sets[k % len(sets)], key=lambda one: one.offset_s):
                yield k / rate_hz + recorded.offset_s, recorded

    def odometry() -> Iterator[tuple[float, None]]:
        for k in range(int(seconds * ODOMETRY_RATE_HZ)):
            yield k / ODOMETRY_RATE_HZ, None

    # Sets overlap where cameras are apart by more than a period: each camera's own images stay in order.
    return heapq.merge(images(), odometry(), key=lambda entry: entry[0])


class Drivers:
    """The publishers, and what they have sent.

    Args:
        node: owns the publishers.
        sets: as read.
        transport: ``compressed`` or ``raw``.
    """

    def __init__(self, node: rclpy.node.Node, sets: list[list[Recorded]], transport: str) -> None:
        # Reliable matches any subscription; best effort ones are served as if it were not.
        qos = QoSProfile(depth=4, reliability=ReliabilityPolicy.RELIABLE)
        kind, suffix = (CompressedImage, _SUFFIX) if transport == "compressed" else (Image, "/image_rect")
        topics = sorted({recorded.topic for recorded in sets[0]})
        self.images = {topic: node.create_publisher(kind, topic + suffix, qos) for topic in topics}
        self.infos = {topic: node.create_publisher(CameraInfo, f"{topic}/camera_info", qos) for topic in topics}
        self.odometry: Publisher = node.create_publisher(Odometry, "/odom", qos)
        self.sent: Counter[str] = Counter()
        self.late_ms: list[float] = []

    def wait_for_listeners(self) -> None:
        """Raises ``OccflownetError`` if an image topic has none in time."""
        until_s = time.monotonic() + _WAIT_FOR_LISTENERS_S
        while waiting := [p.topic_name for p in self.images.values() if not p.get_subscription_count()]:
            if time.monotonic() > until_s:
                raise OccflownetError(f"nobody listens on {waiting[0]}; start the node first")
            time.sleep(0.05)

    def play(self, sets: list[list[Recorded]], rate_hz: float, seconds: float) -> None:
        """Send everything at its time."""
        start_s, start_ns = time.monotonic() + 0.1, time.time_ns() + 100_000_000
        for due_s, recorded in schedule(sets, rate_hz, seconds):
            time.sleep(max(start_s + due_s - time.monotonic(), 0.0))
            stamp_ns = start_ns + round(due_s * 1e9)
            if recorded is None:
                self.odometry.publish(_odometry(stamp_ns, SPEED_MPS * due_s))
                continue
            self.late_ms.append(1e3 * (time.monotonic() - start_s - due_s))
            self.infos[recorded.topic].publish(stamped(recorded.info, stamp_ns))
            self.images[recorded.topic].publish(stamped(recorded.image, stamp_ns))
            self.sent[recorded.topic.lstrip("/")] += 1


def _odometry(stamp_ns: int, x_m: float) -> Odometry:
    message = Odometry(child_frame_id="base_link")
    message.header.stamp = time_message(stamp_ns)
    message.header.frame_id = "odom"
    message.pose.pose.position.x = x_m
    return message


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.camera_streams", description=__doc__.splitlines()[0])
    parser.add_argument("--bag", type=Path, required=True, help="bag with six JPEG topics")
    parser.add_argument("--transport", choices=("compressed", "raw"), default="compressed")
    parser.add_argument("--rate", type=float, default=12.0, metavar="HZ", help="of each camera (default: 12)")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="how long (default: 20)")
    return exit_status("benchmarks.camera_streams", lambda: _run(parser.parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    sets = read_sets(options.bag, options.transport)
    rclpy.init()
    node = rclpy.create_node("camera_streams")
    try:
        drivers = Drivers(node, sets, options.transport)
        drivers.wait_for_listeners()
        drivers.play(sets, options.rate, options.seconds)
        time.sleep(0.5)  # reliable messages under way still need their sender
    finally:
        node.destroy_node()
        rclpy.shutdown()
    late_ms = float(np.percentile(drivers.late_ms, 99)) if drivers.late_ms else 0.0
    print(json.dumps({"sent": drivers.sent, "late_ms_p99": late_ms}))


if __name__ == "__main__":
    sys.exit(main())
