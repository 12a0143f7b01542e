"""The workers that run, on disk: what a killed supervisor may have left is found at the start.

Workers die with their supervisor by themselves; this is the net below that.
A process is known by pid and start together, since pids are used again. On Linux the
start is in clock ticks since boot, beside the id of the boot: the time of day that is
computed from them is another one after the clock was set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from pathlib import Path

import msgspec
import psutil

from supervisor import jsonfile

log = logging.getLogger(__name__)

FILE_NAME = "workers.json"
SCHEMA_VERSION = 1


class _Worker(msgspec.Struct, frozen=True):
    """``started_at`` is the process's start as the system tells it, in epoch seconds; it
    counts only where there are no ``start_ticks``, which earlier versions did not write."""

    pid: int
    started_at: float
    start_ticks: int | None = None
    boot_id: str | None = None


class _File(msgspec.Struct, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    workers: list[_Worker] = []


class WorkerLedger:
    """Keeps the file of one home, whose lock the caller holds."""

    def __init__(self, home: Path) -> None:
        self._left, self._writer = jsonfile.open_state(
            home / FILE_NAME, _File, schema_version=SCHEMA_VERSION
        )
        self._workers: dict[int, _Worker] = {}

    def sweep(self) -> list[int]:
        """Kill what is left of an earlier supervisor; returns the pids. Call once, first."""
        recorded = self._left.workers if self._left is not None else []
        swept = []
        for worker in recorded:
            if not _is_running(worker):
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)
                swept.append(worker.pid)
                log.warning("killed worker %d, left by an earlier server", worker.pid)
        return swept

    def add(self, pid: int) -> None:
        """A worker was spawned."""
        # Bookkeeping of a net below others: no trouble with it may reach a model.
        with contextlib.suppress(psutil.Error, OSError):
            self._workers[pid] = _Worker(
                pid, psutil.Process(pid).create_time(), _start_ticks(pid), _boot_id()
            )
            self._save()

    def remove(self, pid: int) -> None:
        """A worker was reaped."""
        if self._workers.pop(pid, None) is not None:
            self._save()

    async def flush(self) -> None:
        """Wait for the pending write."""
        await self._writer.flush()

    def _save(self) -> None:
        self._writer.save(_File(workers=list(self._workers.values())))


def _is_running(worker: _Worker) -> bool:
    """Whether the number is still that process's; a group without its leader is not
    touched, since the number may be a stranger's by now."""
    if worker.start_ticks is not None:
        start = (_start_ticks(worker.pid), _boot_id())
        return start == (worker.start_ticks, worker.boot_id)
    try:
        return bool(psutil.Process(worker.pid).create_time() == worker.started_at)
    except (psutil.Error, OSError):
        return False


def _start_ticks(pid: int) -> int | None:
    """Clock ticks from the boot to the process's start; None elsewhere than on Linux."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        # The name, in parentheses, may have spaces and parentheses in it; 22 is the
        # field's number in proc(5), and what follows the name begins with the third.
        return int(stat.rpartition(b")")[2].split()[22 - 3])
    except (OSError, ValueError, IndexError):
        return None


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
