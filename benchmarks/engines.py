# SPDX-License-Identifier: Apache-2.0
"""Engines and precisions side by side on the demo drive: latency, ratio to fp32, labels alike, mIoU, against the roofline.

All engines run each frame in turn, so that whatever else the machine does meanwhile hits all of them. The quantised bundles
are calibrated on the first half of the drive. The demo bundle carries no weights for PyTorch, so that PyTorch runs the same
network with random weights, beside ONNX Runtime on that one's graph: latencies and agreement mean what they say, a mIoU does not.
On a machine with a GPU the full-size networks follow, in PyTorch at batch 1 and half precision.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import gpu_networks
from benchmarks.encoder import model_config
from benchmarks.report import machine
from benchmarks.roofline import Peak, Work
from occflownet_core.command_line import exit_status
from occflownet_core.errors import DatasetError, EngineError
from occflownet_core.model import ModelConfig
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_core.runtime.comparison import EngineRecord, compare_engines
from occflownet_core.runtime.cuda_device import find_gpu
from occflownet_core.runtime.drive import EngineInput
from occflownet_core.runtime.engine import HALF, SINGLE, Engine
from occflownet_core.runtime.factory import create_engine
from occflownet_core.runtime.quantisation import CPU, TENSORRT, quantise_bundle
from occflownet_core.runtime.torch_engine import TorchEngine
from occflownet_ros.engine_inputs import bag_inputs
from occflownet_ros.share import share_path
from training.export import export, load_model

PACKAGES = ("onnxruntime", "torch", "tensorrt", "cuda-bindings", "numpy")


@dataclass(frozen=True)
class Row:
    """One engine.

    Attributes:
        engine: what runs, in which precision.
        weights: ``demo`` or ``random``.
        median_ms: of an inference.
        ratio: to ONNX Runtime in fp32 on the same weights, median of the frames' ratios.
        of_roofline: the least time that single precision allows here over the fastest frame's; None for a GPU's engines.
        labels_alike, occupied_alike: mean share over frames, against that same engine; None for itself.
        miou_17: against ground truth; None with random weights.
    """

    engine: str
    weights: str
    median_ms: float
    ratio: float
    of_roofline: float | None
    labels_alike: float | None
    occupied_alike: float | None
    miou_17: float | None


def engines_of_the_demo(bundle: Bundle, folder: Path, frames: list[EngineInput], threads: int) -> dict[str, Engine]:
    """ONNX Runtime in every precision, and TensorRT where there is a GPU; fp32 first."""
    half = frames[: max(1, len(frames) // 2)]
    eight = {
        target: quantise_bundle(bundle, half, target, folder / target, "first half of the drive", threads)
        for target in (CPU, TENSORRT)
    }
    engines = {
        f"ONNX Runtime {title}": create_engine(b, "onnxruntime-cpu", threads, precision)
        for title, b, precision in (
            ("fp32", bundle, SINGLE),
            ("fp16", bundle, HALF),
            ("int8 (cpu)", eight[CPU], SINGLE),
            ("int8 (tensorrt)", eight[TENSORRT], SINGLE),
        )
    }
    if no_gpu():
        return engines
    return engines | {
        f"TensorRT {title}": create_engine(b, "tensorrt", threads, precision, folder / "engines")
        for title, b, precision in (
            ("fp32", bundle, SINGLE),
            ("fp16", bundle, HALF),
            ("int8", eight[TENSORRT], SINGLE),
            ("int8 + fp16", eight[TENSORRT], HALF),
        )
    }


def engines_of_random_weights(config: ModelConfig, folder: Path, threads: int, compiled: bool) -> dict[str, Engine]:
    """ONNX Runtime and PyTorch on one network with random weights; ONNX Runtime first."""
    bundle, _ = export(load_model(config, None), folder, {"training": "none"}, with_weights=True, parity_frames=1)
    engines = {
        "ONNX Runtime fp32": create_engine(bundle, "onnxruntime-cpu", threads),
        "PyTorch eager fp32": TorchEngine(bundle, threads),
    }
    if compiled:
        engines["torch.compile fp32"] = TorchEngine(bundle, threads, compiled=True)
    return engines


def measure(groups: dict[str, dict[str, Engine]], frames: list[EngineInput]) -> Iterator[dict[str, list[EngineRecord]]]:
    """Run all engines of all groups over the frames, taking turns; before, each runs the first frame once, which does not count.

    Args:
        groups: engines by the name of their weights; the first of each group is the one the others are compared with.
        frames: of one drive.

    Yields:
        The records so far, by group, after every frame.
    """
    for engines in groups.values():  # what plans, allocates or compiles at the first run does it here
        for _ in compare_engines(engines, frames[:1]):
            pass
        for engine in engines.values():
            engine.reset()
    for records in zip(*(compare_engines(engines, frames) for engines in groups.values()), strict=True):
        yield {weights: list(each.values()) for weights, each in zip(groups, records, strict=True)}


def rows_of(weights: str, records: list[EngineRecord], least_ms: float) -> list[Row]:
    """The figures of a group of engines."""
    reference = records[0]
    rows = []
    for record in records:
        scores = record.scores.to_dict()["camera_mask"] if record.scores.samples and weights == "demo" else {}
        on_cpu = not record.name.startswith("TensorRT")
        rows.append(
            Row(
                record.name,
                weights,
                record.median_ms,
                float(np.median(np.divide(record.engine_ms, reference.engine_ms))),
                least_ms / min(record.engine_ms) if on_cpu else None,
                _mean([frame.label_agreement for frame in record.frames]),
                _mean([frame.occupied_agreement for frame in record.frames]),
                scores.get("miou_17"),
            )
        )
    return rows


def no_gpu() -> str:
    """Why TensorRT cannot run here; empty where it can."""
    try:
        import tensorrt  # noqa: F401

        find_gpu()
    except ImportError:
        return "TensorRT is not installed"
    except EngineError as error:
        return str(error)
    return ""


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _table(rows: list[Row], title: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        caption="* random weights",
        caption_justify="left",
    )
    table.add_column("engine", no_wrap=True)
    for heading in ("ms", "of fp32", "of roof", "labels", "occupied", "mIoU %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shares = [row.labels_alike, row.occupied_alike]
        table.add_row(
            row.engine + ("" if row.weights == "demo" else " *"),
            f"{row.median_ms:.0f}",
            f"{row.ratio:.2f}",
            "-" if row.of_roofline is None else f"{row.of_roofline:.0%}",
            *("-" if share is None else f"{share:.2%}" for share in shares),
            "-" if row.miou_17 is None else f"{100 * row.miou_17:.2f}",
        )
    return table


def _gpu_table(rows: list[gpu_networks.Latency], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("network", "PyTorch, fp16, batch 1", "median ms", "roofline ms", "GFLOP", "least MB"):
        table.add_column(heading, justify="left" if heading.startswith(("network", "PyTorch")) else "right")
    for row in rows:
        figures = (row.median_ms, row.roofline_ms, row.gflop, row.least_mb)
        table.add_row(row.network, row.way, *(f"{figure:.1f}" for figure in figures))
    return table


def versions() -> dict[str, str]:
    """Of the packages that matter, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure, print, write.

    Raises:
        OccflownetError: with one sentence for the user.
    """
    torch.set_num_threads(options.threads)
    bundle = load_bundle(options.bundle or share_path("demo", "bundle"))
    frames = list(islice(bag_inputs(options.bag or share_path("demo", "bag"), bundle), options.frames))
    if not frames:
        raise DatasetError("there is no frame to measure on; give a drive with at least one complete image set")
    config = model_config(bundle.name)
    work, peak = Work.of(config), Peak.measured(torch.device("cpu"), torch.float32)
    least_ms = peak.least_ms(work)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = {
            "demo": engines_of_the_demo(bundle, folder, frames, options.threads),
            "random": engines_of_random_weights(config, folder / "random", options.threads, not options.no_compile),
        }
        records: dict[str, list[EngineRecord]] = {}
        for so_far in track(measure(groups, frames), "frames", len(frames), console=console, transient=True):
            records = so_far
        rows = [row for weights, each in records.items() for row in rows_of(weights, each, least_ms)]
    here = machine() | {"threads": options.threads, "tensorrt": no_gpu() or "runs"}
    if torch.cuda.is_available():
        here["gpu"] = torch.cuda.get_device_name()
    packages = versions()
    named = ", ".join(f"{package} {number}" for package, number in packages.items())
    console.print(
        _table(
            rows,
            f"{bundle.name}, {len(frames)} frames: {here['cpu']}, {options.threads} of {here['cores']} cores, {here['date']}",
        ),
        f"{named}\nroofline: {work.gflop:.1f} GFLOP and {work.least_mb:.0f} MB at least, of a matrix product's "
        f"{peak.gflop_per_s:.0f} GFLOP/s and a copy's {peak.gb_per_s:.1f} GB/s: {least_ms:.0f} ms in single precision (eight bits may need less)",
        sep="\n",
    )
    if reason := no_gpu():
        console.print(f"TensorRT: not measured, {reason}", soft_wrap=True)
    large: list[gpu_networks.Latency] = []
    if torch.cuda.is_available():
        for each in gpu_networks.CONFIGS:
            large += gpu_networks.latencies(each, torch.device("cuda"), options.frames, not options.no_compile)
        console.print(_gpu_table(large, f"full size: {here['gpu']}, {here['date']}"))
    else:
        console.print(f"{' and '.join(gpu_networks.CONFIGS)} at full size: not measured, that needs a GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": here,
        "versions": packages,
        "work": asdict(work),
        "peak": asdict(peak),
        "engines": [asdict(row) for row in rows],
        "full_size": [asdict(row) for row in large],
    }
    (options.out / "engines.json").write_text(json.dumps(content, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.engines", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="of a shipped configuration (default: the demo's)")
    parser.add_argument("--bag", type=Path, help="drive (default: the demo's)")
    parser.add_argument(
        "--frames", type=int, default=12, metavar="N", help="of the drive (default: 12, all of the demo's)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each engine (default: 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON (default: out/bench)")
    options = parser.parse_args(arguments)
    if options.frames < 1 or options.threads < 1:
        parser.error(f"--frames is {options.frames} and --threads {options.threads}; give 1 or more")
    return exit_status("benchmarks.engines", lambda: run(options, Console(highlight=False)))


if __name__ == "__main__":
    sys.exit(main())
