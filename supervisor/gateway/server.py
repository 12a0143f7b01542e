"""Runs the application under uvicorn, and tells the operator where.

The socket is bound before anything else starts, so that a port in use costs no
model load. Shutdown: no new connections, ``shutdown_grace_s`` for what is
running, then the fleet stops and answers everyone who still waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import signal
import socket
from collections.abc import Iterator

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from protocol.errors import CodedError, ErrorCode
from supervisor.fleet import Fleet
from supervisor.gateway.app import create_app
from supervisor.gateway.auth import is_loopback
from supervisor.gateway.errors import error_body
from supervisor.metrics import Metrics
from supervisor.settings import Settings

log = logging.getLogger(__name__)

_BACKLOG = 2048
#: Between the fleet's stop and the cancellation of a handler that still runs.
_LAST_RESORT_S = 5.0


class BindRefused(Exception):
    """The address is taken, unknown, or not to be served without keys; the message says which."""


def run(
    fleet: Fleet,
    settings: Settings,
    metrics: Metrics,
    listener: socket.socket | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. Returns after every worker is gone.

    Raises ``BindRefused``. ``listener`` comes from ``bind``; it is closed at the end.
    """
    require_keys(settings)
    with contextlib.closing(listener or bind(settings)) as sock:
        server = create_server(fleet, settings, metrics)
        log.info("listening on %s", base_url(settings, sock))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve(sockets=[sock]))


def create_server(fleet: Fleet, settings: Settings, metrics: Metrics) -> Server:
    """A server ready for ``serve(sockets=[...])`` on the main thread's event loop."""
    config = uvicorn.Config(
        create_app(fleet, settings, metrics),
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(
            settings.shutdown_grace_s + settings.stop_grace_s + _LAST_RESORT_S
        ),
    )
    return Server(config, fleet, settings.shutdown_grace_s)


def require_keys(settings: Settings) -> None:
    """Refuse to offer an open side to the network."""
    if is_loopback(settings.host) or settings.allow_unauthenticated:
        return
    missing = [name for name in ("admin_key", "api_key") if getattr(settings, name) is None]
    if missing:
        raise BindRefused(
            f"host {settings.host!r} is reachable from outside: set {' and '.join(missing)}, "
            "or allow_unauthenticated to serve without"
        )


def bind(settings: Settings) -> socket.socket:
    """A listening socket on ``settings.host`` and ``settings.port`` (0: any free one)."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise BindRefused(f"cannot listen on {where}: {error.strerror or error}") from error


def base_url(settings: Settings, listener: socket.socket | None = None) -> str:
    """Where a client on this machine reaches the server."""
    port = settings.port if listener is None else listener.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server with our order of shutdown, a quiet idle and exit status 0."""

    def __init__(self, config: uvicorn.Config, fleet: Fleet, grace_s: float) -> None:
        super().__init__(config)
        self._fleet = fleet
        self._grace_s = grace_s
        self.exit_asked = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again afterwards: the process would die
        # of it before its caller has cleaned up.
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for signum in handled:
            loop.add_signal_handler(signum, self.ask_exit)
        try:
            yield
        finally:
            for signum in handled:
                loop.remove_signal_handler(signum)

    def ask_exit(self) -> None:
        """Begin the shutdown. Asked twice: don't wait for requests that are running."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.exit_asked.set()

    async def main_loop(self) -> None:
        # Once a second for the Date header; uvicorn's own wakes ten times as often.
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.exit_asked.wait(), 1.0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.create_task(self._stop_fleet_after_grace())
        try:
            await super().shutdown(sockets)
        finally:
            stopping.cancel()
            # uvicorn skips the lifespan's end when it was told to hurry: workers
            # must be gone all the same.
            await self._fleet.stop()

    async def _stop_fleet_after_grace(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s):
                while not self.force_exit:
                    self.exit_asked.clear()
                    await self.exit_asked.wait()
        await self._fleet.stop()


class _Protocol(HttpToolsProtocol):
    """Answers what is not HTTP in the same envelope as everything else."""

    def send_400_response(self, msg: str) -> None:
        body = error_body(CodedError(ErrorCode.INVALID_VALUE, msg))
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {secrets.token_hex(16)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[400] + head.encode() + body)
        self.transport.close()
