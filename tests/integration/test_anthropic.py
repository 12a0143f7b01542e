"""Anthropic's official client against a running server: scripted models and real ones."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import pydantic
import pytest

from tests.support.server import Server, polls, serve, write_script

REAL = ["tiny-gguf", "tiny-mlx", "demo"]
HI: list[Any] = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
PARIS: dict[str, Any] = {
    "system": "You are a helpful assistant.",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "extra_body": {"temperature": 0},
}
COUNTING = [f" {number}" for number in range(100)]
#: Thinks, and calls tools as Hermes does.
TEMPLATE = (
    "{% if tools %}<tool_call>{{ tool_call.name }}{% endif %}<think>{{ c.split('</think>') }}"
)


def client_of(server: Server, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, max_retries=0, **{"api_key": "k", **options})


@pytest.fixture(scope="module")
def real(real_server: Server) -> Iterator[anthropic.Anthropic]:
    with client_of(real_server) as client:
        yield client


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose models say what their scripts say, through the whole stack."""
    folder = tmp_path_factory.mktemp("models")
    agent = [
        *("<think>", "Where", " is it?", "</think>", "\n\n", "I look", ".", "<tool", "_call>"),
        *('{"name": "get_', 'weather", "argu', 'ments": {"city": "Par', 'is", "days": 2}}'),
        *("</tool_call>", '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}'),
        "</tool_call>",
    ]
    write_script(folder, "agent", tokens=agent, chat_template=TEMPLATE)
    write_script(folder, "talker", tokens=["one", " two", " three", " four"])
    write_script(folder, "clerk", tokens=['{"city": ', '"Paris", ', '"days": 2}'])
    write_script(folder, "slow", tokens=COUNTING, repeat=True, step_delay_s=0.05)
    with serve(
        tmp_path_factory.mktemp("home"),
        *("--models-dir", str(folder)),
        OPTA_LMX_MAX_QUEUE="2",
        OPTA_LMX_API_KEY="secret",
    ) as server:
        for model in ("agent", "talker", "clerk", "slow"):
            assert server.load(model).status_code == 200
        yield server


@pytest.fixture(scope="module")
def client(scripted: Server) -> Iterator[anthropic.Anthropic]:
    with client_of(scripted, api_key="secret") as client:
        yield client


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def prompt_tokens(message: anthropic.types.Message) -> int:
    usage = message.usage
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    return usage.input_tokens + cached


# --- real models ------------------------------------------------------------------


def test_a_real_model_answers(real: anthropic.Anthropic) -> None:
    message = real.messages.create(model="demo", max_tokens=40, **PARIS)
    assert "Paris" in text_of(message)
    assert (message.role, message.stop_reason) == ("assistant", "end_turn")
    assert 5 < message.usage.output_tokens < 40


