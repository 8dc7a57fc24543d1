# SPDX-License-Identifier: Apache-2.0
"""Rendering forward and backward: exact voxel traversal against published sampling, in time, memory and error.

Every variant runs in its own process on the same rays and lattice (200 x 200 x 16 cells, density and 17 logits): the
best of several steps, and the peak of resident memory over what the process held before its first step. Range errors
are against float64 twins that take tiny steps through the very field that a variant renders: constant cells for
traversal, trilinear for published sampling; samples of constant cells share traversal's twin. What is left of traversal's error there is mostly
the twin's own: it shrinks with the twin's step.

The limit: with M crossings, rows of logits are read forward and backward and read, added to and written once more for
their gradient: 4 x 68 bytes x M; the table of logits is laid out once and its gradient written and laid back: 6 x 43.5
MB. Divided by the measured rate of copying memory, that is the floor in the table; arithmetic is far below it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import Figure, publish
from occflownet_core.errors import DatasetError, OccflownetError
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.interpolate import nearest, trilinear
from occflownet_core.labels import OCCUPIED_CLASSES, label_of
from occflownet_core.renderer import Rays, RenderConfig, render
from occflownet_core.renderer.samplers import grid_segment
from occflownet_core.rig_file import load_rig
from occflownet_core.runtime.bundle import load_bundle
from occflownet_core.runtime.factory import create_engine
from occflownet_core.voxel_field import VoxelField
from occflownet_ros.share import share_path

GRID = OCC3D_GRID
TWIN_RAYS = 128
TWIN_STEP_M = 0.0005
LEAST_SPEEDUP = 3.0
MOST_MEMORY = 0.5
_MOST_OPAQUE = 1 - 1e-7  # float32 knows no probability between this and 1
_SOLID_PER_M, _FREE_PER_M, _SOFT_M = 12.0, 0.01, 0.1


@dataclass(frozen=True)
class Variant:
    """One way to render, and the field that it truly renders."""

    name: str
    config: RenderConfig
    interpolation: str = "trilinear"


VARIANTS = {
    "traversal": Variant("traversal", RenderConfig()),
    "traversal_full": Variant("traversal, no stop", RenderConfig(min_transmittance=0, min_weight=0)),
    "sampled": Variant("sampled 50 + 100", RenderConfig(method="sampled")),
    "sampled_100": Variant("sampled 50, 100", RenderConfig(method="sampled", keep_proposal_samples=False)),
    "sampled_cells": Variant("sampled, cells", RenderConfig(method="sampled", sampled_field="continuous"), "nearest"),
}


def street(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A street as a trained field might hold it: soft surfaces, haze in free space, undecided logits.

    Returns:
        density [Z, Y, X] 1/m and logits [17, Z, Y, X], float32.
    """
    random = np.random.default_rng(seed)
    centres = GRID.centres()  # [X, Y, Z, 3]
    x, y, z = np.moveaxis(centres, -1, 0)
    inside = -z  # how deep a cell lies in the nearest thing, metres
    label = np.full(GRID.shape, label_of("driveable_surface"))

    def put(depth_m: np.ndarray, name: str, where: tuple[slice, ...] = (slice(None),) * 2) -> None:
        deeper = depth_m > inside[where]
        inside[where] = np.where(deeper, depth_m, inside[where])
        label[where] = np.where(deeper, label_of(name), label[where])

    def around(middle_m: np.ndarray, reach_m: float) -> tuple[slice, ...]:
        low, high = (GRID.cells(np.append(middle_m[:2] + d, 0.0))[0] for d in (-reach_m, reach_m))
        return tuple(slice(i, j + 1) for i, j in zip(low[:2], high[:2], strict=True))

    put(np.minimum(np.abs(y) - 6, 0.15 - z), "sidewalk")
    put(np.abs(y) - 14 + 2 * np.sin(0.2 * x), "manmade")
    for _ in range(40):
        middle = np.array([random.uniform(-38, 38), random.choice([-4.5, -1.8, 1.8, 4.5]), 0.8])
        where = around(middle, 3.0)
        if np.abs(middle[0]) > 6:
            put((np.array([2.2, 0.9, 0.8]) - np.abs(centres[where] - middle)).min(axis=-1), "car", where)
    for _ in range(60):
        middle = np.array([random.uniform(-38, 38), random.choice([-8.0, 8.0])]) + random.uniform(-1, 1, 2)
        where = around(middle, 2.5)
        aside = np.hypot(x[where] - middle[0], y[where] - middle[1])
        put(np.maximum(1.6 - np.hypot(aside, z[where] - 4), 0.3 - aside), "vegetation", where)
    density = _FREE_PER_M + _SOLID_PER_M / (1 + np.exp(-np.clip(inside / _SOFT_M, -30, 30)))
    logits = 4 * np.eye(OCCUPIED_CLASSES)[label] + random.normal(0, 0.5, (*GRID.shape, OCCUPIED_CLASSES))
    return (
        np.ascontiguousarray(density.transpose(2, 1, 0), dtype=np.float32),
        np.ascontiguousarray(logits.transpose(3, 2, 1, 0), dtype=np.float32),
    )


