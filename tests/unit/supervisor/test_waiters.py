"""Loads that are waited for: everyone is answered, each on his own."""

import asyncio

import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor.lifecycle import Readiness
from supervisor.views import ReadinessView
from supervisor.waiters import LoadWaiters

ROUTABLE = ReadinessView(
    state=Readiness.ROUTABLE, reason="", crash_count=0, updated_at=0.0, retry_at=None, code=None
)


async def waiting(waiters: LoadWaiters, count: int) -> list[asyncio.Future[ReadinessView]]:
    tasks: list[asyncio.Future[ReadinessView]] = [
        asyncio.ensure_future(waiters.wait()) for _ in range(count)
    ]
    await asyncio.sleep(0)
    return tasks


async def test_all_who_wait_get_the_answer_and_who_comes_later_the_next() -> None:
    waiters = LoadWaiters()
    early = await waiting(waiters, 2)
    waiters.answer(ROUTABLE)
    [late] = await waiting(waiters, 1)
    assert [await each for each in early] == [ROUTABLE, ROUTABLE]
    assert waiters
    waiters.answer(CodedError(ErrorCode.MODEL_UNLOADED, "gone"))
    with pytest.raises(CodedError, match="gone"):
        await late
    assert not waiters


async def test_a_failure_is_told_to_each_in_an_error_of_its_own() -> None:
    waiters = LoadWaiters()
    tasks = await waiting(waiters, 2)
    waiters.answer(CodedError(ErrorCode.MODEL_UNSTABLE, "no", details={"incident_id": "i"}))
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert errors[0] is not errors[1]
    assert [getattr(error, "details", None) for error in errors] == [{"incident_id": "i"}] * 2
    assert {error.code for error in errors if isinstance(error, CodedError)} == {
        ErrorCode.MODEL_UNSTABLE
    }


async def test_who_gives_up_is_forgotten() -> None:
    waiters = LoadWaiters()
    gone, still = await waiting(waiters, 2)
    gone.cancel()
    waiters.answer(ROUTABLE)
    assert await still == ROUTABLE
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert not waiters
