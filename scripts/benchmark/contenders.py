"""What a contender is, and those that are ours: Opta-LMX and the backend it runs on."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from benchmark.children import Child, Player, free_port, running
from benchmark.plan import Answer, Failed, Plan
from benchmark.ready import await_http, get

#: What every server calls the model.
MODEL = "bench"


@dataclass(frozen=True)
class Setup:
    """What is the same for all: the model, and how much of it runs at once.

    ``context`` is in tokens per sequence; ``pool`` is what sequences get that share one.
    """

    model: Path
    threads: int
    sequences: int
    context: int
    pool: int


class Instance(Protocol):
    """A contender that runs. ``gateway`` are the processes that only pass text on."""

    gateway: list[int]
    workers: list[int]

    def play(self, plan: Plan) -> list[Answer]:
        """Raises ``Failed``."""


class Contender(Protocol):
    """Something to measure; ``name`` is how it is chosen and reported."""

    name: str

    def missing(self) -> str | None:
        """Why it cannot be measured here, or None."""

    def run(self, setup: Setup, client: Player) -> contextlib.AbstractContextManager[Instance]:
        """Start it and wait until it is ready; stop it at the end. Raises ``Failed``."""


# --- instances ----------------------------------------------------------------------


class _Bare:
    """The bare backend takes plans as they are."""

    def __init__(self, player: Player) -> None:
        self._player = player
        self.gateway: list[int] = []
        self.workers = [player.child.pid]

    def play(self, plan: Plan) -> list[Answer]:
        return self._player.play(plan)


class HttpInstance:
    """A server is asked by the client. ``extra`` goes into every body, None takes out."""

    def __init__(
        self,
        client: Player,
        child: Child,
        port: int,
        *,
        gateway: list[int],
        workers: list[int],
        extra: dict[str, Any] | None = None,
    ) -> None:
        self._client = client
        self._child = child
        self._port = port
        self._extra = extra or {}
        self.gateway = gateway
        self.workers = workers

    def play(self, plan: Plan) -> list[Answer]:
        requests = [
            msgspec.structs.replace(request, body=self._body(request.body))
            for request in plan.requests
        ]
        try:
            return self._client.play(
                msgspec.structs.replace(plan, requests=requests, port=self._port)
            )
        except Failed:
            # If the server is gone, its last words say more than the client can.
            self._child.check()
            raise

    def _body(self, body: dict[str, Any]) -> dict[str, Any]:
        merged = {"model": MODEL, "ignore_eos": True, **body, **self._extra}
        return {name: value for name, value in merged.items() if value is not None}


# --- contenders ---------------------------------------------------------------------


class Bare:
    """The backend's own loop."""

    name = "bare"

    def missing(self) -> str | None:
        return None

    @contextmanager
    def run(self, setup: Setup, client: Player) -> Iterator[Instance]:
        player = Player(
            "bare",
            f"--model={setup.model}",
            f"--threads={setup.threads}",
            f"--sequences={setup.sequences}",
            f"--context={setup.pool}",
        )
        with running(player.child):
            player.await_ready()
            yield _Bare(player)


class OptaLmx:
    """This project: a supervisor and a worker."""

    name = "opta-lmx"

    def missing(self) -> str | None:
        return None

    @contextmanager
    def run(self, setup: Setup, client: Player) -> Iterator[Instance]:
        arguments = [
            f"--model={MODEL}={setup.model}",
            f"--threads={setup.threads}",
            f"--max-sequences={setup.sequences}",
            f"--context-length={setup.pool}",
            f"--max-queue={queue_for(setup.sequences)}",
        ]
        with serve(*arguments) as server:
            server.await_model(MODEL)
            workers = server.workers()
            yield HttpInstance(
                client, server.child, server.port, gateway=[server.child.pid], workers=workers
            )


def queue_for(requests: int) -> int:
    """A bound of the queue that lets one client have so many requests at once."""
    return max(64, 2 * requests)


@dataclass(frozen=True)
class Served:
    """An Opta-LMX server that listens."""

    child: Child
    port: int

    def await_model(self, model_id: str) -> None:
        """Wait for one named on the command line. Raises ``Failed`` with the server's words."""
        name = re.escape(model_id)
        line = self.child.await_line(f"{name} is ready|{name} failed to load")
        if not line.endswith("is ready"):
            raise Failed(line[:600])

    def workers(self) -> list[int]:
        """The workers' pids; the supervisor has other children too."""
        status, body = get(self.port, "/admin/models")
        if status != 200:
            raise Failed(f"/admin/models: HTTP {status}")
        return [model["pid"] for model in msgspec.json.decode(body)["models"] if model["pid"]]


@contextmanager
def serve(*arguments: str) -> Iterator[Served]:
    """Run ``opta-lmx serve`` with a home of its own."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="opta-bench-") as home:
        command = [sys.executable, "-P", "-m", "supervisor.cli", "serve", f"--home={home}"]
        command += [f"--port={port}", "--log-level=warning", *arguments]
        with running(Child(command)) as child:
            await_http(child, port, "/healthz")
            yield Served(child, port)
