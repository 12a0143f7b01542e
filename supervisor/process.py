"""One worker process: spawn it, learn of its death at once, bring it down.

Must be used from the main thread: the kernel's parent-death signal is tied to
the thread that spawned the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from protocol.handshake import BOOT_ENV, WorkerBoot, encode_boot
from supervisor.marks import MARK_ENV, own_environment
from supervisor.quarantine import FailureKind

log = logging.getLogger(__name__)

#: From linux/sched.h, of the flags in ``/proc/PID/stat``.
_PF_EXITING = 0x4

#: Between SIGTERM and SIGKILL for a worker from which nothing is expected.
BROKEN_GRACE_S = 1.0

#: After a SIGKILL. Who is not gone by then hangs in the kernel, and may do so for ever.
KILL_TIMEOUT_S = 10.0

#: How much of a worker's output is kept for the reason of a failure, and read in one turn
#: of the event loop: a worker that floods must not starve everybody else. It is also what
#: a pipe holds.
OUTPUT_TAIL_BYTES = 64 * 1024


#: glibc asks for huge pages where it maps much at once, if the system leaves that to programs:
#: a KV cache of 190 MB is there in 30 ms instead of 130. Others do not read it.
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def worker_environment(boot: WorkerBoot, mark: str) -> dict[str, str]:
    """Ours without our settings, the worker's boot record, and what its libraries are to do."""
    own = own_environment()
    tunables = own.get(_TUNABLES, "")
    if _HUGE_PAGES not in tunables:
        tunables = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    return {
        **own,
        _TUNABLES: tunables,
        # A worker loads what is on disk; it never asks a hub.
        "HF_HUB_OFFLINE": "1",
        MARK_ENV: mark,
        BOOT_ENV: encode_boot(boot),
    }


class WorkerProcess:
    """A spawned worker, in a session and process group of its own.

    ``on_exit`` is called on the event loop exactly once, after the process was
    reaped. Raises ``OSError`` when it cannot be spawned.
    """

    def __init__(
        self,
        boot: WorkerBoot,
        death_fd: int,
        *,
        on_exit: Callable[[], None],
        name: str,
        mark: str,
    ) -> None:
        self.mark = mark
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self.name = name
        self._tail = bytearray()
        self._exited = asyncio.Event()
        output_read, output_write = os.pipe()
        self._output: int | None = output_read
        try:
            with _signal_ignored(signal.SIGUSR1):
                # -P keeps the current folder out of the import path: our import
                # names are generic enough to be shadowed by a user's own files.
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", "-m", "worker"],
                    stdin=subprocess.DEVNULL,
                    stdout=output_write,
                    stderr=output_write,
                    env=worker_environment(boot, mark),
                    pass_fds=(death_fd,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(output_read)
            raise
        finally:
            os.close(output_write)
        try:
            os.set_blocking(output_read, False)
            self._loop.add_reader(output_read, self._read_output)
            self._watch()
        except BaseException:
            # Nobody would ever learn of its end.
            self._signal(signal.SIGKILL)
            self._popen.wait()
            self._close_output()
            raise

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_status(self) -> int | None:
        """As ``subprocess``: negative for a signal. None before ``on_exit``."""
        return self._popen.returncode if self._exited.is_set() else None

    @property
    def output_tail(self) -> str:
        """The last of what the worker wrote to stdout and stderr."""
        return self._tail.decode(errors="replace")

    def describe_exit(self) -> tuple[FailureKind, str]:
        """What the exit status says. Only after ``on_exit``."""
        status = self.exit_status
        assert status is not None
        if status >= 0:
            return FailureKind.EXIT, f"exited with status {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return FailureKind.SIGNAL, f"killed by {name}"

    async def stop(self, *, grace_s: float, broken: bool) -> bool:
        """SIGTERM, then SIGKILL after ``grace_s``, to the group; waits for the end.

        A worker that is not ``broken`` was asked to shut down before this call and
        gets ``grace_s`` for that, too; from a broken one nothing is expected. False
        if not even SIGKILL ends it in time; ``on_exit`` is called when it does.
        """
        if not broken and await self._wait(grace_s):
            return True
        if not self._exited.is_set():
            self._signal(signal.SIGKILL if broken and self.is_stopped() else signal.SIGTERM)
        if await self._wait(min(grace_s, BROKEN_GRACE_S) if broken else grace_s):
            return True
        self._signal(signal.SIGKILL)
        return await self._wait(KILL_TIMEOUT_S)

    def is_stopped(self) -> bool:
        """Whether whatever it is sent, a SIGTERM too, waits for the process to be continued."""
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        except (psutil.Error, OSError):
            return False

    def is_dead(self) -> bool:
        """Whether the process has ended or is about to, also before ``on_exit`` told so."""
        if _is_exiting(self.pid):
            return True
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
        except (psutil.Error, OSError):
            return False

    def dump_stacks(self) -> None:
        """Make the worker print its Python stacks; they appear in ``output_tail``."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    def _signal(self, number: signal.Signals) -> None:
        # The group, not the process: a backend may have started helpers.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _wait(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        except TimeoutError:
            return False
        return True

    def _watch(self) -> None:
        try:
            pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):
            # No pidfd here (macOS, old kernels): a thread waits instead.
            threading.Thread(target=self._wait_in_thread, daemon=True).start()
            return

        def ended() -> None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
            self._reap()

        try:
            self._loop.add_reader(pidfd, ended)
        except BaseException:
            os.close(pidfd)
            raise

    def _wait_in_thread(self) -> None:
        _await_end(self.pid)
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            self._loop.call_soon_threadsafe(self._reap)

    def _reap(self) -> None:
        # Helpers of the worker go first: while it is a zombie, the number of
        # its group cannot have been given to somebody else.
        self._signal(signal.SIGKILL)
        self._popen.wait()
        # What is in the pipe now is all there will be from the worker itself; a
        # helper that inherited the pipe could hold it open, or fill it, for ever.
        self._read_output()
        self._close_output()
        self._exited.set()
        self._on_exit()

    def _read_output(self) -> None:
        """Read once; the loop calls again while there is more."""
        if self._output is None:
            return
        try:
            data = os.read(self._output, OUTPUT_TAIL_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close_output()
            return
        self._tail += data
        del self._tail[:-OUTPUT_TAIL_BYTES]
        if log.isEnabledFor(logging.DEBUG):
            for line in data.decode(errors="replace").splitlines():
                log.debug("%s: %s", self.name, line)

    def _close_output(self) -> None:
        if self._output is not None:
            self._loop.remove_reader(self._output)
            os.close(self._output)
            self._output = None


@contextlib.contextmanager
def _signal_ignored(number: signal.Signals) -> Iterator[None]:
    """A child spawned here ignores it until it says otherwise: the request for its stacks
    would end a worker that hangs before it knows how to answer."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)


def _is_exiting(pid: int) -> bool:
    """Whether Linux has begun to take it down: for a while it is neither there nor a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & _PF_EXITING)


def _await_end(pid: int) -> None:
    """Block until our child has ended, and leave it to be reaped."""
    if hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return
    # macOS before Python 3.13.
    kernel: Any = select
    event = kernel.kevent(
        pid, kernel.KQ_FILTER_PROC, kernel.KQ_EV_ADD | kernel.KQ_EV_ONESHOT, kernel.KQ_NOTE_EXIT
    )
    # It may be a zombie already, which cannot be watched any more.
    with contextlib.closing(kernel.kqueue()) as queue, contextlib.suppress(ProcessLookupError):
        queue.control([event], 1, None)
