# SPDX-License-Identifier: Apache-2.0
"""What does each idea of learning from 2D labels buy? Field fitting: `python -m benchmarks.supervision --dataroot DIR`.

The other instrument, networks trained from end to end, is `python -m benchmarks.network_training`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.field_fitting import (
    ROWS,
    THRESHOLDS,
    FittedVoxels,
    Row,
    Truth,
    Window,
    WindowSettings,
    busiest_keyframes,
    confusion_matrices,
    fit,
    load_truth,
    load_window,
)
from benchmarks.paired_tables import Scores, TextTable, difference_table, mean_table, publish
from occflownet_core.errors import ConfigError, OccflownetError
from occflownet_core.metrics import DYNAMIC_CLASSES, STATIC_CLASSES, VoxelScores
from training.data.nuscenes import Keyframe, KeyframeIndex
from training.data.splits import only_version
from training.evaluation_report import comparison_picture

MEASURES = {
    "miou": "mIoU",
    "geometric": "geometric",
    "static": "static",
    "dynamic": "dynamic",
    "dynamic_occupied": "dynamic as one",
    "moving": "where things moved",
}
LADDER = ("single", "static", "filter", "flow")
GROUPS = {
    "Moving things": (*LADDER, "flow_own_class"),
    "Horizon": ("single", "horizon_1", "horizon_2", "flow", "horizon_4"),
    "Rendering": ("flow", "camera_z", "dropped", "sigmoid", "half_pixel", "sampled", "edges"),
    "Rays and losses": ("flow", "no_holes", "no_return_loss", "plain", "plain_camera_z", "plain_dropped", "published"),
}


def scores_of(confusion: np.ndarray, moving_confusion: np.ndarray) -> dict[str, float]:
    """The measures of one keyframe.

    Means run over the classes that are there in its ground truth, so that they are the same for every row.

    Args:
        confusion: [18, 18] in the camera mask.
        moving_confusion: [18, 18] of its voxels that moving boxes sweep through.
    """
    scores = VoxelScores.of(confusion)
    there = {c for c in range(len(scores.iou)) if confusion[c].sum()}
    return {
        "miou": scores.mean(sorted(there)),
        "geometric": scores.geometric_iou,
        "static": scores.mean(sorted(there.intersection(STATIC_CLASSES))),
        "dynamic": scores.mean(sorted(there.intersection(DYNAMIC_CLASSES))),
        "dynamic_occupied": scores.dynamic_iou,
        "moving": VoxelScores.of(moving_confusion).dynamic_iou,
    }


class Results:
    """What has been measured so far, one JSON file per row and keyframe, so that a rerun goes on where it stopped.

    Args:
        folder: of the files.
        settings: of the fits; other settings have other files.
    """

    def __init__(self, folder: Path, settings: WindowSettings) -> None:
        self.folder, self.settings = folder, settings

    def _path(self, key: str, token: str) -> Path:
        return self.folder / f"{key}-{token[:12]}-{self.settings.steps}steps.json"

    def _made_with(self, row: Row) -> dict:
        return json.loads(json.dumps({"row": asdict(replace(row, title="", reference=None)), **asdict(self.settings)}))

    def load(self, key: str, token: str) -> dict | None:
        """A finished measurement; None where there is none, or it was made with other settings."""
        path = self._path(key, token)
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        return content if content["made_with"] == self._made_with(ROWS[key]) else None

    def save(self, key: str, token: str, content: dict) -> None:
        """Keep one; written beside its place and then moved there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key, token)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({**content, "made_with": self._made_with(ROWS[key])}) + "\n")
        unfinished.replace(path)


def measure(
    keyframe: Keyframe, window: Window, truth: Truth, key: str, settings: WindowSettings, progress: Progress
) -> tuple[dict, FittedVoxels]:
    """Fit one row to one keyframe: what is kept of it, confusion matrices above all, and the field."""
    row = ROWS[key]
    task = progress.add_task(f"  {row.title}", total=settings.steps)
    began, began_cpu = time.perf_counter(), time.process_time()
    fitted = fit(window, row, settings, lambda: progress.advance(task))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    confusion, moving = confusion_matrices(fitted, truth)
    progress.remove_task(task)
    content = {
        "key": key,
        "token": keyframe.token,
        "scene": keyframe.scene,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "terms": fitted.terms,
        "confusion": confusion.tolist(),
        "moving_confusion": moving.tolist(),
    }
    return content, fitted


