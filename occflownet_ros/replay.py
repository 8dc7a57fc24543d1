# SPDX-License-Identifier: Apache-2.0
"""A bag through the node as on the vehicle: player process -> DDS -> node process -> a recorder that subscribes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import OccupancyGrid
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Float64, UInt8MultiArray
from visualization_msgs.msg import Marker, MarkerArray

from occflownet_core.errors import OccflownetError
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_ros import lifecycle_client
from occflownet_ros.bag import Bag
from occflownet_ros.conversions import labels_from_message
from occflownet_ros.publishers import STAGES
from occflownet_ros.transport import image_environment

NODE_NAME = "occflownet"

DIAGNOSTICS_PERIOD_S = 1.0
"""The node reports once in so long."""

# Only these are played: the player then waits until every one of them has a listener.
_NODE_INPUTS = (
    "sensor_msgs/msg/CompressedImage",
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/CameraInfo",
    "nav_msgs/msg/Odometry",
)

OUTPUTS = {
    "labels": UInt8MultiArray,
    "occupancy": PointCloud2,
    "voxels": MarkerArray,
    "costmap": OccupancyGrid,
    "mesh": Marker,
}

_TRANSITION_TIMEOUT_S = 120.0  # a machine that trains meanwhile is slow to load a model
_STOP_TIMEOUT_S = 5.0
_PROGRESS_S = 0.2


class ReplayError(OccflownetError):
    """A process of the replay did not start, or failed on the way."""


@dataclass
class Replay:
    """What came out of the node while a bag was played.

    Attributes:
        frames: by anchor stamp, in order of arrival.
        latency_ms: every latency that the node published, by stage.
        diagnostics: the last values of every status, by its name.
        seconds_to_active: from the node's process start to its active state.
        node_resident_mb: the node's peak resident memory.
        play_seconds: how long the player ran.
        player_output: what the player printed.
        player_exit: its exit status (1: the bag was cut, and played up to the cut).
        unanswered: sets that were sent in lockstep and gave no labels: anchor stamp -> reason.
    """

    frames: dict[int, OccupancyFrame] = field(default_factory=dict)
    latency_ms: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    diagnostics: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds_to_active: float = 0.0
    node_resident_mb: float = 0.0
    play_seconds: float = 0.0
    player_output: str = ""
    player_exit: int = 0
    unanswered: dict[int, str] = field(default_factory=dict)

    def latency_percentiles(self, percentiles: tuple[float, ...] = (50, 99)) -> dict[str, list[float]]:
        """Milliseconds per stage that was measured, in the order of ``STAGES``."""
        return {stage: np.percentile(ms, percentiles).tolist() for stage, ms in self.latency_ms.items() if ms}

    def frame_latency_ms(self) -> dict[int, dict[str, float]]:
        """Stage -> milliseconds of every frame, by its stamp; nothing if a message was lost and they cannot be told apart.

        Latencies carry no stamp, but come in the order of the frames.
        """
        if any(len(ms) != len(self.frames) for ms in self.latency_ms.values()):
            return {}
        return {
            stamp_ns: {stage: ms[k] for stage, ms in self.latency_ms.items()} for k, stamp_ns in enumerate(self.frames)
        }

    def trouble(self) -> str:
        """What the node's diagnostics give as the reason when nothing comes out."""
        calibration = self.diagnostics.get("calibration", {}).get("message", "complete")
        if calibration != "complete":
            return calibration
        return self.diagnostics.get("engine", {}).get("message", "it sent no diagnostics")

    def set_counts(self) -> dict[str, int]:
        """The node's own counters of image sets: ``{"opened": 20, "processed": 20, ...}``."""
        values = self.diagnostics.get("engine", {})
        return {key.removeprefix("sets "): int(v) for key, v in values.items() if key.startswith("sets ")}


class Recorder(Node):
    """Subscribes to all that the node says and keeps it in a ``Replay``.

    Args:
        replay: that is filled.
        heard: instead of keeping frames, 640 kB each, only receive these outputs (keys of ``OUTPUTS``).
    """

    def __init__(self, replay: Replay, heard: Sequence[str] | None = None) -> None:
        super().__init__("occflownet_recorder")
        self._replay = replay
        queue = QoSProfile(depth=20)
        if heard is None:
            self.create_subscription(UInt8MultiArray, f"/{NODE_NAME}/labels", self._labels, queue)
        for name in heard or ():
            self.create_subscription(OUTPUTS[name], f"/{NODE_NAME}/{name}", lambda serialised: None, queue, raw=True)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._diagnostics, queue)
        for stage in STAGES:
            self.create_subscription(Float64, f"/{NODE_NAME}/latency/{stage}", self._latency(stage), queue)

    def _labels(self, message: UInt8MultiArray) -> None:
        frame = labels_from_message(message)
        self._replay.frames[frame.stamp_ns] = frame

    def _latency(self, stage: str):
        return lambda message: self._replay.latency_ms[stage].append(message.data)

    def _diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            owner, _, name = status.name.partition(": ")
            if owner.endswith(NODE_NAME):
                self._replay.diagnostics[name] = {"message": status.message, **{v.key: v.value for v in status.values}}


