"""One backend's try at a model, in a worker of its own: load, canary, and away with it.

Beside the models that are loaded, and without a trace in the model's account: nothing is
restarted here, counted or quarantined.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from protocol.errors import UNCOUNTED_LOAD_FAILURES, ErrorCode
from supervisor.canary import CanaryReport
from supervisor.footprint import resident_gb
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.lifecycle import (
    CanaryPassed,
    Event,
    LoadRefused,
    Readiness,
    RunCanary,
    WorkerExited,
    WorkerFailed,
    WorkerLoaded,
    failure_code,
)
from supervisor.memory import Footprint
from supervisor.proof import Prover
from supervisor.quarantine import FailureKind
from supervisor.recorder import PASSED
from supervisor.requests import RequestTable
from supervisor.services import Services

log = logging.getLogger(__name__)

#: The generation of every trial; those of loads begin with 1.
NUMBER = 0

#: For whoever watches its memory. No id begins with a slash.
NAME = "/trial"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a trial ended. ``report`` and ``parts_s`` (see ``CaseFile``) are those of a pass.

    ``telling``: it says something about the model on this backend, not only about this
    trial or this machine; ``kind`` is that of a failure.
    """

    reason: str
    code: ErrorCode | None = None
    kind: FailureKind | None = None
    telling: bool = False
    report: CanaryReport | None = None
    parts_s: dict[str, float] = field(default_factory=dict)
    memory_gb: float | None = None
    output_tail: str = ""


class Trial:
    """``run`` it once. ``strict`` is that of ``RunCanary``."""

    def __init__(self, spec: ModelSpec, services: Services, *, strict: bool) -> None:
        self._spec = spec
        self._services = services
        self._strict = strict
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._requests = RequestTable(
            max_stream_buffer_bytes=services.settings.max_stream_buffer_bytes
        )
        self._generation: Generation | None = None
        self._prover = Prover(self._requests, self._events.put_nowait)
        self._size = 0
        self._short_of_memory: str | None = None
        self._ending = self._gone = False

    async def run(self, timeout_s: float) -> Ended:
        """Wait for the outcome, ``timeout_s`` at most, and for the end of the worker.

        Who is cancelled calls it off: the worker is gone when the cancellation is through.
        """
        try:
            self._generation = generation = Generation(
                NUMBER,
                self._spec,
                self._services,
                requests=self._requests,
                post=self._events.put_nowait,
            )
        except Exception as error:
            log.debug("%s: not spawned", self._spec.model_id, exc_info=True)
            self._services.sockets.renew()
            return Ended(f"no worker could be started: {error}", ErrorCode.INTERNAL_ERROR)
        passed = False
        try:
            ended = await self._outcome(generation, timeout_s)
            passed = ended.code is None
        finally:
            await self._end(generation, broken=not passed)
        # What it still said is there only now.
        return replace(ended, output_tail=generation.output_tail)

    @property
    def path(self) -> Path:
        """Where its model is."""
        return self._spec.files.path

    # --- for the memory watch; see ``Actor`` ---

    @property
    def worker(self) -> tuple[int, int] | None:
        if self._generation is None or self._generation.exit_status is not None:
            return None
        return NUMBER, self._generation.pid

    @property
    def dying(self) -> bool:
        return self._ending and not self._gone

    def footprint(self, generation: int, size: int) -> Footprint | None:
        """All that it holds is its growth: before it came, the memory was enough."""
        self._size = max(self._size, size)
        return Footprint(NAME, generation, size, 0, self._spec.memory_limit_bytes)

    def fail(self, generation: int, kind: FailureKind, reason: str) -> None:
        limit = self._spec.memory_limit_bytes
        if limit is None or self._size <= limit:
            # It had to go for the others' sake.
            self._short_of_memory = reason
        self._events.put_nowait(WorkerFailed(generation, kind, reason))

    # --- inside ---

    async def _outcome(self, generation: Generation, timeout_s: float) -> Ended:
        try:
            async with asyncio.timeout(timeout_s):
                event = await self._decision(generation)
        except TimeoutError:
            code = failure_code(self._phase, FailureKind.LOAD_TIMEOUT)
            return Ended(f"not through within the {timeout_s:g} s of this probe", code)
        memory_gb = resident_gb(generation.pid) or self._size / 1e9 or None
        match event:
            case CanaryPassed():
                parts_s = generation.case.parts_s()
                ended = Ended(PASSED, telling=True, report=self._prover.report, parts_s=parts_s)
            case LoadRefused(code=code, reason=reason):
                ended = Ended(reason, code, telling=code in UNCOUNTED_LOAD_FAILURES)
            case WorkerFailed(reason=reason) if self._short_of_memory is not None:
                ended = Ended(reason, ErrorCode.INSUFFICIENT_MEMORY)
            case WorkerFailed(kind=kind, reason=reason) | WorkerExited(kind=kind, reason=reason):
                ended = Ended(reason, failure_code(self._phase, kind), kind, telling=True)
            case _:
                raise AssertionError(f"{event} decides nothing")
        return replace(ended, memory_gb=memory_gb)

    @property
    def _phase(self) -> Readiness:
        return Readiness.CANARY_PENDING if self._prover.started else Readiness.LOADING

    async def _decision(self, generation: Generation) -> Event:
        """The event that settles it."""
        while isinstance(event := await self._next_event(), WorkerLoaded):
            self._requests.connect(generation.send)
            assert generation.model is not None
            command = RunCanary(NUMBER, self._strict)
            timeout_s = self._services.settings.canary_timeout_s
            self._prover.start(generation.model, command, timeout_s=timeout_s)
        return event

    async def _next_event(self) -> Event:
        event = await self._events.get()
        self._gone = self._gone or isinstance(event, WorkerExited)
        return event

    async def _end(self, generation: Generation, *, broken: bool) -> None:
        self._ending = True
        self._requests.disconnect()
        self._prover.cancel()
        generation.stop(broken=broken)
        # It comes in any case, also of a process that cannot be killed.
        while not self._gone:
            await self._next_event()
