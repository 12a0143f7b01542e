"""``X-Conversation-Id`` and ``/v1/stream/{id}``: streams that their clients may leave."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref

import httpx
import pytest
from starlette.types import ASGIApp

from protocol.errors import ErrorCode
from protocol.messages import FinishReason
from supervisor.gateway.recordings import Recordings
from supervisor.metrics import Metrics
from tests.support.asgi import Exchange, MakeApp, events
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
TALK = {"x-conversation-id": "talk-1"}
IDS = re.compile(rb"^id: (\d+)$", re.MULTILINE)


def post(app: ASGIApp, path: str = CHAT, headers: dict[str, str] | None = None) -> Exchange:
    return Exchange(
        app,
        "POST",
        path,
        json={**BODIES[path], "stream": True},
        headers={**TALK, **(headers or {})},
    )


async def begun(app: ASGIApp, fleet: FakeFleet, path: str = CHAT) -> tuple[Exchange, Submitted]:
    """A stream whose client has read something of it."""
    fleet.script = None
    call = post(app, path)
    submitted = await fleet.request(len(fleet.requests))
    submitted.accept()
    submitted.say("one ")
    await call.wait_for(b"one ")
    return call, submitted


def numbers(body: bytes) -> list[int]:
    return [int(number) for number in IDS.findall(body)]


def text_of(body: bytes) -> str:
    plain = re.sub(rb"(?m)^id: \d+\n", b"", body)
    return "".join(
        each["choices"][0]["delta"].get("content", "")
        for each in events(plain)
        if each != "[DONE]" and each.get("choices")
    )


async def refused(app: ASGIApp, path: str, **headers: str) -> tuple[int, str, object]:
    call = Exchange(app, "GET", path, headers=headers)
    await call.finish()
    error = call.json["error"]
    return call.status, error["code"], error["param"]


@pytest.mark.parametrize("path", BODIES)
async def test_who_has_left_gets_the_rest_and_nothing_twice(
    app: ASGIApp, fleet: FakeFleet, path: str
) -> None:
    call, submitted = await begun(app, fleet, path)
    stream_id = call.headers["x-stream-id"]
    call.disconnect()
    await call.finish()
    submitted.say("two ")
    submitted.say("three ")
    seen = numbers(call.body)
    back = Exchange(app, "GET", f"/v1/stream/{stream_id}?from={len(seen)}")
    await back.wait_for(b"three ")
    submitted.say("four", FinishReason.STOP)
    await back.finish()
    assert not submitted.cancelled
    assert back.headers["content-type"].startswith("text/event-stream")
    assert (back.headers["x-stream-id"], back.headers["x-served-model"]) == (stream_id, "m")
    assert seen + numbers(back.body) == list(range(len(seen) + len(numbers(back.body))))
    whole = Exchange(app, "GET", f"/v1/stream/{stream_id}")
    await whole.finish()
    assert whole.body == call.body + back.body
    for word in (b"one ", b"two ", b"three ", b"four"):
        assert word in whole.body


async def test_the_bytes_are_those_of_a_stream_without_the_header_but_for_the_ids(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    body = {**BODIES[MESSAGES], "stream": True}
    named = {"x-request-id": "same"}
    plain = Exchange(app, "POST", MESSAGES, json=body, headers=named)
    await plain.finish()
    recorded = Exchange(app, "POST", MESSAGES, json=body, headers={**named, **TALK})
    await recorded.finish()
    assert b"id: 0\nevent: message_start" in recorded.body
    assert "x-stream-id" not in plain.headers
    made_up = re.compile(rb"msg_\w+")
    without = re.sub(rb"(?m)^id: \d+\n", b"", recorded.body)
    assert made_up.sub(b"", without) == made_up.sub(b"", plain.body)


async def test_without_the_header_who_leaves_ends_it(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    call = Exchange(app, "POST", CHAT, json={**BODIES[CHAT], "stream": True})
    submitted = await fleet.request()
    submitted.accept()
    await call.wait_for_messages(2)
    call.disconnect()
    await asyncio.wait_for(submitted.cancellation.wait(), 5)
    await call.finish()


async def test_an_event_source_goes_on_after_its_last_event(app: ASGIApp, fleet: FakeFleet) -> None:
    call = post(app)
    await call.finish()
    path = f"/v1/stream/{call.headers['x-stream-id']}"
    every = numbers(call.body)
    again = Exchange(app, "GET", path, headers={"last-event-id": "1"})
    await again.finish()
    assert numbers(again.body) == every[2:]
    # What is asked for in so many words comes first.
    both = Exchange(app, "GET", f"{path}?from=1", headers={"last-event-id": "2"})
    await both.finish()
    assert numbers(both.body) == every[1:]
    nothing = Exchange(app, "GET", f"{path}?from={len(every)}")
    await nothing.finish()
    assert (nothing.status, nothing.body, nothing.ended) == (200, b"", True)


@pytest.mark.parametrize("value", ["-1", "x", "", "1.5", "9" * 40, "99"])
async def test_a_wrong_number_is_refused(app: ASGIApp, fleet: FakeFleet, value: str) -> None:
    call = post(app)
    await call.finish()
    path = f"/v1/stream/{call.headers['x-stream-id']}"
    assert await refused(app, f"{path}?from={value}") == (400, "invalid_value", "from")
    if value != "99":
        answer = await refused(app, path, **{"last-event-id": value})
        assert answer == (400, "invalid_value", "Last-Event-ID")


@pytest.mark.parametrize("value", ["", "a b", "x" * 129, "a/b", "ä"])
async def test_a_wrong_name_is_refused(app: ASGIApp, fleet: FakeFleet, value: str) -> None:
    call = post(app, headers={"x-conversation-id": value})
    await call.finish()
    error = call.json["error"]
    assert (call.status, error["code"]) == (400, "invalid_value")
    assert error["param"] == "X-Conversation-Id"
    assert fleet.requests == []


async def test_several_may_read_it_at_once(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await begun(app, fleet)
    path = f"/v1/stream/{call.headers['x-stream-id']}"
    others = [Exchange(app, "GET", path) for _ in range(3)]
    submitted.say("two")
    submitted.finish()
    for each in (call, *others):
        await each.finish()
        assert each.body == call.body
    assert text_of(call.body) == "one two"


# --- whose it is --------------------------------------------------------------------


async def test_another_key_finds_nothing(app: ASGIApp, fleet: FakeFleet) -> None:
    call = post(app, headers={"authorization": "Bearer a"})
    await call.finish()
    path = f"/v1/stream/{call.headers['x-stream-id']}"
    for headers in ({}, {"authorization": "Bearer b"}):
        assert await refused(app, path, **headers) == (404, "stream_not_found", None)
        gone = Exchange(app, "DELETE", path, headers=headers)
        await gone.finish()
        assert gone.status == 404
    mine = Exchange(app, "GET", path, headers={"x-api-key": "a"})
    await mine.finish()
    assert mine.status == 200


async def test_the_clients_own_name_does_only_where_there_is_a_key(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    open_app, closed_app = make_app(), make_app(api_key="secret")
    key = {"authorization": "Bearer secret"}
    await post(open_app).finish()
    assert (await refused(open_app, "/v1/stream/talk-1"))[1] == "stream_not_found"
    await post(closed_app, headers=key).finish()
    newest = post(closed_app, headers=key)
    await newest.finish()
    assert (await refused(closed_app, "/v1/stream/talk-1"))[1] == "invalid_api_key"
    found = Exchange(closed_app, "GET", "/v1/stream/talk-1", headers=key)
    await found.finish()
    assert (found.status, found.body) == (200, newest.body)


async def test_a_second_request_of_a_conversation_leaves_the_first_alone(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    app = make_app(api_key="k")
    key = {"x-api-key": "k"}
    fleet.script = None
    calls = [post(app, headers=key) for _ in range(2)]
    first, second = [await fleet.request(number) for number in range(2)]
    for number, submitted in enumerate((first, second)):
        submitted.accept()
        submitted.say(f"answer {number}", FinishReason.STOP)
    for call in calls:
        await call.finish()
    ids = {call.headers["x-stream-id"] for call in calls}
    assert len(ids) == 2
    assert not first.cancelled
    latest = Exchange(app, "GET", "/v1/stream/talk-1", headers=key)
    await latest.finish()
    assert text_of(latest.body) == "answer 1"


async def test_ids_are_long_and_of_no_pattern(app: ASGIApp) -> None:
    calls = [post(app) for _ in range(20)]
    for call in calls:
        await call.finish()
    ids = {call.headers["x-stream-id"] for call in calls}
    assert len(ids) == 20
    assert all(re.fullmatch(r"stream_[A-Za-z0-9_-]{32}", each) for each in ids)


# --- how it ends ---------------------------------------------------------------------


async def test_an_error_is_replayed_too(app: ASGIApp, fleet: FakeFleet, metrics: Metrics) -> None:
    call, submitted = await begun(app, fleet)
    call.disconnect()
    await call.finish()
    submitted.fail(ErrorCode.MODEL_UNLOADED)
    back = Exchange(app, "GET", f"/v1/stream/{call.headers['x-stream-id']}")
    await back.finish()
    assert b'"code":"model_unloaded"' in back.body
    assert b"[DONE]" not in back.body
    labels = {"model": "m", "endpoint": CHAT, "code": "client_disconnected"}
    assert metrics.value("opta_lmx_requests_total", labels) == 1


async def test_it_can_be_cancelled_by_its_requests_id_while_nobody_is_there(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    call, submitted = await begun(app, fleet)
    call.disconnect()
    await call.finish()
    cancel = Exchange(app, "POST", f"/v1/requests/{call.headers['x-request-id']}/cancel")
    await cancel.finish()
    assert (cancel.status, submitted.cancelled) == (200, True)
    back = Exchange(app, "GET", f"/v1/stream/{call.headers['x-stream-id']}")
    await back.finish()
    assert b'"code":"request_cancelled"' in back.body


async def test_a_deleted_stream_ends_for_everybody_and_is_not_found(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    call, submitted = await begun(app, fleet)
    path = f"/v1/stream/{call.headers['x-stream-id']}"
    deletion = Exchange(app, "DELETE", path)
    await deletion.finish()
    expected = {"id": call.headers["x-stream-id"], "object": "stream", "deleted": True}
    assert deletion.json == expected
    await call.finish()
    assert submitted.cancelled
    assert b'"code":"request_cancelled"' in call.body
    assert (await refused(app, path))[:2] == (404, "stream_not_found")


async def test_a_deadline_counts_on(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    call = post(app, headers={"x-request-timeout": "0.2"})
    submitted = await fleet.request()
    submitted.accept()
    await call.wait_for_messages(2)
    call.disconnect()
    await call.finish()
    await asyncio.wait_for(submitted.cancellation.wait(), 5)
    back = Exchange(app, "GET", f"/v1/stream/{call.headers['x-stream-id']}")
    await back.finish()
    assert b'"code":"request_timeout"' in back.body


async def test_what_nobody_reads_for_long_is_given_up(make_app: MakeApp, fleet: FakeFleet) -> None:
    app = make_app(stream_keep_s=0.1)
    call, submitted = await begun(app, fleet)
    path = f"/v1/stream/{call.headers['x-stream-id']}"
    # Whoever is there keeps it.
    await asyncio.sleep(0.2)
    assert not submitted.cancelled
    call.disconnect()
    await call.finish()
    await asyncio.wait_for(submitted.cancellation.wait(), 5)
    assert (await refused(app, path))[:2] == (404, "stream_not_found")


async def test_what_has_ended_is_kept_for_a_while(make_app: MakeApp, fleet: FakeFleet) -> None:
    app = make_app(stream_keep_s=0.1)
    call = post(app)
    await call.finish()
    path = f"/v1/stream/{call.headers['x-stream-id']}"
    back = Exchange(app, "GET", path)
    await back.finish()
    assert back.body == call.body

    async with asyncio.timeout(5):
        while back.status != 404:
            back = Exchange(app, "GET", path)
            await back.finish()


async def test_a_refusal_is_an_http_error_and_leaves_nothing(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    app = make_app(api_key="k")
    key = {"x-api-key": "k"}
    fleet.script = None
    call = post(app, headers=key)
    submitted = await fleet.request()
    waiting = Exchange(app, "GET", "/v1/stream/talk-1", headers=key)
    await waiting.wait_for_messages(1)
    submitted.fail(ErrorCode.CONTEXT_LENGTH_EXCEEDED)
    await call.finish()
    await waiting.finish()
    assert (call.status, call.json["error"]["code"]) == (400, "context_length_exceeded")
    assert b'"code":"context_length_exceeded"' in waiting.body
    assert (await refused(app, "/v1/stream/talk-1", **key))[1] == "stream_not_found"


async def test_who_leaves_before_it_is_accepted_may_come_back(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    app = make_app(api_key="k")
    key = {"x-api-key": "k"}
    fleet.script = None
    call = post(app, headers=key)
    submitted = await fleet.request()
    call.disconnect()
    submitted.accept()
    submitted.say("Hello", FinishReason.STOP)
    await call.finish()
    back = Exchange(app, "GET", "/v1/stream/talk-1", headers=key)
    await back.finish()
    assert text_of(back.body) == "Hello"


async def test_a_stream_that_is_silent_says_that_it_is_alive(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    app = make_app(sse_keepalive_s=0.05)
    call, submitted = await begun(app, fleet, MESSAGES)
    back = Exchange(app, "GET", f"/v1/stream/{call.headers['x-stream-id']}")
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    said = b"one "
    await call.wait_for(said)
    async with asyncio.timeout(5):
        for each in (call, back):
            seen = len(each.messages)
            while ping not in each.body.partition(said)[2]:
                seen += 1
                await each.wait_for_messages(seen)
    submitted.finish()
    await back.finish()
    await call.finish()
    again = Exchange(app, "GET", f"/v1/stream/{call.headers['x-stream-id']}")
    await again.finish()
    # The one that every message begins with.
    assert again.body.count(ping) == 1


async def test_what_has_ended_holds_no_request(app: ASGIApp, fleet: FakeFleet) -> None:
    for background in (False, True):
        call = Exchange(
            app,
            "POST",
            RESPONSES,
            json={**BODIES[RESPONSES], "stream": True, "background": background},
            headers=TALK,
        )
        await call.finish()
        submitted = fleet.requests.pop()
        stream = weakref.ref(submitted.stream)
        stream_id = call.headers["x-stream-id"]
        del call, submitted
        gc.collect()
        assert stream() is None
        back = Exchange(app, "GET", f"/v1/stream/{stream_id}")
        await back.finish()
        assert b"Hello" in back.body


async def test_a_head_request_does_not_wait(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await begun(app, fleet)
    head = Exchange(app, "HEAD", f"/v1/stream/{call.headers['x-stream-id']}")
    await head.finish()
    assert (head.status, head.body) == (200, b"")
    submitted.finish()
    await call.finish()


# --- bounds --------------------------------------------------------------------------


async def test_what_outgrows_its_share_loses_its_oldest_events(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    app = make_app(stream_store_max_bytes=20_000)
    call, submitted = await begun(app, fleet)
    path = f"/v1/stream/{call.headers['x-stream-id']}"
    for number in range(60):
        submitted.say(f"{number} ")
        await call.wait_for(b'"%d "' % number)
    submitted.finish()
    await call.finish()
    # Who was there has missed nothing.
    every = numbers(call.body)
    assert every == list(range(len(every)))
    late = Exchange(app, "GET", f"{path}?from=1")
    await late.finish()
    error = late.json["error"]
    assert (late.status, error["code"], error["param"]) == (410, "stream_events_gone", "from")
    first = error["first"]
    rest = Exchange(app, "GET", f"{path}?from={first}")
    await rest.finish()
    assert numbers(rest.body) == every[first:]
    assert 0 < len(rest.body) < 5000


async def test_a_reader_that_is_too_far_behind_is_told(make_app: MakeApp, fleet: FakeFleet) -> None:
    app = make_app(stream_store_max_bytes=20_000)
    call, submitted = await begun(app, fleet)
    for number in range(60):
        # All at once: nobody has a turn in between.
        submitted.say(f"{number} ")
    await call.finish()
    assert call.body.endswith(b"\n\n")
    last = call.body.rstrip().rpartition(b"\n\n")[2]
    assert last.startswith(b"event: error\ndata: {")
    assert b'"code":"stream_events_gone"' in last
    assert b'"type":"error"}' in last
    assert not submitted.cancelled


@pytest.mark.parametrize("setting", ["stream_store_max", "stream_store_max_bytes"])
async def test_without_a_place_it_is_a_stream_like_any_other(
    make_app: MakeApp, fleet: FakeFleet, setting: str
) -> None:
    app = make_app(**{setting: 0})
    fleet.script = None
    call = post(app)
    submitted = await fleet.request()
    submitted.accept()
    await call.wait_for_messages(2)
    assert "x-stream-id" not in call.headers
    assert b"id: " not in call.body
    call.disconnect()
    await asyncio.wait_for(submitted.cancellation.wait(), 5)
    await call.finish()


async def test_those_that_have_ended_make_place_and_those_that_run_do_not(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    app = make_app(stream_store_max=2)
    ended = post(app)
    await ended.finish()
    running = [await begun(app, fleet) for _ in range(2)]
    assert (await refused(app, f"/v1/stream/{ended.headers['x-stream-id']}"))[0] == 404
    one_more, submitted = await begun(app, fleet)
    assert "x-stream-id" not in one_more.headers
    submitted.finish()
    await one_more.finish()
    for call, submitted in running:
        submitted.finish()
        await call.finish()
        back = Exchange(app, "GET", f"/v1/stream/{call.headers['x-stream-id']}")
        await back.finish()
        assert back.body == call.body


async def test_all_together_stay_within_their_memory_and_the_largest_pays() -> None:
    store = Recordings(10, 10_000, 60.0)
    small, *large = [store.begin("me", f"talk {n}", lambda: None) for n in range(6)]
    assert small is not None
    small.write(b"data: small\n\n")
    for number in range(400):
        for each in large:
            assert each is not None
            each.write(b"data: %d\n\n" % number)
        assert store.size <= 10_000
    assert (small.events.first, small.events.end) == (0, 1)
    kept = [each.events.end - each.events.first for each in large if each is not None]
    assert max(kept) - min(kept) <= 2
    assert store.size == sum(each.events.size for each in (small, *large) if each is not None)
    await store.close()
    assert (len(store), store.size) == (0, 0)


async def test_the_end_of_the_server_ends_what_nobody_reads(
    app: ASGIApp, fleet: FakeFleet, client: httpx.AsyncClient
) -> None:
    call, submitted = await begun(app, fleet)
    call.disconnect()
    await call.finish()
    await fleet.stop()
    back = await client.get(f"/v1/stream/{call.headers['x-stream-id']}")
    assert '"code":"server_shutting_down"' in back.text
    assert submitted.stream.failed
