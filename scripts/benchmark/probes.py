"""CPU time and memory of processes, as exactly as the system tells."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

LINUX = sys.platform == "linux"
MB = 1_000_000


class Memory(NamedTuple):
    """MB. ``pss`` counts a page shared by n processes as 1/n; None where it is not told.

    ``unique`` is what would be free again if the process ended.
    """

    rss: float
    pss: float | None
    unique: float | None


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time that processes have used, with all their threads, also ended ones."""
    return sum(map(_cpu_s, pids))


def _cpu_s(pid: int) -> float:
    if LINUX:
        # The clock of another process (clock_getcpuclockid): nanoseconds, where
        # /proc/PID/stat has hundredths of a second.
        return time.clock_gettime_ns((~pid << 3) | 2) / 1e9
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def memory(pid: int) -> Memory:
    if not LINUX:
        return Memory(psutil.Process(pid).memory_info().rss / MB, None, None)
    fields = _fields(Path(f"/proc/{pid}/smaps_rollup"))
    unique = fields["Private_Clean"] + fields["Private_Dirty"]
    return Memory(fields["Rss"], fields["Pss"], unique)


def peak_mb(pids: Iterable[int]) -> float:
    """The largest resident sizes of processes, added up; elsewhere than on Linux the present ones.

    Pages they share, as the weights of a file mapped by two, count in each.
    """
    if not LINUX:
        return sum(psutil.Process(pid).memory_info().rss / MB for pid in pids)
    return sum(_fields(Path(f"/proc/{pid}/status"))["VmHWM"] for pid in pids)


def _fields(path: Path) -> dict[str, float]:
    """The lines ``Name: 123 kB`` of a file in /proc, in MB."""
    fields = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.removesuffix(" kB")) * 1024 / MB
    return fields


def tree(pid: int) -> list[int]:
    """The processes below one."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
