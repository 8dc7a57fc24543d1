# SPDX-License-Identifier: Apache-2.0
"""Volume and surface rendering side by side: what fields learned through them know about held-out rays, time and memory.

Every method runs in a process of its own, twice over. *Memory and time*: one training step (render, all loss terms,
backward) on a lattice of 200 x 200 x 16 cells, density and 17 logits; the peak of resident memory over what the process
held before, and what autograd alone keeps for backward. *Accuracy*: a voxel field is fitted to four fifths of one
keyframe's LiDAR rays, from nothing, in the same number of steps of as many rays; the others say how far away things are.
A field's answer is its surface (f = 0.5 over a label voxel, for all methods), and for volumes also the median of where a
ray ends, which is theirs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.field_fitting import WindowSettings
from benchmarks.rendering import GRID, lidar_rays, load_field, resident_mb, street
from benchmarks.report import Figure, publish
from occflownet_core.errors import DatasetError, OccflownetError
from occflownet_core.grid import VoxelGrid
from occflownet_core.losses import LossConfig
from occflownet_core.motion import StaticWorld
from occflownet_core.point_losses import supervised_rays
from occflownet_core.renderer import Rays, RenderConfig, render
from occflownet_core.voxel_field import VoxelField
from training.data.nuscenes import KeyframeIndex
from training.data.rays import LidarRays, RayLimits, temporal_rays
from training.data.splits import only_version
from training.scene import median_range_m
from training.voxel_fitting import RECIPE, SURFACE_RECIPE, fit_voxels

MOST_MEMORY = 0.25
HELD_OUT = 0.2
WITHIN_M = (0.2, 0.4, 1.0)
SURFACE = RenderConfig(method="surface")


@dataclass(frozen=True)
class Method:
    """One way to render in training, and the losses that go with it."""

    name: str
    rendering: RenderConfig
    losses: LossConfig


METHODS = {
    "sampled": Method("sampled", RenderConfig(method="sampled"), RECIPE),
    "traversal": Method("traversal", RenderConfig(), RECIPE),
    "surface": Method("surface", replace(SURFACE, surface_first_steps=64), SURFACE_RECIPE),
    "points": Method(
        "points alone", replace(SURFACE, surface_steps=1), replace(SURFACE_RECIPE, range_weight=0, semantic_weight=0)
    ),
}


def training_step(field: VoxelField, rays: Rays, method: Method) -> None:
    """Render, compare, backward, the march at its finest."""
    field.density_lattice.grad = field.logits_lattice.grad = None
    generator = torch.Generator().manual_seed(0)
    terms = supervised_rays(field, rays, field.grid, StaticWorld(), method.losses, method.rendering.at(1.0), generator)
    torch.stack(list(terms.values())).sum().backward()


def stored_mb(field: VoxelField, rays: Rays, method: Method) -> float:
    """What autograd keeps for one step's backward, the field itself not counted, MB."""
    own = {v.untyped_storage().data_ptr() for v in (field.density_lattice, field.logits_lattice)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        training_step(field, rays, method)
    return sum(kept.values()) / 1e6


def measure_step(key: str, field_path: Path, count: int, repeats: int, threads: int) -> dict:
    """Time and memory of one method's training step; runs in a process of its own."""
    torch.set_num_threads(threads)
    method = METHODS[key]
    field = VoxelField(*(torch.from_numpy(a)[None].requires_grad_() for a in load_field(field_path)), GRID)
    rays = lidar_rays(count)
    training_step(field, rays[:64], method)  # loads what is loaded once
    field.density_lattice.grad = field.logits_lattice.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before_mb = resident_mb("VmRSS")
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        training_step(field, rays, method)
        seconds.append(time.process_time() - began)
    peak_mb = resident_mb("VmHWM") - before_mb
    return {"cpu_seconds": min(seconds), "peak_mb": peak_mb, "stored_mb": stored_mb(field, rays, method)}


def keyframe_rays(dataroot: Path, keyframe: int, grid: VoxelGrid) -> tuple[Rays, Rays]:
    """Rays of one keyframe: those to learn from, and those held out.

    Raises:
        DatasetError: there is no such keyframe, it has no LiDAR sweep, or a file is missing or damaged.
    """
    index = KeyframeIndex(dataroot, only_version(dataroot))
    if not 0 <= keyframe < len(index):
        raise DatasetError(f"{dataroot} has {len(index)} keyframes; --keyframe {keyframe} is none of them")
    frame = index[keyframe]
    rays = temporal_rays(
        {0: (frame, LidarRays(no_return=True).frame_rays(frame))}, RayLimits(grid, beyond_is_free=True)
    )
    held_out = torch.rand(len(rays), generator=torch.Generator().manual_seed(0)) < HELD_OUT
    return rays[~held_out], rays[held_out]


def measure_fit(key: str, dataroot: Path, keyframe: int, settings: WindowSettings, threads: int) -> dict:
    """What a field fitted through one method says about held-out rays; runs in a process of its own."""
    torch.set_num_threads(threads)
    method, grid = METHODS[key], settings.grid
    learned, held_out = keyframe_rays(dataroot, keyframe, grid)
    began = time.process_time()
    fitted = fit_voxels(learned, StaticWorld(), grid, settings, method.losses, method.rendering)
    cpu_seconds = time.process_time() - began
    with torch.no_grad():
        surface_m = render(fitted.field, held_out, grid, config=SURFACE).range_m
        median_m = median_range_m(render(fitted.field, held_out, grid), len(held_out))
    volume = method.rendering.method != "surface"
    return {
        "steps_per_cpu_second": settings.steps / cpu_seconds,
        "surface": range_errors(surface_m, held_out),
        "median": range_errors(median_m, held_out) if volume else None,
        "rays": len(learned),
        "held_out": len(held_out),
    }


def range_errors(range_m: Tensor, rays: Rays) -> dict[str, float]:
    """Errors of ranges [R]: of returns, misses counting as infinitely wrong; and how many rays without return hit."""
    error = (range_m - rays.range_m)[rays.returned].abs().numpy()
    quantiles = np.quantile(error, (0.5, 0.9), method="higher")
    return {
        "median_m": float(quantiles[0]),
        "p90_m": float(quantiles[1]),
        "within": [float((error <= limit).mean()) for limit in WITHIN_M],
        "missed": float(np.isinf(error).mean()),
        "hit_nothing": float(torch.isfinite(range_m[~rays.returned]).float().mean()),
    }


def run(arguments: argparse.Namespace) -> int:
    """All methods, one after the other; the table, and surface.json."""
    results: dict[str, dict] = {key: {} for key in METHODS}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "field.npz"
        density, logits = street()
        np.savez(path, density=density, logits=logits)
        common = [
            "--repeats",
            str(arguments.repeats),
            "--threads",
            str(arguments.threads),
            "--rays",
            str(arguments.rays),
        ]
        jobs = [(key, [*common, "--field", str(path)]) for key in METHODS if key != "points"]
        if arguments.dataroot:
            fit = ["--dataroot", str(arguments.dataroot), "--keyframe", str(arguments.keyframe)]
            jobs += [(key, [*common, *fit, "--steps", str(arguments.steps)]) for key in METHODS]
        for key, options in track(jobs, "volume and surface", transient=True):
            command = [sys.executable, "-m", "benchmarks.surface", "--measure", key, *options]
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode:
                raise OccflownetError(f"measuring '{METHODS[key].name}' failed: {finished.stderr.strip()[-300:]}")
            results[key] |= json.loads(finished.stdout)
    show(results)
    details = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "methods": results}
    publish("volume and surface rendering", figures(results), arguments.out / "surface.json", details)
    return 0


