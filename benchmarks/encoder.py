# SPDX-License-Identifier: Apache-2.0
"""The full-size networks counted: parameters, operations and memory of every part, without computing anything.

Networks and inputs are on torch's "meta" device, where tensors have shapes and no values; it takes no GPU and seconds
of time, and the numbers are exact for the operations that are counted: matrix products and convolutions, at two per
multiplication and addition. Lookups (gather, splat, GridSample), norms and activations are not: they cost bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import machine
from occflownet_core.encoder.lift import CameraTensors, LiftTensors, SplatTensors
from occflownet_core.errors import ConfigError
from occflownet_core.lift_tables import LiftSpec
from occflownet_core.model import ModelConfig, OccFlowNet
from training.settings import CONFIG_FOLDER, TrainingConfig

CONFIGS = ("nuscenes_swinb_512x1408", "nuscenes_r50_256x704", "minicity_tiny")
PARTS = {
    "backbone": r"image_encoder\.backbone",
    "neck": r"image_encoder\.(lateral\.\d+|smooth|neck)",
    "stereo": r"stereo(\.features)?",
    "depth net": r"depth_net",
    "frame block": r"frame_block",
    "volume network": r"volume_encoder",
    "decoders": r"decoder\.\w+",
    "supervision only": r"context_classes",
}
"""Parts, and the modules that are called as such."""


@dataclass(frozen=True)
class Count:
    """A network at batch 1.

    Attributes:
        name: of its configuration.
        parameters: by part.
        gflop: by part, forward.
        backward_gflop: of the whole, backward alone.
        kept_gb: activations in single precision that a training step keeps for backward.
        kept_checkpointed_gb: the same with activation checkpointing.
        memory_mb: what is carried from frame to frame, single precision.
        lift_mb: what the lift reads and writes, single precision.
    """

    name: str
    parameters: dict[str, int]
    gflop: dict[str, float]
    backward_gflop: float
    kept_gb: float
    kept_checkpointed_gb: float
    memory_mb: float
    lift_mb: float


def count(config: ModelConfig) -> Count:
    """Everything about one network."""
    with torch.device("meta"):
        model = OccFlowNet(config.without_download())
    model.to("meta").train()
    counter = FlopCounterMode(display=False)
    kept = KeptBytes(model.parameters())
    with kept, counter:
        loss = forward(model)
        forward_flop = counter.get_total_flops()
        parts = flop_of_parts(counter.get_flop_counts())
        loss.backward()
    model.set_checkpointing(True)
    fewer = KeptBytes(model.parameters())
    with fewer:
        forward(model)
    return Count(
        config.name,
        parameters_of_parts(model),
        {name: flop / 1e9 for name, flop in parts.items()},
        (counter.get_total_flops() - forward_flop) / 1e9,
        kept.total / 1e9,
        fewer.total / 1e9,
        sum(t.numel() * t.element_size() for t in (model.empty_state(), *(model.empty_view() or ()))) / 1e6,
        lift_bytes(config, model.lift_spec) / 1e6,
    )


def forward(model: OccFlowNet) -> torch.Tensor:
    """A number that every part of the network goes into, decoders at every label voxel included."""
    config, device = model.config, torch.device("meta")
    cameras = len(config.cameras)
    images = torch.zeros(1, cameras, config.image_height_px, config.image_width_px, 3, dtype=torch.uint8, device=device)
    view = model.empty_view()
    output = model(
        images, meta_tables(model.lift_spec, cameras), torch.zeros(1, 4, 4, device=device), model.empty_state(), view
    )
    density, logits = output.field.lattice(config.grid)
    return density.sum() + logits.sum() + output.seen.depth_logits.sum()


def meta_tables(spec: LiftSpec, cameras: int) -> LiftTensors | SplatTensors:
    """Tables of the right shapes without values."""
    known = None
    if spec.knows_cameras:
        matrices = torch.zeros(1, cameras, 4, 4, device="meta")
        known = CameraTensors(matrices, matrices, torch.zeros(1, cameras, 17, device="meta"))
    if spec.method == "splat":
        shape = (1, cameras, spec.depth_bins.count, spec.feature_height, spec.feature_width)
        return SplatTensors(torch.zeros(shape, dtype=torch.int32, device="meta"), known)
    shape = (1, spec.grid.size, spec.slots)
    index = torch.zeros(*shape, dtype=torch.int32, device="meta")
    pair = torch.zeros(*shape, 2, dtype=torch.int32, device="meta")
    return LiftTensors(index, pair, torch.zeros(*shape, 2, device="meta"), known)


def parameters_of_parts(model: nn.Module) -> dict[str, int]:
    """Number of parameters by part."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = next(label for label, pattern in PARTS.items() if re.match(rf"({pattern})(\.|$)", name))
        counts[part] += parameter.numel()
    return counts


