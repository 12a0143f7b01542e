"""``POST /v1/requests/{id}/cancel``: who may end which call, and how that call then ends."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from supervisor.gateway.running import RunningCalls
from supervisor.metrics import Metrics
from tests.support.asgi import Exchange, MakeApp, events
from tests.support.fake_fleet import FakeFleet

CHAT = "/v1/chat/completions"
MINE = {"x-request-id": "mine"}


def body(**more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **more}


async def cancel(
    app: ASGIApp, request_id: str, headers: dict[str, str] | None = None
) -> tuple[int, object]:
    call = Exchange(app, "POST", f"/v1/requests/{request_id}/cancel", headers=headers)
    await call.finish()
    answer = call.json
    return call.status, answer["error"]["code"] if "error" in answer else answer


async def test_a_whole_answer_ends_with_499(
    app: ASGIApp, fleet: FakeFleet, metrics: Metrics
) -> None:
    fleet.script = None
    call = Exchange(app, "POST", CHAT, json=body(), headers=MINE)
    submitted = await fleet.request()
    assert await cancel(app, "mine") == (
        200,
        {"id": "mine", "object": "request", "cancelled": True},
    )
    await call.finish()
    assert call.status == 499
    error = call.json["error"]
    assert (error["code"], error["tokens_sent"]) == ("request_cancelled", 0)
    assert submitted.cancelled
    assert b'code="request_cancelled"' in metrics.render()


async def test_a_stream_ends_with_an_error_event(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    call = Exchange(app, "POST", CHAT, json=body(stream=True), headers=MINE)
    submitted = await fleet.request()
    submitted.accept()
    submitted.say("Hel", tokens=2)
    await call.wait_for_messages(3)
    assert (await cancel(app, "mine"))[0] == 200
    await call.finish()
    *_, last = events(call.body)
    assert (last["error"]["code"], last["error"]["tokens_sent"]) == ("request_cancelled", 2)
    assert submitted.cancelled


async def test_our_own_id_is_on_the_stream_from_its_beginning(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    call = Exchange(app, "POST", CHAT, json=body(stream=True))
    (await fleet.request()).accept()
    await call.wait_for_messages(1)
    assert (await cancel(app, call.headers["x-request-id"]))[0] == 200
    await call.finish()


async def test_all_answers_and_all_calls_of_an_id_end(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    several = Exchange(app, "POST", CHAT, json=body(n=2), headers=MINE)
    other = Exchange(app, "POST", CHAT, json=body(), headers=MINE)
    bystander = Exchange(app, "POST", CHAT, json=body(), headers={"x-request-id": "other"})
    submitted = [await fleet.request(number) for number in range(4)]
    assert (await cancel(app, "mine"))[0] == 200
    await several.finish()
    await other.finish()
    assert (several.status, other.status) == (499, 499)
    mine = [each.cancelled for each in submitted]
    assert sorted(mine) == [False, True, True, True]
    for each in submitted:
        each.accept()
        each.finish()
    await bystander.finish()
    assert bystander.status == 200


@pytest.mark.parametrize("request_id", ["unknown", "%00", "a%2Fb", "x" * 500])
async def test_what_does_not_run_is_not_found(client: httpx.AsyncClient, request_id: str) -> None:
    answer = await client.post(f"/v1/requests/{request_id}/cancel")
    assert answer.status_code == 404


async def test_what_has_ended_is_not_found(app: ASGIApp, fleet: FakeFleet) -> None:
    call = Exchange(app, "POST", CHAT, json=body(), headers=MINE)
    await call.finish()
    assert await cancel(app, "mine") == (404, "request_not_found")


async def test_another_key_finds_nothing(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    key = {"authorization": "Bearer a"}
    call = Exchange(app, "POST", CHAT, json=body(), headers={**MINE, **key})
    await fleet.request()
    for headers in ({}, {"authorization": "Bearer b"}, {"x-api-key": "b"}):
        assert await cancel(app, "mine", headers) == (404, "request_not_found")
    assert (await cancel(app, "mine", {"x-api-key": "a"}))[0] == 200
    await call.finish()


async def test_the_servers_key_is_asked_for(make_app: MakeApp) -> None:
    app = make_app(api_key="secret")
    assert await cancel(app, "mine") == (401, "invalid_api_key")


@pytest.mark.parametrize("streaming", [False, True])
async def test_only_what_runs_is_remembered(
    app: ASGIApp, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    fleet.script = None
    seen: list[RunningCalls] = []
    add = RunningCalls.add

    def spy(calls: RunningCalls, *arguments: Any) -> None:
        seen.append(calls)
        add(calls, *arguments)

    monkeypatch.setattr(RunningCalls, "add", spy)
    call = Exchange(app, "POST", CHAT, json=body(stream=streaming))
    submitted = await fleet.request()
    assert len(seen[0]) == 1
    submitted.accept()
    submitted.finish()
    await call.finish()
    assert len(seen[0]) == 0
