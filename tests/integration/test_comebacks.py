"""Clients that drop their connection and come back, against a real server."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.support.server import Server, polls, serve, text_of, write_script

TURNS: Any = [{"role": "user", "content": "Count"}]
COUNTING = [f"{n} " for n in range(150)]
SLOW = ["One ", "two ", "three"]
#: More than sockets take from a server whose client does not read.
LARGE = [f"{n:06} " + "x" * 4000 for n in range(2000)]
KEY, TALK = {"authorization": "Bearer secret"}, {"X-Conversation-Id": "talk"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    write_script(folder, "counter", tokens=COUNTING, step_delay_s=0.005)
    # Not all at once: a megabyte that comes before the stream has its first turn is refused.
    write_script(folder, "large", tokens=LARGE, step_delay_s=0.001)
    write_script(folder, "slow", tokens=SLOW, step_delay_s=0.15)
    arguments = ("--models-dir", str(folder), "--api-key", "secret")
    home = tmp_path_factory.mktemp("home")
    with serve(
        home, *arguments, OPTA_LMX_DRAIN_TIMEOUT_S="0.5", OPTA_LMX_SSE_KEEPALIVE_S="0.1"
    ) as server:
        for model in ("counter", "large", "slow"):
            assert server.load(model).status_code == 200
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def content(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def leave_after(client: openai.OpenAI, events: int) -> tuple[str, list[ChatCompletionChunk]]:
    """Ask for an answer, and drop the connection in the midst of it."""
    answer = client.chat.completions.with_raw_response.create(
        model="counter", messages=TURNS, stream=True, extra_headers=TALK
    )
    stream = answer.parse()
    seen = [next(stream) for _ in range(events)]
    stream.close()
    return answer.headers["x-stream-id"], seen


def come_back(client: openai.OpenAI, stream_id: str, at: int) -> list[ChatCompletionChunk]:
    stream = client.get(
        f"/stream/{stream_id}?from={at}",
        cast_to=ChatCompletionChunk,
        stream=True,
        stream_cls=openai.Stream[ChatCompletionChunk],
    )
    return list(stream)


@pytest.mark.parametrize("name", ["the server's", "the client's"])
def test_a_client_that_comes_back_has_the_rest_and_nothing_twice(
    server: Server, client: openai.OpenAI, name: str
) -> None:
    stream_id, seen = leave_after(client, 20)
    rest = come_back(client, stream_id if name == "the server's" else "talk", len(seen))
    assert content(seen + rest) == "".join(COUNTING)
    assert content(seen)
    assert content(rest)
    assert {chunk.id for chunk in seen + rest} == {seen[0].id}
    assert rest[-1].choices[0].finish_reason == "stop"


def test_a_crash_meanwhile_is_survived(server: Server, client: openai.OpenAI) -> None:
    before = server.model("counter")
    stream_id, seen = leave_after(client, 10)
    # Of signs of life, too, clients must not make events.
    os.kill(before["pid"], signal.SIGSTOP)
    with server.http.stream("GET", f"/v1/stream/{stream_id}", headers=KEY) as answer:
        assert ": keep-alive" in answer.iter_lines()
    os.kill(before["pid"], signal.SIGKILL)
    rest = come_back(client, stream_id, len(seen))
    server.await_state("counter", "routable", generation=before["generation"] + 1)
    assert content(seen + rest) == "".join(COUNTING)
    again = server.http.get(f"/v1/stream/{stream_id}", headers=KEY)
    assert "\n: resumed 1\n" in again.text
    assert again.text.count("data: [DONE]") == 1


def test_client_libraries_read_it_with_its_ids_and_signs_of_life(
    server: Server, client: openai.OpenAI
) -> None:
    chat = client.chat.completions.create(
        model="slow", messages=TURNS, stream=True, extra_headers=TALK
    )
    assert content(list(chat)) == "".join(SLOW)
    response = client.responses.create(model="slow", input="x", stream=True, extra_headers=TALK)
    deltas = [each.delta for each in response if each.type == "response.output_text.delta"]
    assert "".join(deltas) == "".join(SLOW)
    with (
        anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as claude,
        claude.messages.stream(
            model="slow", messages=TURNS, max_tokens=100, extra_headers=TALK
        ) as message,
    ):
        assert "".join(message.text_stream) == "".join(SLOW)
    raw = server.http.get("/v1/stream/talk", headers=KEY).text
    assert "id: 0\nevent: message_start\n" in raw


def test_a_response_in_the_background_is_picked_up_again(
    server: Server, client: openai.OpenAI
) -> None:
    stream = client.responses.create(model="counter", input="x", stream=True, background=True)
    seen = [next(stream) for _ in range(20)]
    stream.close()
    [created, *_] = seen
    assert created.type == "response.created"
    response = client.responses.retrieve(created.response.id)
    assert response.status == "in_progress"
    rest = list(
        client.responses.retrieve(response.id, stream=True, starting_after=seen[-1].sequence_number)
    )
    numbers = [each.sequence_number for each in seen + rest]
    assert numbers == list(range(len(numbers)))
    deltas = [each.delta for each in seen + rest if each.type == "response.output_text.delta"]
    assert "".join(deltas) == "".join(COUNTING)
    assert client.responses.retrieve(response.id).output_text == "".join(COUNTING)


def test_a_response_in_the_background_is_polled_and_cancelled(
    server: Server, client: openai.OpenAI
) -> None:
    response = client.responses.create(model="slow", input="x", background=True)
    for _ in polls(10):
        if response.status not in ("queued", "in_progress"):
            break
        response = client.responses.retrieve(response.id)
    assert (response.status, response.output_text) == ("completed", "".join(SLOW))
    running = client.responses.create(model="counter", input="x", background=True)
    assert client.responses.cancel(running.id).status == "cancelled"
    assert server.model("counter")["readiness"]["state"] == "routable"


def test_nobody_else_finds_it(server: Server, client: openai.OpenAI) -> None:
    stream_id, _ = leave_after(client, 1)
    assert server.http.get(f"/v1/stream/{stream_id}").status_code == 401
    for name in (stream_id[:-1] + "~", "another"):
        with pytest.raises(openai.NotFoundError) as refused:
            come_back(client, name, 0)
        assert refused.value.code == "stream_not_found"
    deleted = server.http.delete(f"/v1/stream/{stream_id}", headers=KEY)
    assert deleted.json()["deleted"] is True
    for _ in polls():
        if server.model("counter")["in_flight"] == 0:
            break
    assert server.http.get(f"/v1/stream/{stream_id}", headers=KEY).status_code == 404


def test_who_stops_reading_is_hung_up_on_and_may_come_back(server: Server) -> None:
    body = {"model": "large", "messages": TURNS, "stream": True}
    request = httpx.Request(
        "POST", f"{server.url}/v1/chat/completions", json=body, headers={**KEY, **TALK}
    )
    head = b"".join(b"%b: %b\r\n" % each for each in request.headers.raw)
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect((request.url.host, request.url.port))
        stalled.sendall(b"POST %b HTTP/1.1\r\n%b\r\n" % (request.url.raw_path, head))
        stalled.sendall(request.read())
        hung_up = 'code="client_disconnected",endpoint="/v1/chat/completions",model="large"'
        for _ in polls():
            if hung_up in server.http.get("/metrics", headers=KEY).text:
                break
    back = server.http.get("/v1/stream/talk", headers=KEY)
    payloads = [
        line.removeprefix("data: ") for line in back.text.split("\n") if line.startswith("data: ")
    ]
    assert payloads[-1] == "[DONE]"
    assert text_of(payloads) == "".join(LARGE)


def test_what_nobody_comes_back_for_is_cancelled(tmp_path: Path) -> None:
    write_script(tmp_path, "counter", tokens=COUNTING, repeat=True, step_delay_s=0.01)
    arguments = ("--models-dir", str(tmp_path))
    with serve(tmp_path / "home", *arguments, OPTA_LMX_STREAM_KEEP_S="0.3") as server:
        assert server.load("counter").status_code == 200
        body = {"model": "counter", "messages": TURNS, "stream": True, "max_tokens": 10**6}
        with server.http.stream("POST", "/v1/chat/completions", json=body, headers=TALK) as answer:
            stream_id = answer.headers["x-stream-id"]
            lines = answer.iter_lines()
            assert next(lines) == "id: 0"
        assert server.model("counter")["in_flight"] == 1
        for _ in polls(10):
            if server.model("counter")["in_flight"] == 0:
                break
        assert server.model("counter")["in_flight"] == 0
        gone = server.http.get(f"/v1/stream/{stream_id}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "stream_not_found")
        # And one that runs when the server is stopped holds nobody up.
        with server.http.stream("POST", "/v1/chat/completions", json=body, headers=TALK) as answer:
            next(answer.iter_lines())
