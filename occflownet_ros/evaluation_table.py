# SPDX-License-Identifier: Apache-2.0
"""A replay evaluation on the terminal: scores, latencies, what was missed, and where the page is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from occflownet_core.labels import BOXED_CLASSES, CLASS_NAMES, COLORS_RGB, OCCUPIED_CLASSES
from occflownet_ros.report.content import PERCENTILES, ReplayReport

_MEANS = (
    ("mIoU, 17 classes", "miou_17"),
    ("mIoU, 15 classes", "miou_15"),
    ("mIoU, dynamic *", "dynamic_miou"),
    ("mIoU, static", "static_miou"),
    ("dynamic as one", "dynamic_iou"),
    ("occupied or free", "geometric_iou"),
)


def print_report(report: ReplayReport, out: Path, console: Console) -> None:
    """Print the report's tables, the settings and the paths."""
    if report.scores:
        console.print(_score_table(report.scores))
    console.print(_latency_table(report))
    counts = report.keyframes
    if counts:
        console.print(f"{counts.published} of {counts.in_bag} keyframes answered, {counts.missed} missed")
        for record in [record for record in report.frames if not record.published][:5]:
            console.print(f"  {record.token}: {record.reason}", soft_wrap=True)
    else:
        console.print(f"{report.sets.get('processed', 0)} of {report.sets.get('opened', 0)} sets processed")
    console.print(report.settings, soft_wrap=True)
    console.print(f"{out / 'report.html'}, {out / 'report.json'}", soft_wrap=True)


def _score_table(scores: dict) -> Table:
    parts = [("camera mask", "camera_mask"), ("no mask", "no_mask"), *([("rays", "rays")] if "rays" in scores else [])]
    table = Table(title="IoU, %", title_justify="left")
    table.add_column("class")
    for heading, _ in parts:
        table.add_column(heading, justify="right")
    for c in range(OCCUPIED_CLASSES):
        name = Text("\u25a0 ", style="rgb({},{},{})".format(*COLORS_RGB[c])) + Text(CLASS_NAMES[c].replace("_", " "))
        name += Text(" *" if c in BOXED_CLASSES else "", style="dim")
        table.add_row(name, *(_percent(scores[part]["iou"][CLASS_NAMES[c]]) for _, part in parts))
    table.add_section()
    for name, key in _MEANS:
        ray_score = scores["rays"]["ray_iou"] if "rays" in scores and key == "miou_17" else None
        cells = [_percent(scores[part][key]) for part in ("camera_mask", "no_mask")]
        table.add_row(name, *cells, *([_percent(ray_score) if key == "miou_17" else ""] if len(parts) == 3 else []))
    table.caption = "* dynamic; rays: RayIoU, mean of 1, 2 and 4 m"
    return table


def _latency_table(report: ReplayReport) -> Table:
    table = Table(title="latency, ms", title_justify="left")
    table.add_column("stage")
    for percentile in PERCENTILES:
        table.add_column("median" if percentile == 50 else f"{percentile} %", justify="right")
    for stage, values in report.latency_ms.items():
        table.add_row(stage, *(f"{values[f'p{percentile}']:.1f}" for percentile in PERCENTILES))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
