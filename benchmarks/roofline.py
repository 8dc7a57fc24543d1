# SPDX-License-Identifier: Apache-2.0
"""What a network must compute and move at least, and what this machine can: the time below which no engine can be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.encoder import forward, lift_bytes
from occflownet_core.model import DeployedModel, ModelConfig, OccFlowNet

_TRIES = 20


@dataclass(frozen=True)
class Work:
    """Of one frame at batch 1.

    Attributes:
        gflop: matrix products and convolutions, at two per multiplication and addition.
        least_mb: weights, images and memory in and out once, what the lift moves and the label grid's outputs; single
            precision. Activations are left out: an engine may keep them in its caches.
    """

    gflop: float
    least_mb: float

    @classmethod
    def of(cls, config: ModelConfig) -> Work:
        """Counted on torch's "meta" device, without computing anything."""
        with torch.device("meta"):
            model = OccFlowNet(config.without_download())
        model.to("meta").eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            forward(model)
        weights = 4 * sum(p.numel() for p in model.parameters())
        images = 3 * len(config.cameras) * config.image_width_px * config.image_height_px
        memory = 2 * sum(t.numel() * t.element_size() for t in DeployedModel(model).empty_memory())
        outputs = config.grid.size * (1 + 4)  # a label and a probability
        least = weights + images + memory + outputs + lift_bytes(config, model.lift_spec)
        return cls(counter.get_total_flops() / 1e9, least / 1e6)


@dataclass(frozen=True)
class Peak:
    """Measured, not promised.

    Attributes:
        gflop_per_s: of a large matrix product.
        gb_per_s: read and written by a large copy.
    """

    gflop_per_s: float
    gb_per_s: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, side: int = 2048) -> Peak:
        """The best of a few tries of matrices [side, side], and of copies of 16 times as many bytes."""
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        source = torch.rand(4 * side, side, device=device)
        target = torch.empty_like(source)
        product_s = best_s(lambda: a @ b, device)
        copy_s = best_s(lambda: target.copy_(source), device)
        return cls(2 * side**3 / product_s / 1e9, 2 * source.numel() * source.element_size() / copy_s / 1e9)

    def least_ms(self, work: Work, byte_share: float = 1.0) -> float:
        """What the work takes at least; ``byte_share`` of 0.5 counts its bytes in half precision."""
        compute_s = work.gflop / self.gflop_per_s
        return 1e3 * max(compute_s, byte_share * work.least_mb / 1e3 / self.gb_per_s)


def best_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, the first (which plans and allocates) left out."""
    run()
    times_s = []
    for _ in range(_TRIES):
        synchronize(device)
        started_s = time.perf_counter()
        run()
        synchronize(device)
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
