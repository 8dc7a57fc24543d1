# SPDX-License-Identifier: Apache-2.0
"""Fit one field per log to all its LiDAR sweeps, or to its images alone, and write what it says about every keyframe as
Occ3D labels.

python -m training.fit_scene --dataroot data/a --out data/a/gts_fitted
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from occflownet_core.boxes import MovingBoxes
from occflownet_core.command_line import exit_status
from occflownet_core.errors import ConfigError
from occflownet_core.evaluation import OccupancyEvaluation
from occflownet_core.grid import OCC3D_GRID
from occflownet_core.losses import LossConfig
from occflownet_core.picture import save_png
from occflownet_core.renderer import Rays
from training.data.nuscenes import Keyframe, KeyframeIndex, load_occupancy
from training.data.rays import SweepRays
from training.data.splits import only_version
from training.evaluation_report import comparison_picture
from training.image_scene import PIXELS_PER_STEP, fit_to_images, load_image_scene, still_lidar_rays
from training.scene import Scene, keyframe_labels, load_scene, predicted_range_m
from training.scene_mesh import add_mesh_options, check_mesh_options, write_drive
from training.scene_picture import scene_picture
from training.voxel_fitting import LOG_LEVELS, RECIPE, FitSettings, FittedVoxels, fit_voxels

WITHIN_M = (0.2, 0.4, 1.0)
_USUAL_STEPS, _USUAL_RAYS = {"lidar": 60, "images": 100}, {"lidar": 16384, "images": PIXELS_PER_STEP}
_TEST_RAYS = 100_000
_HELP_END = """
what it writes into OUT
  <scene>/<keyframe>/labels.npz   semantics, mask_camera, mask_lidar as Occ3D has them; the masks say where any ray of the
                                  log told something. With OUT inside the root, e.g. data/a/gts_fitted, a network
                                  learns from them: training.fit ... --supervision.kind 3d --data.labels_folder gts_fitted
  <scene>/drive.npz               the whole drive without what moves: semantics, seen [X, Y, Z], origin_m, voxel_size_m,
                                  scene_from_global [4, 4]; its frame is the ego frame of the first keyframe
  <scene>/drive.glb               the whole drive as a mesh in nuScenes' colours, moving objects where they are at one
                                  keyframe; *.glb stands upright as glTF has it (y up), *.ply is in the frame of drive.npz
  <scene>/fit.json                settings, losses, ranges of held-out rays, IoU where the root has ground truth
  <scene>/*_field.png             a keyframe's photographs beside the ranges that its cameras see in the field, and voxels
  <scene>/*.png                   fitted, true and different voxels (where there is ground truth)

Without lidarseg or panoptic labels (--labels none) only what is occupied is found, not of which class.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return exit_status("fit_scene", lambda: _run(options, Console()))


def _run(options: argparse.Namespace, console: Console) -> None:
    _check(options)
    version = options.version or only_version(options.dataroot)
    index = KeyframeIndex(options.dataroot, version, scenes=options.scenes)
    check_mesh_options(options, min(map(len, index.scenes.values())))
    for name in index.scenes:
        print_report(fit_one(index, name, options, console), console)


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.hold_out < 1:
        raise ConfigError(f"--hold-out is {options.hold_out:g}; give a share from 0 up to, but not including, 1")
    if not 0 < options.threshold < 1:
        raise ConfigError(f"--threshold is {options.threshold:g}; give a probability between 0 and 1")
    if options.source == "images" and (options.labels or options.hold_out):
        raise ConfigError(
            "--labels and --hold-out are about LiDAR points, which --from images does not learn from; leave them out"
        )
    if options.image_width < 16:
        raise ConfigError(f"--image-width is {options.image_width}; give at least 16 pixels")
    if options.threads:
        torch.set_num_threads(options.threads)


def fit_one(index: KeyframeIndex, name: str, options: argparse.Namespace, console: Console) -> dict:
    """Fit a scene, write its labels and its report; the report."""
    folder = options.out / name
    folder.mkdir(parents=True, exist_ok=True)
    started_s = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        fit = (_from_images if options.source == "images" else _from_lidar)(index, name, options, progress)
        scene, fitted = fit.scene, fit.fitted
        report = {
            "scene": name,
            "from": options.source,
            "labels": fit.labels,
            "keyframes": len(scene.keyframes),
            "voxel_size_m": options.voxel_size,
            "cells": scene.grid.size,
            "moving_objects": len(fit.moving.ego_from_box_now[:, :2, 3].unique(dim=0)) if len(fit.moving) else 0,
            "steps": _steps(options),
            "terms": fitted.terms,
            "threshold": options.threshold,
            "ranges": range_scores(scene, fitted, fit.unseen) if len(fit.unseen) else None,
            **_write_labels(scene, fitted, fit.labels != "none", options, folder, progress),
            **write_drive(scene, fitted, options, folder),
        }
    report["seconds"] = round(time.perf_counter() - started_s, 1)
    (folder / "fit.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def known_labels(keyframes: Sequence[Keyframe]) -> str:
    """The kind of point labels that all keyframes have; lidarseg before panoptic, ``none`` where there are none."""
    for kind in ("lidarseg", "panoptic"):
        if all(getattr(keyframe, f"{kind}_path") is not None for keyframe in keyframes):
            return kind
    return "none"


@dataclass(frozen=True, eq=False)
class _Fit:
    """What came of a fit.

    Attributes:
        scene, fitted: frame and field.
        moving: boxes of what was taken out.
        labels: kind of point labels that it learned from.
        unseen: LiDAR rays that it never saw.
    """

    scene: Scene
    fitted: FittedVoxels
    moving: MovingBoxes
    labels: str
    unseen: Rays


def _from_lidar(index: KeyframeIndex, name: str, options: argparse.Namespace, progress: Progress) -> _Fit:
    labels = options.labels or known_labels([index[i] for i in index.scenes[name]])
    reading = progress.add_task(f"{name}: reading sweeps", total=len(index.scenes[name]), note="")
    scene = load_scene(index, name, SweepRays(labels), options.voxel_size, lambda: progress.advance(reading))
    generator = torch.Generator().manual_seed(options.seed)
    held_out = torch.rand(len(scene.rays), generator=generator) < options.hold_out
    motion, rays = scene.motion, scene.rays[~held_out]
    rays = rays[motion.keeps(rays, scene.grid)]
    on_step = _step_reporter(progress, options)
    fitted = fit_voxels(rays, motion, scene.grid, _settings(options), losses_for(labels), on_step=on_step)
    unseen = scene.rays[held_out]
    return _Fit(scene, fitted, scene.boxes, labels, unseen[motion.keeps(unseen, scene.grid)])


def _from_images(index: KeyframeIndex, name: str, options: argparse.Namespace, progress: Progress) -> _Fit:
    reading = progress.add_task(f"{name}: reading images", total=len(index.scenes[name]), note="")
    images = load_image_scene(
        index, name, options.image_width, options.voxel_size, on_keyframe=lambda: progress.advance(reading)
    )
    fitted = fit_to_images(images, _settings(options), on_step=_step_reporter(progress, options))
    generator = torch.Generator().manual_seed(options.seed)
    unseen = still_lidar_rays(images).sample(_TEST_RAYS, generator)
    return _Fit(images.scene, fitted, images.moving, "none", unseen)


def _settings(options: argparse.Namespace) -> FitSettings:
    return FitSettings(
        _steps(options),
        _rays_per_step(options),
        current_share=None,
        forgetting=options.forgetting,
        seed=options.seed,
        **LOG_LEVELS,
    )


def _steps(options: argparse.Namespace) -> int:
    return options.steps or _USUAL_STEPS[options.source]


def _rays_per_step(options: argparse.Namespace) -> int:
    return options.rays_per_step or _USUAL_RAYS[options.source]


def _step_reporter(progress: Progress, options: argparse.Namespace) -> Callable[[dict[str, torch.Tensor]], None]:
    """What shows a fit's steps and terms."""
    fitting = progress.add_task("fitting", total=_steps(options), note="")

    def on_step(terms: dict[str, torch.Tensor]) -> None:
        progress.update(fitting, advance=1, note="  ".join(f"{name} {term.item():.3f}" for name, term in terms.items()))

    return on_step


def losses_for(labels: str) -> LossConfig:
    """What rays are compared with: without classes only where they end."""
    return RECIPE if labels != "none" else replace(RECIPE, semantic_weight=0.0, class_weighted=False)


def range_scores(scene: Scene, fitted: FittedVoxels, rays: Rays) -> dict:
    """How well rays that the fit never saw are told: those with a return in metres, those without by how many pass.

    Args:
        scene: that was fitted.
        fitted: to some of its rays.
        rays: others.
    """
    predicted_m, returned = predicted_range_m(scene, fitted, rays), rays.returned.numpy()
    error_m = np.abs(predicted_m[returned] - rays.range_m.numpy()[returned])
    return {
        "rays": int(returned.sum()),
        "median_m": _finite(np.percentile(error_m, 50, method="lower")),
        "p90_m": _finite(np.percentile(error_m, 90, method="lower")),
        **{f"within_{limit_m:g}m": float((error_m <= limit_m).mean()) for limit_m in WITHIN_M},
        "never_ending": float(np.isinf(predicted_m[returned]).mean()),
        "rays_without_return": int((~returned).sum()),
        "passing": float(np.isinf(predicted_m[~returned]).mean()) if (~returned).any() else None,
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _write_labels(
    scene: Scene,
    fitted: FittedVoxels,
    labels_known: bool,
    options: argparse.Namespace,
    folder: Path,
    progress: Progress,
) -> dict:
    """Labels of every keyframe; and, where the root has ground truth, how they compare with it."""
    writing = progress.add_task("writing labels", total=len(scene.keyframes), note="")
    evaluation, truths = OccupancyEvaluation(OCC3D_GRID), 0
    drawn = set(np.linspace(0, len(scene.keyframes) - 1, options.pictures).round().astype(int).tolist())
    for k, keyframe in enumerate(scene.keyframes):
        found = keyframe_labels(scene, fitted, k)
        labels = found.labels_at(options.threshold)
        target = folder / keyframe.token
        target.mkdir(exist_ok=True)
        np.savez_compressed(target / "labels.npz", semantics=labels, mask_camera=found.seen, mask_lidar=found.seen)
        if keyframe.occupancy_path.is_file():
            truth, camera_mask, _ = load_occupancy(keyframe, OCC3D_GRID)
            evaluation.add(labels, truth, camera_mask)
            truths += 1
            if k in drawn:
                comparison_picture(labels, truth, camera_mask, OCC3D_GRID, keyframe, folder)
        if k in drawn:
            picture = scene_picture(scene, fitted, k, found, options.threshold, labels_known)
            save_png(str(folder / f"{keyframe.token}_field.png"), picture)
        progress.advance(writing)
    return {"against_truth": evaluation.to_dict() if truths else None}


def print_report(report: dict, console: Console) -> None:
    """What came of the fit, as tables."""
    console.print(
        f"{report['scene']}: {report['keyframes']} keyframes, {report['cells'] / 1e6:.1f} million cells of "
        f"{report['voxel_size_m']:g} m, {report['moving_objects']} moving objects, {report['seconds']:.0f} s",
        highlight=False,
    )
    if ranges := report["ranges"]:
        table = Table("rays that the fit never saw", "", title_justify="left")
        table.add_row("with return", str(ranges["rays"]))
        for name, key in (("median error", "median_m"), ("90 % below", "p90_m")):
            table.add_row(name, "-" if ranges[key] is None else f"{ranges[key]:.3f} m")
        for limit_m in WITHIN_M:
            table.add_row(f"within {limit_m:g} m", f"{100 * ranges[f'within_{limit_m:g}m']:.1f} %")
        table.add_row("predicted to meet nothing", f"{100 * ranges['never_ending']:.1f} %")
        if ranges["passing"] is not None:
            table.add_row("without return, rightly passing", f"{100 * ranges['passing']:.1f} %")
        console.print(table)
    if scores := report["against_truth"]:
        table = Table("labels against ground truth, %", "camera mask", "no mask", title_justify="left")
        by_class = (("mIoU, 17 classes", "miou_17"), ("mIoU, dynamic", "dynamic_miou"), ("mIoU, static", "static_miou"))
        for name, key in (*(by_class if report["labels"] != "none" else ()), ("occupied or free", "geometric_iou")):
            values = (scores[part][key] for part in ("camera_mask", "no_mask"))
            table.add_row(name, *("-" if value is None else f"{100 * value:.1f}" for value in values))
        console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.fit_scene",
        description="Fit one occupancy field per log to all its LiDAR sweeps, or to its images alone, moving objects taken out "
        "by their boxes, and write its voxels at every keyframe: labels for training, made without any 3D label.",
        epilog=_HELP_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataroot", type=Path, required=True, metavar="DIR", help="root in nuScenes' format")
    parser.add_argument("--version", help="its folder of tables, e.g. v1.0-trainval (default: the only one there is)")
    parser.add_argument(
        "--scenes", nargs="+", metavar="NAME", help="names of the logs' scenes (default: all of the root)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for labels and report")
    parser.add_argument(
        "--labels",
        choices=("lidarseg", "panoptic", "none"),
        help="classes of LiDAR points (default: what the root has)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=("lidar", "images"),
        default="lidar",
        help="what the field must explain: LiDAR returns, or the photographs alone (default %(default)s). From images "
        "it learns shapes without classes, of what stands still; LiDAR, where there is any, only tests it",
    )
    parser.add_argument(
        "--image-width",
        type=int,
        default=480,
        metavar="PX",
        help="of the images that are compared (default %(default)s)",
    )
    parser.add_argument("--voxel-size", type=float, default=0.4, metavar="M", help="of the fit (default 0.4 m)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default 60, from images 100)")
    parser.add_argument("--rays-per-step", type=int, metavar="N", help="default 16384, from images 4096")
    parser.add_argument("--forgetting", type=float, default=0.1, help="weight decay of the density (default 0.1)")
    parser.add_argument(
        "--hold-out", type=float, default=0.0, metavar="SHARE", help="of the rays, kept from the fit to test it (0)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.05,
        help="probability above which a voxel is occupied (default 0.05: voxels that a beam met once are not opaque)",
    )
    parser.add_argument("--pictures", type=int, default=2, metavar="N", help="number of keyframes to draw (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of drawn and held-out rays (default 0)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    add_mesh_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
