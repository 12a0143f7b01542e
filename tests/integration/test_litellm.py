"""LiteLLM against a running server: it chooses a provider by the model's prefix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from client_setup import litellm

from tests.support.client_models import WEATHER_SCHEMA
from tests.support.foreign import ForeignClient, ForeignError, foreign_client
from tests.support.server import Server

ROOT = "tests/clients/litellm/client.py"
PARIS = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER_SCHEMA}}
PROVIDERS = ["openai", "anthropic", "hosted_vllm"]


@pytest.fixture(scope="module")
def client(client_server: Server, request: pytest.FixtureRequest) -> Iterator[ForeignClient]:
    command = [litellm(), request.config.rootpath / ROOT]
    with foreign_client(command, request.config.rootpath, BASE_URL=client_server.url) as client:
        yield client


@pytest.mark.parametrize("provider", PROVIDERS)
def test_litellm_answers_and_streams_the_same(client: ForeignClient, provider: str) -> None:
    options: dict[str, Any] = {
        "model": f"{provider}/demo",
        "messages": PARIS,
        "temperature": 0,
        "max_tokens": 24,
    }
    answer = client("completion", **options)
    (choice,) = answer["choices"]
    assert "Paris" in choice["message"]["content"]
    streamed = client("stream", **options, stream_options={"include_usage": True})
    assert len(streamed["chunks"]) > 2
    whole = streamed["whole"]
    assert whole["choices"][0]["message"]["content"] == choice["message"]["content"]
    assert whole["choices"][0]["finish_reason"] == choice["finish_reason"]
    for each in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert whole["usage"][each] == answer["usage"][each] > 0


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("call", ["completion", "stream"])
def test_litellm_gets_tool_calls(client: ForeignClient, provider: str, call: str) -> None:
    answer = client(call, model=f"{provider}/agent", messages=PARIS, tools=[WEATHER])
    (choice,) = (answer["whole"] if call == "stream" else answer)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert [
        (each["function"]["name"], json.loads(each["function"]["arguments"]))
        for each in choice["message"]["tool_calls"]
    ] == [("get_weather", {"city": "Paris", "days": 2}), ("get_weather", {"city": "Rome"})]
    assert choice["message"]["content"].strip() == "I look."
    assert choice["message"]["reasoning_content"] == "Where is it?"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_litellm_forces_a_call(client: ForeignClient, provider: str) -> None:
    answer = client(
        "completion",
        model=f"{provider}/tiny",
        messages=PARIS,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=400,
    )
    for call in answer["choices"][0]["message"]["tool_calls"]:
        jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER_SCHEMA)


def test_litellm_gets_structured_output(client: ForeignClient) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "warm": {"type": "boolean"}},
        "required": ["size", "warm"],
        "additionalProperties": False,
    }
    form = {"name": "city", "schema": schema, "strict": True}
    answer = client(
        "completion",
        model="openai/tiny",
        messages=PARIS,
        response_format={"type": "json_schema", "json_schema": form},
        max_tokens=200,
    )
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), schema)


def test_litellm_on_the_other_routes(client: ForeignClient) -> None:
    answer = client(
        "text_completion", model="text-completion-openai/demo", prompt="One, two,", max_tokens=8
    )
    assert answer["choices"][0]["text"]
    answer = client("responses", model="openai/demo", input="Say hello.", max_output_tokens=8)
    assert answer["output"][0]["content"][0]["text"]
    answer = client("embedding", model="openai/embedder", input=["hello world", "the sea"])
    assert [each["index"] for each in answer["data"]] == [0, 1]
    documents = ["blue", "the sea", "hello"]
    answer = client(
        "rerank", model="hosted_vllm/ranker", query="what is blue?", documents=documents
    )
    assert sorted(each["index"] for each in answer["results"]) == [0, 1, 2]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_litellm_gets_typed_errors(
    client: ForeignClient, client_server: Server, provider: str
) -> None:
    def refused(kind: str, status: int, call: str = "completion", **options: Any) -> None:
        with pytest.raises(ForeignError) as caught:
            client(call, **options)
        assert (caught.value.kind, caught.value.status) == (kind, status), caught.value

    refused("NotFoundError", 404, model=f"{provider}/nobody", messages=PARIS)
    long = [{"role": "user", "content": "word " * 20_000}]
    refused("ContextWindowExceededError", 400, model=f"{provider}/tiny", messages=long)
    crash = [{"role": "user", "content": "crash"}]
    with pytest.raises(ForeignError, match="killed by SIGKILL"):
        client("stream", model=f"{provider}/talker", messages=crash)
    client_server.await_state("talker", "routable")
