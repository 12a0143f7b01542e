"""Whoever waits for a load to end: all get the same answer, and nobody waits for ever."""

from __future__ import annotations

import asyncio

from protocol.errors import CodedError
from supervisor.views import ReadinessView


class LoadWaiters:
    """Those who wait for one model's load. Use on the event loop only."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[ReadinessView]] = set()

    def __bool__(self) -> bool:
        return bool(self._waiters)

    async def wait(self) -> ReadinessView:
        """The readiness of the model that became routable. Raises how it ended otherwise."""
        waiter: asyncio.Future[ReadinessView] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            return await waiter
        finally:
            self._waiters.discard(waiter)

    def answer(self, end: ReadinessView | CodedError) -> None:
        """Tell all who wait now; who comes later waits for the next answer."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if waiter.done():
                continue
            if isinstance(end, CodedError):
                # One for each: a raised exception belongs to whoever raised it.
                waiter.set_exception(CodedError(end.code, end.message, details=end.details))
            else:
                waiter.set_result(end)
