"""One model: owns its state and carries out the readiness machine's commands.

Whatever happens to the model becomes a lifecycle event. Those of the worker and
the clock go through the inbox, those of an operator are applied at once, for an
immediate answer; applying one never waits, so they are applied one at a time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Inquiry, InquiryAnswer, Job
from supervisor import lifecycle, status
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.isolation import Isolation, Quarters
from supervisor.lifecycle import Command, Event, Readiness
from supervisor.memory_share import MemoryShare
from supervisor.portrait import portray
from supervisor.proof import Prover
from supervisor.quarantine import FailureKind, count_in_window
from supervisor.recorder import Recorder
from supervisor.requests import RequestTable
from supervisor.services import Services
from supervisor.standing import Standing
from supervisor.stream import RequestStream
from supervisor.traffic import Traffic
from supervisor.views import ModelView, ReadinessView
from supervisor.waiters import LoadWaiters

log = logging.getLogger(__name__)


class Actor(Standing):
    """A tracked model. ``on_gone`` is called once, when it is tracked no more."""

    def __init__(
        self,
        spec: ModelSpec,
        services: Services,
        quarters: Quarters,
        on_gone: Callable[[], None],
    ) -> None:
        self._requests = RequestTable(
            max_stream_buffer_bytes=services.settings.max_stream_buffer_bytes,
            max_inquiries=services.settings.max_queue,
        )
        share = MemoryShare(spec, services.lessons)
        super().__init__(spec, Traffic(self._requests), share, services.policy)
        self._services = services
        self._on_gone = on_gone
        self._take_spare = quarters.spares.take
        #: ``None`` ends the task.
        self._inbox: asyncio.Queue[Event | None] = asyncio.Queue()
        #: Why the last worker's process is still there, if it is.
        self.left_behind: str | None = None
        self._prover = Prover(self._requests, self._inbox.put_nowait)
        self._timer: asyncio.TimerHandle | None = None
        self._load_waiters = LoadWaiters()
        self._changed = asyncio.Event()
        self._recorder = Recorder(spec, services)
        self._isolation = Isolation(
            *(services, self._requests, quarters),
            known=lambda: self._prover.known,
            tell=self._hear,
            buried=self._recorder.buried,
        )
        self._loaded_at: float | None = None
        self._task: asyncio.Task[None] | None = None

    # --- for the fleet ---

    def start(self, *, probation: bool) -> None:
        """Begin to load. The state is set when this returns."""
        account = self._services.accounts.get(self.spec.account_key)
        self._task = asyncio.create_task(self._run(), name=f"actor {self.spec.model_id}")
        self._apply(lifecycle.LoadAccepted(account, probation))

    def load_again(self, spec: ModelSpec) -> None:
        """Override the quarantine, with other options perhaps. Raises ``model_conflict`` while
        its worker is not gone."""
        if self.state.worker_alive:
            raise CodedError(ErrorCode.MODEL_CONFLICT, "the quarantined worker is not gone yet")
        self.spec = spec
        self._share = MemoryShare(spec, self._services.lessons)
        self._recorder.spec = spec
        self._apply_or_conflict(lifecycle.LoadAccepted(self.state.account, probation=True))

    def unload(
        self, code: ErrorCode = ErrorCode.MODEL_UNLOADED, reason: str = "it was unloaded"
    ) -> None:
        """Ask for the end, and tell those who wait why; see ``changed``."""
        self._traffic.end_drain()
        self._apply_or_conflict(lifecycle.UnloadRequested(code, reason))

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests until ``unload``, and wait for the end of those that run."""
        try:
            await self._traffic.drain(timeout_s, self.is_routable)
        except BaseException:
            # It is not leaving after all: who waits for that looks again.
            self._wake()
            raise

    def abandon(self) -> None:
        """End the task of a model whose worker is gone, without another transition."""
        self._inbox.put_nowait(None)

    def release(self) -> None:
        """End the quarantine. Raises ``model_conflict`` when there is none."""
        self._apply_or_conflict(lifecycle.Released())

    async def routable(self) -> ReadinessView:
        """Wait until the model takes traffic; its readiness at that moment.

        Raises ``CodedError`` with how the load ended.
        """
        if self.state.readiness is Readiness.ROUTABLE:
            return self.readiness()
        if self.state.readiness is Readiness.QUARANTINED:
            raise self.unstable()
        return await self._load_waiters.wait()

    def unstable(self) -> CodedError:
        """The refusal while it is quarantined."""
        incident_id = self._recorder.last_incident_id
        return status.unstable(self.spec.model_id, self.state.reason, incident_id)

    async def changed(self) -> None:
        """Wait for the next transition."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def left(self) -> None:
        """Wait for the end of what is being brought down, if it is, and stays so."""
        while self.ending:
            await self.changed()
        await self._isolation.left()

    @property
    def is_calm(self) -> bool:
        """Whether a spare worker may be made: nothing goes on, or one is waited for."""
        return self.rests or self._isolation.wants_spare or self.idle_s() is not None

    def submit(self, request: Job, *, streaming: bool, resume: bool = True) -> RequestStream:
        """See ``Fleet.submit``."""
        self._require_usable()
        self._services.convicts.check(self.spec.model_id, request)
        limit = 1 if self.state.probation else self._services.settings.max_queue
        may_resume = resume and self.spec.resume
        return self._traffic.submit(
            request, limit=limit, streaming=streaming, may_resume=may_resume
        )

    async def ask(self, inquiry: Inquiry) -> InquiryAnswer:
        """See ``Fleet.tokenize``."""
        self._require_usable()
        self._services.convicts.check(self.spec.model_id, inquiry)
        return await self._traffic.ask(inquiry)

    def _require_usable(self) -> None:
        if self._traffic.draining:
            raise status.being_unloaded(self.spec.model_id)
        status.require_routable(
            self.spec.model_id,
            self.state,
            self._recorder.last_incident_id,
            may_wait=self._services.settings.load_on_demand,
        )

    def view(self) -> ModelView:
        """Raises ``model_not_found`` once the model is not tracked any more."""
        return portray(
            self.spec,
            self.state,
            self._generation,
            self._traffic,
            readiness=self.readiness(),
            leaving=self.leaving,
            loaded_at=self._loaded_at,
            last_incident_id=self._recorder.last_incident_id,
            isolating=self._isolation.view(),
        )

    def fail(self, generation: int, kind: FailureKind, reason: str) -> None:
        """Somebody outside found the worker to be failing."""
        self._inbox.put_nowait(lifecycle.WorkerFailed(generation, kind, reason, random.random()))

    async def close(self) -> None:
        """End the task of a model that has no worker any more, and wait for it."""
        self.abandon()
        self._isolation.end()
        await self._isolation.left()
        if self._task is not None:
            await self._task

    # --- the task ---

    async def _run(self) -> None:
        while self._state is not None:
            event = await self._inbox.get()
            if event is None:
                return
            self._hear(event)
            if isinstance(event, lifecycle.WorkerExited):
                self._bury(event.generation)

    def _hear(self, event: Event) -> None:
        try:
            self._apply(event)
        except lifecycle.IllegalEvent as error:
            log.error("%s: %s", self.spec.model_id, error)
        except Exception:
            # A model that nobody drives any more would be worse than what failed.
            log.exception("%s: %s", self.spec.model_id, event)

    def _bury(self, number: int) -> None:
        """The process is gone: complete its incident and forget it."""
        generation = self._generation
        if generation is None or generation.number != number:
            return
        self._recorder.buried(generation)
        self.left_behind = generation.stuck
        self._generation = None

    def _apply_or_conflict(self, event: Event) -> None:
        try:
            self._apply(event)
        except lifecycle.IllegalEvent as error:
            raise CodedError(ErrorCode.MODEL_CONFLICT, str(error)) from error

    def _apply(self, event: Event) -> None:
        """Apply one event and carry out what it commands. Never waits."""
        before = self._state
        self._state, commands = lifecycle.transition(
            before, event, self._services.policy, time.monotonic()
        )
        for command in commands:
            try:
                self._execute(command)
            except Exception:
                # One that fails, such as keeping a record, must not cost the others:
                # somebody waits for each of them.
                log.exception("%s: %s", self.spec.model_id, type(command).__name__)
        after = self._state
        if after is not before:
            self._recorder.turned(before, after)
            self._wake()
        if after is None:
            self._on_untracked()

    def _execute(self, command: Command) -> None:
        services, spec = self._services, self.spec
        match command:
            case lifecycle.SpawnWorker():
                self._spawn(command.generation)
            case lifecycle.StopWorker():
                self._lose_worker()
                if self._generation is not None:
                    self._generation.stop(broken=command.broken)
            case lifecycle.RunCanary():
                assert self._generation is not None
                assert self._generation.model is not None
                self._requests.connect(self._generation.send)
                timeout_s = services.settings.canary_timeout_s
                self._prover.start(self._generation.model, command, timeout_s=timeout_s)
            case lifecycle.ScheduleRestart():
                self._recorder.restarts(command)
                self._post_later(command.delay_s, lifecycle.RestartDue(command.generation))
            case lifecycle.WatchProbation():
                self._post_later(command.after_s, lifecycle.ProbationServed(command.generation))
            case lifecycle.OpenTraffic():
                self._loaded_at = time.time()
                self._share.loaded()
                if self._generation is not None:
                    self._generation.case.note("routable")
                self._requests.resume()
                if not self.state.probation:
                    self._isolation.begin(spec)
            case lifecycle.ParkRequests():
                self._lose_worker()
                error = self._error(ErrorCode.MODEL_CRASHED, command.reason)
                accuse = not _was_killed_from_outside(self._generation)
                fates = self._requests.park(error, accuse=accuse)
                status.log_parked(spec.model_id, command.reason, fates)
            case lifecycle.ParkSuspects():
                error = self._error(ErrorCode.MODEL_CRASHED, command.reason)
                accuse = not _was_killed_from_outside(self._isolation.generation)
                fates = self._isolation.park(error, accuse=accuse)
                status.log_parked(spec.model_id, command.reason, fates)
            case lifecycle.FailRequests():
                self._lose_worker()
                self._requests.fail_all(self._error(command.code, command.reason))
                self._isolation.end()
            case lifecycle.RecordPass():
                assert self._generation is not None
                self._recorder.passed(self._prover.report, self._generation.case.parts_s())
            case lifecycle.RecordFailure():
                self._record_failure(command)
            case lifecycle.AnswerLoads():
                self._answer_loads(command)
            case lifecycle.SaveAccount():
                services.accounts.put(spec.account_key, command.account, command.released)

    def _post_later(self, delay_s: float, event: Event) -> None:
        # One timer is enough: a generation is waited for before it is on probation.
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(delay_s, self._inbox.put_nowait, event)

    def _error(self, code: ErrorCode, reason: str) -> CodedError:
        incident_id = self._recorder.last_incident_id
        return status.model_error(self.spec.model_id, code, reason, incident_id)

    def _spawn(self, number: int) -> None:
        self._loaded_at = None
        self._share.spawned()
        try:
            generation = Generation(
                number,
                self.spec,
                self._services,
                requests=self._requests,
                post=self._inbox.put_nowait,
                worker=self._take_spare(self.spec.backend, self.spec.backend_version),
            )
        except Exception as error:
            # Whatever it is, such as no more threads: without a process none will exit.
            log.debug("%s: not spawned", self.spec.model_id, exc_info=True)
            self._services.sockets.renew()
            reason = f"no worker could be started: {error}"
            self._inbox.put_nowait(lifecycle.SpawnFailed(number, reason))
            return
        self._generation = generation
        self._inbox.put_nowait(lifecycle.WorkerSpawned(number))

    def _lose_worker(self) -> None:
        self._requests.disconnect()
        self._prover.cancel()

    # --- carrying out ---

    def _record_failure(self, failure: lifecycle.RecordFailure) -> None:
        account, now = self.state.account, time.monotonic()
        generation, requests = self._generation, self._requests
        if failure.in_cell:
            generation, requests = self._isolation.generation, self._isolation.ward
        blameless = failure.kind is None or _was_killed_from_outside(generation)
        self._recorder.failed(
            failure,
            generation,
            requests.running(),
            convicted=None if blameless else requests.convict(),
            quarantined=account.quarantined,
            crash_count=count_in_window(account, self._services.policy, now),
        )

    def _answer_loads(self, command: lifecycle.AnswerLoads) -> None:
        if command.code is None:
            self._load_waiters.answer(self.readiness())
            return
        reason, state = command.reason, self._state
        if state is not None:
            if self._load_waiters:
                log.warning(
                    "%s: load ended: %s (%s)", self.spec.model_id, command.reason, command.code
                )
            if state.readiness is Readiness.LOADING and not state.unloading:
                reason += "; it will be tried again"
        self._load_waiters.answer(self._error(command.code, reason))

    def _on_untracked(self) -> None:
        self._lose_worker()
        if self._timer is not None:
            self._timer.cancel()
        # Everyone has been answered by now, unless the machine forgot somebody.
        self._answer_loads(
            lifecycle.AnswerLoads(ErrorCode.MODEL_UNLOADED, "it is not tracked any more")
        )
        self._inbox.put_nowait(None)
        self._requests.fail_all(self._error(ErrorCode.MODEL_UNLOADED, "it is not tracked any more"))
        self._isolation.end()
        self._on_gone()


def _was_killed_from_outside(generation: Generation | None) -> bool:
    return generation is not None and generation.killed_from_outside
