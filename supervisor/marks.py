"""The processes of one server, known by a mark in the environment they inherit.

A worker's helpers may leave its process group and its session; the mark stays. So
they are found wherever they are, and nobody else's process ever is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

#: Carried by a worker and everything it starts.
MARK_ENV = "OPTA_LMX_WORKER_MARK"

_LOOK_INTERVAL_S = 0.01

#: Waits without Python's memory until nobody holds the other end of its stdin.
_WAIT_THEN_RUN = 'read -r line; exec "$@"'


def home_mark(home: Path) -> str:
    """What the mark of every worker of this home begins with.

    The folder itself counts, not its path alone: two containers may share the process
    ids and have each a folder of its own at the same path.
    """
    identity = os.fsencode(home)
    with contextlib.suppress(OSError):
        found = home.stat()
        identity += f"\0{found.st_dev}\0{found.st_ino}".encode()
    return hashlib.sha256(identity).hexdigest()[:16] + ":"


def server_mark(home: Path) -> str:
    """What the mark of every worker of one run of the server begins with; new each time."""
    return f"{home_mark(home)}{secrets.token_hex(8)}:"


def kill_marked(prefix: str) -> list[int]:
    """Kill the processes whose mark begins so; returns their pids. Takes some milliseconds."""
    killed = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK_ENV, "").startswith(prefix):
                process.kill()
                killed.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return killed


def end_marked(prefix: str, timeout_s: float) -> list[int]:
    """Kill them, and wait until they are gone; returns the pids of those that are not by then."""
    return await_gone(kill_marked(prefix), timeout_s)


async def end_helpers(prefix: str, timeout_s: float, name: str) -> None:
    """As ``end_marked``, off the event loop, of what the worker called ``name`` has started.

    Whatever does not end by then is told in the log.
    """
    try:
        async with asyncio.timeout(timeout_s):
            left = await asyncio.to_thread(end_marked, prefix, timeout_s)
    except TimeoutError:
        left = []
        log.warning("%s: it takes long to look for its helpers", name)
    if left:
        log.warning("%s: helpers %s do not end", name, left)


def await_gone(pids: Sequence[int], timeout_s: float) -> list[int]:
    """Wait for the end of processes that were killed; returns those still there by then."""
    deadline = time.monotonic() + timeout_s
    left = [pid for pid in pids if _holds_memory(pid)]
    while left and time.monotonic() < deadline:
        time.sleep(_LOOK_INTERVAL_S)
        left = [pid for pid in left if _holds_memory(pid)]
    return left


def still_running(pids: Iterable[int]) -> list[int]:
    """Those of them that have not ended."""
    return [pid for pid in sorted(pids) if _holds_memory(pid)]


def _holds_memory(pid: int) -> bool:
    """A zombie does not; it only waits for whoever started it."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, OSError):
        return False


def own_environment() -> dict[str, str]:
    """Our environment for a child, without our settings: among them are keys."""
    return {k: v for k, v in os.environ.items() if not k.startswith("OPTA_LMX_")}


class Janitor:
    """A process that outlives this one, however that dies, and kills what it left.

    Workers die with their supervisor by themselves; their helpers do not. It is a
    shell waiting for the end of a pipe (1 MB, no CPU). Without it, when it cannot be
    started, helpers stay until the next start of the server.
    """

    def __init__(self, prefix: str) -> None:
        """``prefix`` as for ``kill_marked``."""
        self._process: subprocess.Popen[bytes] | None = None
        clean_up = [sys.executable, "-P", "-m", __name__, prefix]
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _WAIT_THEN_RUN, "opta-lmx-janitor", *clean_up],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=own_environment(),
                start_new_session=True,
            )
        except OSError as error:
            log.warning("no janitor: %s", error)

    def dismiss(self) -> None:
        """End it: there is nothing left to clean up. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()


if __name__ == "__main__":
    kill_marked(sys.argv[1])
