"""What a client can do to a connection before, between and after its requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from supervisor.gateway import server
from supervisor.metrics import Metrics
from supervisor.settings import Settings
from tests.support.fake_fleet import FakeFleet

HEAD = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"

Connected = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(fleet: FakeFleet, home: Path, **more: object) -> AsyncIterator[Connected]:
    settings = Settings(home=home, port=0, **more)  # type: ignore[arg-type]
    with contextlib.closing(server.bind(settings)) as listener:
        running = server.create_server(fleet, settings, Metrics())
        task = asyncio.create_task(running.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            running.ask_exit()
            await task


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
