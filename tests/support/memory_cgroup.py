"""A cgroup with a memory limit, where this user may make one."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.support.server import polls

_TOP = Path("/sys/fs/cgroup")


class NotAllowed(Exception):
    """There is no making a cgroup here."""


@contextlib.contextmanager
def memory_cgroup(limit: int, *, below: bool = False) -> Iterator[Path]:
    """Yields its folder; processes enter by their pid in ``cgroup.procs``. Bytes.

    ``below``: it is that of a group without a limit of its own, below the one with it.
    """
    version1 = (_TOP / "memory").is_dir()
    folder = (_TOP / "memory" if version1 else _TOP) / f"test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NotAllowed(str(error)) from error
    try:
        try:
            name = "memory.limit_in_bytes" if version1 else "memory.max"
            (folder / name).write_text(str(limit))
            if not version1:
                (folder / "memory.swap.max").write_text("0")
        except OSError as error:
            raise NotAllowed(str(error)) from error
        with contextlib.ExitStack() as stack:
            yield stack.enter_context(_child(folder)) if below else folder
    finally:
        _remove(folder)


@contextlib.contextmanager
def _child(folder: Path) -> Iterator[Path]:
    child = folder / "below"
    try:
        if (controls := folder / "cgroup.subtree_control").exists():
            controls.write_text("+memory")
        child.mkdir()
    except OSError as error:
        raise NotAllowed(str(error)) from error
    try:
        yield child
    finally:
        _remove(child)


def _remove(folder: Path) -> None:
    for _ in polls(10):
        with contextlib.suppress(OSError):
            folder.rmdir()
            break
