"""Says on a stream that is silent that it is alive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine


class KeepAlive:
    """Runs ``ping()`` whenever nothing was sent for ``interval`` seconds.

    One timer per stream that re-arms itself; a chunk costs a store of the time.
    """

    def __init__(self, ping: Callable[[], Coroutine[None, None, None]], interval: float) -> None:
        self._make_ping = ping
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._ping: asyncio.Task[None] | None = None
        self.last_sent = self._loop.time()
        self._timer = self._loop.call_later(interval, self._tick)

    def stop(self) -> None:
        self._timer.cancel()
        if self._ping is not None:
            # A ping still waiting for a slow client must not follow the end.
            self._ping.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        due = self.last_sent + self._interval
        # The loop's clock has the timer's granularity: a hair early is on time.
        if now >= due - 0.001:
            if self._ping is None or self._ping.done():
                self._ping = self._loop.create_task(self._make_ping())
            self.last_sent = now
            due = now + self._interval
        self._timer = self._loop.call_later(due - now, self._tick)
