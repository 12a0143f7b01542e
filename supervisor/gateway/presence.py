"""Work that is done for as long as its client is there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from supervisor.gateway.body import ClientDisconnected

T = TypeVar("T")


async def while_there(
    receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float | None = None
) -> T:
    """Its result. Raises ``ClientDisconnected`` or ``TimeoutError``, and calls the work off.

    The body must have been read.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        both = {working, gone}
        await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if gone.done():
            raise ClientDisconnected
        raise TimeoutError
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
