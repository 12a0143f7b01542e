"""The requests of one model, from submission to their last delta.

A request belongs to the worker generation it was sent to. When that one dies, it goes
on where it was on the next, or runs there again, if nobody has seen anything of it;
what can do neither ends in a typed error. See ``resumption``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from protocol.errors import CodedError, ErrorCode
from protocol.messages import (
    Accepted,
    Delta,
    Embedded,
    FinishReason,
    Generate,
    Inquiry,
    InquiryAnswer,
    Job,
    Phase,
    Prefilled,
    Rejected,
    Started,
    Tokenize,
)
from supervisor.entries import Entry, blamed, prepare_next_run, worker_blocked
from supervisor.line import SendToWorker
from supervisor.pace import Pace
from supervisor.places import may_enter, no_place
from supervisor.resumption import NextRun
from supervisor.seeds import seeded
from supervisor.stream import Prefill, RequestStream
from supervisor.suspects import convict
from supervisor.turns import Turns, new_id


class RequestTable:
    """All unfinished requests, and inquiries beside them, which count in none of the
    numbers. Methods run on the event loop; only ``ask`` waits.

    ``clock`` is monotonic, in seconds. At most ``max_inquiries`` are open. Until ``resume``
    the worker gets canaries only.
    """

    def __init__(
        self,
        *,
        max_stream_buffer_bytes: int,
        max_inquiries: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_stream_buffer_bytes = max_stream_buffer_bytes
        self._clock = clock
        self._pace = Pace()
        self.turns = Turns(max_inquiries=max_inquiries)
        #: When the last request ended, or traffic began: since then there was nothing to do.
        self.idle_since = clock()
        #: Has those that run apart. They are this one's all the same.
        self.ward: RequestTable | None = None

    def __len__(self) -> int:
        return len(self.turns.entries) + len(self._apart())

    @property
    def busy(self) -> bool:
        """Whether there is anything to do, inquiries included."""
        return bool(self.turns.entries or self.turns.inquiries or self._apart())

    @property
    def suspects(self) -> int:
        """How many are to run alone; without those in the ward."""
        return self.turns.suspects

    def _apart(self) -> list[Entry]:
        ward = self.ward
        return [] if ward is None else [e for e in ward.turns.entries.values() if not e.is_canary]

    def connect(self, send: SendToWorker) -> None:
        """From now on ``send`` reaches a worker that has loaded its model."""
        self.turns.connect(send)

    def disconnect(self) -> None:
        """The worker is lost; nothing reaches it any more."""
        self.turns.connect(None)

    def open(
        self,
        request: Job,
        *,
        streaming: bool,
        limit: int | None = None,
        is_canary: bool = False,
        may_resume: bool = False,
    ) -> RequestStream:
        """Send a request to the connected worker and return its stream.

        ``may_resume``: an answer that its worker's death interrupts may go on on the next.
        Raises ``rate_limit_exceeded``: there are ``limit`` unfinished requests already, or
        too many of this client, or the worker is alive and does not take it.
        """
        if limit is not None:
            self._require_place(request.client, limit)
        if self.turns.line.is_clogged:
            raise worker_blocked()
        request_id = new_id()

        def let_go() -> None:
            entry.let_go(entry)

        stream = RequestStream(
            max_buffer_bytes=self._max_stream_buffer_bytes if streaming else None,
            on_close=let_go,
            keeps_tokens=may_resume and isinstance(request, Generate),
        )
        now = self._clock()
        to_run: Job = msgspec.structs.replace(request, request_id=request_id)
        if isinstance(to_run, Generate):
            # Of the wall: templates print it.
            to_run = msgspec.structs.replace(
                to_run, sampling=seeded(to_run.sampling), accepted_at=time.time()
            )
        entry = Entry(request_id, request, to_run, stream, is_canary, now, self._abandon)
        if not self.turns.run(entry):
            raise worker_blocked()
        self.turns.entries[request_id] = entry
        self._pace.busy(now)
        return stream

    async def ask(self, inquiry: Inquiry) -> InquiryAnswer:
        """Ask the worker something, the next one if this one dies; its id is overwritten.

        Raises ``CodedError``: ``rate_limit_exceeded``, the worker's refusal, or what
        became of the model. Who is cancelled calls the inquiry off.
        """
        try:
            numbered = msgspec.structs.replace(inquiry, request_id=new_id())
            return await self.turns.inquiries.ask(numbered)
        finally:
            self.idle_since = self._clock()

    def answer(self, message: InquiryAnswer) -> None:
        self.turns.inquiries.answer(message)

    def deliver(self, deltas: Iterable[Delta]) -> None:
        """Hand a step's deltas out. Those of abandoned requests are dropped."""
        entries = self.turns.entries
        for delta in deltas:
            entry = entries.get(delta.request_id)
            if entry is None:
                self.turns.line.hear_of(delta.request_id, ended=delta.finish is not None)
                continue
            if delta.finish is not None:
                self._remove(delta.request_id)
                if delta.finish is FinishReason.CANCELLED:
                    # Nobody who still listens has asked for this.
                    entry.stream.fail(
                        CodedError(ErrorCode.INTERNAL_ERROR, "the request was cancelled")
                    )
                    continue
            entry.stream.push(delta)
        if (cleared := self.turns.cleared()) is not None:
            self._go_on_after(cleared)

    def embed(self, message: Embedded) -> None:
        """Hand vectors out; those of abandoned requests are dropped."""
        entry = self.turns.entries.get(message.request_id)
        if entry is None:
            self.turns.line.hear_of(message.request_id, ended=message.last)
            return
        if message.last:
            self._remove(message.request_id)
        entry.stream.add_vectors(message.vectors, last=message.last)

    def accept(self, message: Accepted) -> None:
        if (entry := self.turns.entries.get(message.request_id)) is not None:
            entry.stream.accept(message.prompt_tokens)
        else:
            self.turns.line.hear_of(message.request_id)

    def prefilled(self, message: Prefilled) -> None:
        if (entry := self.turns.entries.get(message.request_id)) is not None:
            if not entry.stream.has_started:
                entry.stream.prefill = Prefill(message.computed, message.total)
        else:
            self.turns.line.hear_of(message.request_id)

    def start(self, message: Started) -> None:
        if (entry := self.turns.entries.get(message.request_id)) is not None:
            entry.begun = True
            entry.stream.start(message.cached_tokens, self._clock() - entry.opened_at)
        else:
            self.turns.line.hear_of(message.request_id)

    def reject(self, message: Rejected) -> None:
        error = CodedError(message.code, message.message, param=message.param)
        if (entry := self._remove(message.request_id)) is not None:
            entry.stream.fail(error)
        elif not self.turns.inquiries.reject(message.request_id, error):
            self.turns.line.hear_of(message.request_id, ended=True)

    def phase(self) -> Phase:
        """What the worker must be doing: newer than its last beat."""
        running = self.turns.sent()
        if not running:
            return Phase.PREFILL if self.turns.inquiries.sent() else Phase.IDLE
        begun = any(entry.begun for entry in running)
        return Phase.DECODE if begun else Phase.PREFILL

    def running(self) -> list[Job]:
        """The requests that the worker has, as they came, oldest first, then those it was
        asked about."""
        running: list[Job] = [entry.asked for entry in self.turns.sent()]
        asked = self.turns.inquiries.sent()
        return running + [each.generate for each in asked if isinstance(each, Tokenize)]

    def sent(self) -> int:
        """How many the worker has; the others wait for the next one."""
        return len(self.turns.sent())

    def retry_after_s(self) -> float:
        """Seconds until a place may be expected to be free; see ``pace``."""
        return self._pace.next_place_s(self._clock())

    def park(self, error: CodedError, *, accuse: bool = True) -> Counter[NextRun]:
        """Keep what can go on on the next worker, or run there again; fail the rest with
        ``error``. ``accuse``: one of those in flight may be to blame. What became of those."""
        alone = accuse and self.sent() == 1
        fates: Counter[NextRun] = Counter()
        for request_id, entry in list(self.turns.entries.items()):
            if entry.sent or entry.is_canary:
                self.turns.accuse(entry, suspected=accuse)
                fate = NextRun.NONE if entry.is_canary else prepare_next_run(entry, alone)
                fates[fate] += not entry.is_canary
                if fate is NextRun.NONE:
                    self._remove(request_id)
                    entry.stream.fail(blamed(error, entry))
        self.turns.inquiries.park(error, accuse=accuse)
        return fates

    def convict(self) -> Job | None:
        """The request, as it came, that the worker's death is to blame on, if that is certain.

        It ends with ``request_poisoned``, whatever becomes of the others. Call it between the
        death and ``park`` or ``fail_all``.
        """
        if not self.sent():
            return self.turns.inquiries.convict()
        if self.turns.inquiries.sent():
            return None
        entry = convict(self.turns.entries.values())
        return None if entry is None else entry.asked

    def resume(self) -> None:
        """Run what was parked on the connected worker, and what comes: first those who were in
        flight at its predecessor's death, one after the other, then everybody."""
        self.idle_since = now = self._clock()
        # What they have waited for was no answer.
        self._pace.idle()
        if self.turns.entries:
            self._pace.busy(now)
        self.turns.call_next()

    def _go_on_after(self, cleared: Entry) -> None:
        """Take the worker from one that is cleared, for those that are not."""
        if self.suspects:
            self.turns.put_aside(cleared)
        self.turns.call_next()

    def give(self, entries: list[Entry]) -> list[Entry]:
        """Let go of what the worker does not have, for another table that takes it."""
        for entry in entries:
            del self.turns.entries[entry.id]
        if not self.turns.entries:
            self._pace.idle()
        return entries

    def take(self, entries: list[Entry]) -> None:
        """Take over what another table has given."""
        for entry in entries:
            entry.let_go = self._abandon
        if self.turns.flows:
            self._pace.busy(self._clock())
        self.turns.join(entries)

    def fail_all(self, error: CodedError) -> None:
        entries = self.turns.clear()
        self._pace.idle()
        for entry in entries:
            entry.stream.fail(blamed(error, entry))
        self.turns.inquiries.fail_all(error)
        if self.ward is not None:
            self.ward.fail_all(error)

    def _require_place(self, client: str, limit: int) -> None:
        entries = [*self.turns.entries.values(), *self._apart()]
        taken = sum(not entry.is_canary for entry in entries)
        own = sum(entry.asked.client == client for entry in entries)
        if not may_enter(own, taken, limit):
            raise no_place(own, taken, limit, self.retry_after_s())

    def _abandon(self, entry: Entry) -> None:
        if self.turns.entries.get(entry.id) is not entry:
            return
        if entry.sent:
            self.turns.line.give_up(entry.id)
        self._remove(entry.id)

    def _remove(self, request_id: int) -> Entry | None:
        """Take a request out at its end, whatever that is."""
        entry = self.turns.entries.pop(request_id, None)
        if entry is not None and entry.sent and not entry.is_canary and entry.stream.has_started:
            # Others, refused or given up in the queue, have not held a slot.
            self._pace.answered(self._clock())
        if not self.turns.entries:
            self._pace.idle()
            self.idle_since = self._clock()
        if entry is not None:
            self.turns.ended(entry)
        return entry