@pytest.mark.parametrize("model", REAL)
def test_a_real_model_streams(real: anthropic.Anthropic, model: str) -> None:
    with real.messages.stream(model=model, max_tokens=12, **PARIS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text
    assert text_of(final) == text
    whole = real.messages.create(model=model, max_tokens=12, **PARIS)
    assert text_of(whole) == text
    assert (whole.stop_reason, whole.usage.output_tokens) == (
        final.stop_reason,
        final.usage.output_tokens,
    )
    assert prompt_tokens(whole) == prompt_tokens(final)


@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("tools", [[], [WEATHER]])
def test_counted_tokens_are_those_of_the_prompt(
    real: anthropic.Anthropic, model: str, tools: list[Any]
) -> None:
    prompt = {key: PARIS[key] for key in ("system", "messages")}
    counted = real.messages.count_tokens(model=model, tools=tools, **prompt).input_tokens
    uncached = real.messages.create(
        model=model, max_tokens=1, tools=tools, extra_body={"cache_prompt": False}, **prompt
    )
    assert counted == uncached.usage.input_tokens
    again = real.messages.create(model=model, max_tokens=1, tools=tools, **prompt)
    assert counted == prompt_tokens(again)


def test_what_is_cached_is_told(real: anthropic.Anthropic) -> None:
    prompt = {**PARIS, "system": "You are a helpful assistant. " * 20}
    real.messages.create(model="tiny-gguf", max_tokens=1, **prompt)
    with real.messages.stream(model="tiny-gguf", max_tokens=1, **prompt) as stream:
        usage = stream.get_final_message().usage
    assert (usage.cache_read_input_tokens or 0) > usage.input_tokens > 0


def test_a_stop_sequence_of_a_real_model_is_named(real: anthropic.Anthropic) -> None:
    message = real.messages.create(model="demo", max_tokens=40, stop_sequences=["Paris"], **PARIS)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Paris")
    assert "Paris" not in text_of(message)


@pytest.mark.parametrize("model", REAL)
def test_text_survives_its_tokens(real_server: Server, model: str) -> None:
    text = "Hello world, how\nare you?"
    body = {"model": model, "content": text}
    told = real_server.http.post("/tokenize", json=body).json()
    assert told["count"] == len(told["tokens"]) > 3
    assert told["max_model_len"] == real_server.model(model)["context_length"]
    body = {"model": model, "tokens": told["tokens"]}
    back = real_server.http.post("/detokenize", json=body).json()
    assert back["prompt"] == text


@pytest.mark.parametrize("model", REAL)
def test_a_rendered_chat_can_be_read(real_server: Server, model: str) -> None:
    told = real_server.http.post("/tokenize", json={"model": model, "messages": HI}).json()
    body = {"model": model, "tokens": told["tokens"]}
    back = real_server.http.post("/detokenize", json=body).json()["content"]
    assert "<|im_start|>user\nHi<|im_end|>" in back


# --- tools and thinking -----------------------------------------------------------


def test_an_agent_thinks_and_calls(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="agent", max_tokens=50, messages=HI, tools=[WEATHER])
    thinking, text, paris, rome = message.content
    assert thinking.type == "thinking"
    assert (thinking.thinking, bool(thinking.signature)) == ("Where is it?", True)
    assert text.type == "text"
    assert text.text == "I look."
    assert paris.type == rome.type == "tool_use"
    assert (paris.name, paris.input) == ("get_weather", {"city": "Paris", "days": 2})
    assert rome.input == {"city": "Rome"}
    assert paris.id != rome.id
    assert message.stop_reason == "tool_use"
    details = message.usage.output_tokens_details
    assert details is not None
    assert 0 < details.thinking_tokens < message.usage.output_tokens


def test_a_stream_adds_up_to_the_whole(client: anthropic.Anthropic) -> None:
    options: Any = {"model": "agent", "max_tokens": 50, "messages": HI, "tools": [WEATHER]}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.type for block in final.content] == [block.type for block in whole.content]
    for streamed, complete in zip(final.content, whole.content, strict=True):
        ids = {"id": None, "parsed_output": None}
        assert {**streamed.to_dict(), **ids} == {**complete.to_dict(), **ids}
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert {"thinking", "signature", "text", "input_json"} <= set(kinds)


def test_results_of_tools_go_back(client: anthropic.Anthropic) -> None:
    options: Any = {"model": "agent", "max_tokens": 50, "tools": [WEATHER]}
    called = client.messages.create(messages=HI, **options)
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
        for block in called.content
        if block.type == "tool_use"
    ]
    history: list[Any] = [
        *HI,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": results},
    ]
    answered = client.messages.create(messages=history, **options)
    assert answered.content
    counted = client.messages.count_tokens(model="agent", messages=history, tools=[WEATHER])
    assert counted.input_tokens == prompt_tokens(answered) > prompt_tokens(called)


@pytest.mark.parametrize("choice", [{"type": "none"}, {"type": "auto"}])
def test_one_call_or_none(client: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    parallel = {"disable_parallel_tool_use": True} if choice["type"] == "auto" else {}
    tool_choice: Any = {**choice, **parallel}
    message = client.messages.create(
        model="agent", max_tokens=50, messages=HI, tools=[WEATHER], tool_choice=tool_choice
    )
    calls = [block for block in message.content if block.type == "tool_use"]
    assert len(calls) == (1 if parallel else 0)
    assert message.stop_reason == ("tool_use" if parallel else "end_turn")


class Trip(pydantic.BaseModel):
    city: str
    days: int


def test_the_parse_helper_gets_its_model(client: anthropic.Anthropic) -> None:
    message = client.messages.parse(model="clerk", max_tokens=50, messages=HI, output_format=Trip)
    assert message.parsed_output == Trip(city="Paris", days=2)


# --- how answers end --------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("options", "text", "reason", "sequence"),
    [
        ({}, "one two three four", "end_turn", None),
        ({"max_tokens": 2}, "one two", "max_tokens", None),
        ({"stop_sequences": ["x", " th"]}, "one two", "stop_sequence", " th"),
    ],
)
def test_stop_reasons(
    client: anthropic.Anthropic,
    streaming: bool,
    options: dict[str, Any],
    text: str,
    reason: str,
    sequence: str | None,
) -> None:
    request: Any = {"model": "talker", "max_tokens": 50, "messages": HI, **options}
    if streaming:
        with client.messages.stream(**request) as stream:
            message: anthropic.types.Message = stream.get_final_message()
    else:
        message = client.messages.create(**request)
    assert (text_of(message), message.stop_reason) == (text, reason)
    assert message.stop_sequence == sequence


# --- errors -----------------------------------------------------------------------


def test_a_request_at_fault(client: anthropic.Anthropic) -> None:
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    messages: Any = [{"role": "user", "content": [image]}]
    with pytest.raises(anthropic.BadRequestError, match="'image'") as caught:
        client.messages.create(model="talker", max_tokens=5, messages=messages)
    error = caught.value
    assert (error.type, error.error_code) == ("invalid_request_error", "unsupported_parameter")
    assert error.request_id == error.response.headers["x-request-id"]


