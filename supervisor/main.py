"""Puts a supervisor together: home lock, fleet, HTTP server."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from supervisor.blocklist import load_blocklist
from supervisor.fleet import Fleet
from supervisor.gateway import server
from supervisor.gateway.announce import Announcer
from supervisor.metrics import Metrics
from supervisor.settings import Settings

log = logging.getLogger(__name__)

#: Says who holds the home; the lock itself is on the folder.
HOLDER_FILE = "supervisor.pid"


class HomeUnusable(Exception):
    """The home folder cannot be made or entered; the message says which and why."""


class HomeInUse(HomeUnusable):
    """Another supervisor holds this home."""


@contextlib.contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Hold the home folder, making it if need be; only one supervisor may write its state.

    The lock is on the folder itself, which works on a read-only disk as well: the
    server then runs, and remembers nothing. The kernel drops it with the process,
    however that dies. Raises ``HomeInUse``, or ``HomeUnusable`` for no folder at all.
    """
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise HomeUnusable(
            f"cannot use {home} as the home folder (--home / OPTA_LMX_HOME): {error.strerror}"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HomeInUse(
                f"another opta-lmx ({_holder(home)}) uses {home}; stop it, "
                "or choose another folder with --home / OPTA_LMX_HOME"
            ) from None
        try:
            (home / HOLDER_FILE).write_text(f"pid {os.getpid()}\n")
        except OSError as error:
            log.error(
                "%s cannot be written (%s): failures, quarantines and incidents of this run "
                "will be forgotten at its end",
                home,
                error.strerror,
            )
        yield
    finally:
        os.close(handle)


def _holder(home: Path) -> str:
    try:
        return (home / HOLDER_FILE).read_text()[:32].strip() or "starting"
    except (OSError, UnicodeDecodeError):
        return "of unknown pid"


def run(settings: Settings, reread: Callable[[], Settings]) -> None:
    """Serve until a signal ends it. ``reread`` reads the settings anew, for a reload.

    Raises ``HomeUnusable``, ``BlocklistError``, ``BindRefused`` or ``OSError`` when
    it cannot start.
    """
    server.require_keys(settings)
    with home_lock(settings.home), contextlib.closing(server.bind(settings)) as listener:
        asked_port, port = settings.port, listener.getsockname()[1]

        def with_real_port(settings: Settings) -> Settings:
            given = settings.port
            return msgspec.structs.replace(settings, port=port if given == asked_port else given)

        settings = with_real_port(settings)

        metrics = Metrics()
        blocklist = load_blocklist(settings.home)
        announcer = Announcer(settings)
        fleet = Fleet(settings, metrics, blocklist, on_autoload=announcer.loaded)
        announcer.started()
        server.run(fleet, settings, metrics, listener, lambda: with_real_port(reread()))
