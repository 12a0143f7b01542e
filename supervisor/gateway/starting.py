"""Requests of a call on their way to a model, before that is known: it has to be loaded, and
there may be no room yet, or the one before it has failed.

One stream stands for them meanwhile. Who gives it up, as any other, calls the rest off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from supervisor.gateway.endpoint import Call
from supervisor.gateway.errors import coded
from supervisor.stream import RequestStream

log = logging.getLogger(__name__)

Streams = list[RequestStream]


def start_later(
    call: Call,
    streams: Streams,
    work: Coroutine[Any, Any, Streams],
    let_go: Callable[[Streams], None],
) -> None:
    """Have what ``work`` returns in ``streams`` as soon as it does; see ``begun``.

    ``let_go`` gets it instead when it comes too late.
    """
    task = asyncio.create_task(work, name="start requests")
    given_up = False

    def give_up() -> None:
        nonlocal given_up
        given_up = True
        task.cancel()

    held = RequestStream(max_buffer_bytes=None, on_close=give_up)

    def done(task: asyncio.Task[Streams]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            failure = coded(error) if isinstance(error, Exception) else None
            if failure is not error:
                log.error("request %s failed", call.request_id.decode(), exc_info=error)
            if failure is not None:
                held.fail(failure)
        elif given_up:
            let_go(task.result())
        else:
            streams[:] = task.result()
            call.starting = None
            held.accept(0)

    streams[:] = [held]
    call.starting = held
    task.add_done_callback(done)


async def begun(call: Call) -> None:
    """Wait until the call's requests are with a model. Raises why they will not be, or what
    they were given up with. Who is cancelled may come back."""
    if call.starting is not None:
        await call.starting.accepted()