def test_a_prompt_that_is_too_long(client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "x" * 5000}]
    with pytest.raises(anthropic.BadRequestError, match="maximum context length is 4096") as caught:
        client.messages.create(model="talker", max_tokens=5, messages=messages)
    assert caught.value.error_code == "context_length_exceeded"
    # What does not fit can still be counted.
    assert client.messages.count_tokens(model="talker", messages=messages).input_tokens > 5000


def test_an_unknown_model(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="nobody", max_tokens=5, messages=HI)
    assert caught.value.error_code == "model_not_found"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="nobody", messages=HI)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_key(scripted: Server, streaming: bool) -> None:
    with (
        client_of(scripted, api_key="wrong") as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(model="talker", max_tokens=5, messages=HI, stream=streaming)


def test_a_token_is_a_key_as_well(scripted: Server) -> None:
    with client_of(scripted, api_key=None, auth_token="secret") as client:
        assert client.messages.create(model="talker", max_tokens=5, messages=HI).content


def test_a_full_queue(client: anthropic.Anthropic) -> None:
    request: Any = {"model": "slow", "max_tokens": 1000, "messages": HI}
    with client.messages.stream(**request) as first, client.messages.stream(**request) as second:
        for stream in (first, second):
            assert next(iter(stream.text_stream))
        with pytest.raises(anthropic.RateLimitError) as caught:
            client.messages.create(**request)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        # An inquiry needs no place in it.
        assert client.messages.count_tokens(model="slow", messages=HI).input_tokens == 9


def test_a_stream_that_is_closed_frees_its_slot(
    scripted: Server, client: anthropic.Anthropic
) -> None:
    with client.messages.stream(model="slow", max_tokens=1000, messages=HI) as stream:
        assert next(iter(stream.text_stream))
    for _ in polls():
        if scripted.model("slow")["in_flight"] == 0:
            return
    raise AssertionError("it goes on for nobody")


def test_a_crash_in_the_stream_is_an_error(scripted: Server, client: anthropic.Anthropic) -> None:
    with client.messages.stream(
        model="slow", max_tokens=1000, messages=HI, extra_headers={"X-Resume": "never"}
    ) as stream:
        texts = iter(stream.text_stream)
        next(texts)
        scripted.kill_worker("slow")
        with pytest.raises(anthropic.APIStatusError) as caught:
            for _ in texts:
                pass
    assert (caught.value.type, caught.value.error_code) == ("api_error", "model_crashed")
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["incident_id"]
    scripted.await_state("slow", "routable", generation=2)


# --- inquiries over the death of a worker ------------------------------------------


def test_an_inquiry_outlives_its_worker(scripted: Server) -> None:
    key = {"x-api-key": "secret"}
    generation = scripted.model("talker")["generation"]
    pid = scripted.kill_worker("talker", signal.SIGSTOP)
    url = httpx.URL(scripted.url)
    connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
    with contextlib.closing(connection):
        body = json.dumps({"model": "talker", "messages": HI})
        headers = {**key, "content-type": "application/json"}
        connection.request("POST", "/v1/messages/count_tokens", body, headers)
        # A later one, which does not wait as long, ends while that one is in hand.
        impatient = scripted.http.post(
            "/tokenize",
            json={"model": "talker", "prompt": "x"},
            headers={**key, "X-Request-Timeout": "0.5"},
        )
        assert (impatient.status_code, impatient.json()["error"]["code"]) == (
            408,
            "request_timeout",
        )
        os.kill(pid, signal.SIGKILL)
        told = connection.getresponse()
        assert (told.status, json.load(told)) == (200, {"input_tokens": 9})
    assert scripted.model("talker")["generation"] == generation + 1


# --- structured output and forced calls, enforced on real models --------------------


class Person(pydantic.BaseModel):
    first: Literal["Ann", "Bob"]
    old: bool


@pytest.mark.parametrize("model", REAL)
def test_the_parse_helper_gets_its_type_of_a_real_model(
    real: anthropic.Anthropic, model: str
) -> None:
    hot = {"temperature": 1.0, "seed": 3}
    message = real.messages.parse(
        model=model, max_tokens=100, messages=HI, output_format=Person, extra_body=hot
    )
    assert isinstance(message.parsed_output, Person)


@pytest.mark.parametrize("model", REAL)
def test_a_call_can_be_forced(real: anthropic.Anthropic, model: str) -> None:
    # Nothing that a random model could go on with for ever.
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tool: Any = {"name": "ping", "input_schema": schema}
    message = real.messages.create(
        model=model,
        max_tokens=200,
        messages=HI,
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    assert message.stop_reason == "tool_use"
    [call] = message.content
    assert call.type == "tool_use"
    assert call.name == "ping"
