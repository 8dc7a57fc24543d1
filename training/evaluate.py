# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model bundle or a checkpoint on labelled keyframes: table, JSON, pictures.

python -m training.evaluate --bundle models/demo --dataroot data/minicity --out eval.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import track

from occflownet_core import poses
from occflownet_core.errors import DatasetError, OccflownetError
from occflownet_core.evaluation import OccupancyEvaluation, voxel_scores_to_dict
from occflownet_core.labels import labels_above
from occflownet_core.metrics import ThresholdSweep, VoxelScores
from occflownet_core.ray_metrics import ray_origins_m
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_core.runtime.engine import Engine
from occflownet_core.runtime.factory import BACKENDS, create_engine
from training.data.augment import ImageWarp
from training.data.nuscenes import KeyframeIndex, load_occupancy
from training.data.splits import ALL, only_version
from training.data.views import load_image
from training.evaluation_report import comparison_picture, print_report

SWEEP = tuple(np.round(np.arange(0.05, 0.96, 0.05), 2))

Reference = Literal["lidar", "anchor"]


@dataclass(frozen=True, eq=False)
class KeyframeResult:
    """What the engine said about one keyframe.

    Attributes:
        keyframe: its place in the index.
        label: uint8 [X, Y, Z], the class that a voxel has if it is occupied; FREE where the graph gives no
            probability and found nothing.
        probability: float32 [X, Y, Z] of being occupied, or None.
        engine_ms: time of the inference.
    """

    keyframe: int
    label: np.ndarray
    probability: np.ndarray | None
    engine_ms: float

    def labels_at(self, threshold: float) -> np.ndarray:
        """uint8 [X, Y, Z], occupied where the probability is above the threshold, as the graph itself decides."""
        if self.probability is None:
            return self.label
        return labels_above(threshold, self.probability, self.label)


def run_keyframes(engine: Engine, index: KeyframeIndex, reference: Reference = "lidar") -> Iterator[KeyframeResult]:
    """Run the engine over every keyframe, scene after scene, its memory carried along within a scene.

    Args:
        engine: its bundle's cameras must be the index's; its threshold is set to 0 where the graph gives
            probabilities, so that any threshold can be applied afterwards.
        index: keyframes.
        reference: ``lidar`` gives each camera the pose that it had at the LiDAR's stamp, for which the labels hold.
            ``anchor`` does what a vehicle does: bare extrinsics, ego motion between the anchor camera's stamps.

    Raises:
        DatasetError: an image is missing or damaged.
    """
    if "occupancy_probability" in engine.bundle.outputs:
        engine.occupancy_threshold = 0.0
    calibrated = None
    for scene in index.scenes.values():
        previous = None
        for i in scene:
            keyframe = index[i]
            rig = keyframe.rig(at_reference=reference == "lidar")
            if rig != calibrated:
                engine.calibrate(rig)
                calibrated = rig
            warps = [ImageWarp(engine.bundle.image_transform(c.width_px, c.height_px)) for c in rig]
            images = np.stack([load_image(keyframe, c, warp) for c, warp in enumerate(warps)])
            pose = keyframe.global_from_ego if reference == "lidar" else keyframe.anchor.global_from_ego
            motion = None if previous is None else poses.inverse(previous) @ pose
            previous = pose
            started = time.perf_counter()
            prediction = engine.infer(images, motion)
            engine_ms = (time.perf_counter() - started) * 1e3
            yield KeyframeResult(i, prediction.labels, prediction.probability, engine_ms)


def scene_ray_origins_m(index: KeyframeIndex, i: int) -> np.ndarray | None:
    """RayIoU's origins for keyframe ``i``, or None where its scene has no LiDAR sweeps."""
    sweeps = [index[j].lidar for j in index.scenes[index[i].scene]]
    if any(sweep is None for sweep in sweeps):
        return None
    return ray_origins_m(np.stack([s.global_from_sensor for s in sweeps]), index[i].global_from_ego)


def evaluate(
    engine: Engine,
    index: KeyframeIndex,
    threshold: float,
    reference: Reference = "lidar",
    pictures: Path | None = None,
    picture_count: int = 4,
    console: Console | None = None,
) -> dict:
    """All scores of an engine on an index, as plain values.

    Args:
        engine: calibrated and reset by this function.
        index: keyframes with Occ3D labels.
        threshold: a voxel is occupied where its probability is above it.
        reference: see ``run_keyframes``.
        pictures: folder for pictures of prediction, truth and difference, or None.
        picture_count: how many, evenly spread over the keyframes.
        console: for the progress bar.

    Raises:
        DatasetError: a label file or an image is missing or damaged.
    """
    grid = engine.bundle.grid
    scores, sweep = OccupancyEvaluation(grid), ThresholdSweep(SWEEP)
    drawn = set(np.linspace(0, len(index) - 1, min(picture_count, len(index))).round().astype(int).tolist())
    times_ms, has_probability = [], False
    results = run_keyframes(engine, index, reference)
    for result in track(results, "keyframes", total=len(index), console=console, disable=console is None):
        keyframe, labels = index[result.keyframe], result.labels_at(threshold)
        truth, camera_mask, _ = load_occupancy(keyframe, grid)
        scores.add(labels, truth, camera_mask, scene_ray_origins_m(index, result.keyframe))
        if result.probability is not None:
            has_probability = True
            sweep.add(result.probability, result.label, truth, camera_mask)
        if pictures is not None and result.keyframe in drawn:
            comparison_picture(labels, truth, camera_mask, grid, keyframe, pictures)
        times_ms.append(result.engine_ms)
    return {
        **scores.to_dict(),
        "threshold_sweep": sweep_to_list(sweep) if has_probability else [],
        "engine_ms_median": float(np.median(times_ms)),
    }


