# SPDX-License-Identifier: Apache-2.0
"""Networks trained with different supervision, alike in all else: `python -m benchmarks.network_training --help`.

Each run is a process of `training.fit` and one of `training.evaluate` on scenes of another seed. What is finished is
kept, and an interrupted run goes on from its last checkpoint, so rows may be run one at a time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from benchmarks.paired_tables import Scores, TextTable, difference_table, mean_table, publish
from occflownet_core.errors import ConfigError, OccflownetError, TrainingError

MEASURES = {
    "miou": "mIoU",
    "geometric": "geometric",
    "static": "static",
    "dynamic": "dynamic",
    "dynamic_as_one": "dynamic as one",
    "ray_iou": "RayIoU",
}


@dataclass(frozen=True)
class NetworkRow:
    """One kind of supervision.

    Attributes:
        title: for the table.
        reference: key of the row that this one is compared with.
        options: of ``training.fit``, on top of the configuration.
        seeds: how many runs it takes: differences between neighbours are small against those between seeds.
    """

    title: str
    reference: str | None
    options: tuple[str, ...]
    seeds: int = 1


CONFIGS = Path("training/configs")


def overrides(path: Path) -> tuple[str, ...]:
    """What a configuration changes in the one that it is based on, as options of ``training.fit``."""

    def flat(values: dict, prefix: str) -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield from (f"--{prefix}{name}", str(value))

    return tuple(flat({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "base"}, ""))


FITTED = "gts_fitted"
"""Folder of the labels that ``training.fit_scene`` has written into each root."""

_STATIC = ("--motion.kind", "static")
ROWS = {
    "single": NetworkRow(
        "2D, single frame", None, (*_STATIC, "--data.horizon", "0", "--supervision.current_share", "null")
    ),
    "static": NetworkRow("2D, 7 keyframes, static world", "single", _STATIC),
    "filter": NetworkRow("2D, 7 keyframes, dynamic filter", "static", ("--motion.kind", "filter"), seeds=3),
    "flow": NetworkRow("2D, 7 keyframes, box flow", "filter", ("--motion.kind", "box_flow"), seeds=3),
    "2d3d": NetworkRow("2D with box flow, and 3D", "3d", ("--motion.kind", "box_flow", "--supervision.kind", "2d3d")),
    "3d": NetworkRow("3D", "flow", ("--supervision.kind", "3d")),
    "surface": NetworkRow("2D, box flow, surfaces", "flow", overrides(CONFIGS / "minicity_tiny_surface.yaml")),
    "fitted": NetworkRow(
        "voxels fitted to whole logs", "flow", ("--supervision.kind", "3d", "--data.labels_folder", FITTED), seeds=3
    ),
}


# Every run starts from the same network: its image encoder taught by single images, then the whole by single frames, which
# no motion concerns. Minutes of training from scratch tell rows apart by how their encoders happened to begin.
IMAGES = "images"
FRAMES = "frames"
_STARTS = {
    IMAGES: (
        *("--supervision.kind", "images", "--data.no_return_rays", "false", "--trainer.batch_size", "2"),
        *("--losses.depth_weight", "1", "--losses.image_semantic_weight", "1"),
    ),
    FRAMES: ROWS["single"].options,
}


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        key: of the row.
        seed: of weights, order, augmentation and drawn rays.
        out: folder of the run.
    """

    key: str
    seed: int
    out: Path

    @property
    def result(self) -> Path:
        """The evaluation's JSON; it is there when the run is finished."""
        return self.out / "eval.json"

    def fit_command(self, options: argparse.Namespace, start: Path) -> list[str]:
        """``training.fit`` from the common start's weights, or from the last checkpoint where there is one."""
        more = (*ROWS[self.key].options, "--trainer.initial_weights", str(start))
        return fit_command(self.out, options, options.steps, self.seed, more)

    def evaluate_command(self, options: argparse.Namespace) -> list[str]:
        """``training.evaluate`` of the last weights on the held-out scenes."""
        command = [sys.executable, "-m", "training.evaluate", "--checkpoint", str(self.out / "last.ckpt")]
        command += ["--dataroot", str(options.val_dataroot), "--out", str(self.result)]
        return [*command, "--threads", str(options.threads), "--pictures", "2"]

    def carry_out(self, options: argparse.Namespace, console: Console) -> None:
        """Train and evaluate.

        Raises:
            TrainingError: a process failed.
        """
        began = time.perf_counter()
        start = common_start(self.out.parent, options, console)
        execute(self.fit_command(options, start), self.out / "fit.log", console)
        try:
            execute(self.evaluate_command(options), self.out / "evaluate.log", console)
        except TrainingError:
            self.result.unlink(missing_ok=True)
            raise
        console.print(f"{self.out.name}: {time.perf_counter() - began:.0f} s")


def common_start(folder: Path, options: argparse.Namespace, console: Console) -> Path:
    """The weights that all runs start from; they are made first where they are missing.

    Raises:
        TrainingError: a process failed.
    """
    weights: Path | None = None
    for name, steps in ((IMAGES, options.image_steps), (FRAMES, options.frame_steps)):
        out = folder / name
        if not (out / "done").exists():
            more = (*_STARTS[name], *(("--trainer.initial_weights", str(weights)) if weights else ()))
            execute(fit_command(out, options, steps, 0, more), out / "fit.log", console)
            (out / "done").touch()
        weights = out / "last.ckpt"
    return weights


