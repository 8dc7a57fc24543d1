# SPDX-License-Identifier: Apache-2.0
"""Learning from images alone: how far off the LiDAR's returns are, before and after, and beside a flat ground.

LiDAR is the judge and never the teacher: returns of what does not move; a plane knows the ground of a flat town better than
any field, so what stands on it is counted for itself. A field's answer is the distance
within which half of a ray ends. *Logs*: one field per scene, fitted to its photographs. *Networks*: checkpoints of
training.fit, on keyframes of another root, beside the same network untrained; and by themselves the depths that their image
encoders give.

python -m benchmarks.photometric --dataroot data/a --scenes minicity-501-0000
python -m benchmarks.photometric --val-dataroot data/val --checkpoints out/photometric/last.ckpt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.report import machine
from occflownet_core.command_line import exit_status
from occflownet_core.errors import ConfigError
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.labels import CLASSES, FREE
from occflownet_core.lift_tables import DepthBins
from occflownet_core.model import OccFlowNet
from occflownet_core.motion import StillWorld
from occflownet_core.renderer import Rays, render
from occflownet_core.voxel_field import Field
from training.checkpoint import load_checkpoint
from training.data.batch import OccupancyBatch, collate
from training.data.dataset import NuScenesOccupancy
from training.data.nuscenes import KeyframeIndex
from training.data.rays import LidarRays
from training.data.splits import only_version
from training.image_scene import PIXELS_PER_STEP, ImageScene, fit_to_images, load_image_scene, still_lidar_rays
from training.module import OccupancyLearner
from training.scene import BOX_SCALE, median_range_m, predicted_range_m
from training.settings import TrainingConfig
from training.voxel_fitting import LOG_LEVELS, FitSettings

WITHIN_M = (0.4, 1.0, 2.0)
WITHIN_SHARE = (0.1, 0.2)
FLAT = [label for label, c in enumerate(CLASSES[:FREE]) if not c.blocks_vehicle]
STANDING_M = 0.5
_RAYS = 20_000

Judged = tuple[dict[str, np.ndarray], np.ndarray]
"""Errors [R] by how a field was learned, and True [R] for returns of what stands on the ground: more than ``STANDING_M`` above
the plane z = 0, or in images, which know no heights, of a class that is not ``FLAT``."""


def flat_ground_m(rays: Rays) -> np.ndarray:
    """Ranges [R] to the plane z = 0 of the frame that rays are in, which a vehicle stands on; infinite above the horizon.

    >>> down = np.array([[0.6, 0.0, -0.8], [0.6, 0.0, 0.8]])
    >>> flat_ground_m(Rays.from_numpy(np.array([[0.0, 0.0, 1.6]]), down, np.ones(2), 0)).tolist()
    [2.0, inf]
    """
    down = -rays.direction[:, 2].numpy()
    return np.where(down > 0, rays.origin_m[:, 2].numpy() / np.where(down > 0, down, 1.0), np.inf)


def errors_of(predicted_m: np.ndarray, rays: Rays) -> np.ndarray:
    """Absolute errors [R], metres; infinite for rays that are predicted to meet nothing."""
    return np.abs(predicted_m - rays.range_m.numpy())


def summary(error_m: np.ndarray) -> dict:
    """What a table shows of absolute errors [R]."""
    median_m, most_m = (float(np.percentile(error_m, p, method="lower")) for p in (50, 90))
    return {
        "rays": len(error_m),
        "median_m": median_m if np.isfinite(median_m) else None,
        "p90_m": most_m if np.isfinite(most_m) else None,
        **{f"within_{limit_m:g}m": float((error_m <= limit_m).mean()) for limit_m in WITHIN_M},
        "missed": float(np.isinf(error_m).mean()),
    }


def standing(rays: Rays) -> np.ndarray:
    """True [R] for returns of what stands on the ground."""
    return (rays.end_m[:, 2] > STANDING_M).numpy()


def of_log(images: ImageScene, steps: int, seed: int) -> Judged:
    """Errors of one log's field, before and after it learned from the images."""
    generator = torch.Generator().manual_seed(seed)
    rays = still_lidar_rays(images)
    rays = rays[rays.returned].sample(_RAYS, generator)
    settings = FitSettings(steps, PIXELS_PER_STEP, current_share=None, seed=seed, **LOG_LEVELS)
    errors = {"flat ground": errors_of(flat_ground_m(rays), rays)}
    for name, fit_settings in (
        ("before", replace(settings, steps=1, density_rate=0.0)),
        ("after", settings),
    ):
        fitted = fit_to_images(images, fit_settings)
        errors[name] = errors_of(predicted_range_m(images.scene, fitted, rays), rays)
    return errors, standing(rays)


