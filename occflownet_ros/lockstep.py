# SPDX-License-Identifier: Apache-2.0
"""A bag's keyframes through the node one by one: each exactly once, the next only after the answer to the one before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import rclpy
from rclpy.node import Node

from occflownet_ros.bag import Bag, BagMessage, BagTopic
from occflownet_ros.bag_keyframes import BagKeyframe, NodeInputs, keyframe_messages
from occflownet_ros.player_node import message_class, publisher_qos
from occflownet_ros.replay import (
    DIAGNOSTICS_PERIOD_S,
    NodeProcess,
    Replay,
    ReplayError,
    activate,
    recording,
)

_MATCHING_TIMEOUT_S = 30.0
_SETTLE_S = 0.5
_POLL_S = 0.005
_REPEAT_S = 1.0
_LATENCY_TIMEOUT_S = 2.0
_LOSSES = ("dropped", "undecodable", "failed")


def replay_lockstep(
    bag: Path,
    keyframes: Sequence[BagKeyframe],
    inputs: NodeInputs,
    parameters: Mapping[str, object],
    log_directory: Path,
    answer_timeout_s: float = 60.0,
    on_answer: Callable[[], None] = lambda: None,
) -> Replay:
    """Send every complete keyframe to a node of its own and wait for its labels.

    Args:
        bag: rosbag2 folder or file.
        keyframes: of the bag, in order of time.
        inputs: topics to send.
        parameters: the node's, ``parameters.LOCKSTEP`` among them.
        log_directory: takes ``node.log``; is made.
        answer_timeout_s: after so long without labels a keyframe counts as unanswered.
        on_answer: called after each keyframe.

    Raises:
        ReplayError: the node did not reach its active state, does not listen, ended, or gave no labels even for the
            first keyframe; with its own words.
    """
    log_directory.mkdir(parents=True, exist_ok=True)
    replay = Replay()
    node = NodeProcess(parameters, log_directory / "node.log")
    try:
        with recording(replay), Bag(bag) as opened:
            activate(node)
            replay.seconds_to_active = time.monotonic() - node.started_s
            feeder = _Feeder([opened.topics[topic] for topic in inputs.topics])
            try:
                feeder.wait_for_listeners(node)
                started_s = time.monotonic()
                messages = opened.messages(set(inputs.topics))
                for keyframe, own in keyframe_messages(messages, keyframes, inputs):
                    feeder.send(own)
                    _await_answer(keyframe, own, inputs, feeder, node, replay, answer_timeout_s)
                    if not replay.frames:
                        raise ReplayError(
                            f"the node gave no labels for the first keyframe: {replay.trouble()}; see {node.log}"
                        )
                    on_answer()
                replay.play_seconds = time.monotonic() - started_s
                time.sleep(DIAGNOSTICS_PERIOD_S + 0.3)  # one more round of diagnostics counts the last set
                replay.node_resident_mb = node.peak_resident_mb()
            finally:
                feeder.close()
    finally:
        node.stop()
    return replay


class _Feeder:
    """Publishers of the topics that are sent, as the bag recorded them."""

    def __init__(self, topics: Iterable[BagTopic]) -> None:
        self._node: Node = rclpy.create_node("replay_lockstep")
        self._publishers = {
            topic.name: self._node.create_publisher(message_class(topic.msgtype), topic.name, publisher_qos(topic))
            for topic in topics
        }

    def wait_for_listeners(self, node: NodeProcess) -> None:
        until_s = time.monotonic() + _MATCHING_TIMEOUT_S
        while silent := [name for name, p in self._publishers.items() if not p.get_subscription_count()]:
            node.require_running()
            if time.monotonic() > until_s:
                raise ReplayError(f"the node does not listen to {', '.join(silent)}; see {node.log}")
            time.sleep(_POLL_S)
        time.sleep(_SETTLE_S)  # the other side learns of the match on its own, a moment later

    def send(self, messages: Iterable[BagMessage]) -> None:
        for message in messages:
            self._publishers[message.topic].publish(message.data)

    def close(self) -> None:
        self._node.destroy_node()


def _await_answer(
    keyframe: BagKeyframe,
    own: Sequence[BagMessage],
    inputs: NodeInputs,
    feeder: _Feeder,
    node: NodeProcess,
    replay: Replay,
    timeout_s: float,
) -> None:
    """Wait for the keyframe's labels and latencies; note why there are none."""
    lost_before = _losses(replay)
    sent_s = repeated_s = time.monotonic()
    while keyframe.set_stamp_ns not in replay.frames:
        now_s = time.monotonic()
        if now_s - sent_s > timeout_s or _losses(replay) != lost_before:
            replay.unanswered[keyframe.set_stamp_ns] = _reason(node, now_s - sent_s)
            return
        if now_s - repeated_s > _REPEAT_S:
            node.require_running()
            # The node hears camera_info by best effort, and a vehicle would repeat it.
            feeder.send(message for message in own if message.topic in inputs.infos)
            repeated_s = now_s
        time.sleep(_POLL_S)
    until_s = time.monotonic() + _LATENCY_TIMEOUT_S
    while any(len(ms) < len(replay.frames) for ms in replay.latency_ms.values()) and time.monotonic() < until_s:
        time.sleep(_POLL_S)


def _losses(replay: Replay) -> int:
    counts = replay.set_counts()
    return sum(counts.get(outcome, 0) for outcome in _LOSSES)


def _reason(node: NodeProcess, waited_s: float) -> str:
    said = node.last_words() if node.log.stat().st_size else "it logged nothing"
    return f"no labels within {waited_s:.1f} s; the node's last words: {said}"
