"""One backend's try at a model, in a worker of its own: load, canary, and away with it.

Beside the models that are loaded, and without a trace in the model's account: nothing is
restarted here, counted or quarantined.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace

from protocol.errors import UNCOUNTED_LOAD_FAILURES, ErrorCode
from supervisor.canary import CanaryReport
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.lifecycle import (
    CanaryPassed,
    LoadRefused,
    Readiness,
    WorkerExited,
    WorkerFailed,
    failure_code,
)
from supervisor.quarantine import FailureKind
from supervisor.recorder import PASSED
from supervisor.requests import RequestTable
from supervisor.services import Services
from supervisor.sideworker import SideWorker

log = logging.getLogger(__name__)

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
        buffer_bytes = services.settings.max_stream_buffer_bytes
        table = RequestTable(max_stream_buffer_bytes=buffer_bytes)
        self.worker = SideWorker(NAME, spec, services, requests=table, purpose="a probe")

    async def run(self, timeout_s: float) -> Ended:
        """Wait for the outcome, ``timeout_s`` at most, and for the end of the worker.

        Who is cancelled calls it off: the worker is gone when the cancellation is through.
        """
        try:
            generation = self.worker.spawn()
        except Exception as error:
            log.debug("%s: not spawned", self._spec.model_id, exc_info=True)
            self._services.sockets.renew()
            return Ended(f"no worker could be started: {error}", ErrorCode.INTERNAL_ERROR)
        passed = False
        try:
            ended = await self._outcome(generation, timeout_s)
            passed = ended.code is None
        finally:
            await self.worker.end(broken=not passed)
        # What it still said is there only now.
        return replace(ended, output_tail=generation.output_tail)

    async def _outcome(self, generation: Generation, timeout_s: float) -> Ended:
        worker = self.worker
        try:
            async with asyncio.timeout(timeout_s):
                event = await worker.decision(strict=self._strict)
        except TimeoutError:
            code = failure_code(self._phase, FailureKind.LOAD_TIMEOUT)
            return Ended(f"not through within the {timeout_s:g} s of this probe", code)
        memory_gb = worker.memory_gb()
        match event:
            case CanaryPassed():
                parts_s, report = generation.case.parts_s(), worker.prover.report
                ended = Ended(PASSED, telling=True, report=report, parts_s=parts_s)
            case LoadRefused(code=code, reason=reason):
                ended = Ended(reason, code, telling=code in UNCOUNTED_LOAD_FAILURES)
            case WorkerFailed(reason=reason) if event is worker.displaced:
                ended = Ended(reason, ErrorCode.INSUFFICIENT_MEMORY)
            case WorkerFailed(kind=kind, reason=reason) | WorkerExited(kind=kind, reason=reason):
                ended = Ended(reason, failure_code(self._phase, kind), kind, telling=True)
            case _:
                raise AssertionError(f"{event} decides nothing")
        return replace(ended, memory_gb=memory_gb)

    @property
    def _phase(self) -> Readiness:
        started = self.worker.prover.started
        return Readiness.CANARY_PENDING if started else Readiness.LOADING