def flop_of_parts(counts: dict[str, dict]) -> dict[str, float]:
    """Operations by part, of the counter's table by module."""
    flop = {name.partition(".")[2]: sum(ops.values()) for name, ops in counts.items()}
    return {
        label: sum(n for name, n in flop.items() if re.fullmatch(pattern, name)) for label, pattern in PARTS.items()
    }


class KeptBytes:
    """Sum of what autograd keeps for backward inside the context: every storage once, parameters never.

    Args:
        parameters: which are there anyway.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._known = {id(p): p for p in parameters}
        self._held: list[torch.Tensor] = []
        self._seen: set[int] = set()
        self.total = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in self._known and storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)  # a freed storage's identity would be given away again
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> KeptBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *reason: object) -> None:
        self._hooks.__exit__(*reason)


def lift_bytes(config: ModelConfig, spec: LiftSpec) -> float:
    """What lifting must read and write at least: tables, pixels per lookup, volume."""
    channels = config.depth.context_channels
    volume = spec.grid.size * channels * 4
    if spec.method == "splat":
        points = len(config.cameras) * spec.depth_bins.count * spec.feature_height * spec.feature_width
        return points * (4 + 4 + 3 * 4 * channels) + volume  # index, probability; context read, sum read and written
    return spec.grid.size * spec.slots * (4 + 16 + 2 * 4 + 4 * channels) + volume


def table_of(c: Count) -> Table:
    """What people read about one network."""
    table = Table(title=c.name, title_justify="left")
    for heading in ("", "M parameters", "GFLOP, forward"):
        table.add_column(heading, justify="right" if heading else "left")
    for label in PARTS:
        if c.parameters[label]:
            table.add_row(label, f"{c.parameters[label] / 1e6:.2f}", f"{c.gflop[label]:.1f}")
    table.add_section()
    table.add_row("all", f"{sum(c.parameters.values()) / 1e6:.2f}", f"{sum(c.gflop.values()):.1f}")
    return table


def sentence_of(c: Count) -> str:
    """What stands below the table."""
    return (
        f"backward {c.backward_gflop:.0f} GFLOP; kept for it {c.kept_gb:.2f} GB, with checkpointing "
        f"{c.kept_checkpointed_gb:.2f} GB;\nmemory between frames {c.memory_mb:.1f} MB; the lift moves {c.lift_mb:.0f} MB\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.encoder", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", nargs="+", default=CONFIGS, help="names in training/configs (default: %(default)s)", metavar="NAME"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON (default: out/bench)")
    options = parser.parse_args(arguments)
    try:
        counts = [count(model_config(name)) for name in options.config]
    except ConfigError as error:
        print(f"benchmarks.encoder: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print("six cameras, batch 1, single precision")
    for each in counts:
        console.print(table_of(each), sentence_of(each), sep="\n")
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "torch": torch.__version__, "networks": [asdict(c) for c in counts]}
    (options.out / "encoder.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0


def model_config(name: str) -> ModelConfig:
    """The network of a training configuration, its bases included.

    Raises:
        ConfigError: there is none of that name.
    """
    return TrainingConfig.from_yaml(CONFIG_FOLDER / f"{name}.yaml").model


if __name__ == "__main__":
    sys.exit(main())
