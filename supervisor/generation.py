"""One generation of a model's worker: spawn, handshake, load, watch, stop.

Turns what the process, the channel and the clock say into lifecycle events; the
actor decides what they mean. Each generation reports at most one failure before
its exit, since its owner stops it for the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import sys
import time
from collections.abc import Callable, Coroutine

from protocol.errors import ErrorCode
from protocol.handshake import EXIT_FAULT, HandshakeError, verify_hello
from protocol.messages import (
    Accepted,
    BackendFault,
    Beat,
    Cancel,
    Detokenized,
    Embed,
    Embedded,
    FromWorker,
    Generate,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Phase,
    Prefilled,
    Rejected,
    Shutdown,
    Started,
    Step,
    Tokenized,
    ToWorker,
)
from supervisor.casefile import ALIVE, GREETED, LOADED, CaseFile
from supervisor.channel import ChannelClosed, ChannelFull
from supervisor.gate import ModelSpec
from supervisor.lifecycle import Event, LoadRefused, WorkerExited, WorkerFailed, WorkerLoaded
from supervisor.line import Delivery
from supervisor.marks import end_helpers
from supervisor.quarantine import FailureKind
from supervisor.requests import RequestTable
from supervisor.services import Services
from supervisor.watchdog import Watchdog
from supervisor.worker import Worker

log = logging.getLogger(__name__)

#: How long an exit that a message may explain waits for the end of the connection. It
#: comes with the death, unless something else has the worker's end as well.
LAST_WORDS_TIMEOUT_S = 0.25
#: How long the end of a worker may wait for that of its helpers, which hold memory, too.
HELPERS_TIMEOUT_S = 2.0

_ON_LINUX = sys.platform == "linux"

#: How often a worker's progress is looked at.
WATCH_INTERVAL_S = 1.0

#: Time for the stacks of a hung worker to be written before it is killed.
STACK_DUMP_S = 0.2


class Generation:
    """A live worker of ``spec``'s model. ``post`` takes lifecycle events; all on the event loop.

    ``worker``: one that has said hello and waits for a model; without it one is spawned.
    Raises ``OSError`` or ``zmq.ZMQError`` when the process or its sockets cannot be made.
    """

    def __init__(
        self,
        number: int,
        spec: ModelSpec,
        services: Services,
        *,
        requests: RequestTable,
        post: Callable[[Event], None],
        worker: Worker | None = None,
    ) -> None:
        settings = services.settings
        self.number = number
        self.model: Loaded | None = None
        self.case = CaseFile(
            model=spec.model_id,
            generation=number,
            backend=spec.backend,
            backend_version=spec.backend_version,
        )
        self._spec = spec
        self._name = f"{spec.model_id} (generation {number})"
        self._settings = settings
        self._oom_kills = services.oom_kills
        self._left_behind = services.left_behind
        self._requests = requests
        self._post = post
        self._loop = asyncio.get_running_loop()
        self._alive = self._greeted = False
        self._stopping = False
        self._condemned = False
        self._hang: tuple[FailureKind, str] | None = None
        #: Why the generation was given up with its process still there; that is
        #: reaped when it ends after all.
        self.stuck: str | None = None
        #: Somebody has killed the process who is none of us, nor the kernel: no request did.
        self.killed_from_outside = False
        self._explained = False
        self._tasks: set[asyncio.Task[None]] = set()
        # What was killed before cannot explain the end of what is spawned now.
        self._oom_kills.refresh()
        if worker is None:
            worker = Worker(spec.backend, services, self, generation=number, name=self._name)
        else:
            worker.listen(self)
            worker.process.name = self._name
        self._worker = worker
        self._channel, self._process = worker.channel, worker.process
        now = self._spawned_at = time.monotonic()
        self._watchdog = Watchdog(
            {
                Phase.STARTING: settings.start_timeout_s,
                Phase.LOAD: settings.load_stall_s,
                Phase.IDLE: settings.beat_timeout_s,
                Phase.PREFILL: settings.prefill_stall_s,
                Phase.DECODE: settings.decode_stall_s,
            },
            now,
        )
        self._watched_at = now
        self._watch_timer = self._watch_later()
        if worker.hello is not None:
            self._alive = True
            self.case.note(ALIVE)
            self._greet(worker.hello)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToWorker) -> Delivery:
        """Never waits."""
        try:
            self._channel.send(message)
        except ChannelClosed:
            return Delivery.LOST
        except ChannelFull:
            if self._process.is_dead():
                return Delivery.LOST
            log.warning("%s does not read; %s not sent", self._name, type(message).__name__)
            return Delivery.BLOCKED
        if isinstance(message, Generate | Embed | Cancel):
            self._watchdog.owes = True
        return Delivery.SENT

    def stop(self, *, broken: bool) -> None:
        """Bring the process down in the background; ``WorkerExited`` is posted at its end,
        or when it does not come: see ``stuck``."""
        self._watch_timer.cancel()
        self._condemned = self._condemned or broken
        if self._process.exit_status is not None:
            # It is dead already, and its end is about to be told.
            return
        self._stopping = True
        self.case.note("told to stop" if not broken else "being killed")
        if not broken:
            self.send(Shutdown())
        self._start(self._stop(broken))

    async def _stop(self, broken: bool) -> None:
        if await self._process.stop(grace_s=self._settings.stop_grace_s, broken=broken):
            return
        self.stuck = f"its process {self.pid} cannot be killed: it hangs in the kernel"
        self._left_behind.add(self.pid)
        log.critical(
            "%s: %s, with its memory. It is left alone, and everything else goes on",
            self._name,
            self.stuck,
        )
        self._channel.close()
        self._post(WorkerExited(self.number, FailureKind.SIGNAL, self.stuck, random.random()))

    # --- what the worker says ---

    def on_message(self, message: FromWorker) -> None:
        if self._condemned:
            # Its requests may be running elsewhere by now: nothing it says counts.
            return
        if type(message) is Step:
            self._watchdog.owes = False
            self._requests.deliver(message.deltas)
            return
        match message:
            case Beat():
                if not self._alive:
                    self._alive = True
                    self.case.note(ALIVE)
                self._watchdog.observe(message, time.monotonic())
            case Hello():
                self._on_hello(message)
            case LoadFailed():
                # Also before the handshake: a backend that cannot be imported.
                self._on_load_failed(message)
            case _ if not self._greeted:
                self.on_violation(f"{type(message).__name__} before the handshake")
            case LoadProgress():
                pass
            case Loaded():
                self.model = message
                self.case.note(LOADED)
                self._watchdog.enter(Phase.IDLE, time.monotonic())
                self._post(WorkerLoaded(self.number))
            case Accepted():
                self._watchdog.owes = False
                self._requests.accept(message)
            case Prefilled():
                self._requests.prefilled(message)
            case Started():
                self._requests.start(message)
            case Embedded():
                self._watchdog.owes = False
                self._requests.embed(message)
            case Rejected():
                self._watchdog.owes = False
                self._requests.reject(message)
            case Tokenized() | Detokenized():
                self._requests.answer(message)
            case BackendFault():
                self._explained = True
                self._fail(FailureKind.BACKEND_EXCEPTION, f"the backend raised {message.message}")

    def _on_hello(self, hello: Hello) -> None:
        try:
            if self._greeted:
                raise HandshakeError("the worker said hello twice")
            verify_hello(hello, self._worker.boot, self.pid)
        except HandshakeError as error:
            self.on_violation(str(error))
            return
        self._greet(hello)

    def _greet(self, hello: Hello) -> None:
        """Give the worker its model."""
        self._greeted = True
        self.case.note(GREETED)
        if hello.backend_version != self._spec.backend_version:
            # What this generation does would be remembered under the wrong version.
            reason = (
                f"backend {hello.backend!r} is now version {hello.backend_version}, "
                f"the model was admitted for {self._spec.backend_version}; load it again"
            )
            self._post(LoadRefused(self.number, ErrorCode.MODEL_CONFLICT, reason))
            return
        self._watchdog.enter(Phase.LOAD, time.monotonic())
        draft, plan = self._spec.draft_path, self._spec.plan
        settings = self._settings
        # What was planned holds, whatever the settings have become since.
        sequences = settings.max_sequences if plan is None else plan.sequences
        kept = settings.prompt_cache_bytes if plan is None else plan.prompt_cache_bytes
        self.send(
            Load(
                path=str(self._spec.files.path),
                context_length=self._spec.context_length,
                max_sequences=sequences,
                threads=settings.threads,
                prompt_cache_bytes=kept,
                draft_tokens=settings.draft_tokens,
                draft_path=None if draft is None else str(draft),
                tool_format=self._spec.tool_format,
                exact_tokens=settings.resume_exact_tokens,
            )
        )

    def _on_load_failed(self, message: LoadFailed) -> None:
        if message.code is ErrorCode.MODEL_LOADER_CRASHED:
            self._fail(FailureKind.LOADER, message.message)
        else:
            self._post(LoadRefused(self.number, message.code, message.message))
        self._explained = True

    def on_violation(self, reason: str) -> None:
        if not self._condemned:
            self._fail(FailureKind.PROTOCOL, reason)

    # --- what the clock says ---

    def _watch(self) -> None:
        now = time.monotonic()
        if now - self._watched_at > 5 * WATCH_INTERVAL_S:
            self._watchdog.forgive(now)
        self._watched_at = now
        in_hand = self.model is not None and self._requests.sent() > 0
        if (reason := self._watchdog.verdict(now, in_hand=in_hand)) is not None:
            loading = self._watchdog.phase in {Phase.STARTING, Phase.LOAD}
            self._hang = FailureKind.LOAD_TIMEOUT if loading else FailureKind.HANG, reason
            self._condemned = True
            self._start(self._fail_hung(*self._hang))
            return
        self._watch_timer = self._watch_later()

    def _watch_later(self) -> asyncio.TimerHandle:
        # All generations at the same moments: one wake-up for them.
        now = self._loop.time()
        return self._loop.call_at(now - now % WATCH_INTERVAL_S + WATCH_INTERVAL_S, self._watch)

    async def _fail_hung(self, kind: FailureKind, reason: str) -> None:
        self._process.dump_stacks()
        await asyncio.sleep(STACK_DUMP_S)
        self._fail(kind, reason)

    # --- how it ends ---

    def _fail(self, kind: FailureKind, reason: str) -> None:
        # From here on: what it has said after its failure may be waiting to be read
        # in this very turn, before the owner hears of it.
        self._condemned = True
        self._post(WorkerFailed(self.number, kind, reason, random.random()))

    def on_exit(self) -> None:
        """See ``worker.Listener``."""
        self._watch_timer.cancel()
        if self.stuck is not None:
            log.warning("%s: its process %d has ended after all", self._name, self.pid)
            self._start(end_helpers(self._process.mark, HELPERS_TIMEOUT_S, self._name))
            return
        self._start(self._report_exit())

    async def _report_exit(self) -> None:
        """Tell of the death at once, and of the end when nothing of the worker is left."""
        kind, reason = self._process.describe_exit()
        try:
            await self._hear_last_words()
            if self._hang is not None:
                # Found to be hung, it died of being looked at.
                kind, reason = self._hang
            elif self._was_oom_killed():
                kind, reason = FailureKind.MEMORY, "killed by the kernel's out-of-memory killer"
            killed = self._process.exit_status == -signal.SIGKILL and not self._stopping
            # Elsewhere the system kills so what takes too much memory.
            self.killed_from_outside = _ON_LINUX and killed and kind is FailureKind.SIGNAL
            if tail := self._process.output_tail.strip():
                log.debug("last output of %s, which %s:\n%s", self._name, reason, tail[-4000:])
            self._post(WorkerFailed(self.number, kind, reason, random.random()))
            await end_helpers(self._process.mark, HELPERS_TIMEOUT_S, self._name)
        finally:
            # Whatever went wrong in looking at it: the death itself has to be told.
            self._post(WorkerExited(self.number, kind, reason, random.random()))

    async def _hear_last_words(self) -> None:
        """Read what the worker still said; wait for it where it explains the exit."""
        self._channel.drain()
        explained = self._process.exit_status == EXIT_FAULT
        # A library may abort on the way out, after the load was refused properly.
        aborted_loading = self._process.exit_status == -signal.SIGABRT and self.model is None
        if (explained or aborted_loading) and not self._stopping and not self._explained:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_TIMEOUT_S):
                    await self._channel.ended()
            self._channel.drain()
        self._channel.close()

    def _was_oom_killed(self) -> bool:
        if self._stopping or self._process.exit_status != -signal.SIGKILL:
            return False
        return self._oom_kills.claim(self._spawned_at)

    @property
    def phase(self) -> Phase:
        """What the worker does; its requests tell sooner than its beats."""
        return self._watchdog.phase if self.model is None else self._requests.phase()

    @property
    def exit_status(self) -> int | None:
        """None while the process is there."""
        return self._process.exit_status

    @property
    def output_tail(self) -> str:
        return self._process.output_tail

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