def of_networks(
    config: TrainingConfig, models: dict[str, OccFlowNet], dataroot: Path, keyframes: int, console: Console
) -> tuple[Judged, Judged]:
    """Errors by network, over keyframes of a root that none of them saw: of its field, and of its image encoder's depths."""
    learners = {name: OccupancyLearner(config, model).eval() for name, model in models.items()}
    parts: list[Judged] = []
    depths: list[Judged] = []
    data = _windows(config, next(iter(models.values())), dataroot, keyframes)
    for window in track(data, "keyframes", console=console, transient=True, total=keyframes):
        rays = _judges(window[-1])
        errors, depth_errors = {"flat ground": errors_of(flat_ground_m(rays), rays)}, {}
        for name, learner in learners.items():
            with torch.no_grad():
                output = learner(window)
                errors[name] = errors_of(median_m(output.field, rays, config.model.grid), rays)
            depth_errors[name] = depth_errors_of(output.seen.depth_logits, window[-1], config.model.depth.bins)
        parts.append((errors, standing(rays)))
        depths.append((depth_errors, ~np.isin(window[-1].depth_label[window[-1].depth_m > 0], FLAT)))
    return joined(parts), joined(depths)


def depth_errors_of(logits: Tensor, batch: OccupancyBatch, bins: DepthBins) -> np.ndarray:
    """By what share [n] of the depth the likeliest bin is off, in each cell of the feature maps that has a LiDAR return.

    Args:
        logits: [B, N, D, h, w].
        batch: with its depth images.
        bins: D of them.
    """
    known = batch.depth_m > 0
    found_m = bins.min_m + (logits.argmax(dim=2)[known] + 0.5) * bins.step_m
    return ((found_m - batch.depth_m[known]).abs() / batch.depth_m[known]).numpy()


def joined(parts: list[Judged]) -> Judged:
    """All parts' returns together."""
    errors = {row: np.concatenate([part[row] for part, _ in parts]) for row in parts[0][0]}
    return errors, np.concatenate([up for _, up in parts])


def median_m(field: Field, rays: Rays, grid: VoxelGrid) -> np.ndarray:
    """Where half of each ray [R] ends."""
    return median_range_m(render(field, rays, grid), len(rays)).numpy()


def _windows(
    config: TrainingConfig, model: OccFlowNet, dataroot: Path, keyframes: int
) -> Iterator[list[OccupancyBatch]]:
    network = config.model
    dataset = NuScenesOccupancy(
        KeyframeIndex(dataroot, only_version(dataroot), cameras=network.cameras),
        network.image_width_px,
        network.image_height_px,
        model.lift_spec,
        grid=network.grid,
        rays=LidarRays("lidarseg"),
        horizon=1,
        boxes=True,
        depth=True,
        window=config.window,
    )
    for i in np.linspace(0, len(dataset) - 1, keyframes).round().astype(int).tolist():
        yield collate([dataset[i]])


def _judges(batch: OccupancyBatch) -> Rays:
    """The current keyframe's returns of what stands still."""
    rays = batch.rays[(batch.rays.time_index == 0) & batch.rays.returned]
    return rays[StillWorld(batch.boxes, BOX_SCALE).keeps(rays, OCC3D_GRID)].sample(
        _RAYS, torch.Generator().manual_seed(0)
    )


def summaries(judged: Judged) -> dict[str, dict]:
    """By how a field was learned: all returns, and those of what stands up."""
    errors, up = judged
    return {row: {**summary(error_m), "standing": summary(error_m[up])} for row, error_m in errors.items()}


def print_tables(title: str, found: dict[str, dict], console: Console) -> None:
    """Rows by how a field was learned; one table for all returns, one for those of what stands up."""
    headings = ("", "median m", *(f"< {limit_m:g} m %" for limit_m in WITHIN_M), "missed %")
    for which, part in ("all returns", None), (f"more than {STANDING_M:g} m up", "standing"):
        table = Table(title=f"{title}, {which}", title_justify="left")
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left")
        for name, s in found.items():
            table.add_row(name, *_cells(s[part] if part else s))
        console.print(table)


