"""What the control groups that this process is in leave of the memory, by either version of them.

A limit holds for a group and all below it: what is left is the least that any on the way up to
the root leaves, whatever the process's own group says.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_MOUNT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


class _Files(NamedTuple):
    """Where a version tells the limit, what is used, and what of that is page cache."""

    limit: str
    used: str
    cached: tuple[bytes, ...]


_VERSION_2 = _Files("memory.max", "memory.current", (b"active_file", b"inactive_file"))
_VERSION_1 = _Files(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    (b"total_active_file", b"total_inactive_file"),
)


def available_bytes(own: Path = _OWN, mount: Path = _MOUNT) -> int | None:
    """What this process and its like may still take; None where nothing limits them.

    ``own`` tells the groups of the process, which are below ``mount``.
    """
    found = [_left(folder, files) for folder, files in _groups(own, mount)]
    return min((left for left in found if left is not None), default=None)


def _groups(own: Path, mount: Path) -> Iterator[tuple[Path, _Files]]:
    """Every group on the way up; some may not be there."""
    for line in read_small(own).decode(errors="surrogateescape").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        top, files = mount, _VERSION_2
        if "memory" in controllers.split(","):
            top, files = mount / "memory", _VERSION_1
        elif number != "0":
            continue
        # In a container its own group may be mounted in the place of the root, which it has
        # another path to, or none.
        relative = PurePosixPath(path.lstrip("/"))
        ways = [] if ".." in relative.parts else [relative, *relative.parents]
        for way in dict.fromkeys([*ways, PurePosixPath()]):
            yield top / way, files


def _left(folder: Path, files: _Files) -> int | None:
    limit, used = _number(folder / files.limit), _number(folder / files.used)
    if limit is None or used is None:
        return None
    # The page cache is counted as used, and given back on demand.
    return max(0, limit - used + _page_cache(folder, files))


def _page_cache(folder: Path, files: _Files) -> int:
    fields = dict(line.split()[:2] for line in read_small(folder / "memory.stat").splitlines())
    return sum(int(fields.get(name, 0)) for name in files.cached)


def _number(path: Path) -> int | None:
    """A file's value; None for ``max`` or where there is no such file."""
    text = read_small(path).strip()
    return int(text) if text.isdigit() else None


def read_small(path: str | Path) -> bytes:
    """A small file of the kernel's; empty if there is none.

    Every second, and often the only thing that happens: a file object costs several
    times as much as what it reads.
    """
    content = b""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The kernel hands out a page at most, however much is asked for.
            while part := os.read(fd, 1 << 16):
                content += part
        finally:
            os.close(fd)
    return content
