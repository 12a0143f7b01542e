"""A canary against a loaded worker, and what came of it as a lifecycle event.

A respawned worker that answers a short one as its predecessor did, which had passed the
whole, need not: every client of the model waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from protocol.errors import ErrorCode
from protocol.messages import Job, Loaded, ModelKind
from supervisor.canary import (
    CanaryFailed,
    CanaryImpossible,
    CanaryReport,
    Proof,
    recall,
    run_canary,
)
from supervisor.embedding_canary import run_embedding_canary
from supervisor.lifecycle import CanaryPassed, Event, LoadRefused, RunCanary, WorkerFailed
from supervisor.quarantine import FailureKind
from supervisor.requests import RequestTable
from supervisor.stream import RequestStream

log = logging.getLogger(__name__)


async def prove(
    requests: RequestTable,
    model: Loaded,
    command: RunCanary,
    *,
    timeout_s: float,
    known: str | None = None,
) -> tuple[Event, Proof | None]:
    """Run the canary that was commanded, through ``requests``; a proof if it passed.

    ``known`` is what an earlier proof recalled: None is the proof of a worker that gives the
    same answer.
    """

    def submit(request: Job) -> RequestStream:
        return requests.open(request, streaming=True, is_canary=True)

    number = command.generation
    try:
        async with asyncio.timeout(timeout_s):
            may_recall = known is not None and not command.strict
            if may_recall and known == await recall(submit, context_length=model.context_length):
                return CanaryPassed(number), None
            if model.kind is ModelKind.GENERATE:
                proof = await run_canary(
                    submit,
                    has_chat_template=model.has_chat_template,
                    context_length=model.context_length,
                    strict=command.strict,
                )
            else:
                report = await run_embedding_canary(
                    submit, dimensions=model.dimensions, kind=model.kind, strict=command.strict
                )
                proof = Proof(report)
    except CanaryImpossible as error:
        return LoadRefused(number, ErrorCode.INVALID_VALUE, str(error)), None
    except (CanaryFailed, TimeoutError) as error:
        reason = str(error) or f"not passed within {timeout_s:.0f} s"
        failure = f"canary: {reason}"
        return WorkerFailed(number, FailureKind.CANARY, failure, random.random()), None
    return CanaryPassed(number), proof


class Prover:
    """Runs canaries of one model through ``requests``, one at a time, and posts what comes of
    each. After one that failed the next is a whole one.

    ``report`` is that of the last one; None if it did not pass, or was a short one.
    ``started``: one runs, or has ended by itself. ``known`` is what the last proof recalled.
    """

    def __init__(
        self,
        requests: RequestTable,
        post: Callable[[Event], None],
        *,
        known: str | None = None,
    ) -> None:
        self.report: CanaryReport | None = None
        self.known = known
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
            if not self._task.done():
                self.known = None
            self._task.cancel()
            self._task = None

    async def _run(self, model: Loaded, command: RunCanary, timeout_s: float) -> None:
        proof: Proof | None = None
        event: Event
        try:
            event, proof = await prove(
                self._requests, model, command, timeout_s=timeout_s, known=self.known
            )
        except Exception as error:
            # Whoever waits for the canary would wait for ever.
            log.exception("the canary of generation %d", command.generation)
            reason = f"canary: {type(error).__name__}: {error}"
            event = WorkerFailed(command.generation, FailureKind.CANARY, reason, random.random())
        self.report = None if proof is None else proof.report
        if proof is not None:
            self.known = proof.recalled
        elif not isinstance(event, CanaryPassed):
            self.known = None
        self._post(event)
