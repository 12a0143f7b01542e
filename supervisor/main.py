"""Puts a supervisor together: home lock, fleet, HTTP server."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec

from supervisor.blocklist import load_blocklist
from supervisor.fleet import Fleet
from supervisor.gateway import server
from supervisor.gateway.announce import announce
from supervisor.metrics import Metrics
from supervisor.settings import Settings

LOCK_FILE = "supervisor.lock"


class HomeInUse(Exception):
    """Another supervisor holds this home."""


@contextlib.contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Hold the home folder, making it if need be; only one supervisor may write its state.

    The kernel drops the lock with the process, however it dies. Raises
    ``HomeInUse``, or ``OSError`` when the folder cannot be made or written.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = home / LOCK_FILE
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise HomeInUse(
                f"another opta-lmx (pid {holder}) uses {home}; stop it, "
                "or set OPTA_LMX_HOME to another folder"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def run(settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises ``HomeInUse``, ``BlocklistError``, ``BindRefused`` or ``OSError`` when it
    cannot start.
    """
    server.require_keys(settings)
    with home_lock(settings.home), contextlib.closing(server.bind(settings)) as listener:
        settings = msgspec.structs.replace(settings, port=listener.getsockname()[1])

        metrics = Metrics()
        blocklist = load_blocklist(settings.home)
        fleet = Fleet(settings, metrics, blocklist, on_autoload=partial(announce, settings))
        server.run(fleet, settings, metrics, listener)
