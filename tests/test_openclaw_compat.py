"""What an OpenClaw agent relies on: bots that run unattended, with an OpenAI client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.support.server import Server, polls, serve, write_script

AGENT = {"X-OpenClaw-Agent-Id": "night-watch"}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TEMPLATE = "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}"
LOOK_UP: Any = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_script(folder, "agent", tokens=["Good ", "morning", "."], chat_template=TEMPLATE)
    calls = ["Wait. ", '<tool_call>{"name": "look_up", ', '"arguments": {}}', "</tool_call>"]
    write_script(folder, "caller", tokens=calls, chat_template=TEMPLATE)
    write_script(folder, "broken", faults=[{"at": "load", "kind": "segfault"}])
    write_script(folder, "slow", load_delay_s=60.0)
    write_script(folder, "endless", repeat=True, step_delay_s=0.005)
    write_script(folder, "reader", prefill_chunk=1, prefill_delay_s=0.2)
    return folder


@pytest.fixture(scope="module")
def server(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("home"), "--models-dir", str(models_dir)) as running:
        for model in ("agent", "caller"):
            assert running.load(model).status_code == 200
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    url = f"{server.url}/v1"
    with openai.OpenAI(
        base_url=url, api_key="none", max_retries=0, default_headers=AGENT
    ) as client:
        yield client


def counted(server: Server, client: str) -> float:
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == "opta_lmx_client_requests_total" and (
                sample.labels["client"] == client
            ):
                return float(sample.value)
    return 0.0


def test_the_agents_header_is_counted(client: openai.OpenAI, server: Server) -> None:
    before = counted(server, "night-watch")
    client.chat.completions.create(model="agent", messages=HELLO, user="somebody")
    assert counted(server, "night-watch") == before + 1


def test_user_is_accepted_and_counted_where_there_is_no_header(server: Server) -> None:
    before = counted(server, "user-7")
    assert server.chat("agent", user="user-7").status_code == 200
    assert counted(server, "user-7") == before + 1


def test_a_stream_ends_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="agent", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks)


def test_two_answers_are_told_apart_by_their_index(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    finished = []
    for chunk in client.chat.completions.create(model="agent", messages=HELLO, n=2, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason is not None:
            finished.append(choice.index)
    assert texts == {0: "Good morning.", 1: "Good morning."}
    assert sorted(finished) == [0, 1]


def test_a_tool_call_is_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="caller", messages=HELLO, tools=[LOOK_UP]) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Wait."
    assert [call.function.name for call in message.tool_calls or []] == ["look_up"]


def test_models_are_looked_up(client: openai.OpenAI) -> None:
    found: Any = client.models.retrieve("agent")
    assert found.readiness["state"] == "routable"
    assert "tools" in found.capabilities
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_legacy_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="agent", prompt="Once", max_tokens=2)
    assert answer.choices[0].text == "Good morning"
    assert answer.choices[0].finish_reason == "length"


def test_a_quarantined_model_is_refused_by_its_code(client: openai.OpenAI, server: Server) -> None:
    server.load("broken")
    server.await_state("broken", "quarantined")
    for ask in (
        lambda: client.chat.completions.create(model="broken", messages=HELLO),
        lambda: client.chat.completions.create(model="broken", messages=HELLO, stream=True),
        lambda: client.models.retrieve("broken"),
    ):
        with pytest.raises(openai.ConflictError) as refused:
            ask()
        assert refused.value.code == "model_unstable"


def test_a_loading_model_says_when_to_ask_again(client: openai.OpenAI, server: Server) -> None:
    assert server.load("slow", wait=False).status_code == 202
    with pytest.raises(openai.ConflictError) as refused:
        client.chat.completions.create(model="slow", messages=HELLO)
    assert refused.value.code == "model_not_ready"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    server.http.post("/admin/models/unload", json={"model_id": "slow"})


def test_an_unknown_tool_format_is_refused_with_the_list(server: Server) -> None:
    server.http.post("/admin/models/unload", json={"model_id": "agent"})
    refused = server.load("agent", tool_format="smoke-signals")
    error = json.loads(refused.text)["error"]
    assert (refused.status_code, error["code"]) == (400, "invalid_value")
    assert "hermes" in error["message"]
    assert server.load("agent", tool_format="mistral").status_code == 200
    assert server.model("agent")["tool_format"] == "mistral"


KEY = "s3cret"


@pytest.fixture(scope="module")
def keyed(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as an unattended machine has it: with keys, and impatient proxies."""
    arguments = ("--models-dir", str(models_dir), "--api-key", KEY, "--admin-key", "admin")
    home = tmp_path_factory.mktemp("home")
    with serve(home, *arguments, OPTA_LMX_SSE_KEEPALIVE_S="0.1") as running:
        running.http.headers["X-Admin-Key"] = "admin"
        for model in ("agent", "caller", "endless", "reader"):
            assert running.load(model).status_code == 200
        yield running