def lidar_rays(count: int, seed: int = 0) -> Rays:
    """Lines of sight as labelled LiDAR points give them: six cameras, 32 rings, seven frames of a moving vehicle."""
    random = np.random.default_rng(seed)
    azimuth = random.uniform(-np.pi, np.pi, count)
    ring = np.deg2rad(np.linspace(-30, 10, 32))[random.integers(0, 32, count)]
    direction = np.stack([np.cos(ring) * np.cos(azimuth), np.cos(ring) * np.sin(azimuth), np.sin(ring)], axis=1)
    frame = random.integers(-3, 4, count)
    origin = np.stack([1.5 * np.cos(azimuth) + 4.0 * frame, 0.5 * np.sin(azimuth), np.full(count, 1.5)], axis=1)
    label = random.integers(0, OCCUPIED_CLASSES, count)
    return Rays.from_numpy(origin, direction, random.uniform(2, 39, count), label, frame)


def load_field(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """density [Z, Y, X] and logits [17, Z, Y, X] of an .npz file.

    Raises:
        DatasetError: the file cannot be read, or does not hold them.
    """
    try:
        with np.load(path) as arrays:
            density, logits = arrays["density"], arrays["logits"]
    except (OSError, KeyError, ValueError) as error:
        raise DatasetError(
            f"cannot read a field from {path} ({error}); give an .npz with density and logits"
        ) from error
    cells = GRID.shape[::-1]
    if density.shape != cells or logits.shape != (OCCUPIED_CLASSES, *cells):
        raise DatasetError(
            f"{path} holds density {density.shape} and logits {logits.shape}; expected {cells} and "
            f"{(OCCUPIED_CLASSES, *cells)}"
        )
    return density.astype(np.float32), logits.astype(np.float32)


def model_field(bundle_path: Path, bag: Path) -> tuple[np.ndarray, np.ndarray]:
    """What a model sees at a bag's first images: density [Z, Y, X] 1/m, exactly, and logits [17, Z, Y, X] of its classes.

    A bundle gives the probability that a cell is opaque, 1 - exp(-s l), which has its density s in it; and with nothing
    called free the likeliest class of every cell, but not by how much: logits are 4 for it and 0 for the others.

    Raises:
        OccflownetError: bundle or bag cannot be read, or do not belong together.
    """
    from occflownet_ros.bag import Bag
    from occflownet_ros.demo import images_at

    bundle = load_bundle(bundle_path)
    with Bag(bag) as opened:
        stamp_ns = next(
            m.time_ns for m in opened.messages() if m.topic == f"/{bundle.cameras[0]}/image_rect_compressed"
        )
    images = images_at(bag, stamp_ns, bundle.cameras)
    engine = create_engine(bundle, "onnxruntime", threads=1)
    engine.calibrate(load_rig(bag / "calibration.yaml").ordered(bundle.cameras))
    engine.occupancy_threshold = 0.0
    network_images = [bundle.image_transform(*images[name].shape[1::-1]).image(images[name]) for name in bundle.cameras]
    seen = engine.infer(np.stack(network_images), None)
    opaque = seen.probability.transpose(2, 1, 0).astype(np.float64)  # [Z, Y, X]
    density = -np.log1p(-np.minimum(opaque, _MOST_OPAQUE)) / bundle.grid.voxel_size_m
    logits = 4.0 * np.eye(OCCUPIED_CLASSES + 1)[seen.labels.transpose(2, 1, 0)][..., :OCCUPIED_CLASSES]
    return density.astype(np.float32), np.ascontiguousarray(logits.transpose(3, 0, 1, 2), dtype=np.float32)


def resident_mb(name: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise OccflownetError(f"/proc/self/status has no {name}; this benchmark needs Linux")


def step(field: VoxelField, rays: Rays, config: RenderConfig) -> tuple[torch.Tensor, int]:
    """Forward and backward of range and semantics, as training does them; the rendered range, how many samples."""
    field.density_lattice.grad = field.logits_lattice.grad = None
    seen = render(field, rays, field.grid, config=config)
    loss = (seen.range_m - rays.range_m).square().mean()
    loss = loss + torch.nn.functional.cross_entropy(seen.logits, rays.label)
    loss.backward()
    return seen.range_m.detach(), len(seen.samples.ray)


def measure(key: str, field_path: Path, count: int, repeats: int, threads: int) -> dict:
    """What one variant takes; runs in a process of its own."""
    torch.set_num_threads(threads)
    variant = VARIANTS[key]
    density, logits = (torch.from_numpy(a)[None].requires_grad_() for a in load_field(field_path))
    field = VoxelField(density, logits, GRID, variant.interpolation)
    rays = lidar_rays(count)
    step(field, rays[:64], variant.config)  # loads what is loaded once
    density.grad = logits.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before_mb = resident_mb("VmRSS")
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        range_m, samples = step(field, rays, variant.config)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "name": variant.name,
        "seconds": min(seconds),
        "cpu_seconds": min(cpu_seconds),
        "peak_mb": resident_mb("VmHWM") - before_mb,
        "samples": samples,
        "range_m": range_m[:TWIN_RAYS].tolist(),
    }


@torch.no_grad()
def twin_range_m(density: np.ndarray, rays: Rays, interpolation: str) -> torch.Tensor:
    """Range [R] with the remainder at the far end, by steps of half a millimetre in float64."""
    volume = torch.from_numpy(density).double()[None, None]
    lookup = nearest if interpolation == "nearest" else trilinear
    far_m = grid_segment(rays, GRID)[1].double()
    ranges = torch.zeros(len(rays)).double()
    for i in track(range(len(rays)), f"float64 twin, {interpolation}", transient=True):
        steps = max(int(far_m[i] / TWIN_STEP_M), 1)
        length = far_m[i] / steps
        t = (torch.arange(steps).double() + 0.5) * length
        points = rays.origin_m[i].double() + t[:, None] * rays.direction[i].double()
        optical_depth = lookup(volume, GRID, points, torch.zeros(steps, dtype=torch.long))[:, 0] * length
        reach = torch.exp(-(optical_depth.cumsum(0) - optical_depth))
        weight = reach * -torch.expm1(-optical_depth)
        ranges[i] = (weight * t).sum() + (1 - weight.sum()) * far_m[i]
    return ranges


def copy_rate_gb_s(threads: int) -> float:
    """Bytes read and written per second by a large copy."""
    torch.set_num_threads(threads)
    source = torch.ones(64_000_000)
    target = torch.empty_like(source)
    target.copy_(source)
    start = time.perf_counter()
    target.copy_(source)
    return 2 * source.nbytes / (time.perf_counter() - start) / 1e9


def floor_seconds(crossings: int, grid: VoxelGrid, rate_gb_s: float) -> float:
    """The time that the unavoidable memory traffic takes; see the module's docstring."""
    row_bytes = 4 * OCCUPIED_CLASSES
    return (4 * row_bytes * crossings + 6 * row_bytes * grid.size) / (rate_gb_s * 1e9)


def run(arguments: argparse.Namespace) -> int:
    density, logits, name = chosen_field(arguments)
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "field.npz"
        np.savez(path, density=density, logits=logits)
        for key in track(VARIANTS, "rendering variants", transient=True):
            command = [sys.executable, "-m", "benchmarks.rendering", "--measure", key, "--field", str(path)]
            command += ["--rays", str(arguments.rays), "--repeats", str(arguments.repeats)]
            command += ["--threads", str(arguments.threads)]
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode:
                raise OccflownetError(f"measuring '{VARIANTS[key].name}' failed: {finished.stderr.strip()[-300:]}")
            results[key] = json.loads(finished.stdout)
    rays = lidar_rays(arguments.rays)[:TWIN_RAYS]
    twins = {kind: twin_range_m(density, rays, kind) for kind in ("nearest", "trilinear")}
    for key, result in results.items():
        cells = key.startswith("traversal") or VARIANTS[key].interpolation == "nearest"
        error = (torch.tensor(result.pop("range_m")).double() - twins["nearest" if cells else "trilinear"]).abs()
        result.update(twin="cells" if cells else "trilinear", error_mean_m=error.mean().item())
        result["error_p99_m"] = error.quantile(0.99).item()
    show(results, arguments.rays)
    ours, theirs, cells = results["traversal"], results["sampled"], results["sampled_cells"]
    rate = copy_rate_gb_s(arguments.threads)
    figures = [
        Figure("time per step", 1e3 * ours["seconds"], 1e3 * theirs["seconds"], "ms", "sampled 50 + 100"),
        Figure("speed-up", theirs["seconds"] / ours["seconds"], LEAST_SPEEDUP, "x", "goal, at least", True),
        Figure(
            "speed-up in CPU time",
            theirs["cpu_seconds"] / ours["cpu_seconds"],
            LEAST_SPEEDUP,
            "x",
            "same, however busy the machine",
            True,
        ),
        Figure("peak memory", ours["peak_mb"], theirs["peak_mb"], "MB", "sampled 50 + 100"),
        Figure("share of memory", ours["peak_mb"] / theirs["peak_mb"], MOST_MEMORY, "x", "goal, at most"),
        Figure("mean range error", 1e3 * ours["error_mean_m"], 1e3 * theirs["error_mean_m"], "mm", "sampled, own twin"),
        Figure("mean range error", 1e3 * ours["error_mean_m"], 1e3 * cells["error_mean_m"], "mm", "sampled, same twin"),
        Figure(
            "time per step",
            1e3 * ours["seconds"],
            1e3 * floor_seconds(ours["samples"], GRID, rate),
            "ms",
            f"memory-traffic floor at {rate:.1f} GB/s",
        ),
    ]
    details = {"rays": arguments.rays, "threads": arguments.threads, "copy_rate_gb_s": rate, "variants": results}
    details["field"] = name
    publish(f"rendering, forward and backward, {name}", figures, arguments.out / "rendering.json", details)
    return 0


def chosen_field(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, str]:
    """Density and logits to render, and what to call them."""
    if arguments.street:
        return *street(), "synthetic street"
    if arguments.field:
        return *load_field(arguments.field), str(arguments.field)
    bundle = arguments.bundle or share_path("demo", "bundle")
    return *model_field(bundle, arguments.bag or share_path("demo", "bag")), f"field of {bundle.name}"


def show(results: dict[str, dict], rays: int) -> None:
    """Print one row per variant."""
    table = Table(title=f"{rays} rays, 200 x 200 x 16 cells, density and 17 logits", title_justify="left")
    for heading in ("", "ms", "CPU ms", "peak MB", "samples", "error mm", "p99 mm", "twin"):
        table.add_column(heading, justify="left" if heading in ("", "twin") else "right")
    for result in results.values():
        table.add_row(
            result["name"],
            f"{1e3 * result['seconds']:.0f}",
            f"{1e3 * result['cpu_seconds']:.0f}",
            f"{result['peak_mb']:.0f}",
            f"{result['samples']:,}",
            f"{1e3 * result['error_mean_m']:.3f}",
            f"{1e3 * result['error_p99_m']:.2f}",
            result["twin"],
        )
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rendering", description=__doc__.splitlines()[0])
    parser.add_argument("--field", type=Path, help=".npz with density [16,200,200] in 1/m and logits [17,16,200,200]")
    parser.add_argument("--bundle", type=Path, help="model whose field to render (default: the demo model)")
    parser.add_argument("--bag", type=Path, help="bag whose first images it sees (default: the demo drive)")
    parser.add_argument("--street", action="store_true", help="render a synthetic street rather than a model's field")
    parser.add_argument("--rays", type=int, default=32_768, help="rays per step (default %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="steps of which the fastest counts (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for rendering.json")
    parser.add_argument("--measure", choices=sorted(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        if arguments.measure:
            print(
                json.dumps(
                    measure(arguments.measure, arguments.field, arguments.rays, arguments.repeats, arguments.threads)
                )
            )
            return 0
        return run(arguments)
    except OccflownetError as error:
        print(f"benchmarks.rendering: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
