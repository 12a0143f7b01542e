"""The life of a worker after its guard is up: handshake, load, serve, exit."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Protocol

import zmq

from protocol.errors import CodedError, ErrorCode
from protocol.handshake import EXIT_FAULT, WorkerBoot
from protocol.messages import (
    PROTOCOL_VERSION,
    Accepted,
    BackendFault,
    Cancel,
    Delta,
    Detokenize,
    Embed,
    FinishReason,
    Generate,
    Hello,
    Inquiry,
    InquiryAnswer,
    Job,
    Load,
    LoadFailed,
    LoadProgress,
    Phase,
    Priority,
    Rejected,
    Shutdown,
    Step,
    Tokenize,
    ToWorker,
)
from worker.backends import create_backend
from worker.backends.base import Backend
from worker.embedding import EmbeddingEngine
from worker.engine import Engine, Progress
from worker.link import Link, LinkWrapper
from worker.prompt import PromptBuilder
from worker.queue import RequestQueue
from worker.transport import DataLink, Heart
from worker.vitals import Vitals

#: Seconds spent on new requests between two steps. One is taken in any case, and may
#: take longer: to render a template and tokenise a long prompt is not to be divided.
SUBMISSION_BUDGET_S = 0.005
#: Seconds without anything to do after which there is time for what only may be needed: those
#: who waited for a respawn come right behind its canary.
QUIET_S = 1.0


def run(boot: WorkerBoot) -> int:
    """Connect, serve until told to stop or broken, and return the exit status."""
    vitals = Vitals()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = DataLink(context, boot.data_endpoint)
    heart = Heart(context, boot, vitals)
    heart.start()
    try:
        return _load_and_serve(boot, link, vitals)
    finally:
        heart.stop()
        link.close()
        context.term()


def _load_and_serve(boot: WorkerBoot, link: Link, vitals: Vitals) -> int:
    try:
        backend = create_backend(boot.backend)
    except CodedError as refusal:
        link.send(LoadFailed(refusal.code, refusal.message))
        return EXIT_FAULT
    if isinstance(backend, LinkWrapper):
        link = backend.wrap_link(link)
    link.send(
        Hello(
            protocol_version=PROTOCOL_VERSION,
            nonce=boot.nonce,
            pid=os.getpid(),
            generation=boot.generation,
            backend=backend.name,
            backend_version=backend.version,
        )
    )
    try:
        request = link.wait()
        if isinstance(request, Shutdown):
            return 0
        if not isinstance(request, Load):
            raise TypeError(f"expected a load, got {type(request).__name__}")
        engine = _load(backend, request, link, vitals)
        if engine is None:
            return EXIT_FAULT
        return _serve(engine, link)
    finally:
        backend.close()


def _load(backend: Backend, request: Load, link: Link, vitals: Vitals) -> Runner | None:
    def report(fraction: float) -> None:
        vitals.advance()
        link.send(LoadProgress(fraction))

    vitals.phase = Phase.LOAD
    try:
        model = backend.load(request, report)
        prompts = PromptBuilder(backend, model, request.tool_format)
    except CodedError as refusal:
        link.send(LoadFailed(refusal.code, refusal.message))
        return None
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        link.send(LoadFailed(ErrorCode.MODEL_LOADER_CRASHED, reason))
        return None
    link.send(prompts.describe())
    # Not before: until it has been said, this is still the load, with its deadline.
    vitals.phase = Phase.IDLE
    embedder = backend.embedder
    if embedder is not None:
        return EmbeddingEngine(embedder, model, vitals, prompts)
    return Engine(backend, model, vitals, prompts, exact_tokens=request.exact_tokens)


def _serve(engine: Runner, link: Link) -> int:
    try:
        Service(engine, link).run()
    except Exception as error:
        traceback.print_exc()
        link.send(BackendFault(f"{type(error).__name__}: {error}"))
        return EXIT_FAULT
    finally:
        engine.close()
    return 0


class Runner(Protocol):
    """What runs the requests of one kind of model; see ``worker.engine.Engine``."""

    @property
    def idle(self) -> bool:
        """Whether a step would find nothing to do."""

    def prepare(self) -> None:
        """Do what may be done once and takes a moment, now that there is one."""

    def submit(self, request: Job) -> Accepted | Rejected | None:
        """Check and enqueue a request. None: a later step has the answer."""

    def answer(self, inquiry: Inquiry) -> InquiryAnswer | Rejected:
        """Tell tokens or text, at once."""

    def cancel(self, request_id: int) -> Delta | None:
        """Drop a request; None if it is unknown."""

    def step(self) -> Progress:
        """Move what runs on, and return what came of it."""

    def close(self) -> None:
        """Leave the backend alone from now on."""


class Service:
    """Takes the supervisor's messages between the steps of the engine, and sends what comes of it.

    Whatever has arrived is looked at before every step, so that a cancellation holds
    from the next one on. New requests are only put by; as many as fit the budget are
    submitted, in the order in which their clients are entitled to, and the others
    after the step: however many arrive at once, the running answers go on. Answers that
    were interrupted together begin together, as the batch they were in. Inquiries wait for
    their turn like requests, but for no slot.
    """

    def __init__(
        self, engine: Runner, link: Link, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._link = link
        self._clock = clock
        self._arrived: dict[int, Job | Inquiry] = {}
        self._order = RequestQueue()
        self._stepped = self._prepared = False

    def run(self) -> None:
        """Serve until told to stop. Raises whatever the backend or the link raises."""
        while True:
            if self._engine.idle and not self._arrived:
                # Not before the first answer, which is the one that is timed.
                if self._stepped and not self._prepared and not self._link.has_news(QUIET_S):
                    self._prepared = True
                    self._engine.prepare()
                if not self._receive(self._link.wait()):
                    return
            for message in self._link.pending():
                if not self._receive(message):
                    return
            if self._submit():
                # What was interrupted with it may be there by now.
                continue
            if not self._engine.idle:
                self._step()

    def _receive(self, message: ToWorker) -> bool:
        """Carry out one message, or put it by; False when it was the last."""
        match message:
            case Generate() | Embed() | Detokenize():
                self._put_by(message, message.client, message.priority)
            case Tokenize():
                self._put_by(message, message.generate.client, message.generate.priority)
            case Cancel():
                self._cancel(message.request_id)
            case Load():
                raise TypeError("a worker loads one model only")
            case Shutdown():
                return False
        return True

    def _put_by(self, message: Job | Inquiry, client: str, priority: Priority) -> None:
        self._order.enter(message.request_id, client, priority)
        self._arrived[message.request_id] = message

    def _submit(self) -> bool:
        """Whether an answer that goes on was among it."""
        resumed = False
        until = self._clock() + SUBMISSION_BUDGET_S
        while (request_id := self._order.take()) is not None:
            # It is no more than a turn: what runs counts in the engine's own queue.
            self._order.leave(request_id)
            message = self._arrived.pop(request_id)
            goes_on = False
            if isinstance(message, Tokenize | Detokenize):
                self._link.send(self._engine.answer(message))
            else:
                goes_on = isinstance(message, Generate) and bool(message.resume_tokens)
                if (answer := self._engine.submit(message)) is not None:
                    self._link.send(answer)
            resumed = resumed or goes_on
            if self._clock() >= until and not goes_on:
                break
        return resumed

    def _cancel(self, request_id: int) -> None:
        if self._arrived.pop(request_id, None) is not None:
            self._order.leave(request_id)
            delta: Delta | None = Delta(request_id, "", [], FinishReason.CANCELLED)
        else:
            delta = self._engine.cancel(request_id)
        if delta is not None:
            self._link.send(Step([delta]))

    def _step(self) -> None:
        self._stepped = True
        started, deltas, settled, embedded, prefilled = self._engine.step()
        for message in (*settled, *started, *embedded, *prefilled):
            self._link.send(message)
        if deltas:
            self._link.send(Step(deltas))