def socket_url(server: Server) -> str:
    return server.url.replace("http://", "ws://") + "/v1/chat/stream"


@pytest.fixture
def socket(keyed: Server) -> Iterator[ClientConnection]:
    headers = {"Authorization": f"Bearer {KEY}", **AGENT}
    with connect(socket_url(keyed), additional_headers=headers) as connection:
        yield connection


def ask(socket: ClientConnection, request_id: str, model: str, **more: object) -> None:
    frame = {"type": "chat.request", "id": request_id, "model": model, "messages": HELLO, **more}
    socket.send(json.dumps(frame))


def frames(socket: ClientConnection, *ends: str) -> Iterator[dict[str, Any]]:
    """Frames as they come, until every request named in ``ends`` has ended."""
    left = set(ends)
    while left:
        frame = json.loads(socket.recv(timeout=30))
        if frame["type"] in ("chat.done", "chat.error"):
            left.discard(frame["id"])
        yield frame


def await_idle(server: Server, model: str) -> None:
    for _ in polls():
        if server.model(model)["in_flight"] == 0:
            return
    raise AssertionError(f"{model} is still at work")


def test_the_websocket_needs_the_key(keyed: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Admin-Key": "admin"}):
        with (
            pytest.raises(InvalidStatus) as refused,
            connect(socket_url(keyed), additional_headers=headers),
        ):
            pass
        assert refused.value.response.status_code == 401
        error = json.loads(refused.value.response.body or b"")["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    with connect(socket_url(keyed), additional_headers={"X-Api-Key": KEY}) as socket:
        ask(socket, "a", "agent")
        assert [*frames(socket, "a")][-1]["finish_reason"] == "stop"


def test_one_websocket_carries_several_chats(socket: ClientConnection) -> None:
    ask(socket, "morning", "agent")
    ask(socket, "call", "caller", tools=[LOOK_UP])
    texts = {"morning": "", "call": ""}
    calls: list[Any] = []
    reasons = {}
    for frame in frames(socket, "morning", "call"):
        match frame["type"]:
            case "chat.token":
                texts[frame["id"]] += frame["content"]
            case "chat.tool_call":
                calls.append((frame["id"], frame["tool_call"]))
            case "chat.done":
                reasons[frame["id"]] = frame["finish_reason"]
                assert frame["usage"]["completion_tokens"] > 0
    assert texts == {"morning": "Good morning.", "call": "Wait."}
    assert reasons == {"morning": "stop", "call": "tool_calls"}
    assert {request_id for request_id, _ in calls} == {"call"}
    assert calls[0][1]["function"]["name"] == "look_up"
    assert json.loads("".join(piece["function"]["arguments"] for _, piece in calls)) == {}


def test_a_chat_on_the_websocket_is_cancelled(socket: ClientConnection, keyed: Server) -> None:
    ask(socket, "long", "endless")
    for frame in frames(socket, "long"):
        if frame["type"] == "chat.token":
            socket.send(json.dumps({"type": "chat.cancel", "id": "long"}))
            break
    *_, done = frames(socket, "long")
    assert (done["type"], done["finish_reason"]) == ("chat.done", "cancelled")
    await_idle(keyed, "endless")
    # The connection is still good, and what is wrong on it is told.
    ask(socket, "typo", "agent", temperature=9)
    [refused] = frames(socket, "typo")
    assert refused["error"]["param"] == "temperature"
    ask(socket, "gone", "nobody")
    assert [frame["error"]["code"] for frame in frames(socket, "gone")] == ["model_not_found"]


def test_hanging_up_cancels_what_runs(keyed: Server) -> None:
    headers = {"X-Api-Key": KEY}
    with connect(socket_url(keyed), additional_headers=headers) as leaving:
        ask(leaving, "a", "endless")
        ask(leaving, "b", "endless")
        next(frames(leaving, "a"))
        assert keyed.model("endless")["in_flight"] >= 1
    await_idle(keyed, "endless")


def test_the_websocket_stays_alive_during_a_long_prompt(socket: ClientConnection) -> None:
    ask(socket, "a", "reader")
    heard = [*frames(socket, "a")]
    assert heard[0]["type"] == "chat.keepalive"
    prefills = [frame["prefill"] for frame in heard if "prefill" in frame]
    assert {prefill["total"] for prefill in prefills} == {12}
    assert all(0 < prefill["computed"] < 12 for prefill in prefills)
    assert heard[-1]["type"] == "chat.done"


def test_a_stream_says_how_far_its_long_prompt_is(keyed: Server) -> None:
    body = {"model": "reader", "messages": HELLO, "stream": True}
    headers = {"X-Api-Key": KEY}
    with keyed.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        lines = [*answer.iter_lines()]
    assert any(re.fullmatch(r": prefill \d+/12", line) for line in lines)
    assert lines[-2:] == ["data: [DONE]", ""]
