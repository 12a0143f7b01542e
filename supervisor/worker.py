"""A worker process and the channel to it, whoever listens to it at the moment."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import Protocol

from protocol.handshake import WorkerBoot
from protocol.messages import FromWorker, Hello
from supervisor.channel import Channel
from supervisor.process import WorkerProcess
from supervisor.services import Services


class Listener(Protocol):
    """Who is told of what a worker says and does, on the event loop."""

    def on_message(self, message: FromWorker) -> None: ...

    def on_violation(self, reason: str) -> None: ...

    def on_exit(self) -> None:
        """The process is gone; called once, and nothing is said afterwards."""


class Worker:
    """Spawned at once, to load ``backend`` and wait for a model.

    ``hello`` is what the worker has said of itself,
    once its listener has seen and kept it. Raises ``OSError`` or ``zmq.ZMQError`` when the
    process or its sockets cannot be made.
    """

    def __init__(
        self, backend: str, services: Services, listener: Listener, *, generation: int, name: str
    ) -> None:
        settings = services.settings
        self._listener = listener
        self.hello: Hello | None = None
        self._ledger = services.ledger
        with contextlib.ExitStack() as always, contextlib.ExitStack() as undo:
            death_read, self._death_write = os.pipe()
            always.callback(os.close, death_read)
            undo.callback(os.close, self._death_write)
            self.channel = Channel(
                services.zmq_context,
                services.sockets.path,
                secrets.token_hex(4),
                on_message=listener.on_message,
                on_violation=listener.on_violation,
            )
            undo.callback(self.channel.close)
            self.boot = WorkerBoot(
                data_endpoint=self.channel.data_endpoint,
                beat_endpoint=self.channel.beat_endpoint,
                nonce=secrets.token_hex(16),
                generation=generation,
                backend=backend,
                parent_pid=os.getpid(),
                death_fd=death_read,
                beat_interval_s=settings.beat_interval_s,
                quiet_beat_interval_s=settings.beat_timeout_s / 4,
            )
            self.process = WorkerProcess(
                self.boot,
                death_read,
                on_exit=self._on_exit,
                name=name,
                mark=services.server_mark + self.boot.nonce,
            )
            undo.pop_all()
        self._ledger.add(self.process.pid)
        self.spawned_at = time.monotonic()

    def listen(self, listener: Listener) -> None:
        """From now on this one is told."""
        self._listener = listener
        self.channel.on_message = listener.on_message
        self.channel.on_violation = listener.on_violation

    def _on_exit(self) -> None:
        os.close(self._death_write)
        self._ledger.remove(self.process.pid)
        self._listener.on_exit()
