"""Tables as data: shown in a terminal, or written as Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from benchmark.summary import Range, Verdict

NOTHING = "-"


class Table(NamedTuple):
    """``columns`` are headings; the first column is left-aligned. ``notes`` follow it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def show(tables: Sequence[Table], console: Console) -> None:
    for table in tables:
        shown = RichTable(show_header=any(table.columns))
        for number, heading in enumerate(table.columns):
            shown.add_column(heading, justify="right" if number and heading else "left")
        for row in table.rows:
            shown.add_row(*row)
        # A table's own title would be wrapped to its width.
        console.print(f"\n{table.title}", style="bold", markup=False, highlight=False)
        console.print(shown)
        for note in table.notes:
            console.print(note, markup=False, highlight=False)


def write_markdown(tables: Sequence[Table], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(markdown, tables)))


def markdown(table: Table) -> str:
    aligned = [":--" if number == 0 else "--:" for number in range(len(table.columns))]
    lines = [table.columns, aligned, *table.rows]
    body = "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in lines)
    notes = "".join(f"\n{note}\n" for note in table.notes)
    return f"**{table.title}**\n\n{body}\n{notes}"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def cell(value: Range | None, digits: int = 1) -> str:
    """Median, and the range where there is one."""
    if value is None:
        return NOTHING
    text = f"{value.median:,.{digits}f}"
    if value.low == value.high:
        return text
    return f"{text} ({value.low:,.{digits}f} to {value.high:,.{digits}f})"


def verdict_table(found: Sequence[Verdict]) -> Table:
    words = {None: "not measured", True: "ok", False: "SHORT"}
    rows = [(each.promise, cell(each.value, 3), words[each.kept]) for each in found]
    return Table("What is promised of opta-lmx: median (range)", ("", "measured", ""), rows)
