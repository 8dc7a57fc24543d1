# SPDX-License-Identifier: Apache-2.0
"""The node in a process of its own, under camera streams from another: what it publishes, counts and holds."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.camera_streams import ANCHOR
from occflownet_core.errors import OccflownetError
from occflownet_ros.private_graph import use_private_graph
from occflownet_ros.replay import (
    DIAGNOSTICS_PERIOD_S,
    OUTPUTS,
    NodeProcess,
    Replay,
    activate,
    process_environment,
    recording,
    stop_process,
)
from occflownet_ros.share import share_path

_SAMPLE_PERIOD_S = 1.0


@dataclass(frozen=True)
class Sample:
    """What a process holds at one moment.

    Attributes:
        at_s: since the streams began.
        resident_mb: memory.
        handles: open file descriptors.
        threads: running.
    """

    at_s: float
    resident_mb: float
    handles: int
    threads: int


@dataclass
class Load:
    """What came of it.

    Attributes:
        replay: latencies and diagnostics; frames only if they were to be kept.
        sent: images per camera.
        late_ms_p99: how late the streams were themselves.
        samples: once a second.
        seconds: how long the streams ran.
    """

    replay: Replay = field(default_factory=Replay)
    sent: dict[str, int] = field(default_factory=dict)
    late_ms_p99: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0

    def received(self, camera: str) -> int:
        """Images of a camera that reached the node, by its own count."""
        return int(self.replay.diagnostics.get(f"camera {camera}", {}).get("received", 0))

    @property
    def lost(self) -> int:
        """Images that were sent and never reached the node."""
        return sum(count - self.received(camera) for camera, count in self.sent.items())

    def outside_engine_ms(self) -> np.ndarray:
        """Per set: from its last image's arrival to its publication, without the engine's time on it and on the set before.

        Raises:
            OccflownetError: latencies were lost on the way, or none came.
        """
        stages = {stage: np.array(self.replay.latency_ms[stage]) for stage in ("total", "engine", "busy")}
        counts = {len(values) for values in stages.values()}
        if counts != {len(stages["total"])} or not counts.copy().pop():
            raise OccflownetError(f"the node published {sorted(counts)} latencies; its log says why")
        return stages["total"] - stages["engine"] - stages["busy"]


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of the loaded node takes."""
    demo = share_path("demo")
    parser.add_argument("--rate", type=float, default=12.0, metavar="HZ", help="of each camera (default: 12)")
    parser.add_argument(
        "--bag",
        type=Path,
        default=demo / "bag",
        help="bag with six JPEG topics and calibration.yaml (default: the demo's)",
    )
    parser.add_argument("--bundle", type=Path, default=demo / "bundle", help="model bundle (default: the demo's)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON (default: out/bench)")


def node_parameters(options: argparse.Namespace) -> dict[str, object]:
    """The node's, from ``add_load_options``."""
    calibration = options.bag / "calibration.yaml"
    return {"bundle": str(options.bundle), "calibration_file": str(calibration), "anchor_camera": ANCHOR}


def put_under_load(
    bag: Path,
    parameters: dict[str, object],
    logs: Path,
    transport: str,
    rate_hz: float,
    seconds: float,
    on_progress: Callable[[float], None] = lambda at_s: None,
    heard: Sequence[str] = tuple(OUTPUTS),
) -> Load:
    """Start the node, send it streams, stop it.

    Args:
        bag: whose images are sent.
        parameters: of the node.
        logs: folder for ``node.log``.
        transport: ``compressed`` or ``raw``.
        rate_hz: of each camera.
        seconds: of the streams.
        on_progress: takes the seconds since their beginning, once a second.
        heard: outputs that somebody listens to.

    Raises:
        OccflownetError: a process failed; with its last words.
    """
    use_private_graph()
    os.environ.update(process_environment())
    load = Load(seconds=seconds)
    node = NodeProcess({**parameters, "image_transport": transport}, logs / "node.log")
    command = [sys.executable, "-m", "benchmarks.camera_streams", "--bag", str(bag), "--transport", transport]
    command += ["--rate", str(rate_hz), "--seconds", str(seconds)]
    try:
        with recording(load.replay, heard):
            activate(node)
            load.replay.seconds_to_active = time.monotonic() - node.started_s
            streams = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                _watch(streams, node, load, on_progress)
            finally:
                stop_process(streams)
            time.sleep(DIAGNOSTICS_PERIOD_S + 0.3)  # what is under way arrives, and is counted
            load.replay.node_resident_mb = node.peak_resident_mb()
    finally:
        node.stop()
    return load


def _watch(streams: subprocess.Popen, node: NodeProcess, load: Load, on_progress: Callable[[float], None]) -> None:
    started_s = time.monotonic()
    while streams.poll() is None:
        time.sleep(_SAMPLE_PERIOD_S)
        node.require_running()
        at_s = time.monotonic() - started_s
        load.samples.append(sample(node.pid, at_s))
        on_progress(at_s)
    output = streams.stdout.read()
    if streams.returncode:
        raise OccflownetError(f"the camera streams ended with status {streams.returncode}")
    report = json.loads(output.strip().splitlines()[-1])
    load.sent, load.late_ms_p99 = report["sent"], report["late_ms_p99"]


def sample(pid: int, at_s: float) -> Sample:
    """What a running process holds now."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    resident_mb = int(status["VmRSS"].split()[0]) / 1024
    return Sample(at_s, resident_mb, len(os.listdir(process / "fd")), int(status["Threads"]))
