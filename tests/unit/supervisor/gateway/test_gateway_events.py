"""``GET /admin/events`` over the real journal."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import ASGIApp

from supervisor.gateway.events import MAX_FOLLOWERS
from supervisor.journal import ConfigReloaded, Journal, LoadRefused, ModelEvicted
from tests.support.asgi import Exchange, MakeApp
from tests.support.fake_fleet import FakeFleet

EVENTS = "/admin/events"


def parsed(body: bytes) -> list[tuple[str | None, str, dict[str, Any]]]:
    """The id, name and value of each event."""
    found = []
    for block in body.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            value = msgspec.json.decode(fields["data"])
            found.append((fields.get("id"), fields["event"], value))
    return found


def evict(journal: Journal, *models: str) -> None:
    for model in models:
        journal.add(ModelEvicted(model=model, made_room_for="big"))


async def replay(app: ASGIApp, query: str, **headers: str) -> list[tuple[str | None, str, Any]]:
    call = Exchange(app, "GET", f"{EVENTS}?follow=false&{query}", headers=headers)
    async with asyncio.timeout(5):
        await call.finish()
    assert call.status == 200, call.body
    return parsed(call.body)


def models(events: list[tuple[str | None, str, Any]]) -> list[str]:
    return [value["model"] for _, kind, value in events if kind != "hello"]


async def test_events_come_as_they_happen(app: ASGIApp, fleet: FakeFleet) -> None:
    evict(fleet.journal, "before")
    call = Exchange(app, "GET", EVENTS)
    await call.wait_for(b"hello")
    evict(fleet.journal, "after")
    await call.wait_for(b"after")
    assert call.headers["content-type"].startswith("text/event-stream")
    start = fleet.journal.start_id
    (hello_id, hello, greeting), (event_id, kind, event) = parsed(call.body)
    # Its id is where to go on if nothing comes before the connection breaks.
    assert (hello_id, hello, greeting["missing"]) == (f"{start}-0", "hello", None)
    assert (event_id, kind, event["model"]) == (f"{start}-1", "model_evicted", "after")
    call.disconnect()
    await call.finish()
    assert fleet.journal.listeners == 0


async def test_who_comes_back_is_told_what_they_have_missed(app: ASGIApp, fleet: FakeFleet) -> None:
    evict(fleet.journal, "a", "b", "c")
    start = fleet.journal.start_id
    assert models(await replay(app, "", **{"last-event-id": f"{start}-0"})) == ["b", "c"]
    assert models(await replay(app, "", **{"last-event-id": f"{start}-2"})) == []
    assert models(await replay(app, f"from={start}-1")) == ["b", "c"]
    assert models(await replay(app, "from=0")) == ["a", "b", "c"]
    # What is asked for in so many words comes first.
    assert models(await replay(app, "from=2", **{"last-event-id": f"{start}-0"})) == ["c"]
    assert (await replay(app, "from=1"))[0][2]["missing"] is None


async def test_what_is_not_kept_any_more_is_said_to_be_missing(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    fleet.journal = Journal(2)
    evict(fleet.journal, "a", "b", "c")
    hello, *events = await replay(app, "from=0")
    assert models(events) == ["b", "c"]
    assert hello[2]["missing"] == "gone"
    assert hello[2]["first"] == f"{fleet.journal.start_id}-1"
    assert (await replay(app, "from=1"))[0][2]["missing"] is None


async def test_an_id_of_another_start_is_told_from_an_old_one(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    evict(fleet.journal, "a", "b")
    hello, *events = await replay(app, "", **{"last-event-id": "00000000-7"})
    assert models(events) == ["a", "b"]
    assert (hello[0], hello[2]["missing"]) == (None, "restarted")
    assert hello[2]["start_id"] == fleet.journal.start_id


async def test_model_and_kind_filter(app: ASGIApp, fleet: FakeFleet) -> None:
    evict(fleet.journal, "a", "b")
    fleet.journal.add(ConfigReloaded(changed=["port"], needs_restart=["port"]))
    fleet.journal.add(LoadRefused(model="a", code="model_incomplete", message="cut"))
    told = await replay(app, "from=0&model=a")
    assert [kind for _, kind, _ in told] == ["hello", "model_evicted", "load_refused"]
    told = await replay(app, "from=0&kind=config_reloaded&kind=load_refused")
    assert [kind for _, kind, _ in told] == ["hello", "config_reloaded", "load_refused"]
    assert await replay(app, "from=0&kind=config_reloaded,load_refused") != []
    assert models(await replay(app, "from=0&model=nobody")) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=x", "from"),
        ("from=", "from"),
        ("from=-1", "from"),
        ("from=1", "from"),
        (f"from={'9' * 40}", "from"),
        ("kind=token", "kind"),
        ("follow=maybe", "follow"),
    ],
)
async def test_a_wrong_query_is_refused(client: httpx.AsyncClient, query: str, param: str) -> None:
    answer = await client.get(f"{EVENTS}?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_it_needs_the_admin_key(make_app: MakeApp) -> None:
    app = make_app(admin_key="a", api_key="i")
    for headers in ({}, {"authorization": "Bearer i"}):
        call = Exchange(app, "GET", EVENTS, headers=headers)
        await call.finish()
        assert call.status in (401, 403)
    assert await replay(app, "", **{"x-admin-key": "a"}) != []


async def test_silence_is_filled_with_comments(make_app: MakeApp) -> None:
    call = Exchange(make_app(sse_keepalive_s=0.01), "GET", EVENTS)
    await call.wait_for(b": keep-alive")
    call.disconnect()
    await call.finish()


async def test_the_end_of_the_server_ends_it(app: ASGIApp, fleet: FakeFleet) -> None:
    call = Exchange(app, "GET", EVENTS)
    await call.wait_for(b"hello")
    fleet.journal.close()
    async with asyncio.timeout(5):
        await call.finish()
    assert [kind for _, kind, _ in parsed(call.body)] == ["hello", "server_stopping"]
    assert call.ended


async def test_who_is_too_slow_is_told_and_dropped(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.journal = Journal(5)
    may_go_on = asyncio.Event()
    held = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        async def hold(message: Any) -> None:
            await send(message)
            if b"first" in message.get("body", b""):
                held.set()
                await may_go_on.wait()

        await app(scope, receive, hold)

    call = Exchange(slow, "GET", EVENTS)
    await call.wait_for(b"hello")
    evict(fleet.journal, "first")
    await held.wait()
    # The server is not held up: whatever happens goes on happening.
    evict(fleet.journal, *map(str, range(100)))
    may_go_on.set()
    async with asyncio.timeout(5):
        await call.finish()
    (_, kind, last) = parsed(call.body)[-1]
    assert (kind, last["error"]["code"]) == ("error", "stream_events_gone")
    assert last["error"]["first"] == f"{fleet.journal.start_id}-96"
    assert call.ended
    assert fleet.journal.listeners == 0


async def test_not_more_follow_than_may(app: ASGIApp, fleet: FakeFleet) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(MAX_FOLLOWERS):
            call = Exchange(app, "GET", EVENTS)
            await call.wait_for(b"hello")
            stack.push_async_callback(call.finish)
            stack.callback(call.disconnect)
        refused = Exchange(app, "GET", EVENTS)
        await refused.finish()
        assert (refused.status, refused.json["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "5"
    assert fleet.journal.listeners == 0
    assert await replay(app, "") != []


async def test_the_headers_alone_can_be_asked_for(app: ASGIApp, fleet: FakeFleet) -> None:
    call = Exchange(app, "HEAD", EVENTS)
    await call.finish()
    assert (call.status, call.body) == (200, b"")
    assert fleet.journal.listeners == 0
