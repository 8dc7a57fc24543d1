# SPDX-License-Identifier: Apache-2.0
"""Tables of rows measured on the same units (keyframes, seeds): means with spreads, and paired differences, which leave
out what the units differ in and so tell an effect from noise; on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.report import machine
from occflownet_core.errors import ConfigError

Scores = Mapping[str, Mapping[str, float]]
"""Of one row: unit -> measure -> value in 0..1, NaN where it is not defined."""


@dataclass(frozen=True)
class TextTable:
    """A table of text; the first column is aligned left, all others right."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def show(self, console: Console) -> None:
        """Print it."""
        table = Table(title=self.title, title_justify="left")
        for place, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """The same in Markdown."""
        lines = [self.headings, ("---", *["---:"] * (len(self.headings) - 1)), *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the sample, n - 1) of some values.

    Attributes:
        count: how many values; of one the deviation is NaN, of none the mean as well.
    """

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of all values that are not NaN."""
        known = np.asarray([v for v in values if not np.isnan(v)], dtype=np.float64)
        mean = float(known.mean()) if known.size else float("nan")
        return cls(mean, float(known.std(ddof=1)) if known.size > 1 else float("nan"), known.size)

    def percent(self, signed: bool = False) -> str:
        """``12.3 ± 1.2`` in percent; without the deviation where there is none."""
        if np.isnan(self.mean):
            return "-"
        mean = f"{100 * self.mean:+.1f}" if signed else f"{100 * self.mean:.1f}"
        return mean if np.isnan(self.deviation) else f"{mean} ± {100 * self.deviation:.1f}"


def paired_difference(scores: Scores, reference: Scores, measure: str) -> Spread:
    """Of row minus reference, over the units that both were measured on."""
    return Spread.of([scores[u][measure] - reference[u][measure] for u in scores if u in reference])


def mean_table(
    title: str,
    rows: Mapping[str, Scores],
    names: Mapping[str, str],
    measures: Mapping[str, str],
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> TextTable:
    """Mean ± deviation of every measure, one line per row.

    Args:
        title: of the table.
        rows: key -> scores.
        names: key -> what the row is called.
        measures: measure -> heading.
        extra: further columns of text, heading -> key -> text.
    """
    extra = extra or {}
    lines = [
        (
            names[key],
            *(Spread.of([unit[m] for unit in scores.values()]).percent() for m in measures),
            *(texts[key] for texts in extra.values()),
        )
        for key, scores in rows.items()
    ]
    return TextTable(title, ("", *measures.values(), *extra), tuple(lines))


def difference_table(
    title: str,
    rows: Mapping[str, Scores],
    references: Mapping[str, str | None],
    names: Mapping[str, str],
    measures: Mapping[str, str],
) -> TextTable:
    """Paired difference to each row's reference; rows without one, or whose reference was not measured, are left out."""
    lines = [
        (
            names[key],
            names[references[key]],
            *(paired_difference(scores, rows[references[key]], m).percent(signed=True) for m in measures),
        )
        for key, scores in rows.items()
        if references[key] in rows
    ]
    return TextTable(title, ("", "against", *measures.values()), tuple(lines))


def publish(
    tables: Sequence[TextTable], out: Path, threads: int, page: Path | None, section: str, console: Console
) -> None:
    """Print tables and write them, with the machine, to a Markdown file and into a section of a page.

    Args:
        tables: none at all prints nothing and writes nothing.
        out: the file.
        threads: CPU threads that were used.
        page: a Markdown page with the lines ``<!-- SECTION begins -->`` and ``<!-- SECTION ends -->``, or None.
        section: its name there.
        console: to print on.

    Raises:
        ConfigError: the page has no such section.
    """
    if not tables:
        return
    for table in tables:
        table.show(console)
    here = machine()
    header = f"{here['cpu']}, {threads} thread(s), Python {here['python']}, {here['date']}.\n"
    text = "\n".join([header, *(table.markdown() for table in tables)])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    console.print(f"written: {out}")
    if page:
        page.write_text(with_section(page.read_text(), section, text))
        console.print(f"written: section '{section}' of {page}")


def with_section(page: str, section: str, text: str) -> str:
    """The page with another text between the section's two marker lines.

    Raises:
        ConfigError: it has no such markers.
    """
    begins, ends = f"<!-- {section} begins -->", f"<!-- {section} ends -->"
    before, found, rest = page.partition(begins)
    _, closed, after = rest.partition(ends)
    if not found or not closed:
        raise ConfigError(
            f"the page has no section '{section}'; put the lines '{begins}' and '{ends}' where it belongs"
        )
    return f"{before}{begins}\n\n{text}\n{ends}{after}"
