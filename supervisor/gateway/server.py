"""Runs the application under uvicorn, and tells the operator where.

The socket is bound before anything else starts, so that a port in use costs no
model load. Shutdown: no new connections, ``shutdown_grace_s`` for what is
running, then the fleet stops and answers everyone who still waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
import uvloop

from protocol.errors import CodedError
from supervisor.fleet import Fleet
from supervisor.gateway.app import application, create_gateway
from supervisor.gateway.auth import BindRefused as BindRefused
from supervisor.gateway.auth import how_to_set, is_loopback, open_sides_of
from supervisor.gateway.auth import require_keys as require_keys
from supervisor.gateway.connection import protocol
from supervisor.gateway.endpoint import Gateway
from supervisor.gateway.reload import reload
from supervisor.gateway.websocket import WebSocketConnection
from supervisor.metrics import Metrics
from supervisor.settings import Settings
from supervisor.terminal import has_terminal

log = logging.getLogger(__name__)

_BACKLOG = 2048
#: Between the fleet's stop and the cancellation of a handler that still runs.
_LAST_RESORT_S = 5.0
_LET_GO_S = 1.0

#: Bind addresses that mean all of the machine's, and the one to call it by from here.
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def run(
    fleet: Fleet,
    settings: Settings,
    metrics: Metrics,
    listener: socket.socket | None = None,
    reread: Callable[[], Settings] | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM, or the end of the terminal. Returns after every worker is gone.

    Raises ``BindRefused``. ``listener`` comes from ``bind``; it is closed at the end. ``reread``
    reads the settings anew, for a reload.
    """
    require_keys(settings)
    with contextlib.closing(listener or bind(settings)) as sock:
        server = create_server(fleet, settings, metrics, reread)
        log.info("listening on %s%s", base_url(settings, sock), bound_to(settings, sock))
        if not is_loopback(settings.host) and (open_sides := open_sides_of(settings)):
            log.warning(
                "everyone who can reach this address may use %s: there is no %s",
                " and ".join(open_sides.values()),
                " and no ".join(map(how_to_set, open_sides)),
            )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve(sockets=[sock]))


def create_server(
    fleet: Fleet,
    settings: Settings,
    metrics: Metrics,
    reread: Callable[[], Settings] | None = None,
) -> Server:
    """A server ready for ``serve(sockets=[...])`` on the main thread's event loop."""
    gateway = create_gateway(fleet, settings, metrics, reread or (lambda: settings))
    config = uvicorn.Config(
        application(gateway),
        http=protocol(settings.header_timeout_s, settings.drain_timeout_s),
        ws=WebSocketConnection,
        ws_max_size=settings.max_body_bytes,
        # For small frames between machines that are near, it only takes time.
        ws_per_message_deflate=False,
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
    return Server(config, gateway)


def bind(settings: Settings) -> socket.socket:
    """A listening socket on ``settings.host`` and ``settings.port`` (0: any free one)."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        hint = f"; choose another with {how_to_set('port')}" * (error.errno == errno.EADDRINUSE)
        raise BindRefused(f"cannot listen on {where}: {error.strerror or error}{hint}") from error


def base_url(settings: Settings, listener: socket.socket | None = None) -> str:
    """Where a client on this machine reaches the server."""
    port = settings.port if listener is None else listener.getsockname()[1]
    host = _EVERY_ADDRESS.get(settings.host, settings.host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bound_to(settings: Settings, listener: socket.socket | None = None) -> str:
    """What to say after ``base_url`` when that is only one of the ways in; else nothing."""
    if settings.host not in _EVERY_ADDRESS:
        return ""
    port = settings.port if listener is None else listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f" (bound to {host}:{port}, every address of this machine)"


class Server(uvicorn.Server):
    """uvicorn's server with our order of shutdown, a quiet idle and exit status 0."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._fleet = gateway.fleet
        self._grace_s = gateway.settings.shutdown_grace_s
        self._had_terminal = False
        self._reloads: set[asyncio.Task[None]] = set()
        self.exit_asked = asyncio.Event()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            # After a fault of ours there was no shutdown. The process has to end, for
            # a service manager to start it anew, and its sockets would keep it.
            await self._fleet.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again afterwards: the process would die
        # of it before its caller has cleaned up.
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGINT: self.ask_exit, signal.SIGTERM: self.ask_exit}
        # nohup ignores it so that the server outlives its terminal.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = self._on_hangup
        self._had_terminal = has_terminal()
        for signum, handler in handlers.items():
            loop.add_signal_handler(signum, handler)
        try:
            yield
        finally:
            for signum in handlers:
                loop.remove_signal_handler(signum)
            for task in self._reloads:
                task.cancel()

    def _on_hangup(self) -> None:
        """Somebody wants a reload; or it is what the signal was made for: the terminal of a
        server in the foreground is gone, and nobody would ever stop it."""
        if self._had_terminal and not has_terminal():
            self.ask_exit()
        elif not self.should_exit:
            task = asyncio.create_task(self._reload_config(), name="reload")
            self._reloads.add(task)
            task.add_done_callback(self._reloads.discard)

    async def _reload_config(self) -> None:
        # What was wrong with it is in the log.
        with contextlib.suppress(CodedError):
            await reload(self._gateway)

    def ask_exit(self) -> None:
        """Begin the shutdown. Asked twice: don't wait for requests that are running."""
        if self.should_exit:
            log.info("stopping now")
        else:
            log.info("stopping; waiting up to %g s for running requests", self._grace_s)
        self.force_exit = self.should_exit
        self.should_exit = True
        self.exit_asked.set()

    async def main_loop(self) -> None:
        # Once a second for the Date header; uvicorn's own wakes ten times as often. At
        # the moments at which workers beat and are looked at: one wake-up for it all.
        loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            due = math.floor(loop.time()) + 1.0
            try:
                async with asyncio.timeout_at(due):
                    await self.exit_asked.wait()
            except TimeoutError:
                self._gateway.lag.note(loop.time() - due)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Who follows what happens is not waited for: from here on they would see no end.
        self._fleet.journal.close()
        stopping = asyncio.create_task(self._stop_fleet_after_grace())
        try:
            await super().shutdown(sockets)
        finally:
            stopping.cancel()
            # uvicorn skips the lifespan's end when it was told to hurry: workers
            # must be gone all the same.
            await self._fleet.stop()
            if self.force_exit:
                await self._let_go()

    async def _let_go(self) -> None:
        """See the end of what uvicorn leaves behind when it was told to hurry.

        The loop's end would cancel it, and uvicorn log each as a crash.
        """
        # Everyone who waited for a model has just been answered by the fleet.
        if self.server_state.tasks:
            await asyncio.wait(list(self.server_state.tasks), timeout=_LET_GO_S)
        # Who still does not come to an end waits for a client.
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(list(self.server_state.tasks), timeout=_LET_GO_S)
        await self.lifespan.shutdown()

    async def _stop_fleet_after_grace(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s):
                while not self.force_exit:
                    self.exit_asked.clear()
                    await self.exit_asked.wait()
        await self._fleet.stop()
