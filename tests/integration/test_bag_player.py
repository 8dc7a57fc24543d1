# SPDX-License-Identifier: Apache-2.0
"""bag_player as its own process over DDS: what a subscriber in this process receives, and when."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

rclpy = pytest.importorskip("rclpy", reason="rclpy is not installed (extra 'ros')")

from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402
from rclpy.serialization import deserialize_message  # noqa: E402
from rclpy.signals import SignalHandlerOptions  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import CompressedImage  # noqa: E402
from std_msgs.msg import Header  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

from occflownet_ros import nuscenes_messages as messages  # noqa: E402
from occflownet_ros.private_graph import private_domain  # noqa: E402

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parents[2]
START_NS = 1_532_402_927_000_000_000
PERIOD_NS = 50_000_000
IMAGES = 12


def qos(durability: QosDurability = QosDurability.VOLATILE) -> Qos:
    endless = QosTime(9223372036, 854775807)
    return Qos(
        QosHistory.KEEP_LAST,
        10,
        QosReliability.RELIABLE,
        durability,
        endless,
        endless,
        QosLiveliness.AUTOMATIC,
        endless,
        False,
    )


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    """A latched message, then 12 images 50 ms apart with a header right behind each, and a type nobody has."""
    path = tmp_path_factory.mktemp("bags") / "bag"
    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg("uint8 x", "nobody_has_this_msgs/msg/Thing"))
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:

        def connect(topic: str, msgtype: str, durability: QosDurability = QosDurability.VOLATILE):
            return writer.add_connection(topic, msgtype, typestore=store, offered_qos_profiles=[qos(durability)])

        image = connect("/image", "sensor_msgs/msg/CompressedImage")
        behind = connect("/behind", "std_msgs/msg/Header")
        latched = connect("/latched", "std_msgs/msg/Header", QosDurability.TRANSIENT_LOCAL)
        unknown = connect("/unknown", "nobody_has_this_msgs/msg/Thing")
        writer.write(latched, START_NS, messages.header(START_NS, "latched"))
        rng = np.random.default_rng(1)
        for i in range(IMAGES):
            stamp = START_NS + PERIOD_NS * i
            jpeg = rng.integers(0, 256, 100_000, dtype=np.uint8).tobytes()
            writer.write(image, stamp, messages.compressed_image(stamp, "CAM", jpeg))
            writer.write(behind, stamp, messages.header(stamp, str(i)))
            writer.write(unknown, stamp, b"\0\1\0\0\7")
    return path


@dataclass
class Received:
    topic: str
    stamp_ns: int
    wall_s: float


@dataclass
class Listener:
    """A node of this process, in a domain of its own."""

    domain: int
    node: Node
    received: list[Received] = field(default_factory=list)
    on_image: object = None

    def stamps(self, topic: str) -> list[int]:
        return [r.stamp_ns for r in self.received if r.topic == topic]

    def subscribe(self, topic: str, message_class: type, profile: QoSProfile | int = 100) -> None:
        def record(data: bytes) -> None:
            message = deserialize_message(data, message_class)
            stamp = message.clock if message_class is Clock else getattr(message, "header", message).stamp
            self.received.append(Received(topic, stamp.sec * 1_000_000_000 + stamp.nanosec, time.monotonic()))
            if topic == "/image" and self.on_image is not None:
                self.on_image()

        self.node.create_subscription(message_class, topic, record, profile, raw=True)

    def wait_for(self, count: int, topic: str, seconds: float = 10.0) -> None:
        limit = time.monotonic() + seconds
        while len(self.stamps(topic)) < count and time.monotonic() < limit:
            time.sleep(0.01)
        assert len(self.stamps(topic)) >= count, f"{len(self.stamps(topic))} of {count} on {topic}"


@pytest.fixture
def listener(monkeypatch):
    domain = private_domain()
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("listener", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin)
    thread.start()
    yield Listener(domain, node)
    executor.shutdown()
    thread.join()
    node.destroy_node()
    rclpy.shutdown(context=context)


@contextmanager
def player(domain: int, *arguments: object):
    """The player's process; killed, by its pid, should the test fail while it runs."""
    environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    process = subprocess.Popen(
        [sys.executable, "-m", "occflownet_ros.bag_player", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finished(process: subprocess.Popen, seconds: float = 30.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


EXPECTED_STAMPS = [START_NS + PERIOD_NS * i for i in range(IMAGES)]


def test_order_count_and_pacing_at_half_the_rate(bag, listener):
    for topic, message_class in (("/image", CompressedImage), ("/behind", Header), ("/latched", Header)):
        listener.subscribe(topic, message_class)
    with player(listener.domain, bag, "--rate", 0.5) as process:
        code, out, err = finished(process)
    assert code == 0, err
    assert listener.stamps("/image") == listener.stamps("/behind") == EXPECTED_STAMPS
    assert listener.stamps("/latched") == [START_NS]
    wall = np.array([r.wall_s for r in listener.received if r.topic == "/behind"])
    # 50 ms of bag are 100 ms of wall; the whole span is held to 10 %, each step to what a busy machine allows.
    assert wall[-1] - wall[0] == pytest.approx(0.1 * (IMAGES - 1), rel=0.1)
    assert np.median(np.abs(np.diff(wall) - 0.1)) < 0.02
    assert err.count("nobody_has_this_msgs/msg/Thing") == 1  # one warning per type, and the rest plays
    assert "/unknown" in err
    assert "/image" in out  # the report
    assert f"{IMAGES}" in out


def test_loop_plays_again_from_the_first_stamp(bag, listener):
    listener.subscribe("/behind", Header)
    with player(listener.domain, bag, "--topics", "/behind", "--loop", 3, "--rate", 5) as process:
        code, out, err = finished(process)
    assert code == 0, err
    assert listener.stamps("/behind") == EXPECTED_STAMPS * 3
    assert "3 pass(es)" in out


def test_offset_duration_and_latched_messages_from_before(bag, listener):
    listener.subscribe("/behind", Header)
    kept = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    listener.subscribe("/latched", Header, kept)
    options = ("--topics", "/behind", "/latched", "--start-offset", 0.2, "--duration", 0.2)
    with player(listener.domain, bag, *options) as process:
        code, _, err = finished(process)
    assert code == 0, err
    assert listener.stamps("/behind") == EXPECTED_STAMPS[4:8]
    assert listener.stamps("/latched") == [START_NS]


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_slow_consumer_holds_the_next_set_back(bag, listener, max_in_flight):
    """A consumer that needs 150 ms for images that come every 50 ms gets every one, and never has more in hand."""
    answers = listener.node.create_publisher(Header, "/answer", 10)
    in_hand, most_in_hand = [0], [0]
    lock = threading.Lock()

    def answer() -> None:
        with lock:
            in_hand[0] -= 1
        answers.publish(Header())

    def take() -> None:
        with lock:
            in_hand[0] += 1
            most_in_hand[0] = max(most_in_hand[0], in_hand[0])
            # One worker: each image waits for those before it.
            threading.Timer(0.15 * in_hand[0], answer).start()

    listener.on_image = take
    listener.subscribe("/image", CompressedImage)
    listener.subscribe("/clock", Clock)
    flow = ("--max-in-flight", max_in_flight, "--ack-topic", "/answer", "--clock", 50, "--topics", "/image", "/behind")
    begin = time.monotonic()
    with player(listener.domain, bag, *flow) as process:
        code, out, err = finished(process)
    assert code == 0, err
    assert listener.stamps("/image") == EXPECTED_STAMPS
    assert most_in_hand[0] == max_in_flight
    assert f"{IMAGES} answers, 0 sets unanswered" in out
    if max_in_flight == 1:
        assert time.monotonic() - begin > 0.15 * IMAGES
        # Bag time stood still: it was published more often than it moved.
        clock = np.array(listener.stamps("/clock"))
        assert (np.diff(clock) == 0).sum() > 20
        assert clock.max() <= EXPECTED_STAMPS[-1] + PERIOD_NS


def test_consumer_that_never_answers_does_not_stop_playback(bag, listener):
    listener.node.create_publisher(Header, "/answer", 10)
    listener.subscribe("/image", CompressedImage)
    options = ("--max-in-flight", 4, "--ack-topic", "/answer", "--ack-timeout", 0.3, "--topics", "/image")
    with player(listener.domain, bag, *options) as process:
        code, out, err = finished(process)
    assert code == 0, err
    assert listener.stamps("/image") == EXPECTED_STAMPS
    assert f"0 answers, {IMAGES} sets unanswered" in out


def test_pause_resume_clock_and_interrupt(bag, listener):
    listener.subscribe("/behind", Header)
    listener.subscribe("/clock", Clock)
    pause = listener.node.create_client(Trigger, "/bag_player/pause")
    resume = listener.node.create_client(Trigger, "/bag_player/resume")
    options = ("--topics", "/behind", "--loop", "--rate", 0.5, "--clock", 50, "--start-paused")
    with player(listener.domain, bag, *options) as process:
        listener.wait_for(10, "/clock")
        assert resume.wait_for_service(5.0)
        assert listener.stamps("/behind") == []
        assert set(listener.stamps("/clock")) == {START_NS}
        assert call(resume).success
        listener.wait_for(4, "/behind")
        assert call(pause).success
        time.sleep(0.1)
        count, clock = len(listener.stamps("/behind")), listener.stamps("/clock")[-1]
        time.sleep(0.5)
        assert len(listener.stamps("/behind")) == count
        assert listener.stamps("/clock")[-1] == clock
        assert call(resume).success
        listener.wait_for(IMAGES + 2, "/behind")  # into the second pass
        assert listener.stamps("/behind") == (EXPECTED_STAMPS * 9)[: len(listener.stamps("/behind"))]
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        code, out, err = finished(process, 5.0)
    assert time.monotonic() - begin < 2.0
    assert code == 130
    assert "Traceback" not in err
    assert "/behind" in out  # the report comes all the same


def call(client) -> Trigger.Response:
    future = client.call_async(Trigger.Request())
    limit = time.monotonic() + 5.0
    while not future.done() and time.monotonic() < limit:
        time.sleep(0.01)
    return future.result()


def test_cut_bag_is_played_up_to_the_cut(bag, listener, tmp_path):
    file = tmp_path / "cut.mcap"
    data = (bag / "bag.mcap").read_bytes()
    file.write_bytes(data[:650_000])  # images of 100 kB: six are whole
    listener.subscribe("/image", CompressedImage)
    with player(listener.domain, file, "--topics", "/image", "--rate", 5) as process:
        code, _, err = finished(process)
    assert code == 1
    assert listener.stamps("/image") == EXPECTED_STAMPS[:6]
    assert f"bag file {file} is cut at byte 650000" in err


def test_nobody_listens(bag, listener):
    with player(listener.domain, bag, "--wait-for-subscribers", 0.3, "--rate", 10) as process:
        code, _, err = finished(process)
    assert code == 0
    assert "nobody listened to any topic within 0.3 s" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["/nowhere/bag"], "there is no bag at /nowhere/bag"),
        (["BAG", "--topics", "/imgae"], "topic /imgae is not in bag"),
        (["BAG", "--topics", "/unknown"], "no topic of bag"),
        (["BAG", "--rate", "0"], "0 is not a positive number"),
        (["BAG", "--start-offset", "9"], "beyond the bag's end at 0.550 s"),
        (["BAG", "--max-in-flight", "1"], "belong together"),
        (["BAG", "--max-in-flight", "1", "--ack-topic", "/a", "--topics", "/behind"], "no image topic is played"),
        (["BAG", "--max-in-flight", "1", "--ack-topic", "/a", "--wait-for-subscribers", "0"], "nobody publishes /a"),
    ],
)
def test_bad_input_gets_one_sentence(bag, arguments, sentence):
    arguments = [bag if a == "BAG" else a for a in arguments]
    with player(private_domain(), *arguments) as process:
        code, _, err = finished(process)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
