"""What a client can do to a connection before, between and after its requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from protocol.errors import ErrorCode
from protocol.messages import FinishReason
from supervisor.gateway import server
from supervisor.metrics import Metrics
from supervisor.settings import Settings
from tests.support.fake_fleet import FakeFleet

HEAD = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"

Connected = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serving(
    fleet: FakeFleet, home: Path, **more: object
) -> AsyncIterator[tuple[server.Server, int]]:
    """A server and its port."""
    settings = Settings(home=home, port=0, **more)  # type: ignore[arg-type]
    with contextlib.closing(server.bind(settings)) as listener:
        running = server.create_server(fleet, settings, Metrics())
        task = asyncio.create_task(running.serve(sockets=[listener]))
        try:
            yield running, listener.getsockname()[1]
        finally:
            running.ask_exit()
            await task


@asynccontextmanager
async def connected(fleet: FakeFleet, home: Path, **more: object) -> AsyncIterator[Connected]:
    async with serving(fleet, home, **more) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def answer(data: bytes) -> tuple[int, str]:
    """Status and error code of the last answer on a connection."""
    head, _, body = data.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head[:3]), json.loads(body)["error"]["code"]


async def one_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head + await reader.readexactly(length)


async def test_a_client_that_says_nothing_is_hung_up_on(fleet: FakeFleet, tmp_path: Path) -> None:
    async with connected(fleet, tmp_path, header_timeout_s=0.05) as (reader, _):
        assert await reader.read() == b""


@pytest.mark.parametrize("sent", [b"G", b"GET /healthz HT", HEAD, HEAD + b"x: "])
async def test_half_a_head_times_out(fleet: FakeFleet, tmp_path: Path, sent: bytes) -> None:
    async with connected(fleet, tmp_path, header_timeout_s=0.05) as (reader, writer):
        writer.write(sent)
        assert answer(await reader.read()) == (408, "request_timeout")


async def test_the_deadline_holds_for_the_next_request_too(
    fleet: FakeFleet, tmp_path: Path
) -> None:
    async with connected(fleet, tmp_path, header_timeout_s=0.2) as (reader, writer):
        for _ in range(3):
            # Resting between two requests is no delay of a request.
            await asyncio.sleep(0.15)
            writer.write(HEAD + b"\r\n")
            assert b"200 OK" in await one_answer(reader)
        await asyncio.sleep(0.3)
        writer.write(b"GET")
        started = asyncio.get_running_loop().time()
        assert answer(await reader.read()) == (408, "request_timeout")
        assert asyncio.get_running_loop().time() - started > 0.15


async def test_a_trickled_head_times_out(fleet: FakeFleet, tmp_path: Path) -> None:
    async with connected(fleet, tmp_path, header_timeout_s=0.1) as (reader, writer):
        writer.write(HEAD + b"x: ")
        reading = asyncio.create_task(reader.read())
        while not reading.done():
            writer.write(b"y")
            await asyncio.sleep(0.01)
        assert answer(await reading) == (408, "request_timeout")


async def test_a_long_answer_is_no_late_head(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.script = None
    body = b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}'
    async with connected(fleet, tmp_path, header_timeout_s=0.02) as (reader, writer):
        writer.write(CHAT + b"content-length: %d\r\n\r\n" % len(body) + body)
        submitted = await fleet.request()
        await asyncio.sleep(0.1)
        submitted.accept()
        submitted.say("Bye")
        submitted.finish()
        assert b"200 OK" in await one_answer(reader)


@pytest.mark.parametrize("length", [b"content-length: 10", b"transfer-encoding: chunked"])
async def test_a_body_that_never_comes(fleet: FakeFleet, tmp_path: Path, length: bytes) -> None:
    async with connected(fleet, tmp_path, body_timeout_s=0.05) as (reader, writer):
        writer.write(CHAT + length + b"\r\n\r\n")
        assert answer(await reader.read()) == (408, "request_timeout")


async def test_the_rest_of_a_refused_body_is_not_awaited_for_ever(
    fleet: FakeFleet, tmp_path: Path
) -> None:
    async with connected(fleet, tmp_path, header_timeout_s=0.05) as (reader, writer):
        writer.write(b"POST /no HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n")
        assert b"404 Not Found" in await one_answer(reader)
        writer.write(b"x" * 70_000)
        assert await reader.read() == b""


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
async def test_a_head_without_bound_is_refused(
    fleet: FakeFleet, tmp_path: Path, end: bytes
) -> None:
    async with connected(fleet, tmp_path) as (reader, writer):
        writer.write(HEAD + b"x: " + b"y" * 70_000 + end)
        assert answer(await reader.read()) == (400, "invalid_value")


async def test_a_large_body_is_no_large_head(fleet: FakeFleet, tmp_path: Path) -> None:
    async with connected(fleet, tmp_path) as (reader, writer):
        body = b" " * 200_000
        writer.write(CHAT + b"content-length: 200000\r\n\r\n" + body)
        assert b"invalid_json" in await one_answer(reader)
        writer.write(HEAD + b"\r\n")
        assert b"200 OK" in await one_answer(reader)


async def test_who_still_sends_can_read_the_refusal(fleet: FakeFleet, tmp_path: Path) -> None:
    async with connected(fleet, tmp_path, max_body_bytes=1000) as (reader, writer):
        writer.write(CHAT + b"content-length: 20000000\r\n\r\n")
        for _ in range(20):
            writer.write(b" " * 1_000_000)
            await writer.drain()
        assert answer(await reader.read()) == (413, "request_too_large")


async def test_who_has_finished_sending_gets_an_answer(fleet: FakeFleet, tmp_path: Path) -> None:
    async with connected(fleet, tmp_path) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        writer.write_eof()
        data = await reader.read()
        assert data.startswith(b"HTTP/1.1 200 OK")
        assert data.endswith(b'{"status":"ok"}')


async def test_who_has_finished_sending_has_left_a_stream_that_others_may_read(
    fleet: FakeFleet, tmp_path: Path
) -> None:
    fleet.script = None
    body = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "x"}]}'
    named = b"x-conversation-id: talk\r\n"
    async with serving(fleet, tmp_path, stream_keep_s=0.2) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(CHAT + named + b"content-length: %d\r\n\r\n" % len(body) + body)
        submitted = await fleet.request()
        submitted.accept()
        submitted.say("Hel")
        head = await reader.readuntil(b"Hel")
        stream_id = head.partition(b"x-stream-id: ")[2].partition(b"\r\n")[0]
        back, returned = await asyncio.open_connection("127.0.0.1", port)
        returned.write(b"GET /v1/stream/%b HTTP/1.1\r\nhost: localhost\r\n\r\n" % stream_id)
        await back.readuntil(b"Hel")
        assert not submitted.cancelled
        for each in (writer, returned):
            each.write_eof()
        # Both still read; but nobody could tell them from those who have gone.
        async with asyncio.timeout(5):
            await submitted.cancellation.wait()
        for each in (writer, returned):
            each.close()


async def test_an_upgrade_is_answered_as_a_plain_request(
    fleet: FakeFleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(fleet, tmp_path) as (reader, writer):
        writer.write(HEAD + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n")
        data = await reader.read()
    assert data.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in data
    assert "uvicorn[standard]" not in caplog.text


async def test_who_leaves_with_a_request_waiting_leaves_the_running_one_too(
    fleet: FakeFleet, tmp_path: Path
) -> None:
    fleet.script = None
    body = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "x"}]}'
    request = CHAT + b"content-length: %d\r\n\r\n" % len(body) + body
    async with connected(fleet, tmp_path) as (reader, writer):
        writer.write(request)
        submitted = await fleet.request()
        submitted.accept()
        submitted.say("Hel")
        await reader.readuntil(b"Hel")
        # Waits behind the first: reading stops here, so that only writing shows the end.
        writer.write(request + request)
        await asyncio.sleep(0.05)
        writer.transport.abort()
        async with asyncio.timeout(5):
            while not submitted.cancelled:
                submitted.say("lo")
                await asyncio.sleep(0.01)
        assert len(fleet.requests) == 1


# --- clients that do not read ---


def chat_request(**options: object) -> bytes:
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, **options}
    ).encode()
    fields = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
    return CHAT + fields + b"x-request-timeout: 0.3\r\n\r\n" + body


async def open_deaf(port: int) -> socket.socket:
    """A connection whose client takes little and reads nothing."""
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.setblocking(False)
    await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", port))
    return deaf


async def until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("end", ["overflow", "deadline", "finish", "crash", "one of two"])
async def test_who_does_not_read_is_hung_up_on_and_nobody_else(
    fleet: FakeFleet, tmp_path: Path, end: str
) -> None:
    fleet.script, fleet.max_buffer_bytes = None, 300_000
    async with serving(fleet, tmp_path, drain_timeout_s=0.2) as (running, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(chat_request().replace(b"x-request-timeout: 0.3\r\n", b""))
        listener = await fleet.request()
        listener.accept()
        listener.say("first")
        await reader.readuntil(b"first")
        deaf = await open_deaf(port)
        deaf.send(chat_request(n=2 if end == "one of two" else 1))
        stuck = await fleet.request(1)
        if end == "one of two":
            (await fleet.request(2)).accept()
        stuck.accept()
        # More than the kernel and the server take without asking.
        while not stuck.stream.ended:
            stuck.say("x" * 50_000)
            await asyncio.sleep(0)
            if end != "overflow" and held_back(running) and len(running.server_state.tasks) == 2:
                break
        match end:
            case "finish":
                stuck.finish()
            case "crash" | "one of two":
                stuck.fail(ErrorCode.MODEL_CRASHED)
        await until(lambda: len(running.server_state.connections) == 1)
        await until(lambda: len(running.server_state.tasks) == 1)
        assert stuck.stream.ended
        # The other one never notices.
        listener.say("second", FinishReason.STOP)
        assert b"[DONE]" in await reader.readuntil(b"[DONE]")
        deaf.close()
        writer.close()


def held_back(running: server.Server) -> bool:
    return any(c.flow.write_paused for c in running.server_state.connections)  # type: ignore[union-attr]


async def test_a_whole_answer_that_nobody_reads_is_not_kept(
    fleet: FakeFleet, tmp_path: Path
) -> None:
    fleet.script = ("x" * 20_000_000,)
    async with serving(fleet, tmp_path, drain_timeout_s=0.2) as (running, port):
        deaf = await open_deaf(port)
        deaf.send(chat_request(stream=False))
        await fleet.request()
        await until(lambda: not running.server_state.connections)
        deaf.close()


async def test_who_reads_slowly_gets_it_all(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.script = ("x" * 2_000_000,)
    async with serving(fleet, tmp_path, drain_timeout_s=5.0) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        writer.write(chat_request())
        await asyncio.sleep(0.3)
        assert len(await reader.readuntil(b"[DONE]")) > 2_000_000
        writer.close()
