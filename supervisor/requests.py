"""The requests of one model, from submission to their last delta.

A request belongs to the worker generation it was sent to. When that one dies, it goes
on where it was on the next, or runs there again, if nobody has seen anything of it;
what can do neither ends in a typed error. See ``resumption``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from enum import StrEnum
from itertools import count

import msgspec

from protocol.errors import CodedError, ErrorCode
from protocol.messages import (
    Accepted,
    Cancel,
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
    ToWorker,
)
from supervisor.entries import (
    Entry,
    OpenInquiry,
    blamed,
    prepare_next_run,
    worker_blocked,
)
from supervisor.inquiries import Inquiries
from supervisor.pace import Pace
from supervisor.places import may_enter
from supervisor.seeds import seeded
from supervisor.stream import Prefill, RequestStream
from supervisor.suspects import Suspects, convict

#: Requests that were given up and of which the worker has not told the end yet. It does
#: so within a step: one that has so many does not read, and what it is sent piles up.
MAX_GIVEN_UP = 64

#: Ids are unique within one supervisor, so that no message can be mistaken.
_ids = count(1)


class Delivery(StrEnum):
    """What became of a message to the worker."""

    SENT = "sent"
    #: The worker is dying or dead; its exit is about to be told.
    LOST = "lost"
    #: The worker is alive and does not read.
    BLOCKED = "blocked"


SendToWorker = Callable[[ToWorker], Delivery]


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
        self._entries: dict[int, Entry] = {}
        #: Given up, and not ended yet at the worker; by id, whether that was told.
        self._given_up: dict[int, bool] = {}
        self._inquiries = Inquiries(
            max_inquiries, run=self._run, call_off=self._call_off, when_free=self._call_next
        )
        self._send: SendToWorker | None = None
        self._flows = False
        self._suspects = Suspects()
        #: When the last request ended, or traffic began: since then there was nothing to do.
        self.idle_since = clock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do, inquiries included."""
        return bool(self._entries or self._inquiries)

    def connect(self, send: SendToWorker) -> None:
        """From now on ``send`` reaches a worker that has loaded its model."""
        self._given_up.clear()
        self._send = send
        self._flows = False

    def disconnect(self) -> None:
        """The worker is lost; nothing reaches it any more."""
        self._given_up.clear()
        self._send = None
        self._flows = False

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
        if len(self._given_up) >= MAX_GIVEN_UP:
            raise worker_blocked()
        request_id = next(_ids)

        def let_go() -> None:
            self._abandon(entry)

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
        entry = Entry(request_id, request, to_run, stream, is_canary, opened_at=now)
        if not self._run(entry):
            raise worker_blocked()
        self._entries[request_id] = entry
        self._pace.busy(now)
        return stream

    async def ask(self, inquiry: Inquiry) -> InquiryAnswer:
        """Ask the worker something, the next one if this one dies; its id is overwritten.

        Raises ``CodedError``: ``rate_limit_exceeded``, the worker's refusal, or what
        became of the model. Who is cancelled calls the inquiry off.
        """
        try:
            numbered = msgspec.structs.replace(inquiry, request_id=next(_ids))
            return await self._inquiries.ask(numbered)
        finally:
            self.idle_since = self._clock()

    def answer(self, message: InquiryAnswer) -> None:
        self._inquiries.answer(message)

    def deliver(self, deltas: Iterable[Delta]) -> None:
        """Hand a step's deltas out. Those of abandoned requests are dropped."""
        for delta in deltas:
            entry = self._entries.get(delta.request_id)
            if entry is None:
                self._hear_of_given_up(delta.request_id, ended=delta.finish is not None)
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
        if self._suspects.current is not None and self._suspects.is_cleared():
            self._pause_and_call_next()

    def embed(self, message: Embedded) -> None:
        """Hand vectors out; those of abandoned requests are dropped."""
        entry = self._entries.get(message.request_id)
        if entry is None:
            self._hear_of_given_up(message.request_id, ended=message.last)
            return
        if message.last:
            self._remove(message.request_id)
        entry.stream.add_vectors(message.vectors, last=message.last)

    def accept(self, message: Accepted) -> None:
        if (entry := self._entries.get(message.request_id)) is not None:
            entry.stream.accept(message.prompt_tokens)
        else:
            self._hear_of_given_up(message.request_id)

    def prefilled(self, message: Prefilled) -> None:
        if (entry := self._entries.get(message.request_id)) is not None:
            if not entry.stream.has_started:
                entry.stream.prefill = Prefill(message.computed, message.total)
        else:
            self._hear_of_given_up(message.request_id)

    def start(self, message: Started) -> None:
        if (entry := self._entries.get(message.request_id)) is not None:
            entry.begun = True
            entry.stream.start(message.cached_tokens, self._clock() - entry.opened_at)
        else:
            self._hear_of_given_up(message.request_id)

    def reject(self, message: Rejected) -> None:
        error = CodedError(message.code, message.message, param=message.param)
        if (entry := self._remove(message.request_id)) is not None:
            entry.stream.fail(error)
        elif not self._inquiries.reject(message.request_id, error):
            self._hear_of_given_up(message.request_id, ended=True)

    def phase(self) -> Phase:
        """What the worker must be doing: newer than its last beat."""
        running = [entry for entry in self._entries.values() if entry.sent]
        if not running:
            return Phase.PREFILL if self._inquiries.sent() else Phase.IDLE
        begun = any(entry.begun for entry in running)
        return Phase.DECODE if begun else Phase.PREFILL

    def running(self) -> list[Job]:
        """The requests that the worker has, as they came, oldest first, then those it was
        asked about."""
        running: list[Job] = [entry.asked for entry in self._entries.values() if entry.sent]
        asked = self._inquiries.sent()
        return running + [each.generate for each in asked if isinstance(each, Tokenize)]

    def sent(self) -> int:
        """How many the worker has; the others wait for the next one."""
        return sum(entry.sent for entry in self._entries.values())

    def retry_after_s(self) -> float:
        """Seconds until a place may be expected to be free; see ``pace``."""
        return self._pace.next_place_s(self._clock())

    def park(self, error: CodedError, *, accuse: bool = True) -> None:
        """Keep what can go on on the next worker, or run there again; fail the rest with
        ``error``. ``accuse``: one of those in flight may be to blame."""
        alone = accuse and self.sent() == 1
        for request_id, entry in list(self._entries.items()):
            if entry.sent or entry.is_canary:
                entry.sent = entry.begun = False
                self._suspects.accuse(entry, suspected=accuse)
                if entry.is_canary or not prepare_next_run(entry, alone):
                    self._remove(request_id)
                    entry.stream.fail(blamed(error, entry))
        self._inquiries.park(error, accuse=accuse)

    def convict(self) -> Job | None:
        """The request, as it came, that the worker's death is to blame on, if that is certain.

        It ends with ``request_poisoned``, whatever becomes of the others. Call it between the
        death and ``park`` or ``fail_all``.
        """
        if not self.sent():
            return self._inquiries.convict()
        if self._inquiries.sent():
            return None
        entry = convict(self._entries.values())
        return None if entry is None else entry.asked

    def resume(self) -> None:
        """Run what was parked on the connected worker, and what comes: first those who were in
        flight at its predecessor's death, one after the other, then everybody."""
        self.idle_since = now = self._clock()
        # What they have waited for was no answer.
        self._pace.idle()
        if self._entries:
            self._pace.busy(now)
        self._call_next()

    def _call_next(self) -> None:
        """Let the next suspect have the worker alone; everybody, if there is none."""
        while (entry := self._suspects.call(self._entries.values())) is not None:
            if self._run(entry):
                return
            self._refuse(entry)
        if self._inquiries.call():
            return
        self._flows = True
        for entry in sorted(self._entries.values(), key=lambda entry: entry.opened_at):
            if not entry.sent and not self._run(entry):
                self._refuse(entry)
        self._inquiries.resume()

    def _pause_and_call_next(self) -> None:
        """Take the worker from one that is cleared, for those that are not."""
        entry = self._suspects.current
        assert entry is not None
        others = any(each.suspect for each in self._entries.values())
        before = entry.id
        if others and self._send is not None and entry.run_as(next(_ids)):
            del self._entries[before]
            self._entries[entry.id] = entry
            self._given_up[before] = self._send(Cancel(before)) is Delivery.SENT
        self._call_next()

    def _refuse(self, entry: Entry) -> None:
        """The worker does not take it."""
        self._entries.pop(entry.id, None)
        entry.stream.fail(worker_blocked())

    def fail_all(self, error: CodedError) -> None:
        self._suspects = Suspects()
        entries, self._entries = self._entries, {}
        self._pace.idle()
        for entry in entries.values():
            entry.stream.fail(blamed(error, entry))
        self._inquiries.fail_all(error)

    def _run(self, entry: Entry | OpenInquiry) -> bool:
        """Give a request to the worker; False when that does not read.

        A request that is lost with its worker stays, and runs on the next one.
        """
        alone = (self._suspects.current, self._inquiries.current)
        may_run = self._flows or entry.is_canary or any(entry is each for each in alone)
        if self._send is None or not may_run:
            return True
        delivery = self._send(entry.request)
        if delivery is Delivery.SENT:
            entry.sent = True
            entry.runs += 1
        return delivery is not Delivery.BLOCKED

    def _call_off(self, request_id: int) -> None:
        if self._send is not None:
            self._send(Cancel(request_id))

    def _require_place(self, client: str, limit: int) -> None:
        taken = sum(not entry.is_canary for entry in self._entries.values())
        own = sum(entry.asked.client == client for entry in self._entries.values())
        if may_enter(own, taken, limit):
            return
        if taken >= limit:
            reason = f"the model has {taken} requests in hand already (limit {limit})"
        else:
            reason = (
                f"{own} of the model's {taken} requests in hand are this client's; "
                f"the last of {limit} places are for others"
            )
        raise CodedError(ErrorCode.RATE_LIMIT_EXCEEDED, reason, retry_after_s=self.retry_after_s())

    def _abandon(self, entry: Entry) -> None:
        if self._entries.get(entry.id) is not entry:
            return
        if entry.sent and self._send is not None:
            self._given_up[entry.id] = self._send(Cancel(entry.id)) is Delivery.SENT
        self._remove(entry.id)

    def _hear_of_given_up(self, request_id: int, *, ended: bool = False) -> None:
        """The worker has spoken of a request that nobody waits for any more."""
        if ended:
            self._given_up.pop(request_id, None)
        elif self._given_up.get(request_id) is False and self._send is not None:
            # It could not be told then. It works at it, so now it may well read.
            self._given_up[request_id] = self._send(Cancel(request_id)) is Delivery.SENT

    def _remove(self, request_id: int) -> Entry | None:
        """Take a request out at its end, whatever that is."""
        entry = self._entries.pop(request_id, None)
        if entry is not None and entry.sent and not entry.is_canary and entry.stream.has_started:
            # Others, refused or given up in the queue, have not held a slot.
            self._pace.answered(self._clock())
        if not self._entries:
            self._pace.idle()
            self.idle_since = self._clock()
        if entry is not None and self._suspects.forget(entry):
            self._call_next()
        return entry
