"""What an OpenClaw agent relies on: bots that run unattended, with an OpenAI client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import Server, serve, write_script

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
