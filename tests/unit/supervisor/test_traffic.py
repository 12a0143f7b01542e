"""A model that is being drained, by one or by several who want it gone."""

from __future__ import annotations

import asyncio
import contextlib

from protocol.messages import Generate, ToWorker
from supervisor.line import Delivery
from supervisor.requests import RequestTable
from supervisor.traffic import Traffic


def busy() -> Traffic:
    requests = RequestTable(max_stream_buffer_bytes=1000)

    def send(_message: ToWorker) -> Delivery:
        return Delivery.SENT

    requests.connect(send)
    requests.resume()
    traffic = Traffic(requests)
    traffic.submit(Generate(0, prompt="Hi"), limit=9, streaming=True, may_resume=False)
    return traffic


def drain(traffic: Traffic, timeout_s: float = 60.0) -> asyncio.Task[None]:
    return asyncio.create_task(traffic.drain(timeout_s, lambda: True))


def is_draining(traffic: Traffic) -> bool:
    return traffic.draining


async def call_off(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_drain_that_is_called_off_leaves_nothing() -> None:
    traffic = busy()
    draining = drain(traffic)
    await asyncio.sleep(0)
    assert is_draining(traffic)
    await call_off(draining)
    assert not is_draining(traffic)


async def test_it_goes_on_for_the_other_who_drains() -> None:
    traffic = busy()
    one, other = drain(traffic), drain(traffic)
    await asyncio.sleep(0)
    await call_off(one)
    assert is_draining(traffic)
    await call_off(other)
    assert not is_draining(traffic)


async def test_after_its_end_it_is_drained_until_that_is_ended() -> None:
    traffic = busy()
    other = drain(traffic)
    await drain(traffic, timeout_s=0)
    assert is_draining(traffic)
    traffic.end_drain()
    assert not is_draining(traffic)
    # Who still waits for it has no part in what comes then.
    await call_off(other)
    again = drain(traffic)
    await asyncio.sleep(0)
    assert is_draining(traffic)
    await call_off(again)