def figures(results: dict[str, dict]) -> list[Figure]:
    """Surface rendering against volumes: of a training step, and of fits where there are any."""
    ours, theirs, exact = (results[key] for key in ("surface", "sampled", "traversal"))
    found = [
        Figure("share of peak memory", ours["peak_mb"] / theirs["peak_mb"], MOST_MEMORY, "x", "goal, at most"),
        Figure("peak memory", ours["peak_mb"], theirs["peak_mb"], "MB", "volume, sampled"),
        Figure("peak memory", ours["peak_mb"], exact["peak_mb"], "MB", "volume, traversal"),
        Figure("kept for backward", ours["stored_mb"], theirs["stored_mb"], "MB", "volume, sampled"),
        Figure("CPU time per step", 1e3 * ours["cpu_seconds"], 1e3 * theirs["cpu_seconds"], "ms", "volume, sampled"),
        Figure("CPU time per step", 1e3 * ours["cpu_seconds"], 1e3 * exact["cpu_seconds"], "ms", "volume, traversal"),
    ]
    if "surface" not in ours:
        return found
    mine, median = ours["surface"], exact["median"]
    return [
        *found,
        Figure("median error", mine["median_m"], median["median_m"], "m", "traversal, its median"),
        Figure("within 0.4 m", mine["within"][1], median["within"][1], "", "the same", True),
    ]


