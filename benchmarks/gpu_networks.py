# SPDX-License-Identifier: Apache-2.0
"""The full-size networks in PyTorch at batch 1 and half precision: eager, compiled, and as CUDA-graph replays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoder import model_config
from benchmarks.roofline import Peak, Work, synchronize
from occflownet_core.lift_tables import build_lift_tables
from occflownet_core.model import DeployedModel, ModelConfig
from training.export import load_model
from training.parity import drive, ring_rig

CONFIGS = ("nuscenes_r50_256x704", "nuscenes_swinb_512x1408")
_WARM_UP = 3
"""Runs before a CUDA graph is recorded: libraries choose their algorithms meanwhile."""


@dataclass(frozen=True)
class Latency:
    """One way to run one network.

    Attributes:
        network, way: which.
        median_ms: of an inference, inputs on the device.
        roofline_ms: the least that the operations and bytes of the network take on this device.
        gflop, least_mb: counted; see ``roofline.Work``.
    """

    network: str
    way: str
    median_ms: float
    roofline_ms: float
    gflop: float
    least_mb: float


def latencies(name: str, device: torch.device, frames: int, compiled: bool = True) -> list[Latency]:
    """Eager, ``torch.compile`` where wanted and, on a GPU, CUDA-graph replays; random weights, whose values cost the same.

    Args:
        name: of a configuration.
        device: a GPU, or the CPU (where half precision is left out).
        frames: timed runs of each, interleaved.
        compiled: try ``torch.compile`` as well.
    """
    config = model_config(name)
    network = DeployedModel(load_model(config, None)).to(device).eval()
    inputs = _inputs(network, config, device)
    ways: dict[str, Callable[[], object]] = {"eager": partial(_run, network, inputs, device)}
    if compiled:
        ways["torch.compile"] = partial(_run, torch.compile(network), inputs, device)
    if device.type == "cuda":
        ways["CUDA graph"] = _recorded(ways["eager"]).replay
    times_ms = interleaved_ms(ways, device, frames)
    on_gpu = device.type == "cuda"
    dtype, side, byte_share = (torch.float16, 8192, 0.5) if on_gpu else (torch.float32, 1024, 1.0)
    work, peak = Work.of(config), Peak.measured(device, dtype, side)
    least_ms = peak.least_ms(work, byte_share)
    return [
        Latency(name, way, float(np.median(times)), least_ms, work.gflop, work.least_mb)
        for way, times in times_ms.items()
    ]


def interleaved_ms(ways: dict[str, Callable[[], object]], device: torch.device, frames: int) -> dict[str, list[float]]:
    """Times of each way, taking turns, after one run of each."""
    for run in ways.values():
        run()
    times_ms: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(frames):
        for way, run in ways.items():
            synchronize(device)
            started_s = time.perf_counter()
            run()
            synchronize(device)
            times_ms[way].append(1e3 * (time.perf_counter() - started_s))
    return times_ms


def _inputs(network: DeployedModel, config: ModelConfig, device: torch.device) -> tuple[Tensor, ...]:
    """A frame of the made-up drive, its tables, and a memory of nothing."""
    images, motion = next(drive(config, 1))
    tables = build_lift_tables(ring_rig(config), network.model.lift_spec).arrays()
    arrays = [images, *tables.values(), motion.astype(np.float32), np.array(0.5, np.float32)]
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return tuple(tensor.to(device) for tensor in (*tensors, *network.empty_memory()))


def _run(network: Callable, inputs: tuple[Tensor, ...], device: torch.device) -> object:
    # Without autocast's cache of cast weights, which a CUDA graph must not depend on.
    with torch.no_grad(), torch.autocast("cuda", torch.float16, device.type == "cuda", cache_enabled=False):
        return network(*inputs)


def _recorded(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The run as a CUDA graph; its inputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
