"""LangChain's ChatOpenAI and OpenAIEmbeddings against a running server."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
import pydantic
import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from tests.support.server import Server

PARIS = [
    SystemMessage("You are a helpful assistant."),
    HumanMessage("What is the capital of France?"),
]


class City(pydantic.BaseModel):
    """A city."""

    name: str = pydantic.Field(max_length=12)
    size: Literal["small", "large"]
    rivers: list[Literal["Seine", "Tiber"]] = pydantic.Field(max_length=2)


@tool
def get_weather(city: str, days: int = 1) -> str:
    """The weather of a city."""
    return f"It rains in {city} for {days} days."


def chat(server: Server, model: str, **options: Any) -> ChatOpenAI:
    defaults: dict[str, Any] = {"temperature": 0, "max_tokens": 32, "max_retries": 0}
    return ChatOpenAI(
        model=model,
        base_url=f"{server.url}/v1",
        api_key=SecretStr("none"),
        **{**defaults, **options},
    )


def merged(chunks: list[Any]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, AIMessageChunk)
    return whole


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain_answers_and_streams_the_same(client_server: Server, responses: bool) -> None:
    model = chat(client_server, "demo", use_responses_api=responses, stream_usage=True)
    answer = model.invoke(PARIS)
    assert "Paris" in answer.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 1
    chunks = list(model.stream(PARIS))
    assert len([chunk for chunk in chunks if chunk.text]) > 1
    whole = merged(chunks)
    assert whole.text == answer.text
    assert whole.usage_metadata is not None
    for each in ("input_tokens", "output_tokens", "total_tokens"):
        assert whole.usage_metadata[each] == answer.usage_metadata[each]


def test_langchain_runs_several_at_once(client_server: Server) -> None:
    model = chat(client_server, "demo", max_tokens=8)
    prompts: list[Any] = ["Count to three.", PARIS, "Say hello.", "Name a colour."]
    alone = [model.invoke(prompt).text for prompt in prompts]
    assert len(set(alone)) == len(prompts)
    together = asyncio.run(model.abatch(prompts))
    assert all(answer.text for answer in together)


def test_langchain_gets_log_probabilities(client_server: Server) -> None:
    model = chat(client_server, "tiny", logprobs=True, top_logprobs=2, max_tokens=4)
    content = model.invoke("Hello").response_metadata["logprobs"]["content"]
    assert [len(each["top_logprobs"]) for each in content] == [2] * 4


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_langchain_gets_tool_calls(client_server: Server, responses: bool, streamed: bool) -> None:
    model = chat(client_server, "agent", use_responses_api=responses).bind_tools([get_weather])
    answer: Any = merged(list(model.stream("Paris?"))) if streamed else model.invoke("Paris?")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [
        ("get_weather", {"city": "Paris", "days": 2}),
        ("get_weather", {"city": "Rome"}),
    ]
    assert answer.text.strip() == "I look."
    assert not answer.invalid_tool_calls
    assert len({call["id"] for call in answer.tool_calls}) == 2


def test_langchain_hands_back_what_tools_returned(client_server: Server) -> None:
    model = chat(client_server, "demo", max_tokens=8)
    call = {"name": "get_weather", "args": {"city": "Paris"}, "id": "call_1"}
    history = [
        HumanMessage("Paris?"),
        AIMessage("", tool_calls=[{**call, "type": "tool_call"}]),
        ToolMessage(get_weather.invoke({"city": "Paris"}), tool_call_id="call_1"),
    ]
    assert model.bind_tools([get_weather]).invoke(history).text


@pytest.mark.parametrize("choice", ["get_weather", "any"])
def test_langchain_forces_a_call(client_server: Server, choice: str) -> None:
    model = chat(client_server, "tiny", temperature=1.0, max_tokens=300)
    bound = model.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
    (call,) = bound.invoke("Hello").tool_calls
    assert call["name"] == "get_weather"
    assert isinstance(call["args"]["city"], str)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_output(client_server: Server, method: Any) -> None:
    model = chat(client_server, "tiny", temperature=1.0, max_tokens=300)
    answer = model.with_structured_output(City, method=method).invoke("Answer in JSON.")
    assert isinstance(answer, City)


def test_langchain_gets_typed_errors(client_server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat(client_server, "nobody").invoke("Hello")
    with pytest.raises(
        openai.BadRequestError, match=r"is 2048 tokens, but the prompt has at least \d+"
    ):
        chat(client_server, "tiny").invoke("word " * 20_000)
    with pytest.raises(openai.APIError):
        list(chat(client_server, "talker").stream("crash"))
    client_server.await_state("talker", "routable")


def test_langchain_embeds(client_server: Server) -> None:
    # Otherwise it counts tokens as OpenAI's models have them, and sends those.
    embeddings = OpenAIEmbeddings(
        model="embedder",
        base_url=f"{client_server.url}/v1",
        api_key=SecretStr("none"),
        check_embedding_ctx_length=False,
    )
    first, second = embeddings.embed_documents(["hello world", "the sea"])
    assert first != second
    assert embeddings.embed_query("the sea") == pytest.approx(second, abs=1e-3)
