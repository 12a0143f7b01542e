"""The real server on a real socket, over the fake fleet."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from protocol.errors import CodedError, ErrorCode
from supervisor.config import ConfigError
from supervisor.gateway import server
from supervisor.gateway.announce import Announcer
from supervisor.metrics import Metrics
from supervisor.settings import ModelSetting, Settings
from tests.support.asgi import events
from tests.support.fake_fleet import FakeFleet

Serve = Callable[..., AbstractAsyncContextManager[str]]

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def serve(fleet: FakeFleet, tmp_path: Path) -> Serve:
    @asynccontextmanager
    async def serve(**more: object) -> AsyncIterator[str]:
        settings = Settings(home=tmp_path, port=0, **more)  # type: ignore[arg-type]
        with contextlib.closing(server.bind(settings)) as listener:
            running = server.create_server(fleet, settings, Metrics())
            task = asyncio.create_task(running.serve(sockets=[listener]))
            yield server.base_url(settings, listener)
            running.ask_exit()
            await task

    return serve


async def test_openai_client(serve: Serve) -> None:
    async with serve() as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as client:
        [model] = (await client.models.list()).data
        assert (await client.models.retrieve(model.id)).id == "m"
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
        answer = await client.chat.completions.create(model="m", messages=messages)
        assert answer.choices[0].message.content == "Hello"
        stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
        assert chunks[-1].choices[0].finish_reason == "stop"
        text = await client.completions.create(model="m", prompt="Once")
        assert text.choices[0].text == "Hello"
        with pytest.raises(openai.NotFoundError) as refusal:
            await client.chat.completions.create(model="x", messages=messages)
        assert refusal.value.code == "model_not_found"


async def test_what_is_not_http_gets_the_envelope(serve: Serve) -> None:
    async with serve() as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"\x16\x03\x01 garbage\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: " in head
    assert json.loads(body)["error"]["code"] == "invalid_value"


async def test_an_oversized_body_gets_an_answer(serve: Serve) -> None:
    async with serve(max_body_bytes=1000) as url, httpx.AsyncClient() as client:
        answer = await client.post(f"{url}/v1/chat/completions", content=b" " * 3_000_000)
        assert answer.status_code == 413
        assert answer.headers["connection"] == "close"
        assert (await client.get(f"{url}/healthz")).status_code == 200


async def test_disconnect_of_a_real_client(serve: Serve, fleet: FakeFleet) -> None:
    fleet.script = None
    async with serve() as url:
        for number, stream in enumerate((False, True)):
            async with httpx.AsyncClient() as client:
                asking = asyncio.create_task(
                    client.post(f"{url}/v1/chat/completions", json={**BODY, "stream": stream})
                )
                submitted = await fleet.request(number)
                asking.cancel()
            await submitted.cancellation.wait()


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Whoever runs the tests may ignore SIGHUP, as nohup does; the server then would, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_lets_a_stream_finish(
    fleet: FakeFleet,
    tmp_path: Path,
    signum: signal.Signals,
    default_signals: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The terminal is there when the server starts, and gone afterwards.
    there = iter([True, False])
    monkeypatch.setattr(server, "has_terminal", lambda: next(there))
    fleet.script = None
    settings = Settings(home=tmp_path, port=0, shutdown_grace_s=60)
    with contextlib.closing(server.bind(settings)) as listener:
        running = server.create_server(fleet, settings, Metrics())
        task = asyncio.create_task(running.serve(sockets=[listener]))
        async with httpx.AsyncClient(base_url=server.base_url(settings, listener)) as client:
            asking = asyncio.create_task(
                client.post("/v1/chat/completions", json={**BODY, "stream": True})
            )
            submitted = await fleet.request()
            submitted.accept()
            os.kill(os.getpid(), signum)
            await running.exit_asked.wait()
            assert not fleet.stopped
            submitted.say("Bye")
            submitted.finish()
            assert events((await asking).content)[-1] == "[DONE]"
        await task
    assert fleet.stopped


@pytest.mark.parametrize("terminal", [True, False])
async def test_a_hangup_reloads_unless_the_terminal_has_gone(
    fleet: FakeFleet,
    tmp_path: Path,
    default_signals: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    terminal: bool,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server, "has_terminal", lambda: terminal)
    settings = Settings(home=tmp_path, port=0)
    found: list[Settings | ConfigError] = [
        ConfigError("config.toml: unknown key 'prot'"),
        msgspec.structs.replace(settings, aliases={"fast": "m"}, shutdown_grace_s=1.0),
    ]

    def reread() -> Settings:
        new = found.pop(0)
        if isinstance(new, ConfigError):
            raise new
        return new

    with contextlib.closing(server.bind(settings)) as listener:
        running = server.create_server(fleet, settings, Metrics(), reread)
        task = asyncio.create_task(running.serve(sockets=[listener]))
        async with httpx.AsyncClient(base_url=server.base_url(settings, listener)) as client:
            assert (await client.get("/healthz")).status_code == 200
            os.kill(os.getpid(), signal.SIGHUP)
            await wait_until(lambda: "nothing has changed: config.toml" in caplog.text)
            assert (await client.get("/v1/models/fast")).status_code == 404
            os.kill(os.getpid(), signal.SIGHUP)
            expected = "changed: aliases; after a restart: shutdown_grace_s"
            await wait_until(lambda: expected in caplog.text)
            assert (await client.get("/v1/models/fast")).json()["alias_of"] == "m"
        assert not running.should_exit
        running.ask_exit()
        await task


async def test_a_hangup_that_nohup_ignores_stays_ignored(
    serve: Serve, fleet: FakeFleet, default_signals: None
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    async with serve() as url, httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/healthz")).status_code == 200
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
        assert (await client.get(f"{url}/healthz")).status_code == 200
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


async def wait_until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - log records set no event
            await asyncio.sleep(0.01)


async def test_asked_twice_it_leaves_no_traceback(
    fleet: FakeFleet, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fleet.script = None
    async with httpx.AsyncClient() as client:
        async with serve(shutdown_grace_s=60) as url:
            address = f"{url}/v1/chat/completions"
            asking = asyncio.create_task(client.post(address, json={**BODY, "stream": True}))
            (await fleet.request()).accept()
            # The way out of ``serve`` asks for the second time.
            os.kill(os.getpid(), signal.SIGINT)
            await wait_until(lambda: "stopping; waiting up to 60 s" in caplog.text)
        assert events((await asking).content)[-1]["error"]["code"] == "server_shutting_down"
    assert "stopping now" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_what_outlasts_the_grace_is_told(fleet: FakeFleet, serve: Serve) -> None:
    fleet.script = None
    async with httpx.AsyncClient() as client:
        async with serve(shutdown_grace_s=0.05) as url:
            address = f"{url}/v1/chat/completions"
            streamed = asyncio.create_task(client.post(address, json={**BODY, "stream": True}))
            (await fleet.request(0)).accept()
            whole = asyncio.create_task(client.post(address, json=BODY))
            (await fleet.request(1)).accept()
        assert events((await streamed).content)[-1]["error"]["code"] == "server_shutting_down"
        assert (await whole).status_code == 503
        assert (await whole).json()["error"]["code"] == "server_shutting_down"


def test_a_port_in_use_is_said_plainly(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(home=tmp_path, port=taken.getsockname()[1])
        expected = r"cannot listen on 127\.0\.0\.1:.*--port / OPTA_LMX_PORT"
        with pytest.raises(server.BindRefused, match=expected):
            server.bind(settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "box.lan"])
def test_open_sides_are_not_offered_to_the_network(tmp_path: Path, host: str) -> None:
    for admin, api in ((None, None), ("a", None), (None, "b")):
        settings = Settings(home=tmp_path, host=host, admin_key=admin, api_key=api)
        with pytest.raises(server.BindRefused, match=r"reachable from outside.*OPTA_LMX_A"):
            server.require_keys(settings)
    server.require_keys(Settings(home=tmp_path, host=host, admin_key="a", api_key="b"))
    server.require_keys(Settings(home=tmp_path, host=host, allow_unauthenticated=True))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
    ],
)
def test_base_url(tmp_path: Path, host: str, url: str) -> None:
    assert server.base_url(Settings(home=tmp_path, host=host)) == url


def test_announce_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Announcer(Settings(home=tmp_path, api_key="s3cret")).loaded("org/it's", None)
    output = capsys.readouterr().out
    assert "http://127.0.0.1:8000/v1\n" in output
    assert "s3cret" not in output
    command = shlex.split(output[output.index("curl") :])
    assert command[1] == "http://127.0.0.1:8000/v1/chat/completions"
    request = json.loads(command[-1])
    assert request["model"] == "org/it's"
    assert [message["role"] for message in request["messages"]] == ["system", "user"]


def test_announce_names_the_bound_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Announcer(Settings(home=tmp_path, host="0.0.0.0", port=9)).loaded("m", None)
    expected = "http://127.0.0.1:9 (bound to 0.0.0.0:9, every address of this machine)\n"
    assert expected in capsys.readouterr().out


def test_announce_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = (ModelSetting(path="m"), ModelSetting(path="n"))
    announcer = Announcer(Settings(home=tmp_path, models=models))
    announcer.started()
    error = CodedError(ErrorCode.MODEL_INCOMPLETE, "shard 2 is missing")
    announcer.loaded("m", error)
    first, *more = capsys.readouterr().out.splitlines()
    assert first == "m failed to load: shard 2 is missing (model_incomplete)"
    assert more[-1].endswith("opta-lmx load MODEL")
    announcer.loaded("n", error)
    expected = "n failed to load: shard 2 is missing (model_incomplete)\n"
    assert capsys.readouterr().out == expected


def test_announce_a_server_without_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Announcer(Settings(home=tmp_path, port=81)).started()
    output = capsys.readouterr().out
    assert "http://127.0.0.1:81/v1\n" in output
    assert output.endswith("opta-lmx load MODEL --url http://127.0.0.1:81\n")


def test_an_open_server_on_the_network_is_warned_about(
    fleet: FakeFleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(home=tmp_path, host="0.0.0.0", port=0, allow_unauthenticated=True)
    fleet.on_start = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with caplog.at_level(logging.INFO):
        server.run(fleet, settings, Metrics())
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("everyone who can reach this address may use /admin and /v1")
    assert "(bound to 0.0.0.0:" in caplog.text