def sweep_to_list(sweep: ThresholdSweep) -> list[dict]:
    """One row per threshold, with the camera mask, without the classes."""
    rows = []
    for threshold, confusion in zip(sweep.thresholds, sweep.confusion_matrices(), strict=True):
        scores = voxel_scores_to_dict(VoxelScores.of(confusion))
        rows.append({"threshold": round(float(threshold), 4), **{k: v for k, v in scores.items() if k != "iou"}})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        report = _run(options, console)
    except OccflownetError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print_report(report, console)
    return 0


def _run(options: argparse.Namespace, console: Console) -> dict:
    _require_writable(options.out)
    with _bundle(options, console) as bundle:
        version = options.version or only_version(options.dataroot)
        with console.status("reading tables"):
            index = KeyframeIndex(options.dataroot, version, options.split, options.scenes, bundle.cameras)
        if options.keyframes is not None:
            index = index.first(options.keyframes)
        engine = create_engine(bundle, options.backend, options.threads)
        threshold = bundle.occupancy_threshold if options.threshold is None else options.threshold
        if not 0 <= threshold <= 1 or ("occupancy_probability" not in bundle.outputs and options.threshold is not None):
            raise DatasetError(
                f"--threshold is {threshold}; give a probability from 0 to 1, for a bundle that gives probabilities"
            )
        pictures = options.out.with_suffix("") if options.pictures else None
        scores = evaluate(engine, index, threshold, options.reference, pictures, options.pictures, console)
    report = {
        "model": {"name": bundle.name, "source": str(options.bundle or options.checkpoint), "backend": engine.name},
        "data": {
            "dataroot": options.dataroot.resolve().name,
            "version": version,
            "split": index.split,
            "scenes": len(index.scenes),
        },
        "settings": {
            "trained_with_camera_mask": bundle.provenance.get("trained_with_camera_mask"),
            "evaluated_with_camera_mask": "both: see camera_mask and no_mask",
            "classes": "both: miou_17 is Occ3D's, miou_15 leaves out others and other_flat",
            "occupancy_threshold": threshold,
            "threshold_source": "bundle" if options.threshold is None else "command line",
            "reference": options.reference,
        },
        **scores,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


@contextmanager
def _bundle(options: argparse.Namespace, console: Console) -> Iterator[Bundle]:
    """The bundle to run; a checkpoint is exported first, so that what is measured is what would be shipped."""
    if options.bundle is not None:
        yield load_bundle(options.bundle)
        return
    from training.checkpoint import load_checkpoint
    from training.export import export

    checkpoint = load_checkpoint(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        with console.status("exporting the checkpoint"):
            bundle, _ = export(checkpoint.model(), Path(folder) / "bundle", checkpoint.provenance, with_weights=True)
        yield bundle


def _require_writable(out: Path) -> None:
    """Refuse before hours of work rather than after them."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a"):
            pass
    except OSError as error:
        raise DatasetError(f"--out {out} cannot be written ({error.strerror}); choose another file") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Run a model over labelled keyframes, scene by scene, and measure it: IoU per class with and "
        "without the camera mask, geometric IoU, RayIoU, dynamic and static means, and a sweep of thresholds.",
        epilog="Example: python -m training.evaluate --bundle models/demo --dataroot data/nuscenes "
        "--version v1.0-trainval --split val --out out/eval.json. Pictures go to a folder beside the JSON file.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--bundle", type=Path, metavar="DIR", help="a model bundle")
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint of training.fit")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataroot", type=Path, required=True, metavar="DIR", help="root in nuScenes' format, with Occ3D's gts/"
    )
    data.add_argument("--version", help="its folder of tables, e.g. v1.0-trainval (default: the only one there is)")
    data.add_argument(
        "--split",
        default=ALL,
        help=f"{ALL} (default), a name in the root's splits.json, or one of nuScenes' own: val, mini_val, ...",
    )
    data.add_argument("--scenes", nargs="+", metavar="NAME", help="scenes instead of a split")
    data.add_argument("--keyframes", type=int, metavar="N", help="only the first N keyframes of each scene")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="number of pictures, spread over all keyframes (default 4)"
    )
    parser.add_argument(
        "--threshold", type=float, help="probability above which a voxel is occupied (default: the model's own)"
    )
    parser.add_argument(
        "--reference",
        choices=("lidar", "anchor"),
        default="lidar",
        help="lidar (default): cameras are placed where they were at the LiDAR's stamp, for which the labels hold; "
        "anchor: as on a vehicle, bare extrinsics and the front camera's stamp, about 35 ms earlier",
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="engine (default auto)")
    parser.add_argument("--threads", type=int, help="CPU threads of the engine (default: all cores)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
