# SPDX-License-Identifier: Apache-2.0
"""The node that republishes a bag: publishers of raw CDR, /clock, pause and resume services, flow control."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import rclpy
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rosbags.interfaces import QosDurability, QosReliability
from rosgraph_msgs.msg import Clock
from std_srvs.srv import Trigger

from occflownet_core.errors import BagError
from occflownet_ros.bag import Bag, BagMessage, BagTopic
from occflownet_ros.playback import FlowControl, PlaybackClock, StopFlag, Stopped

_IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
# Why bag time stands still; the progress bar shows it.
_START, _USER, _SLOW_CONSUMER, _END = "waiting for subscribers", "paused", "waiting for a slow consumer", "finishing"
# A message to a reader that has just matched may still be lost on the way of best effort.
_SETTLE_S = 0.2
# With at least one listener, and no new one for this long, nobody else is expected.
_QUIET_S = 1.5
_POLL_S = 0.02


@dataclass(frozen=True)
class PlayerOptions:
    """What ``bag_player --help`` explains; None switches a feature off."""

    rate: float = 1.0
    loops: int = 1  # 0: for ever
    start_offset_s: float = 0.0
    duration_s: float | None = None
    topics: Sequence[str] | None = None
    clock_hz: float | None = None
    wait_for_subscribers_s: float = 5.0
    start_paused: bool = False
    max_in_flight: int | None = None
    ack_topic: str | None = None
    anchor_topic: str | None = None
    ack_timeout_s: float = 10.0


@dataclass
class TopicReport:
    """When the messages of one topic went out."""

    msgtype: str
    sent_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)


@dataclass
class PlayReport:
    """What was played; ``warnings`` are sentences for the user."""

    topics: dict[str, TopicReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    loops: int = 0
    seconds: float = 0.0
    stopped_by: int | None = None
    answered: int = 0
    unanswered: int = 0

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
        print(f"bag_player: {sentence}", file=sys.stderr, flush=True)


def publisher_qos(topic: BagTopic) -> QoSProfile:
    """The QoS that the recorded publishers offered; where unknown, reliable, and kept for late joiners on /tf_static.

    Recorded deadlines and lifespans are left out: another rate or a pause would break them.
    """
    best_effort = bool(topic.qos) and all(q.reliability is QosReliability.BEST_EFFORT for q in topic.qos)
    if topic.qos:
        latched = all(q.durability is QosDurability.TRANSIENT_LOCAL for q in topic.qos)
    else:
        latched = topic.name == "/tf_static"
    depth = max([10, *(q.depth for q in topic.qos)])
    if latched:
        # Several nodes may have offered one message each; a late joiner needs all of them.
        depth = max(1, min(topic.message_count, 1000), *(q.depth for q in topic.qos))
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def message_class(msgtype: str) -> type | None:
    """The Python class of ``pkg/msg/Name``, or None where its package is not installed."""
    package, name = msgtype.split("/")[0], msgtype.split("/")[-1]
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError):
        return None


class Player:
    """Plays a bag on a ROS graph of its own context.

    Args:
        bag: an open bag.
        options: how.
        stop: set from a signal handler to end playback.
        ros_arguments: arguments for rclpy, e.g. ``["--ros-args", "-r", "/odom:=/ego/odom"]``.

    Raises:
        BagError: a topic asked for is not in the bag, or no topic can be played.
    """

    def __init__(self, bag: Bag, options: PlayerOptions, stop: StopFlag, ros_arguments: Sequence[str] = ()) -> None:
        self._bag = bag
        self._options = options
        self._stop = stop
        self.report = PlayReport()
        playable = self._playable_topics()

        self._context = rclpy.Context()
        rclpy.init(args=list(ros_arguments), context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = Node("bag_player", context=self._context)
        self._publishers = {name: self._publisher(topic) for name, topic in playable.items()}
        self._latched = {
            name
            for name, publisher in self._publishers.items()
            if publisher.qos_profile.durability is DurabilityPolicy.TRANSIENT_LOCAL
        }
        self._start_ns = bag.start_ns + round(options.start_offset_s * 1e9)
        self._stop_ns = bag.end_ns + 1
        if options.duration_s is not None:
            self._stop_ns = min(self._stop_ns, self._start_ns + round(options.duration_s * 1e9))
        self._clock = PlaybackClock(options.rate, stop)
        self._clock.hold(_START)
        if options.start_paused:
            self._clock.hold(_USER)
        self._clock.set(self._start_ns)
        self._flow = None
        if options.max_in_flight is not None:
            self._flow = FlowControl(options.max_in_flight, options.ack_timeout_s, stop)
        self._anchor = options.anchor_topic

        self._node.create_service(Trigger, "~/pause", self._pause)
        self._node.create_service(Trigger, "~/resume", self._resume)
        self._closing = threading.Event()
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._threads = [threading.Thread(target=self._executor.spin, name="executor")]
        if options.clock_hz is not None:
            self._clock_publisher = self._node.create_publisher(Clock, "/clock", 10)
            self._threads.append(threading.Thread(target=self._publish_clock, name="clock"))
        for thread in self._threads:
            thread.start()

    @property
    def span_ns(self) -> tuple[int, int]:
        """First and last bag time of one pass."""
        return self._start_ns, self._stop_ns

    @property
    def state(self) -> str:
        """``playing`` or why not."""
        return next((reason for reason in (_START, _USER, _SLOW_CONSUMER, _END) if self._clock.held(reason)), "playing")

    @property
    def bag_time_ns(self) -> int:
        """Where playback is."""
        return self._clock.now_ns()

    def play(self) -> PlayReport:
        """Play the bag as often as asked, or until the stop flag is set.

        Raises:
            BagError: nobody publishes the acknowledgements that flow control waits for.
        """
        begin_s = time.monotonic()
        try:
            self._wait_for_subscribers()
            if self._flow is not None:
                self._subscribe_to_answers()
            begin_s = time.monotonic()
            self._publish_latched_before_start()
            while self._options.loops == 0 or self.report.loops < self._options.loops:
                self._play_once()
                self.report.loops += 1
            self._clock.hold(_END)
            if self._flow is not None:
                self._flow.drain()
            self._wait_for_delivery()
        except Stopped:
            self.report.stopped_by = self._stop.signal
        self.report.seconds = time.monotonic() - begin_s
        if self._flow is not None:
            self.report.answered, self.report.unanswered = self._flow.answered, self._flow.unanswered
        for sentence in self._bag.damage:
            self.report.warn(sentence)
        return self.report

    def close(self) -> None:
        """Leave the graph: executor first, its thread, then the node and the context."""
        self._closing.set()
        self._executor.shutdown()
        for thread in self._threads:
            thread.join()
        self._node.destroy_node()
        rclpy.shutdown(context=self._context)

    # Choosing and making publishers

    def _playable_topics(self) -> dict[str, BagTopic]:
        wanted = self._options.topics
        unknown = sorted(set(wanted or ()) - set(self._bag.topics))
        if unknown:
            raise BagError(
                f"topic {unknown[0]} is not in bag {self._bag.path}; it has {', '.join(sorted(self._bag.topics))}"
            )
        playable, missing = {}, defaultdict(list)
        for name, topic in self._bag.topics.items():
            if wanted is not None and name not in wanted:
                continue
            if name == "/clock" and self._options.clock_hz is not None:
                continue  # two clocks would contradict each other
            if message_class(topic.msgtype) is None:
                missing[topic.msgtype].append(name)
            else:
                playable[name] = topic
        for msgtype, names in missing.items():
            self.report.warn(
                f"{', '.join(names)} are not played: message type {msgtype} is not installed here; "
                f"install the package {msgtype.split('/')[0]} to play them"
            )
        if not playable:
            raise BagError(f"no topic of bag {self._bag.path} can be played; install its message packages")
        anchor = self._options.anchor_topic
        if anchor is not None and anchor not in playable:
            raise BagError(f"anchor topic {anchor} is not played; the played ones are {', '.join(sorted(playable))}")
        has_images = any(topic.msgtype in _IMAGE_TYPES for topic in playable.values())
        if self._options.max_in_flight is not None and anchor is None and not has_images:
            raise BagError("no image topic is played that could begin a set; name one with --anchor-topic")
        return playable

    def _publisher(self, topic: BagTopic) -> Publisher:
        self.report.topics[topic.name] = TopicReport(topic.msgtype)
        return self._node.create_publisher(message_class(topic.msgtype), topic.name, publisher_qos(topic))

    # Waiting for others

    def _wait_for_subscribers(self) -> None:
        limit_s = time.monotonic() + self._options.wait_for_subscribers_s
        matched, changed_s = 0, time.monotonic()
        while time.monotonic() < limit_s:
            self._stop.check()
            counts = [publisher.get_subscription_count() for publisher in self._publishers.values()]
            if sum(counts) != matched:
                matched, changed_s = sum(counts), time.monotonic()
            if all(counts) or (matched and time.monotonic() - changed_s > _QUIET_S):
                break
            time.sleep(_POLL_S)
        silent = sorted(name for name, p in self._publishers.items() if p.get_subscription_count() == 0)
        if len(silent) == len(self._publishers) and self._options.wait_for_subscribers_s > 0:
            self.report.warn(
                f"nobody listened to any topic within {self._options.wait_for_subscribers_s:g} s; playing all the same"
            )
        elif silent and self._options.wait_for_subscribers_s > 0:
            self.report.warn(f"nobody listens to {', '.join(silent)}")
        if matched:
            time.sleep(_SETTLE_S)

    def _subscribe_to_answers(self) -> None:
        topic = self._options.ack_topic
        limit_s = time.monotonic() + max(self._options.wait_for_subscribers_s, 1.0)
        while not (publishers := self._node.get_publishers_info_by_topic(topic)):
            self._stop.check()
            if time.monotonic() > limit_s:
                raise BagError(
                    f"nobody publishes {topic}, whose messages --max-in-flight waits for; "
                    "start the consumer first, or wait longer with --wait-for-subscribers"
                )
            time.sleep(_POLL_S)
        answer_class = message_class(publishers[0].topic_type)
        if answer_class is None:
            raise BagError(
                f"{topic} has type {publishers[0].topic_type}, which is not installed here; name another --ack-topic"
            )
        # As reliable as the publisher: a lost answer would be waited for.
        qos = QoSProfile(depth=100, reliability=publishers[0].qos_profile.reliability)
        subscription = self._node.create_subscription(answer_class, topic, lambda _: self._flow.answer(), qos, raw=True)
        while subscription.get_publisher_count() == 0 and time.monotonic() < limit_s:
            self._stop.check()
            time.sleep(_POLL_S)
        time.sleep(_SETTLE_S)

    def _wait_for_delivery(self) -> None:
        """Reliable readers get the last messages before the publishers go."""
        limit_s = time.monotonic() + 2.0
        for publisher in self._publishers.values():
            publisher.wait_for_all_acked(Duration(seconds=max(0.0, limit_s - time.monotonic())))

    # Playing

    def _publish_latched_before_start(self) -> None:
        """Starting in the middle must not hide the transforms that were published once, at the beginning."""
        if self._latched and self._start_ns > self._bag.start_ns:
            for message in self._bag.messages(self._latched, stop_ns=self._start_ns):
                self._publish(message, late_s=0.0)

    def _play_once(self) -> None:
        self._clock.set(self._start_ns)
        self._clock.release(_START)
        for message in self._bag.messages(set(self._publishers), self._start_ns, self._stop_ns):
            if self._flow is not None and self._is_anchor(message):
                self._wait_for_consumer(message)
            late_s = self._clock.wait_until(message.time_ns)
            self._publish(message, late_s)
        self._clock.wait_until(self._stop_ns - 1)

    def _publish(self, message: BagMessage, late_s: float) -> None:
        self._publishers[message.topic].publish(message.data)
        topic = self.report.topics[message.topic]
        topic.sent_s.append(time.monotonic())
        topic.late_s.append(late_s)

    def _is_anchor(self, message: BagMessage) -> bool:
        if self._anchor is None and message.msgtype in _IMAGE_TYPES:
            self._anchor = message.topic
        return message.topic == self._anchor

    def _wait_for_consumer(self, anchor: BagMessage) -> None:
        """Bag time stands still at the anchor while too many earlier ones are unanswered."""
        self._clock.wait_until(anchor.time_ns)
        if not self._flow.has_room():
            self._clock.hold(_SLOW_CONSUMER)
            try:
                self._flow.wait_for_room()
            finally:
                self._clock.release(_SLOW_CONSUMER)
        self._flow.sent()

    # Threads and services

    def _publish_clock(self) -> None:
        message = Clock()
        while not self._closing.wait(1.0 / self._options.clock_hz):
            message.clock.sec, message.clock.nanosec = divmod(self._clock.now_ns(), 1_000_000_000)
            self._clock_publisher.publish(message)

    def _pause(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._clock.hold(_USER)
        response.success, response.message = True, f"paused at {self._clock.now_ns()} ns"
        return response

    def _resume(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._clock.release(_USER)
        response.success, response.message = True, f"playing from {self._clock.now_ns()} ns"
        return response
