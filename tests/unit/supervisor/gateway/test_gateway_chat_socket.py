"""Chats over one WebSocket connection: the real server on a real socket, a fake fleet."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from protocol.chat import Extras, ToolCallPiece
from protocol.errors import ErrorCode
from protocol.messages import Delta, FinishReason
from supervisor.gateway import chat_socket, server
from supervisor.metrics import Metrics
from supervisor.presets import Preset
from supervisor.settings import Settings
from supervisor.stream import Prefill
from tests.support.fake_fleet import FakeFleet, view

HELLO = [{"role": "user", "content": "Hi"}]
PATH = "/v1/chat/stream"

Serve = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture
def serve(fleet: FakeFleet, tmp_path: Path, metrics: Metrics) -> Serve:
    @asynccontextmanager
    async def serve(**more: object) -> AsyncIterator[str]:
        settings = Settings(home=tmp_path, port=0, **more)  # type: ignore[arg-type]
        with contextlib.closing(server.bind(settings)) as listener:
            running = server.create_server(fleet, settings, metrics)
            task = asyncio.create_task(running.serve(sockets=[listener]))
            try:
                yield server.base_url(settings, listener)
            finally:
                running.ask_exit()
                await task

    return serve


@asynccontextmanager
async def opened(url: str, **headers: str) -> AsyncIterator[ClientConnection]:
    address = url.replace("http://", "ws://") + PATH
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with connect(address, additional_headers=sent, max_size=None) as connection:
        yield connection


async def ask(socket: ClientConnection, request_id: object = "a", **more: object) -> None:
    await say(socket, type="chat.request", id=request_id, model="m", messages=HELLO, **more)


async def say(socket: ClientConnection, **frame: object) -> None:
    # "type" first, in the middle or last: it is JSON.
    await socket.send(json.dumps(dict(reversed(frame.items()))))


async def hear(socket: ClientConnection) -> dict[str, Any]:
    data = await socket.recv()
    assert isinstance(data, str)
    frame: dict[str, Any] = json.loads(data)
    return frame


async def hear_all(socket: ClientConnection, request_id: object = "a") -> list[dict[str, Any]]:
    """Everything up to the end of a request, its own frames only."""
    frames = []
    while True:
        frame = await hear(socket)
        if frame["id"] == request_id:
            frames.append(frame)
            if frame["type"] in ("chat.done", "chat.error"):
                return frames


async def test_a_chat_is_streamed_and_ends_with_usage(serve: Serve, fleet: FakeFleet) -> None:
    async with serve() as url, opened(url) as socket:
        await ask(socket, temperature=0, max_tokens=9)
        *tokens, done = await hear_all(socket)
        assert {frame["type"] for frame in tokens} == {"chat.token"}
        assert "".join(frame["content"] for frame in tokens) == "Hello"
        assert done["type"] == "chat.done"
        assert done["finish_reason"] == "stop"
        assert done["usage"]["prompt_tokens"] == 5
        assert done["usage"]["completion_tokens"] == 3
        assert done["model"] == "m"
        [submitted] = fleet.requests
        assert submitted.streaming
        assert submitted.request.max_tokens == 9


async def test_reasoning_and_calls_have_their_frames(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve() as url, opened(url) as socket:
        await ask(socket, 7)
        submitted = await fleet.request()
        submitted.accept()
        frames = []
        for extras in (
            Extras(reasoning="Hm."),
            Extras(tool_calls=[ToolCallPiece(0, "call_1", "look_up", "")]),
            Extras(tool_calls=[ToolCallPiece(0, None, None, "{}")]),
        ):
            submitted.stream.push(Delta(0, "", [1], None, extras))
            frames.append(await hear(socket))
        submitted.say("", FinishReason.TOOL_CALLS)
        thought, begun, went_on, done = [*frames, await hear(socket)]
    assert thought == {"type": "chat.token", "id": 7, "reasoning_content": "Hm."}
    assert begun["type"] == went_on["type"] == "chat.tool_call"
    assert begun["tool_call"] == {
        "index": 0,
        "id": "call_1",
        "type": "function",
        "function": {"name": "look_up", "arguments": ""},
    }
    assert went_on["tool_call"] == {"index": 0, "function": {"arguments": "{}"}}
    assert done["finish_reason"] == "tool_calls"


async def test_a_name_stands_for_a_model_and_the_end_says_for_which(
    serve: Serve, fleet: FakeFleet
) -> None:
    fleet.script = None
    fleet.add(view("big"))
    preset = Preset(model=("big", "m"), system_prompt="Be brief.")
    async with serve(presets={"short": preset}) as url, opened(url) as socket:
        frame = {"type": "chat.request", "model": "short", "messages": HELLO}
        await say(socket, id="a", **frame)
        (await fleet.request(0)).fail(ErrorCode.MODEL_UNSTABLE)
        other = await fleet.request(1)
        assert other.request.messages is not None
        assert other.request.messages[0].content == "Be brief."
        other.accept()
        other.say("Hi")
        other.finish()
        *_, done = await hear_all(socket)
        assert (done["type"], done["model"], other.model) == ("chat.done", "m", "m")
        # What is cancelled after it has moved on is cancelled where it is.
        await say(socket, id="b", **frame)
        (await fleet.request(2)).fail(ErrorCode.MODEL_UNSTABLE)
        await fleet.request(3)
        await say(socket, type="chat.cancel", id="b")
        *_, done = await hear_all(socket, "b")
        assert done["finish_reason"] == "cancelled"
        await fleet.requests[3].cancellation.wait()


async def test_requests_of_one_connection_run_beside_each_other(
    serve: Serve, fleet: FakeFleet
) -> None:
    fleet.script = None
    async with serve() as url, opened(url) as socket:
        await ask(socket, "a")
        await ask(socket, "b")
        first, second = await fleet.request(0), await fleet.request(1)
        for each in (second, first):
            each.accept()
            each.say("x")
        assert {(await hear(socket))["id"], (await hear(socket))["id"]} == {"a", "b"}
        second.finish()
        assert (await hear(socket))["type"] == "chat.done"
        first.say("y")
        assert (await hear(socket))["content"] == "y"
        # An id that has ended is free again.
        await ask(socket, "b")
        await fleet.request(2)
        first.finish()
        assert (await hear_all(socket, "a"))[-1]["finish_reason"] == "stop"


async def test_a_cancelled_request_ends_and_frees_its_slot(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve() as url, opened(url) as socket:
        await ask(socket)
        submitted = await fleet.request()
        submitted.accept()
        submitted.say("Hel")
        await hear(socket)
        await say(socket, type="chat.cancel", id="a")
        [done] = await hear_all(socket)
        assert done["finish_reason"] == "cancelled"
        assert done["usage"]["completion_tokens"] == 1
        assert submitted.cancelled
        # One that nobody knows may just have ended.
        await say(socket, type="chat.cancel", id="a")
        fleet.script = ("Still here",)
        await ask(socket)
        assert (await hear(socket))["content"] == "Still here"


async def test_one_that_waits_can_be_cancelled(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve() as url, opened(url) as socket:
        await ask(socket)
        submitted = await fleet.request()
        await say(socket, type="chat.cancel", id="a")
        assert (await hear(socket))["finish_reason"] == "cancelled"
        assert submitted.cancelled


BAD_FRAMES: list[tuple[str | bytes, object, str, str | None]] = [
    ("nonsense", None, "invalid_json", None),
    ("[]", None, "invalid_type", None),
    (b"\xff", None, "invalid_json", None),
    ("{" * 5000, None, "invalid_json", None),
    ("{}", None, "missing_required_parameter", "type"),
    ('{"type": "chat.sing", "id": "a"}', "a", "invalid_value", "type"),
    ('{"type": "chat.cancel"}', None, "missing_required_parameter", "id"),
    ('{"type": "chat.request", "id": "a"}', "a", "missing_required_parameter", "model"),
    ('{"type": "chat.request", "id": 1.5, "model": "m"}', None, "invalid_type", "id"),
    ('{"type": "chat.request", "id": ""}', None, "invalid_value", "id"),
    (
        '{"type": "chat.request", "id": 3, "model": "m", "messages": [], "temperature": 9}',
        3,
        "invalid_value",
        "temperature",
    ),
    ('{"type": "chat.request", "id": 3, "model": "m", "messages": []}', 3, "invalid_value", None),
    (
        '{"type": "chat.request", "id": 3, "model": "x", "messages": [{"role": "user", '
        '"content": "y"}]}',
        3,
        "model_not_found",
        "model",
    ),
    (
        '{"type": "chat.request", "id": 3, "model": "m", "n": 2, "messages": [{"role": "user", '
        '"content": "y"}]}',
        3,
        "unsupported_parameter",
        "n",
    ),
]


async def test_bad_frames_are_told_and_the_connection_goes_on(serve: Serve) -> None:
    async with serve() as url, opened(url) as socket:
        for data, request_id, code, param in BAD_FRAMES:
            await socket.send(data)
            frame = await hear(socket)
            assert frame["type"] == "chat.error", data
            assert (frame["id"], frame["error"]["code"]) == (request_id, code), data
            if param is not None:
                assert frame["error"]["param"] == param, data
            assert {"message", "type", "param", "code"} <= frame["error"].keys()
        await ask(socket)
        assert (await hear_all(socket))[-1]["finish_reason"] == "stop"


async def test_frames_may_be_binary(serve: Serve) -> None:
    async with serve() as url, opened(url) as socket:
        frame = {"type": "chat.request", "id": "a", "model": "m", "messages": HELLO}
        await socket.send(json.dumps(frame).encode())
        assert (await hear_all(socket))[-1]["type"] == "chat.done"


async def test_an_id_in_use_is_refused_without_ending_the_other(
    serve: Serve, fleet: FakeFleet
) -> None:
    fleet.script = None
    async with serve() as url, opened(url) as socket:
        await ask(socket)
        submitted = await fleet.request()
        await ask(socket)
        refused = await hear(socket)
        assert (refused["id"], refused["error"]["param"]) == (None, "id")
        submitted.accept()
        submitted.finish()
        assert [frame["type"] for frame in await hear_all(socket)] == ["chat.done"]


async def test_requests_in_flight_are_bounded(
    serve: Serve, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_socket, "MAX_IN_FLIGHT", 2)
    fleet.script = None
    async with serve() as url, opened(url) as socket:
        for request_id in ("a", "b", "c"):
            await ask(socket, request_id)
        refused = await hear(socket)
        assert (refused["id"], refused["error"]["code"]) == ("c", "rate_limit_exceeded")
        first = await fleet.request(0)
        first.accept()
        first.finish()
        await hear_all(socket, "a")
        await ask(socket, "c")
        await fleet.request(2)


async def test_a_full_queue_says_when_to_come_back(serve: Serve, fleet: FakeFleet) -> None:
    fleet.capacity = 0
    async with serve() as url, opened(url) as socket:
        await ask(socket)
        [refused] = await hear_all(socket)
    assert refused["error"]["code"] == "rate_limit_exceeded"
    assert refused["retry_after"] == 1


async def test_an_answer_that_went_on_says_so_at_its_end(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve() as url, opened(url) as socket:
        for name, resumes in (("a", 0), ("b", 2)):
            await ask(socket, name)
            submitted = await fleet.request(resumes // 2)
            submitted.accept()
            submitted.stream.resumes = resumes
            submitted.finish()
            done = (await hear_all(socket, name))[-1]
            assert done.get("resumed", 0) == resumes


async def test_a_failure_ends_its_request_only(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve() as url, opened(url) as socket:
        await ask(socket, "a")
        await ask(socket, "b")
        first, second = await fleet.request(0), await fleet.request(1)
        first.accept()
        second.accept()
        first.fail(ErrorCode.MODEL_CRASHED)
        failed = await hear(socket)
        assert (failed["id"], failed["error"]["code"]) == ("a", "model_crashed")
        second.finish()
        assert (await hear(socket))["type"] == "chat.done"


async def test_a_bug_is_told_as_such(
    serve: Serve, fleet: FakeFleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.bug = RuntimeError("secret")
    async with serve() as url, opened(url) as socket:
        await ask(socket)
        [frame] = await hear_all(socket)
    assert frame["error"]["code"] == "internal_error"
    assert "secret" not in frame["error"]["message"]
    assert "secret" in caplog.text


async def test_keep_alive_frames_while_nothing_is_said(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve(sse_keepalive_s=0.02) as url, opened(url) as socket:
        await ask(socket)
        # In the queue, and in the prompt.
        assert await hear(socket) == {"type": "chat.keepalive", "id": "a"}
        submitted = await fleet.request()
        submitted.accept()
        submitted.stream.prefill = Prefill(1024, 4096)
        prefill = {"computed": 1024, "total": 4096}
        while (frame := await hear(socket)) == {"type": "chat.keepalive", "id": "a"}:
            pass
        assert frame == {"type": "chat.keepalive", "id": "a", "prefill": prefill}
        submitted.start()
        while "prefill" in (frame := await hear(socket)):
            pass
        assert frame == {"type": "chat.keepalive", "id": "a"}
        submitted.finish()
        assert (await hear_all(socket))[-1]["type"] == "chat.done"


async def test_who_leaves_cancels_everything(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve() as url:
        async with opened(url) as socket:
            await ask(socket, "a")
            await ask(socket, "b")
            first, second = await fleet.request(0), await fleet.request(1)
            first.accept()
        await first.cancellation.wait()
        await second.cancellation.wait()
        async with opened(url) as socket:
            await ask(socket, "a")
            third = await fleet.request(2)
            socket.transport.abort()
            await third.cancellation.wait()


async def test_a_slow_reader_loses_its_request(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    fleet.max_buffer_bytes = 100_000
    async with serve() as url, opened(url) as socket:
        socket.transport.pause_reading()
        await ask(socket)
        submitted = await fleet.request()
        submitted.accept()
        for _ in range(2000):
            submitted.say("x" * 50_000)
            await asyncio.sleep(0)
            if submitted.cancelled:
                break
        assert submitted.cancelled
        socket.transport.resume_reading()
        frames = await hear_all(socket)
        assert frames[-1]["error"]["code"] == "stream_overflow"
        # The connection is none the worse for it.
        fleet.script = ("Hi",)
        await ask(socket)
        assert (await hear(socket))["content"] == "Hi"


async def test_the_deadline_of_the_handshake_holds_for_each_request(
    serve: Serve, fleet: FakeFleet
) -> None:
    fleet.script = None
    async with serve() as url, opened(url, X_Request_Timeout="0.05") as socket:
        for request_id in ("a", "b"):
            await ask(socket, request_id)
            [frame] = await hear_all(socket, request_id)
            assert frame["error"]["code"] == "request_timeout"


async def test_requests_are_counted_and_named(
    serve: Serve, fleet: FakeFleet, metrics: Metrics
) -> None:
    async with serve() as url:
        async with opened(url, X_OpenClaw_Agent_Id="night-watch", X_Priority="low") as socket:
            await ask(socket)
            await hear_all(socket)
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"{url}/metrics")).text
        families = text_string_to_metric_families(text)
        found = {
            sample.name: sample.value
            for family in families
            for sample in family.samples
            if sample.name.endswith("_total")
            and {"night-watch", PATH} & set(sample.labels.values())
        }
    assert list(found.values()) == [1.0, 1.0]
    assert fleet.requests[0].request.priority == "low"


async def refused(url: str, **headers: str) -> InvalidStatus:
    with pytest.raises(InvalidStatus) as refusal:
        async with opened(url, **headers):
            pass
    return refusal.value


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer no"}, {"X_Admin_Key": "s3cret"}])
async def test_keys_are_asked_for_before_the_upgrade(serve: Serve, headers: dict[str, str]) -> None:
    async with serve(api_key="s3cret") as url:
        answer = (await refused(url, **headers)).response
    assert answer.status_code == 401
    assert json.loads(answer.body or b"")["error"]["code"] == "invalid_api_key"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer s3cret"}, {"X_Api_Key": "s3cret"}])
async def test_a_key_opens_it(serve: Serve, headers: dict[str, str]) -> None:
    async with serve(api_key="s3cret") as url, opened(url, **headers) as socket:
        await ask(socket)
        assert (await hear_all(socket))[-1]["type"] == "chat.done"


async def test_without_keys_foreign_pages_are_refused(serve: Serve) -> None:
    async with serve() as url:
        answer = (await refused(url, Origin="https://evil.example")).response
        assert answer.status_code == 403
        assert json.loads(answer.body or b"")["error"]["code"] == "host_not_allowed"
        async with opened(url, Origin="http://localhost:3000"):
            pass
        port = int(url.rsplit(":", 1)[1])
        with pytest.raises(InvalidStatus) as refusal:
            async with connect(f"ws://evil.example:{port}{PATH}", host="127.0.0.1", port=port):
                pass
        assert refusal.value.response.status_code == 403


async def test_what_is_no_handshake_gets_the_envelope(serve: Serve) -> None:
    proper = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    broken: list[dict[str, str]] = [
        {},
        {**proper, "Sec-WebSocket-Version": "8"},
        {**proper, "Sec-WebSocket-Key": "short"},
        {**proper, "X-Long": "x" * 9000},
        {**proper, **{f"X-{n}": "x" for n in range(120)}},
        {**proper, "Content-Length": "2"},
    ]
    async with serve() as url, httpx.AsyncClient(base_url=url) as http:
        for headers in broken:
            content = "{}" if "Content-Length" in headers else None
            answer = await http.request("GET", PATH, headers=headers, content=content)
            assert answer.status_code == 400, headers
            assert answer.json()["error"]["param"] == "Upgrade"
        assert (await http.post(PATH, headers=proper)).status_code == 405
        # Other routes do not offer it.
        assert (await http.get("/v1/models", headers=proper)).json()["object"] == "list"
        assert (await http.get("/v1/chat/else", headers=proper)).status_code == 404


async def test_a_frame_beyond_the_bound_ends_the_connection(serve: Serve) -> None:
    async with serve(max_body_bytes=1000) as url, opened(url) as socket:
        await socket.send("x" * 2000)
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


async def test_what_runs_may_end_at_a_shutdown(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve(shutdown_grace_s=30) as url:
        socket = await connect(url.replace("http://", "ws://") + PATH)
        idle = await connect(url.replace("http://", "ws://") + PATH)
        await ask(socket)
        submitted = await fleet.request()
        submitted.accept()
        submitted.say("Hel")
        await hear(socket)

        async def go_on() -> list[dict[str, Any]]:
            with pytest.raises(ConnectionClosed) as closed:
                await hear(idle)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1012
            await ask(socket, "late")
            late = (await hear_all(socket, "late"))[-1]
            assert late["error"]["code"] == "server_shutting_down"
            submitted.say("lo", FinishReason.STOP)
            frames = await hear_all(socket)
            with pytest.raises(ConnectionClosed):
                await hear(socket)
            return frames

        ending = asyncio.create_task(go_on())
    token, done = await ending
    assert token["content"] == "lo"
    assert done["finish_reason"] == "stop"


async def test_what_outlasts_the_grace_is_told(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve(shutdown_grace_s=0.05) as url:
        socket = await connect(url.replace("http://", "ws://") + PATH)
        await ask(socket)
        (await fleet.request()).accept()
    frames = await hear_all(socket)
    assert frames[-1]["error"]["code"] == "server_shutting_down"
    await socket.close()


async def test_who_waits_for_a_model_is_told_and_holds_nobody_up(
    serve: Serve, fleet: FakeFleet
) -> None:
    fleet.preparation_may_end = asyncio.Event()
    async with serve(load_on_demand=True, sse_keepalive_s=0.02) as url, opened(url) as socket:
        await ask(socket, "a")
        await ask(socket, "b")
        assert await fleet.preparation(1) == "m"
        assert await hear(socket) == {"type": "chat.keepalive", "id": "a"}
        await say(socket, type="chat.cancel", id="a")
        [done] = [
            frame for frame in await hear_all(socket, "a") if frame["type"] != "chat.keepalive"
        ]
        assert (done["type"], done["finish_reason"]) == ("chat.done", "cancelled")
        assert fleet.preparations_called_off == 1
        fleet.preparation_may_end.set()
        assert (await hear_all(socket, "b"))[-1]["finish_reason"] == "stop"
        assert len(fleet.requests) == 1