def fit_command(out: Path, options: argparse.Namespace, steps: int, seed: int, more: Sequence[str]) -> list[str]:
    """``training.fit`` into a folder, from the start or from the last checkpoint where there is one."""
    roots = "[" + ",".join(str(root) for root in options.dataroot) + "]"
    settings = {
        "data.dataroot": roots,
        "data.val_dataroot": options.val_dataroot,
        "trainer.out": out,
        "trainer.seed": seed,
        "trainer.max_steps": steps,
        "trainer.val_steps": steps,  # one validation, at the end: it takes the threshold
        "trainer.threads": options.threads,
        "trainer.precision": options.precision,
    }
    command = [sys.executable, "-m", "training.fit", "--config", str(options.config)]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command += more
    return [*command, "--resume", "last"] if (out / "last.ckpt").exists() else command


def execute(command: Sequence[str], log: Path, console: Console) -> None:
    """Run a process, its output into a file.

    Raises:
        TrainingError: it failed; with its last words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(shlex.join(command), style="dim", markup=False, highlight=False)
    with log.open("a") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if status:
        last = log.read_text().strip().splitlines()[-1:]
        raise TrainingError(f"run {log.parent} failed ({' '.join(last)}); its output is in {log}")


def load_scores(run: Run) -> dict[str, float] | None:
    """The measures of a finished run, camera mask; None where it is not finished."""
    if not run.result.is_file() or not run.result.stat().st_size:
        return None
    report = json.loads(run.result.read_text())
    masked = report["camera_mask"]
    values = {
        "miou": masked["miou_17"],
        "geometric": masked["geometric_iou"],
        "static": masked["static_miou"],
        "dynamic": masked["dynamic_miou"],
        "dynamic_as_one": masked["dynamic_iou"],
        "ray_iou": report["rays"]["ray_iou"],
    }
    return {name: float("nan") if value is None else value for name, value in values.items()}


def tables(runs: Sequence[Run], title: str) -> list[TextTable]:
    """Means over seeds and paired differences of what is finished."""
    rows: dict[str, Scores] = {}
    for run in runs:
        scores = load_scores(run)
        if scores:
            rows.setdefault(run.key, {})[str(run.seed)] = scores
    if not rows:
        return []
    names = {key: row.title for key, row in ROWS.items()}
    references = {key: row.reference for key, row in ROWS.items()}
    counts = {"seeds": {key: str(len(scores)) for key, scores in rows.items()}}
    return [
        mean_table(f"Networks: IoU in %, {title}", rows, names, MEASURES, counts),
        difference_table(f"Networks: paired differences, {title}", rows, references, names, MEASURES),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options, Console())
    except OccflownetError as error:
        print(f"benchmarks.network_training: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, console: Console) -> None:
    unknown = [key for key in options.rows if key not in ROWS]
    if unknown:
        raise ConfigError(f"row '{unknown[0]}' is unknown; the rows are {', '.join(ROWS)}")
    folder = options.out / "networks" / f"{options.config.stem}_{options.steps}steps"
    runs = {key: [Run(key, seed, folder / f"{key}_seed{seed}") for seed in range(ROWS[key].seeds)] for key in ROWS}
    # Seed after seed rather than row after row: an interrupted session has compared as many rows as it could.
    wanted = [run for key in options.rows for run in runs[key] if options.seed in (None, run.seed)]
    for run in sorted(wanted, key=lambda run: run.seed):
        if load_scores(run) is None and not options.tables:
            run.carry_out(options, console)
    made = tables([run for row in runs.values() for run in row], f"{options.config.stem}, {options.steps} steps")
    out = options.out / f"networks_{options.config.stem}_{options.steps}.md"
    publish(made, out, options.threads, options.page, options.section, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network_training",
        description="Train small networks with different supervision, alike in all else, and evaluate them on held-out "
        "scenes. Finished runs are kept, interrupted ones go on.",
        epilog="rows: "
        + ", ".join(f"{key} ({row.title}; {row.seeds} seed(s))" for key, row in ROWS.items())
        + f". Row 'fitted' learns from DIR/{FITTED} of each root, which python -m training.fit_scene --dataroot DIR --out "
        f"DIR/{FITTED} makes.",
    )
    parser.add_argument("--dataroot", type=Path, nargs="+", required=True, metavar="DIR", help="roots to learn from")
    parser.add_argument(
        "--val-dataroot", type=Path, required=True, metavar="DIR", help="root of another seed to evaluate on"
    )
    parser.add_argument("--out", type=Path, default=Path("out/ablation"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="default: all, see below")
    parser.add_argument("--seed", type=int, help="only this seed of each row (default: all that the row takes)")
    parser.add_argument(
        "--config",
        type=Path,
        default=CONFIGS / "minicity_tiny.yaml",
        metavar="FILE",
        help="the network (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps per run (default %(default)s)")
    parser.add_argument(
        "--image-steps", type=int, default=1500, help="steps of single images, common to all (default %(default)s)"
    )
    parser.add_argument(
        "--frame-steps",
        type=int,
        default=800,
        help="steps of single frames after it, also common (default %(default)s)",
    )
    parser.add_argument(
        "--precision", default="bf16-mixed", help="of training: 32-true on a CPU without AMX (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown page whose section takes the tables")
    parser.add_argument("--section", default="networks", metavar="NAME", help="of that page (default %(default)s)")
    parser.add_argument("--tables", action="store_true", help="run nothing, only make the tables of what is finished")
    return parser


if __name__ == "__main__":
    sys.exit(main())