def print_depths(depths: dict[str, dict], console: Console) -> None:
    """How many of the encoder's likeliest depths are right, by network."""
    table = Table(title="image encoder: % of likeliest depths right to 10 and 20 %")
    table.add_column("")
    for part in ("ground", "stands"):
        for share in WITHIN_SHARE:
            table.add_column(f"{part} {100 * share:g} %", justify="right")
    for name, parts in depths.items():
        table.add_row(name, *(f"{100 * right:.1f}" for right in (*parts["ground"], *parts["standing"])))
    console.print(table)


def depth_summaries(judged: Judged) -> dict[str, dict[str, list[float]]]:
    """Shares of depths that are right to ``WITHIN_SHARE``, by network."""
    errors, up = judged
    return {
        row: {
            part: [float((error[which] <= share).mean()) for share in WITHIN_SHARE]
            for part, which in (("ground", ~up), ("standing", up))
        }
        for row, error in errors.items()
    }


def _cells(s: dict) -> list[str]:
    shares = (f"{100 * s[key]:.1f}" for key in (*(f"within_{limit_m:g}m" for limit_m in WITHIN_M), "missed"))
    return ["-" if s["median_m"] is None else f"{s['median_m']:.2f}", *shares]


def run_names(checkpoints: list[Path]) -> list[str]:
    """What to call each: the run's folder, and the file too where a folder has several.

    Raises:
        ConfigError: one is given twice, or two cannot be told apart.
    """
    folders = [path.parent.name for path in checkpoints]
    names = [
        folder if folders.count(folder) == 1 else f"{folder}/{path.stem}"
        for folder, path in zip(folders, checkpoints, strict=True)
    ]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"--checkpoints names {twice[0]} twice; give each checkpoint once, of folders of different names"
        )
    return names


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure, print and write ``photometric.json``."""
    if not options.dataroot and not options.checkpoints:
        raise ConfigError("nothing to measure; give --dataroot (logs), or --val-dataroot and --checkpoints (networks)")
    if options.checkpoints and not options.val_dataroot:
        raise ConfigError("--checkpoints are judged on another root; give --val-dataroot")
    if options.threads:
        torch.set_num_threads(options.threads)
    report: dict[str, object] = {"machine": machine(), "torch": torch.__version__, "steps": options.steps}
    if options.dataroot:
        index = KeyframeIndex(options.dataroot, only_version(options.dataroot), scenes=options.scenes)
        logs = [
            of_log(load_image_scene(index, name), options.steps, options.seed)
            for name in track(list(index.scenes), "logs", console=console, transient=True)
        ]
        report["scenes"], report["logs"] = list(index.scenes), summaries(joined(logs))
        print_tables(f"fields of {len(logs)} logs", report["logs"], console)
    if options.checkpoints:
        checkpoints = [load_checkpoint(path) for path in options.checkpoints]
        config = checkpoints[0].training_config
        torch.manual_seed(options.seed)
        models = {"untrained": OccFlowNet(config.model.without_download()).eval()}
        models |= {name: c.model() for name, c in zip(run_names(options.checkpoints), checkpoints, strict=True)}
        fields, depths = of_networks(config, models, options.val_dataroot, options.keyframes, console)
        report["networks"], report["encoder_depths"] = summaries(fields), depth_summaries(depths)
        print_tables(f"networks on {options.keyframes} keyframes", report["networks"], console)
        print_depths(report["encoder_depths"], console)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "photometric.json").write_text(json.dumps(report, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photometric",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataroot", type=Path, metavar="DIR", help="root whose logs to fit")
    parser.add_argument("--scenes", nargs="+", metavar="NAME", help="of them (default: all)")
    parser.add_argument("--steps", type=int, default=100, help="of each fit (default %(default)s)")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="networks, all alike; the first one says of which keyframes",
    )
    parser.add_argument("--val-dataroot", type=Path, metavar="DIR", help="root to judge networks on")
    parser.add_argument("--keyframes", type=int, default=12, help="of it (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON (default: out/bench)")
    options = parser.parse_args(arguments)
    return exit_status("benchmarks.photometric", lambda: run(options, Console()))


if __name__ == "__main__":
    sys.exit(main())
