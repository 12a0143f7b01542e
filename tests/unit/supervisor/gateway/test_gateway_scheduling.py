"""Whose request it is, its lane and its deadline: from the headers to the worker."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.types import ASGIApp

from protocol.errors import ErrorCode
from protocol.messages import FinishReason, Priority
from supervisor.gateway.scheduling import client_of
from supervisor.metrics import Metrics
from tests.support.asgi import Exchange, MakeApp, events
from tests.support.fake_fleet import FakeFleet

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, object]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    TEXT: {"model": "m", "prompt": "Hi"},
}


def client(
    headers: dict[str, str] | None = None,
    *claims: object,
    address: str | None = "10.0.0.1",
    api_key: str | None = None,
) -> str:
    sent = [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items()]
    scope: dict[str, Any] = {
        "type": "http",
        "headers": sent,
        "client": None if address is None else (address, 5000),
    }
    return client_of(Request(scope), api_key=api_key, claims=claims)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# --- whose it is ---


def test_the_first_that_is_there_names_the_client() -> None:
    everything = {"X-Client-Id": "me", **bearer("k")}
    assert client(everything, "u") == client({"X-Client-Id": "me"}, address="10.9.9.9")
    assert client(bearer("k"), "u") == client(None, "u", address="10.9.9.9")
    assert client(bearer("k")) == client(bearer("k"), address="10.9.9.9")
    assert client() == client() != client(address="10.9.9.9")


def test_the_kinds_of_names_are_apart() -> None:
    named = [client({"X-Client-Id": "x"}), client(None, "x"), client(bearer("x")), client()]
    assert len(set(named)) == 4
    assert client(address="x") not in named[:3]


def test_the_first_claim_that_is_a_text_counts() -> None:
    assert client(None, None, "safe") == client(None, "safe")
    assert client(None, 5, "safe") == client(None, "safe")
    assert client(None, "", {"a": 1}) == client()


def test_either_way_to_present_a_key_is_the_same_client() -> None:
    assert (
        client(bearer("k")) == client({"X-Api-Key": "k"}) == client({"authorization": "bearer k"})
    )
    assert client({"Authorization": "Basic eDp5"}) == client()
    assert client({"Authorization": "Bearer "}) == client()


def test_the_servers_own_key_tells_nobody_apart() -> None:
    assert client(bearer("shared"), api_key="shared") == client()
    assert client(bearer("other"), api_key="shared") != client()


@pytest.mark.parametrize("value", ["x" * 100_000, "", "äöü", "\ud800", "a\0b"])
def test_names_are_short_whatever_they_are_made_of(value: str) -> None:
    assert len(client(None, value)) == 24


def test_a_name_tells_no_key() -> None:
    assert "secret" not in client(bearer("secret"))


def test_programs_on_one_machine_are_told_apart() -> None:
    named = [client({"User-Agent": agent}) for agent in ("aider/1", "curl/8", "")]
    assert len(set(named)) == 3
    assert named[2] == client()
    assert named[0] != client({"User-Agent": "aider/1"}, address="10.9.9.9")
    # Whoever says who it is, is it with every program.
    assert client({"X-Client-Id": "me", "User-Agent": "a"}) == client({"X-Client-Id": "me"})


def test_a_socket_without_an_address_is_a_client_too() -> None:
    assert client(address=None) == client(address=None)


# --- what reaches the worker ---


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("streaming", [True, False])
async def test_headers_reach_the_worker(
    client: httpx.AsyncClient, fleet: FakeFleet, path: str, streaming: bool
) -> None:
    body = {**BODIES[path], "stream": streaming}
    for headers in ({"X-Priority": " HIGH"}, {"X-Priority": "low", "X-Client-Id": "a"}, {}):
        assert (await client.post(path, json=body, headers=headers)).status_code == 200
    requests = [submitted.request for submitted in fleet.requests]
    assert [r.priority for r in requests] == [Priority.HIGH, Priority.LOW, Priority.NORMAL]
    assert requests[0].client == requests[2].client != requests[1].client


async def test_every_prompt_of_a_call_has_its_terms(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    body = {"model": "m", "prompt": ["a", "b"], "user": "ann"}
    await client.post(TEXT, json=body, headers={"X-Priority": "low"})
    assert [s.request.priority for s in fleet.requests] == [Priority.LOW] * 2
    assert len({s.request.client for s in fleet.requests}) == 1


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_body_names_the_client(
    client: httpx.AsyncClient, fleet: FakeFleet, path: str
) -> None:
    for more in ({"user": "ann"}, {"safety_identifier": "ann"}, {"user": {"odd": 1}}, {}):
        assert (await client.post(path, json={**BODIES[path], **more})).status_code == 200
    names = [submitted.request.client for submitted in fleet.requests]
    assert names[0] == names[1]
    assert names[2] == names[3] != names[0]


# --- what is refused ---


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Priority", "urgent"),
        ("X-Priority", ""),
        *(
            ("X-Request-Timeout", value)
            for value in ("0", "-1", "nan", "inf", "86401", "1e3", "1_0", "soon", "", "5s", "0.0")
        ),
    ],
)
async def test_bad_values_are_refused_by_name(
    client: httpx.AsyncClient, fleet: FakeFleet, path: str, header: str, value: str
) -> None:
    answer = await client.post(path, json=BODIES[path], headers={header: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", header)
    assert fleet.requests == []


@pytest.mark.parametrize("value", ["86400", "0.5", " 30 ", "30.", ".5"])
async def test_good_timeouts(client: httpx.AsyncClient, value: str) -> None:
    headers = {"X-Request-Timeout": value}
    assert (await client.post(CHAT, json=BODIES[CHAT], headers=headers)).status_code == 200


# --- the deadline ---


def exchange(app: ASGIApp, path: str, timeout: str, **more: object) -> Exchange:
    headers = {"x-request-timeout": timeout}
    return Exchange(app, "POST", path, json={**BODIES[path], **more}, headers=headers)


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_deadline_before_the_answer_is_an_http_error(
    app: ASGIApp, fleet: FakeFleet, metrics: Metrics, streaming: bool
) -> None:
    fleet.script = None
    late = exchange(app, CHAT, "0.02", stream=streaming)
    await late.finish()
    error = late.json["error"]
    assert (late.status, error["code"], error["tokens_sent"]) == (408, "request_timeout", 0)
    assert "connection" not in late.headers
    assert (await fleet.request()).cancelled
    labels = {"model": "m", "endpoint": CHAT, "code": "request_timeout"}
    assert metrics.value("opta_lmx_requests_total", labels) == 1


async def test_a_deadline_in_a_stream_is_its_last_event(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    late = exchange(app, CHAT, "0.05", stream=True)
    submitted = await fleet.request()
    submitted.accept()
    await late.wait_for_messages(2)
    submitted.say("half", tokens=3)
    await late.finish()
    assert late.status == 200
    *_, text, error = events(late.body)
    assert text["choices"][0]["delta"] == {"content": "half"}
    assert (error["error"]["code"], error["error"]["tokens_sent"]) == ("request_timeout", 3)
    assert submitted.cancelled


async def test_a_deadline_ends_every_prompt(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    late = exchange(app, TEXT, "0.02", prompt=["a", "b"])
    await late.finish()
    assert late.status == 408
    assert [submitted.cancelled for submitted in fleet.requests] == [True, True]


async def test_a_deadline_that_has_passed_starts_nothing(app: ASGIApp, fleet: FakeFleet) -> None:
    late = exchange(app, CHAT, "0.000000001")
    await late.finish()
    assert late.status == 408
    assert fleet.requests == []


@pytest.mark.parametrize("end", ["finish", "fail", "disconnect"])
@pytest.mark.parametrize("streaming", [True, False])
async def test_no_timer_is_left_behind(
    app: ASGIApp, fleet: FakeFleet, end: str, streaming: bool
) -> None:
    fleet.script = None
    call = exchange(app, CHAT, "3600", stream=streaming)
    submitted = await fleet.request()
    submitted.accept()
    match end:
        case "finish":
            submitted.say("x", FinishReason.STOP)
        case "fail":
            submitted.fail(ErrorCode.MODEL_CRASHED)
        case "disconnect":
            call.disconnect()
    await call.finish()
    loop: Any = call.task.get_loop()
    pending = [timer for timer in loop._scheduled if not timer.cancelled()]
    assert not [timer for timer in pending if timer.when() > loop.time() + 600]


# --- what was cached ---


async def test_usage_tells_what_was_cached(
    app: ASGIApp, fleet: FakeFleet, metrics: Metrics
) -> None:
    fleet.script = None
    call = Exchange(app, "POST", TEXT, json={"model": "m", "prompt": ["a", "b"]})
    for number, cached in enumerate((3, 4)):
        submitted = await fleet.request(number)
        submitted.accept(prompt_tokens=10)
        submitted.start(cached)
        submitted.say("x", FinishReason.STOP)
    await call.finish()
    assert call.json["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 2,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 7},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    labels = {"model": "m"}
    assert metrics.value("opta_lmx_prompt_tokens_total", labels) == 20
    assert metrics.value("opta_lmx_cached_prompt_tokens_total", labels) == 7
    assert metrics.value("opta_lmx_time_to_start_seconds_count", labels) == 2


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_streams_usage_tells_what_was_cached(
    app: ASGIApp, fleet: FakeFleet, path: str
) -> None:
    fleet.script = None
    body = {**BODIES[path], "stream": True, "stream_options": {"include_usage": True}}
    call = Exchange(app, "POST", path, json=body)
    submitted = await fleet.request()
    submitted.accept(prompt_tokens=10)
    submitted.start(6)
    submitted.say("x", FinishReason.STOP)
    await call.finish()
    *_, last, _done = events(call.body)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


async def test_the_servers_own_key_is_known_from_its_settings(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    app = make_app(api_key="shared", admin_key="admin")
    for headers in ({"authorization": "Bearer shared"}, {"x-api-key": "shared"}):
        call = Exchange(app, "POST", CHAT, json=BODIES[CHAT], headers=headers)
        await call.finish()
        assert call.status == 200
    expected = client_of(Request(call.scope), api_key="shared")
    assert {submitted.request.client for submitted in fleet.requests} == {expected}
    address_only = {**call.scope, "headers": []}
    assert expected == client_of(Request(address_only), api_key="shared")
