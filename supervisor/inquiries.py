"""What a model's worker is asked beside its requests: answered whole, and it takes no slot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Inquiry, InquiryAnswer
from supervisor.entries import OpenInquiry, worker_blocked
from supervisor.resumption import MAX_RUNS


class Inquiries:
    """At most ``limit`` unanswered ones of one model, by their request ids.

    ``run`` gives one to the worker, False when that does not read; ``call_off`` tells the
    worker that nobody waits for one any more.
    """

    def __init__(
        self,
        limit: int,
        *,
        run: Callable[[OpenInquiry], bool],
        call_off: Callable[[int], None],
    ) -> None:
        self._limit = limit
        self._run = run
        self._call_off = call_off
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
            if self._open.pop(inquiry.request_id, None) is not None and entry.sent:
                self._call_off(inquiry.request_id)

    def answer(self, message: InquiryAnswer) -> None:
        entry = self._open.pop(message.request_id, None)
        if entry is not None and not entry.answer.done():
            entry.answer.set_result(message)

    def reject(self, request_id: int, error: CodedError) -> bool:
        """Whether there was such an inquiry, which has failed now."""
        entry = self._open.pop(request_id, None)
        if entry is not None:
            entry.fail(error)
        return entry is not None

    def sent(self) -> list[Inquiry]:
        """Those that the worker has."""
        return [entry.request for entry in self._open.values() if entry.sent]

    def park(self, error: CodedError) -> None:
        """Keep for the next worker what may be asked once more; fail the rest."""
        for request_id, entry in list(self._open.items()):
            entry.sent = False
            if entry.runs >= MAX_RUNS:
                self.reject(request_id, error)

    def resume(self) -> None:
        """Ask the connected worker what was parked."""
        for request_id, entry in list(self._open.items()):
            if not entry.sent and not self._run(entry):
                self.reject(request_id, worker_blocked())

    def fail_all(self, error: CodedError) -> None:
        for request_id in list(self._open):
            self.reject(request_id, error)
