"""Puts a supervisor together: home lock, fleet, HTTP server."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from supervisor.blocklist import load_blocklist
from supervisor.fleet import Fleet
from supervisor.gateway import server
from supervisor.gateway.announce import Announcer
from supervisor.metrics import Metrics
from supervisor.settings import Settings

LOCK_FILE = "supervisor.lock"


class HomeUnusable(Exception):
    """The home folder cannot be made or written; the message says which and why."""


class HomeInUse(HomeUnusable):
    """Another supervisor holds this home."""


@contextlib.contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Hold the home folder, making it if need be; only one supervisor may write its state.

    The kernel drops the lock with the process, however it dies. Raises
    ``HomeInUse``, or ``HomeUnusable`` when the folder cannot be made or written.
    """
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(home / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise HomeUnusable(
            f"cannot use {home} as the home folder (--home / OPTA_LMX_HOME): {error.strerror}"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise HomeInUse(
                f"another opta-lmx (pid {holder}) uses {home}; stop it, "
                "or choose another folder with --home / OPTA_LMX_HOME"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def run(settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises ``HomeUnusable``, ``BlocklistError``, ``BindRefused`` or ``OSError`` when
    it cannot start.
    """
    server.require_keys(settings)
    with home_lock(settings.home), contextlib.closing(server.bind(settings)) as listener:
        settings = msgspec.structs.replace(settings, port=listener.getsockname()[1])

        metrics = Metrics()
        blocklist = load_blocklist(settings.home)
        announcer = Announcer(settings)
        fleet = Fleet(settings, metrics, blocklist, on_autoload=announcer.loaded)
        announcer.started()
        server.run(fleet, settings, metrics, listener)
