"""JSON state files that survive a kill at any moment, and never stop a start."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TypeVar

import msgspec

log = logging.getLogger(__name__)

T = TypeVar("T")


class Unreadable(Exception):
    """The content is not what this version can read."""


def write(path: Path, content: object) -> None:
    """Replace ``path`` atomically: readers see the old file or the new one, whole.

    Raises ``OSError`` (disk full, read-only); the old file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(content), indent=1))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
    _sync_folder(path.parent)


def read(path: Path, kind: type[T], *, schema_version: int) -> T | None:
    """Decode ``path``; None when it is absent or had to be set aside.

    A file that cannot be read is renamed, never overwritten, and logged.
    ``kind`` must have a ``schema_version`` field; a higher one than ours is a
    later program's file and equally set aside.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _set_aside(path, error)
        return None
    try:
        found = msgspec.json.decode(content, type=_Versioned).schema_version
        if found > schema_version:
            raise Unreadable(f"schema version {found}, this program knows {schema_version}")
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, Unreadable) as error:
        _set_aside(path, error)
        return None


class _Versioned(msgspec.Struct):
    schema_version: int


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(f"{path.name}.unreadable-{time.time_ns()}")
    try:
        path.rename(aside)
    except OSError as failure:
        log.error("%s is unreadable (%s) and cannot be set aside: %s", path, error, failure)
    else:
        log.error("%s is unreadable (%s); set aside as %s", path, error, aside.name)


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
    is logged and tried again with the next save.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next: object | None = None
        self._task: asyncio.Task[None] | None = None

    def save(self, content: object) -> None:
        """Schedule ``content``, which the caller must not change any more."""
        self._next = content
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), name=f"write {self._path.name}")

    async def flush(self) -> None:
        """Wait until everything saved so far is on disk, or has failed to get there."""
        if self._task is not None:
            await self._task

    async def _drain(self) -> None:
        while (content := self._next) is not None:
            self._next = None
            try:
                await asyncio.to_thread(write, self._path, content)
            except OSError as error:
                log.error("cannot write %s: %s", self._path, error)
