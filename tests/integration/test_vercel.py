"""Vercel's AI SDK on Node.js against a running server: each API by the provider made for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from client_setup import node

from tests.support.foreign import ForeignClient, ForeignError, foreign_client
from tests.support.server import Server, polls

CLIENT = Path("tests/clients/node/ai_sdk.mjs")
PARIS = "What is the capital of France?"
APIS = ["chat", "responses", "messages"]
CALLS = [("get_weather", {"city": "Paris", "days": 2}), ("get_weather", {"city": "Rome"})]


@pytest.fixture(scope="module")
def client(
    client_server: Server, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ForeignClient]:
    home = node()
    if home is None:
        pytest.skip("there is no Node.js")
    # Node looks for packages beside the script.
    folder = tmp_path_factory.mktemp("vercel")
    shutil.copy(request.config.rootpath / CLIENT, folder)
    (folder / "node_modules").symlink_to(home / "node_modules")
    url = f"{client_server.url}/v1"
    with foreign_client(["node", CLIENT.name], folder, BASE_URL=url) as client:
        yield client


def named(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    assert len({call["toolCallId"] for call in calls}) == len(calls)
    return [(call["toolName"], call["input"]) for call in calls]


@pytest.mark.parametrize("api", [*APIS, "completions"])
def test_the_ai_sdk_answers_and_streams_the_same(client: ForeignClient, api: str) -> None:
    options: dict[str, Any] = {
        "api": api,
        "model": "demo",
        "system": "You are a helpful assistant.",
        "prompt": PARIS,
        "temperature": 0,
        "maxOutputTokens": 24,
    }
    answer = client("generate", **options)
    assert "Paris" in answer["text"]
    streamed = client("stream", **options)
    assert len(streamed["texts"]) > 1
    assert "".join(streamed["texts"]) == answer["text"]
    assert streamed["finishReason"] == answer["finishReason"]
    for each in ("inputTokens", "outputTokens"):
        assert streamed["usage"][each] == answer["usage"][each] > 0


@pytest.mark.parametrize("api", APIS)
def test_the_ai_sdk_gets_tool_calls_and_reasoning(client: ForeignClient, api: str) -> None:
    options: dict[str, Any] = {"api": api, "model": "agent", "prompt": "Paris?", "weather": True}
    if api == "messages":
        thinking = {"type": "enabled", "budgetTokens": 1024}
        options["providerOptions"] = {"anthropic": {"thinking": thinking}}
    if api == "responses":
        options["providerOptions"] = {
            "openai": {"forceReasoning": True, "reasoningSummary": "auto"}
        }
    answer = client("generate", **options)
    assert named(answer["calls"]) == CALLS
    assert answer["finishReason"] == "tool-calls"
    assert answer["text"].strip() == "I look."
    assert answer["reasoning"] == "Where is it?"
    streamed = client("stream", **options)
    assert named(streamed["calls"]) == CALLS
    assert "".join(streamed["inputs"]).startswith('{"city": "Paris"')
    assert "".join(streamed["texts"]).strip() == "I look."
    assert streamed["reasoning"] == "Where is it?"


@pytest.mark.parametrize("api", APIS)
def test_the_ai_sdk_goes_on_with_results_of_tools(client: ForeignClient, api: str) -> None:
    answer = client("generate", api=api, model="agent", prompt="Paris?", weather=True, steps=2)
    assert [step["results"] for step in answer["steps"]] == [
        ["It rains in Paris.", "It rains in Rome."]
    ] * 2


@pytest.mark.parametrize("api", APIS)
def test_the_ai_sdk_forces_a_call(client: ForeignClient, api: str) -> None:
    answer = client(
        "generate",
        api=api,
        model="tiny",
        prompt="Hello",
        weather=True,
        toolChoice={"type": "tool", "toolName": "get_weather"},
        maxOutputTokens=400,
    )
    assert {name for name, _ in named(answer["calls"])} == {"get_weather"}


@pytest.mark.parametrize("api", APIS)
def test_the_ai_sdk_gets_objects(client: ForeignClient, api: str) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "warm": {"type": "boolean"}},
        "required": ["size", "warm"],
        "additionalProperties": False,
    }
    answer = client(
        "generate", api=api, model="tiny", prompt="Hello", schema=schema, maxOutputTokens=200
    )
    jsonschema.validate(answer["output"], schema)


def test_the_ai_sdk_embeds(client: ForeignClient) -> None:
    answer = client("embed", model="embedder", values=["hello world", "the sea"])
    first, second = answer["embeddings"]
    assert first != second
    assert answer["usage"]["tokens"] > 0


@pytest.mark.parametrize("api", APIS)
def test_the_ai_sdk_gets_errors(client: ForeignClient, client_server: Server, api: str) -> None:
    def refused(status: int, **options: Any) -> str:
        with pytest.raises(ForeignError) as caught:
            client("generate", api=api, **options)
        assert caught.value.kind == "AI_APICallError"
        assert caught.value.status == status
        return caught.value.message

    assert "nobody" in refused(404, model="nobody", prompt="Hello")
    assert "tokens" in refused(400, model="tiny", prompt="word " * 20_000)
    with pytest.raises(ForeignError, match="killed by SIGKILL"):
        client("stream", api=api, model="talker", prompt="crash")
    client_server.await_state("talker", "routable")


def test_the_ai_sdk_cancels(client: ForeignClient, client_server: Server) -> None:
    answer = client(
        "stream", api="chat", model="demo", prompt=PARIS, maxOutputTokens=2000, abortAfter=6
    )
    assert answer["aborted"]
    for _ in polls(10):
        if not client_server.model("demo")["in_flight"]:
            return
    raise AssertionError("the request goes on")
