"""Makes sure that a worker never outlives its supervisor, before anything heavy is imported.

Three independent nets: the kernel's parent-death signal (Linux), a pipe whose
other end only the supervisor holds, and a check that the parent is still the
one that spawned us, for a death between ``fork`` and the first two.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from typing import NoReturn

#: ``prctl`` option from linux/prctl.h.
PR_SET_PDEATHSIG = 1

#: Exit status of a worker that found itself without its supervisor.
EXIT_ORPHANED = 75


def arm(parent_pid: int, death_fd: int) -> None:
    """Install all nets. Exits the process when the parent is already gone."""
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.set_inheritable(death_fd, False)
    threading.Thread(
        target=_die_with_pipe, args=(death_fd,), name="death-pipe", daemon=True
    ).start()
    if os.getppid() != parent_pid:
        os._exit(EXIT_ORPHANED)


def _die_with_pipe(death_fd: int) -> NoReturn:
    # Nothing is ever written: the read returns only when the last write end,
    # the supervisor's, is closed.
    with contextlib.suppress(OSError):
        while os.read(death_fd, 1):
            pass
    os.killpg(0, signal.SIGKILL)
    os._exit(EXIT_ORPHANED)
