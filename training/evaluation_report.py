# SPDX-License-Identifier: Apache-2.0
"""What people see of an evaluation: the table on the terminal, and pictures of prediction, truth and difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from occflownet_core.evaluation import DIFFERENCE_RGB, difference
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import BOXED_CLASSES, CLASS_NAMES, COLORS_RGB, FREE, OCCUPIED_CLASSES
from occflownet_core.picture import draw_voxels, legend, save_png, side_by_side, stacked, titled, view_from_above
from training.data.nuscenes import Keyframe

_DIFFERENCE_COLORS_RGB = np.zeros((FREE + 1, 3), dtype=np.uint8)
_DIFFERENCE_COLORS_RGB[: len(DIFFERENCE_RGB)] = DIFFERENCE_RGB
_DIFFERENCE_NOTE = "grey right, yellow wrong class, blue missed, red invented; camera mask only"


def comparison_picture(
    prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray, grid: VoxelGrid, keyframe: Keyframe, folder: Path
) -> Path:
    """Write prediction, truth and difference from above, side by side; returns the PNG's path.

    Args:
        prediction, truth: uint8 [X, Y, Z].
        mask: bool [X, Y, Z], voxels that a camera could see.
        grid: of the labels.
        keyframe: what is shown, for title and file name.
        folder: created if need be.
    """
    view = view_from_above(grid)
    kind = difference(prediction, truth, mask)
    panels = [
        titled(draw_voxels(prediction, grid, view), "prediction"),
        titled(draw_voxels(truth, grid, view), "truth"),
        titled(draw_voxels(kind, grid, view, _DIFFERENCE_COLORS_RGB), "difference"),
    ]
    picture = side_by_side(panels)
    names = titled(legend(truth, picture.shape[1], columns=6), "voxels of the truth", size_px=16)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{keyframe.scene}_{keyframe.token}.png"
    title = f"{keyframe.scene}, {keyframe.token}"
    save_png(str(path), titled(stacked([picture, names]), title, _DIFFERENCE_NOTE))
    return path


def print_report(report: dict, console: Console) -> None:
    """The report as tables."""
    console.print(_class_table(report))
    console.print(_mean_table(report))
    if report["threshold_sweep"]:
        console.print(_sweep_table(report))
    settings = report["settings"]
    trained = {True: "with", False: "without", None: "(not stated whether with or without)"}
    console.print(
        f"{report['model']['name']} on {report['data']['dataroot']}, {report['data']['split']}: "
        f"{report['samples']} keyframes of {report['data']['scenes']} scenes. "
        f"Trained {trained[settings['trained_with_camera_mask']]} camera mask; occupancy threshold "
        f"{settings['occupancy_threshold']:g} ({settings['threshold_source']}); ego frame at the {settings['reference']}'s "
        f"stamp; engine {report['engine_ms_median']:.0f} ms.",
        highlight=False,
    )


def _class_table(report: dict) -> Table:
    table = Table(title="IoU per class, %")
    table.add_column("class")
    for heading in ("camera mask", "no mask", "rays"):
        table.add_column(heading, justify="right")
    for c in range(OCCUPIED_CLASSES):
        name = CLASS_NAMES[c]
        swatch = Text("■ ", style="rgb({},{},{})".format(*COLORS_RGB[c])) + Text(name)
        cells = (report[part]["iou"][name] for part in ("camera_mask", "no_mask", "rays"))
        table.add_row(swatch + Text(" *" if c in BOXED_CLASSES else "", style="dim"), *map(_percent, cells))
    table.caption = "* dynamic; a class that is neither there nor predicted has no IoU and counts in no mean"
    return table


def _mean_table(report: dict) -> Table:
    table = Table(title="means, %")
    table.add_column("")
    table.add_column("camera mask", justify="right")
    table.add_column("no mask", justify="right")
    for name, key in (
        ("mIoU, 17 classes", "miou_17"),
        ("mIoU, 15 classes", "miou_15"),
        ("mIoU, dynamic", "dynamic_miou"),
        ("mIoU, static", "static_miou"),
        ("dynamic classes as one", "dynamic_iou"),
        ("geometric IoU", "geometric_iou"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        table.add_row(name, _percent(report["camera_mask"][key]), _percent(report["no_mask"][key]))
    table.add_section()
    rays = report["rays"]
    table.add_row("RayIoU", "", _percent(rays["ray_iou"]))
    table.add_row("  at 1, 2, 4 m", "", " ".join(_percent(rays[f"ray_iou_{m}m"]) for m in (1, 2, 4)))
    return table


def _sweep_table(report: dict) -> Table:
    rows = report["threshold_sweep"]
    best = max(rows, key=lambda row: row["miou_17"] or 0)
    table = Table(title="thresholds, camera mask, %")
    keys = ("miou_17", "dynamic_miou", "static_miou", "geometric_iou", "precision", "recall")
    for heading in ("above", "mIoU 17", "dynamic", "static", "geometric", "precision", "recall"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['threshold']:.2f}", *(_percent(row[key]) for key in keys), style="bold" if row is best else ""
        )
    table.caption = "bold: best mIoU; to choose a threshold by it, sweep on data that the report is not made on"
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
