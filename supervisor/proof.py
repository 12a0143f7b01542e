"""A canary against a loaded worker, and what came of it as a lifecycle event."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from protocol.errors import ErrorCode
from protocol.messages import Job, Loaded, ModelKind
from supervisor.canary import CanaryFailed, CanaryImpossible, CanaryReport, run_canary
from supervisor.embedding_canary import run_embedding_canary
from supervisor.lifecycle import CanaryPassed, Event, LoadRefused, RunCanary, WorkerFailed
from supervisor.quarantine import FailureKind
from supervisor.requests import RequestTable
from supervisor.stream import RequestStream


async def prove(
    requests: RequestTable, model: Loaded, command: RunCanary, *, timeout_s: float
) -> tuple[Event, CanaryReport | None]:
    """Run the canary that was commanded, through ``requests``; a report if it passed."""

    def submit(request: Job) -> RequestStream:
        return requests.open(request, streaming=True, is_canary=True)

    number = command.generation
    try:
        async with asyncio.timeout(timeout_s):
            if model.kind is ModelKind.GENERATE:
                report = await run_canary(
                    submit,
                    has_chat_template=model.has_chat_template,
                    context_length=model.context_length,
                    strict=command.strict,
                )
            else:
                report = await run_embedding_canary(
                    submit, dimensions=model.dimensions, kind=model.kind, strict=command.strict
                )
    except CanaryImpossible as error:
        return LoadRefused(number, ErrorCode.INVALID_VALUE, str(error)), None
    except (CanaryFailed, TimeoutError) as error:
        reason = str(error) or f"not passed within {timeout_s:.0f} s"
        failure = f"canary: {reason}"
        return WorkerFailed(number, FailureKind.CANARY, failure, random.random()), None
    return CanaryPassed(number), report


class Prover:
    """Runs canaries through ``requests``, one at a time, and posts what comes of each.

    ``report`` is that of the last one that passed; ``started``: one runs, or has ended by itself.
    """

    def __init__(self, requests: RequestTable, post: Callable[[Event], None]) -> None:
        self.report: CanaryReport | None = None
        self._requests = requests
        self._post = post
        self._task: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        return self._task is not None

    def start(self, model: Loaded, command: RunCanary, *, timeout_s: float) -> None:
        self._task = asyncio.create_task(self._run(model, command, timeout_s))

    def cancel(self) -> None:
        """Its worker is lost. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self, model: Loaded, command: RunCanary, timeout_s: float) -> None:
        event, self.report = await prove(self._requests, model, command, timeout_s=timeout_s)
        self._post(event)
