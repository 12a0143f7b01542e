"""What a model's worker is asked beside its requests: answered whole, and it takes no slot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Inquiry, InquiryAnswer, Job, Tokenize
from supervisor.entries import OpenInquiry, poisoned, worker_blocked
from supervisor.resumption import MAX_RUNS


class Inquiries:
    """At most ``limit`` unanswered ones of one model, by their request ids.

    ``run`` gives one to the worker, False when that does not read; ``call_off`` tells the
    worker that nobody waits for one any more. Who was in flight when a worker died is asked
    alone, as ``current``; ``when_free`` is told when that has ended.
    """

    def __init__(
        self,
        limit: int,
        *,
        run: Callable[[OpenInquiry], bool],
        call_off: Callable[[int], None],
        when_free: Callable[[], None],
    ) -> None:
        self._limit = limit
        self._run = run
        self._call_off = call_off
        self._when_free = when_free
        self.current: OpenInquiry | None = None
        self._convicted: OpenInquiry | None = None
        self._open: dict[int, OpenInquiry] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def ask(self, inquiry: Inquiry) -> InquiryAnswer:
        """See ``RequestTable.ask``; the id is the inquiry's own here."""
        if len(self._open) >= self._limit:
            raise CodedError(
                ErrorCode.RATE_LIMIT_EXCEEDED,
                f"the model has {len(self._open)} inquiries in hand already",
                retry_after_s=1.0,
            )
        entry = OpenInquiry(inquiry, asyncio.get_running_loop().create_future())
        if not self._run(entry):
            raise worker_blocked()
        self._open[inquiry.request_id] = entry
        try:
            return await entry.answer
        finally:
            if inquiry.request_id in self._open:
                if entry.sent:
                    self._call_off(inquiry.request_id)
                self._remove(inquiry.request_id)

    def answer(self, message: InquiryAnswer) -> None:
        entry = self._remove(message.request_id)
        if entry is not None and not entry.answer.done():
            entry.answer.set_result(message)

    def reject(self, request_id: int, error: CodedError) -> bool:
        """Whether there was such an inquiry, which has failed now."""
        entry = self._remove(request_id)
        if entry is not None:
            entry.fail(error)
        return entry is not None

    def _remove(self, request_id: int) -> OpenInquiry | None:
        entry = self._open.pop(request_id, None)
        if entry is not None and entry is self.current:
            self.current = None
            self._when_free()
        return entry

    def sent(self) -> list[Inquiry]:
        """Those that the worker has."""
        return [entry.request for entry in self._open.values() if entry.sent]

    def convict(self) -> Job | None:
        """What was asked about alone when the worker died, as at an earlier death; see
        ``RequestTable.convict``."""
        sent = [entry for entry in self._open.values() if entry.sent]
        if len(sent) == 1 and sent[0].suspect and isinstance(sent[0].request, Tokenize):
            self._convicted = sent[0]
            return sent[0].request.generate
        return None

    def park(self, error: CodedError, *, accuse: bool) -> None:
        """Keep for the next worker what may be asked once more; fail the rest."""
        self.current, convicted, self._convicted = None, self._convicted, None
        for request_id, entry in list(self._open.items()):
            entry.suspect = entry.suspect or (entry.sent and accuse)
            entry.sent = False
            if entry is convicted:
                self.reject(request_id, poisoned(error))
            elif entry.runs >= MAX_RUNS:
                self.reject(request_id, error)

    def call(self) -> bool:
        """Let the next suspect have the worker alone; False if there is none."""
        if self.current is not None:
            return True
        for request_id, entry in list(self._open.items()):
            if entry.suspect and not entry.sent:
                self.current = entry
                if self._run(entry):
                    return True
                self.current = None
                self.reject(request_id, worker_blocked())
        return False

    def resume(self) -> None:
        """Ask the connected worker what was parked."""
        for request_id, entry in list(self._open.items()):
            if not entry.sent and not self._run(entry):
                self.reject(request_id, worker_blocked())

    def fail_all(self, error: CodedError) -> None:
        self.current, convicted, self._convicted = None, self._convicted, None
        if convicted is not None:
            self.reject(convicted.request.request_id, poisoned(error))
        for request_id in list(self._open):
            self.reject(request_id, error)
