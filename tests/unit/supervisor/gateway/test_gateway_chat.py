"""``/v1/chat/completions``: what is accepted, refused and answered, whole and streamed."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from protocol.chat import ChatMessage
from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason, Sampling
from supervisor.gateway.openai.answers import ChatChunks
from supervisor.gateway.streaming import encode_json
from supervisor.metrics import Metrics
from supervisor.stream import Prefill
from tests.support.asgi import Exchange, MakeApp, events
from tests.support.fake_fleet import FakeFleet

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def named_choice(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


def body(**more: object) -> dict[str, object]:
    return {"model": "m", "messages": [USER], **more}


async def error_of(client: httpx.AsyncClient, request: object) -> tuple[int, Any, Any]:
    answer = await client.post(CHAT, json=request)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


# --- requests ---


async def test_defaults(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    await client.post(CHAT, json=body())
    [submitted] = fleet.requests
    assert submitted.model == "m"
    assert not submitted.streaming
    assert submitted.request.messages == [ChatMessage("user", "Hi")]
    assert submitted.request.sampling == Sampling()
    assert submitted.request.max_tokens is None
    assert submitted.request.stop == []
    assert not submitted.request.ignore_eos


async def test_every_honoured_field_reaches_the_worker(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    request = body(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-2,
        frequency_penalty=2,
        seed=-(2**63),
        logit_bias={"50256": -100, "1": 2.5},
        stop=["a", "b"],
        max_tokens=5,
        ignore_eos=True,
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        some_local_extension=[1],
    )
    assert (await client.post(CHAT, json=request)).status_code == 200
    generate = fleet.requests[0].request
    assert generate.sampling == Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-2,
        frequency_penalty=2,
        seed=-(2**63),
        logit_bias={50256: -100, 1: 2.5},
    )
    assert generate.stop == ["a", "b"]
    assert generate.max_tokens == 5
    assert generate.ignore_eos


async def test_max_completion_tokens_wins(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    await client.post(CHAT, json=body(max_tokens=5, max_completion_tokens=9, top_k=-1, stop="x"))
    generate = fleet.requests[0].request
    assert generate.max_tokens == 9
    assert generate.sampling.top_k == 0
    assert generate.stop == ["x"]


async def test_messages(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None, "audio": None},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
        {"role": "user", "content": "", "name": "Ann"},
    ]
    assert (await client.post(CHAT, json=body(messages=messages))).status_code == 200
    assert fleet.requests[0].request.messages == [
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "a\nb"),
        ChatMessage("assistant", "c"),
        ChatMessage("tool", "d", tool_call_id="1"),
        ChatMessage("user", "", "Ann"),
    ]


HARMLESS = {
    "n": 1,
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "logprobs": False,
    "top_logprobs": 0,
    "modalities": ["text"],
    "reasoning_effort": "none",
    "verbosity": "medium",
    "parallel_tool_calls": True,
}


async def test_values_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient) -> None:
    assert (await client.post(CHAT, json=body(**HARMLESS))).status_code == 200
    nothing = dict.fromkeys([*HARMLESS, "stop", "seed", "stream", "max_tokens", "temperature"])
    assert (await client.post(CHAT, json=body(**nothing))).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}),
        ("verbosity", "low"),
        ("web_search_options", {}),
    ],
)
async def test_documented_fields_that_cannot_be_honoured_are_refused_by_name(
    client: httpx.AsyncClient, fleet: FakeFleet, name: str, value: object
) -> None:
    refusal = await error_of(client, body(**{name: value}))
    assert refusal == (400, "unsupported_parameter", name)
    assert fleet.requests == []


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ({"content": "x"}, "missing_required_parameter", "role"),
        ({"role": "user"}, "missing_required_parameter", "content"),
        ({"role": "assistant", "content": None}, "missing_required_parameter", "content"),
        ({"role": 3, "content": "x"}, "invalid_type", "role"),
        ({"role": "wizard", "content": "x"}, "invalid_value", "role"),
        ({"role": "user", "content": 3}, "invalid_type", "content"),
        ({"role": "user", "content": []}, "invalid_value", "content"),
        ({"role": "user", "content": [3]}, "invalid_type", "content[0]"),
        ({"role": "user", "content": [{}]}, "missing_required_parameter", "content[0].type"),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "missing_required_parameter",
            "content[0].text",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "unsupported_parameter",
            "content[0]",
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            "missing_required_parameter",
            "tool_calls[0].function",
        ),
        (
            {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]},
            "invalid_value",
            "tool_calls",
        ),
        ({"role": "tool", "content": "x"}, "missing_required_parameter", "tool_call_id"),
        (
            {"role": "assistant", "content": "", "function_call": {}},
            "unsupported_parameter",
            "function_call",
        ),
        ({"role": "user", "content": "x", "name": 1}, "invalid_type", "name"),
    ],
)
async def test_bad_messages_are_named(
    client: httpx.AsyncClient, message: object, code: str, param: str
) -> None:
    refusal = await error_of(client, body(messages=[USER, message]))
    assert refusal == (400, code, f"messages[1].{param}")


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": None}, "invalid_type", "messages"),
        ({"messages": "Hi"}, "invalid_type", "messages"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_p": 1.1}, "invalid_value", "top_p"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"top_k": 1.5}, "invalid_type", "top_k"),
        ({"min_p": -1}, "invalid_value", "min_p"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"seed": "1"}, "invalid_type", "seed"),
        ({"logit_bias": {"x": 1}}, "invalid_type", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
        ({"logit_bias": []}, "invalid_type", "logit_bias"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": ["a", ""]}, "invalid_value", "stop"),
        ({"stop": list("abcde")}, "invalid_value", "stop"),
        ({"stop": [1]}, "invalid_type", "stop[0]"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": -5}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": -5}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": 10**30}, "invalid_value", "max_tokens"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 17}, "invalid_value", "n"),
        ({"tools": {"a": 1}}, "invalid_type", "tools"),
        ({"tools": [{"type": "mcp"}]}, "invalid_value", "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "invalid_value",
            "tools[0].function.name",
        ),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": named_choice("other")}, "invalid_value", "tool_choice"),
        (
            {"tool_choice": {"type": "function"}},
            "missing_required_parameter",
            "tool_choice.function",
        ),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "missing_required_parameter",
            "response_format.json_schema.schema",
        ),
        ({"logprobs": 3}, "invalid_type", "logprobs"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"chat_template_kwargs": {"messages": []}}, "invalid_value", "chat_template_kwargs"),
        ({"model": None}, "invalid_type", "model"),
    ],
)
async def test_bad_values_are_named(
    client: httpx.AsyncClient, more: dict[str, object], code: str, param: str
) -> None:
    assert await error_of(client, body(**more)) == (400, code, param)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "1", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("logit_bias", "stop", "max_tokens", "n", "tools", "response_format"),
        *("stream_options", "logprobs", "echo", "suffix", "tool_choice", "top_logprobs"),
        *("chat_template_kwargs", "reasoning_effort", "cache_prompt", "best_of"),
    ]
)


@given(fields=st.dictionaries(FIELDS, JSON, max_size=5))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_json_is_a_server_error(
    client: httpx.AsyncClient, fields: dict[str, object]
) -> None:
    for path, valid in ((CHAT, body()), ("/v1/completions", {"model": "m", "prompt": "x"})):
        answer = await client.post(path, json={**valid, **fields})
        assert answer.status_code in (200, 400, 404)


# --- whole answers ---


async def test_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=body())
    assert answer.headers["content-type"] == "application/json"
    value = answer.json()
    assert value.pop("id").startswith("chatcmpl-")
    assert isinstance(value.pop("created"), int)
    assert value.pop("timings")["predicted_n"] == 3
    assert value == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        "system_fingerprint": "simulated-1.0",
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ErrorCode.MODEL_NOT_READY, 409),
        (ErrorCode.MODEL_UNSTABLE, 409),
        (ErrorCode.RATE_LIMIT_EXCEEDED, 429),
    ],
)
async def test_refused_at_the_door(
    client: httpx.AsyncClient,
    fleet: FakeFleet,
    metrics: Metrics,
    code: ErrorCode,
    status: int,
    stream: bool,
) -> None:
    fleet.refusal = CodedError(code, "not now", retry_after_s=0.2)
    answer = await client.post(CHAT, json=body(stream=stream))
    assert answer.status_code == status
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == code.value
    labels = {"model": "m", "endpoint": CHAT, "code": code.value}
    assert metrics.value("opta_lmx_requests_total", labels) == 1


async def test_unknown_model_has_no_label(client: httpx.AsyncClient, metrics: Metrics) -> None:
    answer = await client.post(CHAT, json=body(model="someone/else"))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    labels = {"model": "", "endpoint": CHAT, "code": "model_not_found"}
    assert metrics.value("opta_lmx_requests_total", labels) == 1
    assert b"someone" not in metrics.render()


async def test_refused_by_the_worker(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    for number, stream in enumerate((False, True)):
        exchange = Exchange(app, "POST", CHAT, json=body(stream=stream))
        submitted = await fleet.request(number)
        submitted.stream.fail(
            CodedError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long", param="messages")
        )
        await exchange.finish()
        assert exchange.status == 400
        assert exchange.headers["content-type"] == "application/json"
        assert exchange.json["error"] == {
            "message": "too long",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }


async def test_a_cancellation_is_never_a_finish_reason(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    for number, stream in enumerate((False, True)):
        exchange = Exchange(app, "POST", CHAT, json=body(stream=stream))
        submitted = await fleet.request(number)
        submitted.accept()
        submitted.say("Hi", FinishReason.CANCELLED)
        await exchange.finish()
        assert b"cancelled" not in exchange.body.replace(b"the server cancelled", b"")
        if stream:
            *_, text, last = events(exchange.body)
            assert text["choices"][0]["delta"] == {"content": "Hi"}
            assert last["error"]["code"] == "internal_error"
        else:
            assert exchange.status == 500


# --- streams ---


async def test_stream(client: httpx.AsyncClient, metrics: Metrics) -> None:
    answer = await client.post(CHAT, json=body(stream=True))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert len(answer.headers["x-request-id"]) == 32
    *chunks, done = events(answer.content)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["model"] == "m"
        assert chunk["system_fingerprint"] == "simulated-1.0"
        assert isinstance(chunk["created"], int)
        assert "usage" not in chunk
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hello"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    labels = {"model": "m"}
    assert metrics.value("opta_lmx_prompt_tokens_total", labels) == 5
    assert metrics.value("opta_lmx_completion_tokens_total", labels) == 3
    assert metrics.value("opta_lmx_time_to_first_token_seconds_count", labels) == 1
    labels = {"model": "m", "endpoint": CHAT, "code": "ok"}
    assert metrics.value("opta_lmx_requests_total", labels) == 1


async def test_stream_with_usage(client: httpx.AsyncClient) -> None:
    request = body(stream=True, stream_options={"include_usage": True})
    answer = await client.post(CHAT, json=request)
    *chunks, last, done = events(answer.content)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert done == "[DONE]"


async def test_a_token_is_one_event_and_what_a_client_is_behind_is_another(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    exchange = Exchange(app, "POST", CHAT, json=body(stream=True))
    submitted = await fleet.request()
    assert exchange.messages == []
    submitted.accept()
    await exchange.wait_for_messages(2)
    submitted.say("a")
    await exchange.wait_for_messages(3)
    submitted.say("b")
    assert len(exchange.messages) == 4, "written at once"
    exchange.behind = True
    submitted.say("c")
    submitted.say("d")
    assert len(exchange.messages) == 4
    exchange.behind = False
    submitted.say("e")
    await exchange.wait_for_messages(5)
    submitted.say("f")
    submitted.say("g", FinishReason.LENGTH)
    await exchange.finish()
    texts = [
        [event["choices"][0]["delta"].get("content") for event in events(part) if event != "[DONE]"]
        for part in exchange.bodies
    ]
    assert texts == [[""], ["a"], ["b"], ["cde"], ["f"], ["g", None]]


async def test_an_error_after_the_first_byte_ends_the_stream(
    app: ASGIApp, fleet: FakeFleet, metrics: Metrics
) -> None:
    fleet.script = None
    exchange = Exchange(app, "POST", CHAT, json=body(stream=True))
    submitted = await fleet.request()
    submitted.accept()
    submitted.say("Hel")
    submitted.fail(ErrorCode.MODEL_CRASHED)
    await exchange.finish()
    assert exchange.status == 200
    assert exchange.ended
    _, text, last = events(exchange.body)
    assert text["choices"][0]["delta"] == {"content": "Hel"}
    assert last == {
        "error": {
            "message": "it broke",
            "type": "server_error",
            "param": None,
            "code": "model_crashed",
        }
    }
    labels = {"model": "m", "endpoint": CHAT, "code": "model_crashed"}
    assert metrics.value("opta_lmx_requests_total", labels) == 1


async def test_a_slow_reader_loses_its_own_request(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script, fleet.max_buffer_bytes = None, 10
    exchange = Exchange(app, "POST", CHAT, json=body(stream=True))
    submitted = await fleet.request()
    submitted.accept()
    submitted.say("x" * 11)
    await exchange.finish()
    assert events(exchange.body)[-1]["error"]["code"] == "stream_overflow"
    assert submitted.cancelled


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", ["nothing", "accepted", "text"])
async def test_disconnect_cancels_at_once(
    app: ASGIApp, fleet: FakeFleet, metrics: Metrics, stream: bool, said: str
) -> None:
    fleet.script = None
    exchange = Exchange(app, "POST", CHAT, json=body(stream=stream))
    submitted = await fleet.request()
    if said != "nothing":
        submitted.accept()
    if said == "text":
        submitted.say("Hel")
    if stream and said != "nothing":
        await exchange.wait_for_messages(3 if said == "text" else 2)
    exchange.disconnect()
    await exchange.finish()
    assert submitted.cancelled
    assert b'finish_reason":"' not in exchange.body
    labels = {"model": "m", "endpoint": CHAT, "code": "client_disconnected"}
    assert metrics.value("opta_lmx_requests_total", labels) == 1


async def test_a_finished_request_is_not_cancelled(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    for stream in (False, True):
        await client.post(CHAT, json=body(stream=stream))
    assert not any(submitted.cancelled for submitted in fleet.requests)


async def test_keep_alive_while_nothing_arrives(make_app: MakeApp, fleet: FakeFleet) -> None:
    fleet.script = None
    app = make_app(sse_keepalive_s=0.01)
    exchange = Exchange(app, "POST", CHAT, json=body(stream=True))
    submitted = await fleet.request()
    submitted.accept()
    await exchange.wait_for_messages(4)
    submitted.say("a", FinishReason.STOP)
    await exchange.finish()
    assert exchange.bodies[1:3] == [b": keep-alive\n\n"] * 2
    assert events(exchange.body)[-1] == "[DONE]"


async def test_the_comment_says_how_far_the_prompt_is(make_app: MakeApp, fleet: FakeFleet) -> None:
    fleet.script = None
    exchange = Exchange(
        make_app(sse_keepalive_s=0.01), "POST", CHAT, json=body(stream=True, n=2, max_tokens=5)
    )
    first, second = await fleet.request(0), await fleet.request(1)
    for each in (first, second):
        each.accept()
    first.stream.prefill = Prefill(1024, 4096)
    await exchange.wait_for_messages(3)
    assert exchange.bodies[-1] == b": prefill 1024/4096\n\n"
    second.stream.prefill = Prefill(10, 4096)
    told = len(exchange.messages)
    await exchange.wait_for_messages(told + 2)
    assert exchange.bodies[-1] == b": prefill 1034/8192\n\n"
    for each in (first, second):
        each.start()
    await exchange.wait_for_messages(len(exchange.messages) + 2)
    assert exchange.bodies[-1] == b": keep-alive\n\n"
    for each in (first, second):
        each.finish()
    await exchange.finish()
    assert events(exchange.body)[-1] == "[DONE]"


@given(st.text())
def test_any_text_survives_the_wire(text: str) -> None:
    """Also for clients that split lines by Unicode's rules, as ``str.splitlines`` does."""
    chunk = ChatChunks("m", None, include_usage=False).piece(0, text, None)
    line, blank = chunk.decode().splitlines()
    assert blank == ""
    [event] = events(chunk)
    assert event["choices"][0]["delta"]["content"] == text
    assert line.startswith("data: ")


@pytest.mark.parametrize(
    "text", ["\n", "\r", "\r\n", "\n\n", "\u2028", "\u2029", "\x85", "\x1c", "\0", "é\u2028é"]
)
def test_line_ends_are_escaped(text: str) -> None:
    assert encode_json(text).decode().splitlines() == [encode_json(text).decode()]
