"""What a process really costs, and what the host has left, as each system tells it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from supervisor import cgroup_memory
from supervisor.cgroup_memory import read_small

#: Not tested directly: a type checker would take one branch for the only one.
_PLATFORM: str = sys.platform

#: From <libproc.h> and <sys/resource.h>: ``proc_pid_rusage`` and the offset of
#: ``ri_phys_footprint`` in ``rusage_info_v0`` (16 bytes of uuid, then 64-bit fields).
_RUSAGE_INFO_V0 = 0
_RUSAGE_FIELDS = 12
_PHYS_FOOTPRINT_FIELD = 9

_LARGE_MAC_BYTES = 36 * 1024**3

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

#: A resident size that changed by more than this makes a new walk through all pages.
_ESTIMATED_FRACTION = 0.1


class FootprintMeter:
    """Measures processes again and again. Call it off the event loop, from one thread.

    Walking the pages of a large process takes milliseconds, asking for its resident
    size microseconds: what was added since the last walk is taken for its own.
    """

    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process] = {}
        #: Resident size and footprint at the last walk, by pid.
        self._known: dict[int, tuple[int, int]] = {}

    def measure(self, pids: Sequence[int], *, exactly: bool = False) -> dict[int, int]:
        """Bytes by pid, without those that are gone; never an estimate if ``exactly``."""
        resident = {pid: size for pid in pids if (size := self._resident(pid)) is not None}
        self._processes = {pid: p for pid, p in self._processes.items() if pid in resident}
        if exactly or not self._near_known(resident):
            # All of them: they share pages, and what one of them maps or lets go changes
            # what the others cost while their own resident sizes stay.
            walked = {pid: footprint_bytes(pid) for pid in resident}
            self._known = {
                pid: (resident[pid], size) for pid, size in walked.items() if size is not None
            }
        return {
            pid: max(0, size + resident[pid] - was_resident)
            for pid, (was_resident, size) in self._known.items()
        }

    def _near_known(self, resident: Mapping[int, int]) -> bool:
        return resident.keys() == self._known.keys() and all(
            abs(resident[pid] - was_resident) <= was_resident * _ESTIMATED_FRACTION
            for pid, (was_resident, _) in self._known.items()
        )

    def _resident(self, pid: int) -> int | None:
        if _PLATFORM == "linux":
            pages = read_small(f"/proc/{pid}/statm").split()
            return int(pages[1]) * _PAGE_BYTES if pages else None
        try:
            process = self._processes.get(pid)
            if process is None:
                process = self._processes[pid] = psutil.Process(pid)
            return int(process.memory_info().rss)
        except (psutil.Error, OSError):
            return None


class Usage(NamedTuple):
    """Bytes of a process. ``mapped``: of the total, what is mapped from files; 0 where the
    total is without it."""

    total: int
    mapped: int


def footprint_bytes(pid: int) -> int | None:
    """Memory that would be free without the process, or None once it is gone; see ``usage_of``."""
    usage = usage_of(pid)
    return None if usage is None else usage.total


def usage_of(pid: int) -> Usage | None:
    """What a process takes, or None once it is gone.

    Linux: the proportional set size, which splits shared pages among their users;
    macOS: the physical footprint, which is what its memory pressure goes by.
    Takes up to some milliseconds for a large process: call it off the event loop.
    """
    try:
        if _PLATFORM == "linux":
            return _pss(pid)
        if _PLATFORM == "darwin":
            return Usage(_phys_footprint(pid), 0)
        return Usage(int(psutil.Process(pid).memory_info().rss), 0)
    except (psutil.Error, OSError):
        return None


def resident_gb(pid: int) -> float | None:
    """Resident memory of a process in GB (1e9 bytes); None once it is gone."""
    try:
        return float(psutil.Process(pid).memory_info().rss) / 1e9
    except (psutil.Error, OSError):
        return None


def total_bytes() -> int:
    """Physical memory of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_limit_bytes() -> int | None:
    """What Metal lets all processes have together, as far as it is known; elsewhere None.

    ``iogpu.wired_limit_mb`` is what an operator has set; without it the system keeps a
    third of the memory of small machines, and a quarter of that of large ones.
    """
    if _PLATFORM != "darwin":
        return None
    total = total_bytes()
    limit = _sysctl_number("iogpu.wired_limit_mb") * 1024 * 1024
    return limit or (total * 2 // 3 if total <= _LARGE_MAC_BYTES else total * 3 // 4)


def available_bytes() -> int:
    """What can be allocated without swapping: the host's, or what a cgroup leaves of it."""
    _, found, rest = read_small("/proc/meminfo").partition(b"MemAvailable:")
    available = int(rest.split()[0]) * 1024 if found else int(psutil.virtual_memory().available)
    limited = cgroup_memory.available_bytes()
    return available if limited is None else min(available, limited)


def _pss(pid: int) -> Usage:
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"Pss", "Pss_File"}:
            found[name] = int(value.split()[0]) * 1024
    if "Pss" not in found:
        return Usage(int(psutil.Process(pid).memory_info().rss), 0)
    return Usage(found["Pss"], found.get("Pss_File", 0))


def _sysctl_number(name: str) -> int:
    """A number of the system's; 0 where there is none of the name."""
    value = ctypes.c_int64(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    libc = ctypes.CDLL(None)
    failed = libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else max(0, value.value)


def _phys_footprint(pid: int) -> int:
    buffer = (ctypes.c_uint64 * _RUSAGE_FIELDS)()
    libproc = ctypes.CDLL("/usr/lib/libproc.dylib")
    if libproc.proc_pid_rusage(pid, _RUSAGE_INFO_V0, ctypes.byref(buffer)) != 0:
        raise OSError(f"proc_pid_rusage failed for {pid}")
    return int(buffer[_PHYS_FOOTPRINT_FIELD])
