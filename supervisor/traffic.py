"""What clients do with one model: how much, how lately, and that they stop before it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from protocol.messages import Inquiry, InquiryAnswer, Job
from supervisor.requests import RequestTable
from supervisor.stream import RequestStream

#: How often it is looked whether the last request has ended.
_DRAIN_INTERVAL_S = 0.05


class Traffic:
    """Counts what goes to ``requests``. Whoever calls has seen that the model may be used.

    ``last_used_at`` is in epoch seconds.
    """

    def __init__(self, requests: RequestTable) -> None:
        self.requests = requests
        self.count = 0
        self.last_used_at: float | None = None
        self._drains = 0

    @property
    def draining(self) -> bool:
        """Whether no more is to be let in."""
        return self._drains > 0

    def end_drain(self) -> None:
        """What it was for has come, for all who drain."""
        self._drains = 0

    def submit(
        self, request: Job, *, limit: int, streaming: bool, may_resume: bool
    ) -> RequestStream:
        """See ``RequestTable.open``."""
        stream = self.requests.open(
            request, limit=limit, streaming=streaming, may_resume=may_resume
        )
        self.count += 1
        self.last_used_at = time.time()
        return stream

    async def ask(self, inquiry: Inquiry) -> InquiryAnswer:
        """See ``RequestTable.ask``."""
        self.last_used_at = time.time()
        return await self.requests.ask(inquiry)

    def idle_s(self) -> float | None:
        """Seconds without anything to do; None while there is."""
        if self.draining or self.requests.busy:
            return None
        return time.monotonic() - self.requests.idle_since

    async def drain(self, timeout_s: float, is_routable: Callable[[], bool]) -> None:
        """Let nothing more in until ``end_drain``, and wait for the end of what runs.

        What waits for the model to be loaded is not waited for. Who is cancelled does not drain
        any more; others may.
        """
        self._drains += 1
        deadline = time.monotonic() + timeout_s
        try:
            while is_routable() and self.requests.busy:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                await asyncio.sleep(min(left_s, _DRAIN_INTERVAL_S))
        except BaseException:
            self._drains = max(0, self._drains - 1)
            raise
