"""What a client says and sees about answers that go on after a crash."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import ASGIApp

from protocol.errors import ErrorCode
from protocol.messages import FinishReason
from supervisor.metrics import Metrics
from tests.support.asgi import Exchange
from tests.support.fake_fleet import FakeFleet, Submitted

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
TURNS = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, object]] = {
    CHAT: {"model": "m", "messages": TURNS},
    TEXT: {"model": "m", "prompt": "Hi"},
    MESSAGES: {"model": "m", "messages": TURNS, "max_tokens": 10},
    RESPONSES: {"model": "m", "input": "Hi"},
}
RESUMED = "opta_lmx_resumed_answers_total"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("headers", "expected"),
    [({}, True), ({"X-Resume": "auto"}, True), ({"X-Resume": " Never "}, False)],
)
async def test_a_request_may_ask_not_to_go_on(
    client: httpx.AsyncClient,
    fleet: FakeFleet,
    path: str,
    headers: dict[str, str],
    expected: bool,
) -> None:
    assert (await client.post(path, json=BODIES[path], headers=headers)).status_code == 200
    [submitted] = fleet.requests
    assert submitted.resume is expected


@pytest.mark.parametrize("value", ["always", "", "0"])
async def test_another_word_is_refused_by_the_headers_name(
    client: httpx.AsyncClient, fleet: FakeFleet, value: str
) -> None:
    answer = await client.post(CHAT, json=BODIES[CHAT], headers={"X-Resume": value})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "X-Resume")
    assert fleet.requests == []


def crash_and_go_on(submitted: Submitted) -> None:
    submitted.accept()
    submitted.say("Hel")
    submitted.stream.resumes += 1
    submitted.accept(prompt_tokens=99)
    submitted.say("lo", FinishReason.STOP)


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_that_went_on_says_so_before_its_end(
    app: ASGIApp, fleet: FakeFleet, metrics: Metrics, path: str
) -> None:
    fleet.script = None
    exchange = Exchange(app, "POST", path, json={**BODIES[path], "stream": True})
    crash_and_go_on(await fleet.request())
    await exchange.finish()
    comment = exchange.body.index(b": resumed 1\n\n")
    for end in (b"data: [DONE]", b"event: message_stop", b"event: response.completed"):
        if end in exchange.body:
            assert comment < exchange.body.index(end)
    assert exchange.body.count(b": resumed") == 1
    assert metrics.value(RESUMED, {"model": "m", "outcome": "completed"}) == 1


@pytest.mark.parametrize("path", BODIES)
async def test_a_whole_answer_that_went_on_says_so_in_a_header(
    app: ASGIApp, fleet: FakeFleet, path: str
) -> None:
    fleet.script = None
    exchange = Exchange(app, "POST", path, json=BODIES[path])
    crash_and_go_on(await fleet.request())
    await exchange.finish()
    assert (exchange.status, exchange.headers["x-resumed"]) == (200, "1")
    assert b"Hello" in exchange.body


async def test_what_went_on_and_failed_is_counted_as_that(
    app: ASGIApp, fleet: FakeFleet, metrics: Metrics
) -> None:
    fleet.script = None
    exchange = Exchange(app, "POST", CHAT, json=BODIES[CHAT])
    submitted = await fleet.request()
    submitted.accept()
    submitted.stream.resumes = 2
    submitted.fail(ErrorCode.MODEL_CRASHED)
    await exchange.finish()
    assert (exchange.status, exchange.headers["x-resumed"]) == (503, "2")
    assert metrics.value(RESUMED, {"model": "m", "outcome": "failed"}) == 1


async def test_an_answer_without_a_crash_says_nothing_of_it(
    client: httpx.AsyncClient, metrics: Metrics
) -> None:
    answer = await client.post(CHAT, json=BODIES[CHAT])
    streamed = await client.post(CHAT, json={**BODIES[CHAT], "stream": True})
    assert "x-resumed" not in answer.headers
    assert ": resumed" not in streamed.text
    assert metrics.value(RESUMED, {"model": "m", "outcome": "completed"}) is None