def measure_keyframe(
    index: KeyframeIndex, i: int, keys: Sequence[str], results: Results, progress: Progress, pictures: Path | None
) -> Iterator[str]:
    """Fit all rows that have not been fitted to a keyframe yet, and keep the results; yields each row's key."""
    pending = [key for key in keys if results.load(key, index[i].token) is None]
    grid = results.settings.grid
    truth = load_truth(index, i, grid) if pending else None
    offsets = {ROWS[key].render.half_pixel_offset for key in pending}
    windows = {offset: load_window(index, i, grid, offset) for offset in offsets}
    for key in pending:
        window = windows[ROWS[key].render.half_pixel_offset]
        content, fitted = measure(index[i], window, truth, key, results.settings, progress)
        results.save(key, index[i].token, content)
        if pictures:
            scores = [VoxelScores.of(np.array(c)).miou for c in content["confusion"]]
            labels = fitted.labels_at(THRESHOLDS[int(np.argmax(scores))])
            comparison_picture(labels, truth.labels, truth.camera_mask, grid, index[i], pictures / key)
        yield key


def best_threshold(measured: Sequence[dict]) -> int:
    """Place in ``THRESHOLDS`` of the best mean mIoU over a row's keyframes."""
    confusions = np.array([m["confusion"] for m in measured])  # [keyframes, T, 18, 18]
    empty = np.zeros_like(confusions[0, 0])
    means = [np.mean([scores_of(c, empty)["miou"] for c in confusions[:, t]]) for t in range(len(THRESHOLDS))]
    return int(np.argmax(means))


def tables(keys: Sequence[str], tokens: Sequence[str], results: Results) -> list[TextTable]:
    """All tables that what has been measured allows; rows that lack a keyframe are left out."""
    scores: dict[str, Scores] = {}
    thresholds, seconds = {}, {}
    for key in keys:
        measured = [m for token in tokens if (m := results.load(key, token))]
        if len(measured) < len(tokens):
            continue
        t = best_threshold(measured)
        scores[key] = {
            m["token"]: scores_of(np.array(m["confusion"][t]), np.array(m["moving_confusion"][t])) for m in measured
        }
        thresholds[key] = f"{THRESHOLDS[t]:.2f}"
        seconds[key] = f"{np.mean([m['cpu_seconds'] for m in measured]):.0f}"
    names = {key: row.title for key, row in ROWS.items()}
    references = {key: row.reference for key, row in ROWS.items()}
    made = []
    for group, members in GROUPS.items():
        chosen = {key: scores[key] for key in members if key in scores}
        if len(chosen) < 2:
            continue
        note = f"{results.settings.steps} steps, {len(tokens)} keyframes"
        extra = {"threshold": thresholds, "CPU s": seconds}
        made.append(mean_table(f"{group}: IoU in %, {note}", chosen, names, MEASURES, extra))
        made.append(difference_table(f"{group}: paired differences, {note}", chosen, references, names, MEASURES))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        _run(options, console)
    except OccflownetError as error:
        print(f"benchmarks.supervision: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, console: Console) -> None:
    if options.quick:
        options.rows, options.keyframes = list(LADDER), 2
    unknown = [key for key in options.rows if key not in ROWS]
    if unknown:
        raise ConfigError(f"row '{unknown[0]}' is unknown; the rows are {', '.join(ROWS)}")
    if options.steps < 1 or options.keyframes < 1:
        raise ConfigError(f"--steps is {options.steps} and --keyframes {options.keyframes}; give at least 1 of each")
    torch.set_num_threads(options.threads)
    settings = WindowSettings(steps=options.steps)
    results = Results(options.out / "fields", settings)
    with console.status("reading tables and choosing keyframes"):
        index = KeyframeIndex(options.dataroot, only_version(options.dataroot))
        chosen = busiest_keyframes(index, options.keyframes, settings.grid)
    pictures = options.out / "pictures" if options.pictures else None
    waiting = sum(results.load(key, index[i].token) is None for i in chosen for key in options.rows)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        done = progress.add_task("fits", total=waiting)
        for i in chosen:
            for _ in measure_keyframe(index, i, options.rows, results, progress, pictures):
                progress.advance(done)
    made = tables(options.rows, [index[i].token for i in chosen], results)
    section = f"fields, {settings.steps} steps"
    publish(made, options.out / f"fields_{settings.steps}.md", options.threads, options.page, section, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.supervision",
        description="Fit a free voxel field to the rays of single keyframes, in many ways, and hold it against ground "
        "truth: what each idea of learning from 2D labels buys, without a network's noise. What is done is kept: a "
        "rerun goes on, and makes the tables anew.",
        epilog="rows: " + ", ".join(f"{key} ({row.title})" for key, row in ROWS.items()),
    )
    parser.add_argument(
        "--dataroot", type=Path, required=True, metavar="DIR", help="MiniCity root of scenes of 9 keyframes or more"
    )
    parser.add_argument("--out", type=Path, default=Path("out/ablation"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="default: all, see below")
    parser.add_argument(
        "--keyframes",
        type=int,
        default=6,
        metavar="N",
        help="the N busiest, from different scenes (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=WindowSettings.steps, help="steps per fit (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="only the rows on moving things, on two keyframes: minutes"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown page whose section takes the tables")
    parser.add_argument("--pictures", action="store_true", help="also draw every field, beside its truth")
    return parser


if __name__ == "__main__":
    sys.exit(main())