def show(results: dict[str, dict]) -> None:
    """Print a table of steps, and one of what was learned where anything was."""
    steps = Table(title="a training step, 200 x 200 x 16 cells", title_justify="left")
    for heading in ("", "CPU ms", "steps / CPU s", "peak MB", "kept for backward MB"):
        steps.add_column(heading, justify="left" if not heading else "right")
    for key, result in results.items():
        if "peak_mb" in result:
            cells = (1e3 * result["cpu_seconds"], 1 / result["cpu_seconds"], result["peak_mb"], result["stored_mb"])
            steps.add_row(METHODS[key].name, *(f"{cell:,.0f}" if cell >= 100 else f"{cell:.3g}" for cell in cells))
    Console().print(steps)
    if any("surface" in result for result in results.values()):
        Console().print(_fits(results))


def _fits(results: dict[str, dict]) -> Table:
    learned = Table(title="fields fitted to one keyframe, asked about held-out rays", title_justify="left")
    headings = (
        "",
        "asked for",
        "median m",
        "p90 m",
        *(f"< {limit} m" for limit in WITHIN_M),
        "missed",
        "false",
        "steps/s",
    )
    for heading in headings:
        learned.add_column(heading, justify="left" if heading in ("", "asked for") else "right")
    for key, result in results.items():
        for asked in ("surface", "median"):
            if (errors := result[asked]) is not None:
                shares = (*errors["within"], errors["missed"], errors["hit_nothing"])
                learned.add_row(
                    METHODS[key].name,
                    asked,
                    *(f"{errors[name]:.2f}" for name in ("median_m", "p90_m")),
                    *(f"{100 * share:.0f} %" for share in shares),
                    f"{result['steps_per_cpu_second']:.1f}",
                )
    return learned


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.surface",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataroot",
        type=Path,
        help="data set in the nuScenes format, one of whose keyframes is fitted (default: only steps are measured)",
    )
    parser.add_argument("--keyframe", type=int, default=20, help="which one (default %(default)s)")
    parser.add_argument("--steps", type=int, default=96, help="of the fit, 4,096 rays each (default %(default)s)")
    parser.add_argument("--rays", type=int, default=32_768, help="of the measured step (default %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="steps of which the fastest counts (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for surface.json")
    parser.add_argument("--measure", choices=sorted(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--field", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        if not arguments.measure:
            return run(arguments)
        if arguments.field:
            result = measure_step(
                arguments.measure, arguments.field, arguments.rays, arguments.repeats, arguments.threads
            )
        else:
            settings = WindowSettings(steps=arguments.steps, rays_per_step=4096, current_share=None)
            result = measure_fit(arguments.measure, arguments.dataroot, arguments.keyframe, settings, arguments.threads)
        print(json.dumps(result))
        return 0
    except OccflownetError as error:
        print(f"benchmarks.surface: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
