"""Requests whose model has to be loaded first, and has not begun to: for lack of memory, say."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import ASGIApp

from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason
from supervisor.gateway.openai import responses_background
from supervisor.metrics import Metrics
from tests.support.asgi import Exchange, MakeApp, events
from tests.support.fake_fleet import FakeFleet, view

HI = [{"role": "user", "content": "Hi"}]
STREAMS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 5},
}
WHOLE: dict[str, dict[str, object]] = {
    **STREAMS,
    "/v1/embeddings": {"input": "Hi"},
    "/v1/rerank": {"query": "Hi", "documents": ["Ho"]},
}
CHAT = "/v1/chat/completions"
NO_ROOM = CodedError(ErrorCode.INSUFFICIENT_MEMORY, "there is no room", retry_after_s=5.0)
NAMES = ("m", "best")


@pytest.fixture
def fleet() -> FakeFleet:
    fleet = FakeFleet()
    fleet.add(view("m"))
    fleet.add(view("other"))
    fleet.preparation_may_end = asyncio.Event()
    return fleet


@pytest.fixture
def waiting(fleet: FakeFleet) -> asyncio.Event:
    """Set, it lets those go on who wait for their model."""
    assert fleet.preparation_may_end is not None
    return fleet.preparation_may_end


@pytest.fixture
def app(make_app: MakeApp) -> ASGIApp:
    return make_app(aliases={"best": ("m", "other")}, load_on_demand=True, sse_keepalive_s=0.02)


@pytest.fixture
def patient_app(make_app: MakeApp) -> ASGIApp:
    """One that opens no stream before there is something to say."""
    return make_app(aliases={"best": ("m", "other")}, load_on_demand=True, sse_keepalive_s=60)


def post(app: ASGIApp, path: str, name: str, *, stream: bool, **headers: str) -> Exchange:
    body = {"model": name, **WHOLE[path]}
    if stream:
        body["stream"] = True
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    return Exchange(app, "POST", path, json=body, headers=sent)


async def over(call: Exchange) -> None:
    async with asyncio.timeout(5):
        await call.finish()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", STREAMS)
async def test_a_stream_says_that_it_is_alive_while_its_model_waits(
    app: ASGIApp, fleet: FakeFleet, waiting: asyncio.Event, path: str, name: str
) -> None:
    call = post(app, path, name, stream=True)
    await call.wait_for(b": keep-alive\n\n: keep-alive\n\n: keep-alive")
    assert fleet.requests == []
    waiting.set()
    await over(call)
    # They have waited for one preparation all along.
    assert [model for model, _ in fleet.prepared] == ["m"]
    assert b"Hel" in call.body
    assert b'"model":"m"' in call.body


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("path", "stream"), [*((path, False) for path in WHOLE), *((path, True) for path in STREAMS)]
)
async def test_who_leaves_waits_no_more(
    patient_app: ASGIApp,
    fleet: FakeFleet,
    metrics: Metrics,
    path: str,
    stream: bool,
    name: str,
) -> None:
    call = post(patient_app, path, name, stream=stream)
    await fleet.preparation()
    call.disconnect()
    await over(call)
    assert fleet.preparations_called_off == 1
    assert len(fleet.prepared) == 1
    assert fleet.requests == []
    assert b'code="client_disconnected"' in metrics.render()


async def test_who_leaves_an_open_stream_waits_no_more(app: ASGIApp, fleet: FakeFleet) -> None:
    call = post(app, CHAT, "best", stream=True)
    await call.wait_for(b": keep-alive")
    call.disconnect()
    await over(call)
    assert (fleet.preparations_called_off, len(fleet.prepared)) == (1, 1)


async def test_who_leaves_takes_nobody_with_them(
    patient_app: ASGIApp, fleet: FakeFleet, waiting: asyncio.Event
) -> None:
    leaving, staying = (post(patient_app, CHAT, "m", stream=True) for _ in range(2))
    await fleet.preparation(1)
    leaving.disconnect()
    await over(leaving)
    waiting.set()
    await over(staying)
    assert (staying.status, events(staying.body)[-1]) == (200, "[DONE]")
    assert len(fleet.requests) == 1


async def test_who_leaves_when_the_model_has_just_come_keeps_it_from_nothing(
    patient_app: ASGIApp, fleet: FakeFleet, waiting: asyncio.Event
) -> None:
    fleet.script = None
    calls = [post(patient_app, CHAT, "m", stream=bool(number % 2)) for number in range(20)]
    await fleet.preparation(len(calls) - 1)
    waiting.set()
    for pauses, call in enumerate(calls):
        # At each of the steps in between.
        asyncio.get_running_loop().call_soon(call.disconnect)
        for _ in range(pauses % 4):
            await asyncio.sleep(0)
    for call in calls:
        await over(call)
    async with asyncio.timeout(5):
        for submitted in fleet.requests:
            await submitted.cancellation.wait()


@pytest.mark.parametrize("path", STREAMS)
async def test_what_is_refused_soon_is_a_proper_refusal(
    patient_app: ASGIApp, fleet: FakeFleet, waiting: asyncio.Event, path: str
) -> None:
    fleet.unprepared["m"] = NO_ROOM
    waiting.set()
    call = post(patient_app, path, "m", stream=True)
    await over(call)
    assert call.status in (507, 529)
    assert call.headers["retry-after"] == "5"


@pytest.mark.parametrize("path", STREAMS)
async def test_what_is_refused_later_is_an_event(
    app: ASGIApp, fleet: FakeFleet, waiting: asyncio.Event, path: str
) -> None:
    fleet.unprepared["m"] = NO_ROOM
    call = post(app, path, "m", stream=True)
    await call.wait_for(b": keep-alive")
    assert call.headers["x-served-model"] == "m"
    waiting.set()
    await over(call)
    assert b"there is no room" in call.body
    assert b"[DONE]" not in call.body


@pytest.mark.parametrize("stream", [False, True])
async def test_a_list_goes_on_when_there_is_no_room_for_its_first(
    app: ASGIApp, fleet: FakeFleet, waiting: asyncio.Event, stream: bool
) -> None:
    fleet.unprepared["m"] = NO_ROOM
    call = post(app, CHAT, "best", stream=stream)
    await fleet.preparation()
    if stream:
        await call.wait_for(b": keep-alive")
        assert "x-served-model" not in call.headers
    waiting.set()
    await over(call)
    assert [model for model, _ in fleet.prepared] == ["m", "other"]
    assert [submitted.model for submitted in fleet.requests] == ["other"]
    assert call.status == 200


async def test_a_bug_on_the_way_to_a_model_is_told_and_logged(
    patient_app: ASGIApp,
    fleet: FakeFleet,
    waiting: asyncio.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet.bug = RuntimeError("a bug")
    waiting.set()
    call = post(patient_app, CHAT, "m", stream=False)
    await over(call)
    assert (call.status, call.json["error"]["code"]) == (500, "internal_error")
    assert "a bug" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_the_clients_deadline_counts(
    patient_app: ASGIApp, fleet: FakeFleet, stream: bool
) -> None:
    call = post(patient_app, CHAT, "m", stream=stream, x_request_timeout="0.05")
    await over(call)
    assert (call.status, call.json["error"]["code"]) == (408, "request_timeout")
    assert fleet.preparations_called_off == 1


async def test_it_can_be_cancelled_by_its_id(patient_app: ASGIApp, fleet: FakeFleet) -> None:
    call = post(patient_app, CHAT, "m", stream=False, x_request_id="mine")
    await fleet.preparation()
    cancel = Exchange(patient_app, "POST", "/v1/requests/mine/cancel")
    await over(cancel)
    assert cancel.status == 200
    await over(call)
    assert (call.status, call.json["error"]["code"]) == (499, "request_cancelled")
    assert fleet.preparations_called_off == 1


async def test_a_stream_to_come_back_to_goes_on_waiting(
    app: ASGIApp, fleet: FakeFleet, waiting: asyncio.Event
) -> None:
    call = post(app, CHAT, "m", stream=True, x_conversation_id="talk")
    await call.wait_for(b": keep-alive")
    call.disconnect()
    await over(call)
    waiting.set()
    back = Exchange(app, "GET", f"/v1/stream/{call.headers['x-stream-id']}")
    await over(back)
    assert b"[DONE]" in back.body
    assert fleet.preparations_called_off == 0


async def test_a_response_in_the_background_waits_alone(
    app: ASGIApp, fleet: FakeFleet, waiting: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_background, "_AT_ONCE_S", 0.02)
    fleet.script = None
    body = {"model": "m", "input": "Hi", "background": True}
    call = Exchange(app, "POST", "/v1/responses", json=body)
    await over(call)
    assert (call.status, call.json["status"]) == (200, "queued")
    waiting.set()
    submitted = await fleet.request()
    submitted.accept()
    submitted.say("Hello", FinishReason.STOP)
    path = f"/v1/responses/{call.json['id']}"
    await over(Exchange(app, "GET", f"{path}?stream=true"))
    answer = Exchange(app, "GET", path)
    await over(answer)
    assert answer.json["status"] == "completed"


async def test_a_response_in_the_background_that_cannot_be_is_refused(
    app: ASGIApp, fleet: FakeFleet, waiting: asyncio.Event
) -> None:
    fleet.unprepared["m"] = NO_ROOM
    waiting.set()
    body = {"model": "m", "input": "Hi", "background": True}
    call = Exchange(app, "POST", "/v1/responses", json=body)
    await over(call)
    assert (call.status, call.json["error"]["code"]) == (507, "insufficient_memory")


async def test_a_response_in_the_background_can_be_cancelled_while_it_waits(
    app: ASGIApp, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_background, "_AT_ONCE_S", 0.02)
    body = {"model": "m", "input": "Hi", "background": True}
    call = Exchange(app, "POST", "/v1/responses", json=body)
    await over(call)
    cancel = Exchange(app, "POST", f"/v1/responses/{call.json['id']}/cancel")
    await over(cancel)
    assert cancel.json["status"] == "cancelled"
    assert (fleet.preparations_called_off, fleet.requests) == (1, [])
