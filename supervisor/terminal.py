"""Text on its way to a person's terminal."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

import typer

#: Everything that moves the cursor, rings, recolours or retitles; line feed and tab stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


#: Wider than any table.
_UNBOUNDED = 10_000


def plain(text: str) -> str:
    """The text without terminal control characters: a model may have been told to send some."""
    return _CONTROL.sub("", text)


def size_text(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns on stdout: fitted to a terminal, never cut for a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(*header, box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*(Text(plain(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    console.print(grid)


def has_terminal() -> bool:
    """Whether this process has a controlling terminal, now."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def never_fail_to_encode() -> None:
    """Make the standard streams print ``?`` for a character they have no code for."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def give_up_stdout() -> None:
    """After a failed write: whatever is left in the buffer fails no second time at the exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def fail(message: str, status: int = 1) -> NoReturn:
    """Say what is wrong, and end the command with this status."""
    typer.echo(f"error: {plain(message)}", err=True)
    raise typer.Exit(status)
