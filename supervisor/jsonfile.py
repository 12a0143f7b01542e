"""JSON state files that survive a kill at any moment, and never stop a start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TypeVar

import msgspec

log = logging.getLogger(__name__)

T = TypeVar("T")

#: In the name of a file that could not be read.
ASIDE = ".unreadable-"

#: Files that could not be written, and why, until they are.
_unwritten: dict[Path, str] = {}

#: Formatting holds the interpreter lock, for milliseconds per MB: larger files do without.
INDENT_LIMIT_BYTES = 256 * 1024


def unwritten(home: Path) -> dict[str, str]:
    """What could not be written in a folder, by name, and why."""
    return {path.name: why for path, why in _unwritten.items() if path.parent == home}


def note_written(path: Path, error: Exception | None) -> None:
    """How it went to write a file, or all there was to write of a folder."""
    _unwritten.pop(path, None)
    if error is not None:
        _unwritten[path] = str(error)


class Unreadable(Exception):
    """The content is not what this version can read."""


def open_state(
    path: Path, kind: type[T], *, schema_version: int
) -> tuple[T | None, BackgroundWriter]:
    """Content of a state file, as ``read`` gives it, and what writes it from now on.

    Call it once, under the home lock: what a killed writer left is swept away.

    A file of a later schema is its program's, which may come back, and stays as it
    is: this version then keeps its own beside it, ``name.v1.json`` beside ``name.json``,
    for as long as the later one is there. Afterwards ``path`` is used again.
    """
    if (found := _later_schema(path, schema_version)) is not None:
        later = path
        path = path.with_name(f"{path.stem}.v{schema_version}{path.suffix}")
        log.error(
            "%s is of schema version %d, written by a later version of this program (here: "
            "%d): it is left as it is, and %s is used instead",
            *(later, found, schema_version, path.name),
        )
    sweep(path.parent, _temporary_prefix(path))
    writer = BackgroundWriter(path)
    try:
        return _decode(path, kind, schema_version), writer
    except Unreadable as error:
        writer.set_aside_first = not _try_to_set_aside(path, error)
        return None, writer


def sweep(folder: Path, prefix: str = ".") -> None:
    """Delete the temporary files that a killed writer left in ``folder``."""
    for stale in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            stale.unlink()


def is_later(path: Path, schema_version: int) -> bool:
    """Whether a file was written by a later version of this program."""
    return _later_schema(path, schema_version) is not None


def _later_schema(path: Path, schema_version: int) -> int | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Versioned).schema_version
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return found if found > schema_version else None


def write(path: Path, content: object) -> None:
    """Replace ``path`` atomically: readers see the old file or the new one, whole.

    Raises ``OSError`` (disk full, read-only); the old file is then untouched. A kill
    can leave a temporary file beside it, see ``open_state``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.encode(content)
    if len(encoded) <= INDENT_LIMIT_BYTES:
        encoded = msgspec.json.format(encoded, indent=1)
    handle, name = tempfile.mkstemp(prefix=_temporary_prefix(path), dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read(path: Path, kind: type[T], *, schema_version: int) -> T | None:
    """Decode ``path``; None when it is absent or had to be set aside.

    A file that cannot be read is renamed, never overwritten, and logged.
    ``kind`` must have a ``schema_version`` field; a higher one than ours is a
    later program's file and equally set aside, unless ``open_state`` is used.
    """
    try:
        return _decode(path, kind, schema_version)
    except Unreadable as error:
        _try_to_set_aside(path, error)
        return None


def _decode(path: Path, kind: type[T], schema_version: int) -> T | None:
    """Raises ``Unreadable``; None when there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unreadable(error) from error
    try:
        found = msgspec.json.decode(content, type=_Versioned).schema_version
        if found > schema_version:
            raise Unreadable(f"schema version {found}, this program knows {schema_version}")
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(error) from error


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}."


class _Versioned(msgspec.Struct):
    schema_version: int


def _try_to_set_aside(path: Path, error: Exception) -> bool:
    try:
        aside = _set_aside(path)
    except OSError as failure:
        log.error(
            "%s is unreadable (%s) and cannot be set aside: %s; it stays as it is, and "
            "nothing is written in its place",
            *(path, error, failure),
        )
        return False
    log.error("%s is unreadable (%s); set aside as %s", path, error, aside.name)
    return True


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}{ASIDE}{time.time_ns()}")
    path.rename(aside)
    return aside


def _sync_folder(folder: Path) -> None:
    # Without this the rename itself may be lost with the power.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class BackgroundWriter:
    """Writes the latest content of one file off the event loop, one write at a time.

    A save that arrives during a write replaces the one that waits. A failed write
    is logged and tried again with the next save and the next flush.

    ``set_aside_first``: there is a file that nobody could read. It may be a good one,
    so nothing is written before it has been renamed.
    """

    def __init__(self, path: Path) -> None:
        self.set_aside_first = False
        self._path = path
        self._next: object | None = None
        self._unwritten: object | None = None
        self._task: asyncio.Task[None] | None = None

    def save(self, content: object) -> None:
        """Schedule ``content``, which the caller must not change any more."""
        self._next, self._unwritten = content, None
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), name=f"write {self._path.name}")

    async def flush(self) -> None:
        """Wait until everything saved so far is on disk, or has failed to get there."""
        if self._task is None:
            return
        await self._task
        if self._unwritten is not None:
            self.save(self._unwritten)
            # Another one now, which ``save`` has begun.
            await self._task

    async def _drain(self) -> None:
        while (content := self._next) is not None:
            self._next = self._unwritten = None
            try:
                await asyncio.to_thread(self._write_now, content)
            except Exception as error:
                # Also of the content: whoever waits for the flush has others to wait for.
                self._unwritten = content
                note_written(self._path, error)
                log.error("cannot write %s: %s", self._path, error)
            else:
                note_written(self._path, None)

    def _write_now(self, content: object) -> None:
        if self.set_aside_first:
            with contextlib.suppress(FileNotFoundError):
                log.error("%s is set aside as %s", self._path, _set_aside(self._path).name)
            self.set_aside_first = False
        write(self._path, content)
