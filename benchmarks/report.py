# SPDX-License-Identifier: Apache-2.0
"""What every benchmark's report has: the machine, a table of figures against their references, and a JSON file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number beside what it is to be held against.

    Attributes:
        name: what was measured.
        value: ours.
        reference: the other one's number, or the limit.
        unit: of both.
        against: what the reference is.
        more_is_better: whether a ratio above 1 is good.
    """

    name: str
    value: float
    reference: float
    unit: str
    against: str
    more_is_better: bool = False

    @property
    def ratio(self) -> float:
        if self.reference == 0:
            return 1.0 if self.value == 0 else float("inf")
        return self.value / self.reference


def machine() -> dict[str, object]:
    """The machine that the absolute figures belong to."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "date": date.today().isoformat(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def publish(title: str, figures: list[Figure], path: Path, details: dict | None = None) -> None:
    """Print the table and write ``path`` (JSON)."""
    here = machine()
    table = Table(title=f"{title}: {here['cpu']}, {here['cores']} cores, {here['date']}", title_justify="left")
    for heading, justify in (
        ("", "left"),
        ("ours", "right"),
        ("reference", "right"),
        ("ratio", "right"),
        ("held against", "left"),
    ):
        table.add_column(heading, justify=justify)
    for figure in figures:
        is_good = (figure.ratio >= 1) == figure.more_is_better or figure.ratio == 1
        color = "green" if is_good else "red"
        table.add_row(
            figure.name,
            f"{figure.value:.4g} {figure.unit}",
            f"{figure.reference:.4g} {figure.unit}",
            f"[{color}]{figure.ratio:.3g}[/]",
            figure.against,
        )
    Console().print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": here, "figures": [{**asdict(f), "ratio": f.ratio} for f in figures], "details": details or {}}
    path.write_text(json.dumps(content, indent=2) + "\n")