class NodeProcess:
    """The node in a process of its own.

    Args:
        parameters: ROS parameters that differ from their defaults.
        log: file that takes what it prints.
    """

    def __init__(self, parameters: Mapping[str, object], log: Path) -> None:
        self.log = log
        self.started_s = time.monotonic()
        self._log_file = log.open("w")
        arguments = [f"{name}:={json.dumps(value)}" for name, value in parameters.items()]
        command = [sys.executable, "-m", "occflownet_ros.node", "--ros-args"]
        for argument in arguments:
            command += ["-p", argument]
        self._process = subprocess.Popen(
            command, stdout=self._log_file, stderr=subprocess.STDOUT, env=process_environment()
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def require_running(self) -> None:
        """Raises ``ReplayError`` with the node's last words if it has ended."""
        if self._process.poll() is not None:
            raise ReplayError(f"the node ended with status {self._process.returncode}: {self.last_words()}")

    def last_words(self) -> str:
        """The last warning or error that the node logged, or its last line."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "[ERROR]" in line or "[WARN]" in line] or lines
        return telling[-1].rpartition("]: ")[2] if telling else f"it printed nothing (see {self.log})"

    def peak_resident_mb(self) -> float:
        """Peak resident memory so far."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        return 0.0

    def stop(self) -> int:
        """End it as Ctrl-C would, by force if it does not; its exit status."""
        status = stop_process(self._process)
        self._log_file.close()
        return status


def stop_process(process: subprocess.Popen) -> int:
    """End one of our processes as Ctrl-C would, by force if it does not; its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


def process_environment() -> dict[str, str]:
    """What this process and its children run in; a user's own settings win."""
    return {**image_environment(), **os.environ}


@contextlib.contextmanager
def recording(replay: Replay, heard: Sequence[str] | None = None) -> Iterator[None]:
    """Spin a ``Recorder`` in a thread of its own; rclpy is initialised and shut down around it."""
    rclpy.init()
    recorder = Recorder(replay, heard)
    executor = SingleThreadedExecutor()
    executor.add_node(recorder)

    def spin() -> None:
        with contextlib.suppress(ExternalShutdownException):
            executor.spin()

    thread = threading.Thread(target=spin, name="recorder", daemon=True)
    thread.start()
    try:
        yield
    finally:
        # In this order, or the process aborts: executor, its thread, rclpy.
        executor.shutdown()
        thread.join()
        recorder.destroy_node()
        rclpy.shutdown()


def replay_bag(
    bag: Path,
    parameters: Mapping[str, object],
    log_directory: Path,
    player_arguments: tuple[str, ...] = (),
    on_progress: Callable[[float], None] = lambda played_s: None,
) -> Replay:
    """Play a bag through a node and return what it published.

    Args:
        bag: rosbag2 folder or file.
        parameters: the node's parameters (``bundle`` at least).
        log_directory: takes ``node.log``; is made.
        player_arguments: further arguments of ``bag_player``, e.g. ``("--rate", "2")``.
        on_progress: called now and then with the seconds since the player's start.

    Raises:
        ReplayError: the node did not reach its active state, or a process failed; with its own words.
    """
    log_directory.mkdir(parents=True, exist_ok=True)
    replay = Replay()
    node = NodeProcess(parameters, log_directory / "node.log")
    try:
        with recording(replay):
            activate(node)
            replay.seconds_to_active = time.monotonic() - node.started_s
            _play(bag, player_arguments, node, replay, on_progress)
            # What is still under way arrives, and one more round of diagnostics counts it.
            time.sleep(DIAGNOSTICS_PERIOD_S + 0.3)
            replay.node_resident_mb = node.peak_resident_mb()
    finally:
        node.stop()
    return replay


def activate(node: NodeProcess) -> None:
    """Configure and activate the node.

    Raises:
        ReplayError: it refused or did not answer; with its own words.
    """
    driver = rclpy.create_node("occflownet_driver")
    try:
        for transition in (lifecycle_client.CONFIGURE, lifecycle_client.ACTIVATE):
            lifecycle_client.change_state(driver, NODE_NAME, transition, _TRANSITION_TIMEOUT_S)
    except lifecycle_client.LifecycleError as error:
        node.require_running()
        raise ReplayError(f"{node.last_words()} ({error})") from None
    finally:
        driver.destroy_node()


def _play(
    bag: Path,
    arguments: tuple[str, ...],
    node: NodeProcess,
    replay: Replay,
    on_progress: Callable[[float], None],
) -> None:
    with Bag(bag) as opened:
        topics = [topic.name for topic in opened.topics.values() if topic.msgtype in _NODE_INPUTS]
    command = [sys.executable, "-m", "occflownet_ros.bag_player", str(bag), *arguments, "--topics", *topics]
    started_s = time.monotonic()
    player = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=process_environment()
    )
    try:
        output = None
        while output is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = player.communicate(timeout=_PROGRESS_S)
            on_progress(time.monotonic() - started_s)
    finally:
        stop_process(player)
    replay.play_seconds = time.monotonic() - started_s
    replay.player_output, replay.player_exit = output, player.returncode
    node.require_running()
    if player.returncode not in (0, 1):
        raise ReplayError((output.strip().splitlines() or ["the bag player failed"])[-1])
