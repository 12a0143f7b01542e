"""A worker beside those of the models that are loaded: brought to its canary, and to its end.

Nothing of what it does is counted or remembered here.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from supervisor.footprint import resident_gb
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.lifecycle import Event, RunCanary, WorkerExited, WorkerFailed, WorkerLoaded
from supervisor.memory import Footprint
from supervisor.proof import Prover
from supervisor.quarantine import FailureKind
from supervisor.requests import RequestTable
from supervisor.services import Services
from supervisor.worker import Worker

#: The generation of every such worker; those of loads begin with 1.
NUMBER = 0


class SideWorker:
    """One worker of ``spec``'s model, once, for ``requests``.

    ``name`` is for whoever watches its memory: no model's id, as it begins with a slash.
    ``purpose`` tells who uses the model's files; ``known`` is of ``prove``.
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        services: Services,
        *,
        requests: RequestTable,
        purpose: str,
        known: str | None = None,
    ) -> None:
        self.name = name
        self.purpose = purpose
        self.generation: Generation | None = None
        #: The largest size that was seen, in bytes.
        self.size = 0
        #: The failure that was none: it had to go for the others' sake.
        self.displaced: Event | None = None
        #: Set once the process is gone, or given up.
        self.gone = asyncio.Event()
        self._spec = spec
        self._services = services
        self._requests = requests
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.prover = Prover(requests, self._events.put_nowait, known=known)
        self._ending = False
        self._given: Worker | None = None

    def spawn(self, worker: Worker | None = None) -> Generation:
        """Start it, or give ``worker``, which waits for a model, this one. Raises whatever keeps
        a process from being made."""
        self._given = worker
        self.generation = Generation(
            NUMBER,
            self._spec,
            self._services,
            requests=self._requests,
            post=self._events.put_nowait,
            worker=worker,
        )
        return self.generation

    async def decision(self, *, strict: bool) -> Event:
        """Wait until the canary has passed, or it is clear that it will not; that event."""
        generation = self._live
        while isinstance(event := await self.event(), WorkerLoaded):
            self._requests.connect(generation.send)
            assert generation.model is not None
            command = RunCanary(NUMBER, strict)
            timeout_s = self._services.settings.canary_timeout_s
            self.prover.start(generation.model, command, timeout_s=timeout_s)
        return event

    async def event(self) -> Event:
        """Wait for the next thing that happens to it."""
        event = await self._events.get()
        if isinstance(event, WorkerExited):
            self.gone.set()
        return event

    async def end(self, *, broken: bool) -> None:
        """Bring it down, if it was spawned or given, and wait for its end."""
        self._ending = True
        self._requests.disconnect()
        self.prover.cancel()
        if self.generation is None:
            if self._given is not None:
                grace_s = self._services.settings.stop_grace_s
                await self._given.process.stop(grace_s=grace_s, broken=True)
            self.gone.set()
            return
        self.generation.stop(broken=broken)
        # It comes in any case, also of a process that cannot be killed.
        while not self.gone.is_set():
            await self.event()

    @property
    def path(self) -> Path:
        """Where its model is."""
        return self._spec.files.path

    def memory_gb(self) -> float | None:
        """What it holds, or was last seen to hold, in GB (1e9 bytes)."""
        return resident_gb(self._live.pid) or self.size / 1e9 or None

    @property
    def _live(self) -> Generation:
        assert self.generation is not None
        return self.generation

    # --- for the memory watch; see ``Standing`` ---

    @property
    def worker(self) -> tuple[int, int] | None:
        if self.generation is None or self.generation.exit_status is not None:
            return None
        return NUMBER, self.generation.pid

    @property
    def dying(self) -> bool:
        return self._ending and not self.gone.is_set()

    def footprint(self, generation: int, size: int) -> Footprint | None:
        """All that it holds is its growth: before it came, the memory was enough."""
        self.size = max(self.size, size)
        if self.generation is not None:
            self.generation.case.sample(size)
        return Footprint(self.name, generation, size, 0, self._spec.memory_limit_bytes)

    def fail(self, generation: int, kind: FailureKind, reason: str) -> None:
        event = WorkerFailed(generation, kind, reason)
        limit = self._spec.memory_limit_bytes
        if limit is None or self.size <= limit:
            self.displaced = event
        self._events.put_nowait(event)
