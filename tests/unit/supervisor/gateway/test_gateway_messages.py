"""``/v1/messages`` and ``/v1/messages/count_tokens``: requests, whole answers, errors."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from protocol.chat import (
    ChatMessage,
    Constraint,
    ConstraintKind,
    Extras,
    Tool,
    ToolCall,
    ToolCallPiece,
    ToolChoice,
)
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Delta, FinishReason, Generate, Sampling, Tokenize
from supervisor.gateway.scheduling import client_of
from tests.support.asgi import Exchange, MakeApp
from tests.support.fake_fleet import FakeFleet

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}


def body(**more: object) -> dict[str, object]:
    return {"model": "m", "max_tokens": 10, "messages": HI, **more}


async def asked(client: httpx.AsyncClient, fleet: FakeFleet, **more: object) -> Generate:
    answer = await client.post(PATH, json=body(**more))
    assert answer.status_code == 200, answer.text
    return fleet.requests[-1].request


# --- requests ---


async def test_a_plain_request(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    request = await asked(client, fleet)
    assert request == Generate(
        0, messages=[ChatMessage("user", "Hi")], max_tokens=10, client=request.client
    )


async def test_parameters(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    request = await asked(
        client,
        fleet,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.1,
        seed=7,
        stop_sequences=["a", "b", "c", "d", "e"],
        cache_prompt=False,
        service_tier="auto",
        cache_control={"type": "ephemeral"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        mcp_servers=[],
    )
    assert request.sampling == Sampling(
        temperature=0.5, top_p=0.9, top_k=0, min_p=0.1, repetition_penalty=1.1, seed=7
    )
    assert request.stop == ["a", "b", "c", "d", "e"]
    assert not request.cache_prompt
    assert (await asked(client, fleet, top_k=5)).sampling.top_k == 5


@pytest.mark.parametrize(
    ("system", "messages"),
    [
        ("Be brief.", [ChatMessage("system", "Be brief.")]),
        (
            [
                {"type": "text", "text": "Be"},
                {"type": "text", "text": "brief.", "cache_control": {"type": "ephemeral"}},
            ],
            [ChatMessage("system", "Be\nbrief.")],
        ),
        ("", []),
        ([], []),
        (None, []),
    ],
)
async def test_system(
    client: httpx.AsyncClient, fleet: FakeFleet, system: object, messages: list[ChatMessage]
) -> None:
    request = await asked(client, fleet, system=system)
    assert request.messages == [*messages, ChatMessage("user", "Hi")]


async def test_a_history_with_thinking_and_tools(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    history = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Let me see.", "signature": "x"},
                {"type": "redacted_thinking", "data": "zzz"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "b", "name": "time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "rain"},
                {
                    "type": "tool_result",
                    "tool_use_id": "b",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "clock"}],
                },
                {"type": "tool_result", "tool_use_id": "c"},
                {"type": "text", "text": "And"},
                {"type": "text", "text": "now?"},
            ],
        },
    ]
    request = await asked(client, fleet, messages=history)
    calls = [ToolCall("a", "weather", '{"city":"Paris"}'), ToolCall("b", "time", "{}")]
    assert request.messages == [
        ChatMessage("user", "Hi"),
        ChatMessage("assistant", "I look.", tool_calls=calls, reasoning="Let me see."),
        ChatMessage("tool", "rain", "weather", tool_call_id="a"),
        ChatMessage("tool", "Error: no\nclock", "time", tool_call_id="b"),
        ChatMessage("tool", "", tool_call_id="c"),
        ChatMessage("user", "And\nnow?"),
    ]


async def test_turns_of_the_same_role_are_one(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    history = [
        {"role": "system", "content": [{"type": "text", "text": "Two."}]},
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": ""}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    request = await asked(client, fleet, system="One.", messages=history)
    assert request.messages == [
        ChatMessage("system", "One.\nTwo."),
        ChatMessage("user", "a\nb"),
        ChatMessage("assistant", "c"),
        ChatMessage("user", "d"),
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (ToolChoice.AUTO, None, True)),
        ({"type": "auto"}, (ToolChoice.AUTO, None, True)),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            (ToolChoice.AUTO, None, False),
        ),
        ({"type": "any"}, (ToolChoice.REQUIRED, None, True)),
        ({"type": "none"}, (ToolChoice.NONE, None, True)),
        (
            {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
            (ToolChoice.NAMED, "weather", False),
        ),
    ],
)
async def test_tools(
    client: httpx.AsyncClient, fleet: FakeFleet, choice: object, expected: tuple[object, ...]
) -> None:
    strict = {
        "type": "custom",
        "name": "b",
        "input_schema": {},
        "strict": True,
        "allowed_callers": ["direct"],
        "eager_input_streaming": True,
    }
    request = await asked(client, fleet, tools=[TOOL, strict], tool_choice=choice)
    assert request.tools == [
        Tool("weather", "Tells it.", SCHEMA),
        Tool("b", None, {}, strict=True),
    ]
    assert (request.tool_choice, request.named_tool, request.parallel_tool_calls) == expected


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2048}},
            {"enable_thinking": True, "thinking_budget": 2048},
        ),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"output_config": {"effort": "high"}}, {"reasoning_effort": "high"}),
        (
            {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True}},
            {"enable_thinking": True},
        ),
    ],
)
async def test_thinking(
    client: httpx.AsyncClient,
    fleet: FakeFleet,
    fields: dict[str, object],
    options: dict[str, object],
) -> None:
    assert (await asked(client, fleet, **fields)).template_options == options


@pytest.mark.parametrize("field", ["output_config", "output_format"])
async def test_an_output_format_is_a_constraint(
    client: httpx.AsyncClient, fleet: FakeFleet, field: str
) -> None:
    format: dict[str, object] = {"type": "json_schema", "schema": {"type": "null"}}
    value = format if field == "output_format" else {"format": format}
    request = await asked(client, fleet, **{field: value})
    assert request.constraint == Constraint(ConstraintKind.SCHEMA, '{"type":"null"}')


async def test_metadata_names_the_client(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    from starlette.requests import Request

    request = await asked(client, fleet, metadata={"user_id": "me", "other": 1})
    scope: dict[str, Any] = {"type": "http", "headers": [], "client": None}
    assert request.client == client_of(Request(scope), api_key=None, claims=("me",))


async def test_the_key_is_taken_as_the_clients_send_it(make_app: MakeApp) -> None:
    app = make_app(api_key="secret")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        headers = {"x-api-key": "secret", "anthropic-version": "2023-06-01"}
        assert (await client.post(PATH, json=body(), headers=headers)).status_code == 200
        refused = await client.post(PATH, json=body(), headers={"x-api-key": "wrong"})
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error"


# --- what is refused ---


def user(*blocks: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def answer_of(*blocks: object) -> dict[str, object]:
    return {"messages": [{"role": "assistant", "content": list(blocks)}, *HI]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"max_tokens": None}, "invalid_type", "max_tokens"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"max_tokens": 0}, "unsupported_parameter", "max_tokens"),
        ({"temperature": 1.5}, "invalid_value", "temperature"),
        ({"top_p": 2}, "invalid_value", "top_p"),
        ({"stop_sequences": [""]}, "invalid_value", "stop_sequences"),
        ({"stop_sequences": ["x"] * 65}, "invalid_value", "stop_sequences"),
        ({"stop_sequences": "x"}, "invalid_type", "stop_sequences"),
        ({"container": "c"}, "unsupported_parameter", "container"),
        ({"diagnostics": {"previous_message_id": "m"}}, "unsupported_parameter", "diagnostics"),
        ({"inference_geo": "eu"}, "unsupported_parameter", "inference_geo"),
        ({"mcp_servers": [{"name": "x"}]}, "unsupported_parameter", "mcp_servers"),
        ({"speed": "fast"}, "unsupported_parameter", "speed"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "unsupported_parameter",
            "context_management",
        ),
        (
            {"output_config": {"task_budget": {"total": 1}}},
            "unsupported_parameter",
            "output_config.task_budget",
        ),
        (
            {"output_config": {"format": {"type": "grammar", "schema": {}}}},
            "invalid_value",
            "output_config.format.type",
        ),
        ({"thinking": {"type": "between_tools"}}, "unsupported_parameter", "thinking.type"),
        ({"thinking": {"type": "enabled"}}, "missing_required_parameter", "thinking.budget_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "invalid_value", "chat_template_kwargs"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "invalid_value", "messages[0].content"),
        ({"messages": [*HI, *answer_of()["messages"][:1]]}, "unsupported_parameter", "messages[1]"),  # type: ignore[index]
        (user(IMAGE), "unsupported_parameter", "messages[0].content[0]"),
        (user({"type": "document"}), "unsupported_parameter", "messages[0].content[0]"),
        (
            user({"type": "web_search_tool_result", "content": {"error_code": "x"}}),
            "unsupported_parameter",
            "messages[0].content[0]",
        ),
        (user({"type": "tool_use", "id": "a"}), "unsupported_parameter", "messages[0].content[0]"),
        (user({"type": "text"}), "missing_required_parameter", "messages[0].content[0].text"),
        (
            user({"type": "tool_result", "content": "x"}),
            "missing_required_parameter",
            "messages[0].content[0].tool_use_id",
        ),
        (
            user({"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}),
            "unsupported_parameter",
            "messages[0].content[0].content[0]",
        ),
        (
            user({"type": "tool_result", "tool_use_id": "a", "content": {}}),
            "invalid_value",
            "messages[0].content[0].content",
        ),
        (
            answer_of({"type": "tool_use", "name": "x", "input": {}}),
            "missing_required_parameter",
            "messages[0].content[0].id",
        ),
        (
            answer_of({"type": "server_tool_use", "id": "a", "name": "x", "input": {}}),
            "unsupported_parameter",
            "messages[0].content[0]",
        ),
        (
            answer_of({"type": "thinking"}),
            "missing_required_parameter",
            "messages[0].content[0].thinking",
        ),
        ({"system": [IMAGE]}, "unsupported_parameter", "system[0]"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]},
            "unsupported_parameter",
            "tools[0]",
        ),
        ({"tools": [{"type": "computer_toolset_20260801"}]}, "unsupported_parameter", "tools[0]"),
        ({"tools": [{"name": "x"}]}, "missing_required_parameter", "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "missing_required_parameter", "tools[0].name"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "invalid_value", "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
        (
            {"tools": [{**TOOL, "defer_loading": True}]},
            "unsupported_parameter",
            "tools[0].defer_loading",
        ),
        (
            {"tools": [{**TOOL, "input_examples": [{}]}]},
            "unsupported_parameter",
            "tools[0].input_examples",
        ),
        ({"tool_choice": {"type": "any"}}, "invalid_value", "tool_choice"),
        (
            {"tool_choice": {"type": "tool"}, "tools": [TOOL]},
            "missing_required_parameter",
            "tool_choice.name",
        ),
        (
            {"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]},
            "invalid_value",
            "tool_choice.name",
        ),
        ({"tool_choice": {"type": "required"}}, "invalid_value", "tool_choice.type"),
    ],
)
async def test_a_request_at_fault(
    client: httpx.AsyncClient, fields: dict[str, object], code: str, param: str
) -> None:
    answer = await client.post(PATH, json=body(**fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"


async def test_max_tokens_is_required(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"model": "m", "messages": HI})
    assert answer.json()["error"]["param"] == "max_tokens"


blocks = st.recursive(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image"])},
        optional={
            "text": st.text() | st.none(),
            "thinking": st.text(),
            "id": st.text(max_size=3),
            "name": st.text(max_size=3),
            "input": st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3)),
            "tool_use_id": st.text(max_size=3),
            "is_error": st.booleans(),
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {
            "type": st.just("tool_result"),
            "tool_use_id": st.just("a"),
            "content": st.lists(inner, max_size=2),
        }
    ),
    max_leaves=4,
)
turns = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool"]),
        "content": st.text(max_size=5) | st.lists(blocks, max_size=3) | st.none(),
    }
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "name", "edits"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(turns, max_size=4),
    st.dictionaries(
        st.sampled_from(
            ["system", "tools", "tool_choice", "thinking", "metadata", "stop_sequences"]
        ),
        anything,
        max_size=2,
    ),
)
async def test_no_request_is_a_server_error(
    client: httpx.AsyncClient, messages: list[object], fields: dict[str, object]
) -> None:
    for path in (PATH, COUNT):
        answer = await client.post(path, json=body(messages=messages, **fields))
        assert answer.status_code in (200, 400), answer.text
        assert answer.status_code == 200 or answer.json()["type"] == "error"


# --- whole answers ---


async def test_an_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=body(), headers={"X-Request-ID": "me"})
    assert (answer.headers["request-id"], answer.headers["x-request-id"]) == ("me", "me")
    value = answer.json()
    assert value.pop("id").startswith("msg_")
    assert value == {
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 0,
            "output_tokens": 3,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


async def answer_with(
    app: ASGIApp, fleet: FakeFleet, *deltas: Delta, **more: object
) -> dict[str, Any]:
    fleet.script = None
    call = Exchange(app, "POST", PATH, json=body(**more))
    submitted = await fleet.request()
    submitted.accept(10)
    submitted.start(cached_tokens=4)
    for delta in deltas:
        submitted.stream.push(delta)
    await call.finish()
    value: dict[str, Any] = call.json
    return value


async def test_an_answer_with_everything(app: ASGIApp, fleet: FakeFleet) -> None:
    calls = [
        ToolCallPiece(0, "call_a", "weather", '{"city":'),
        ToolCallPiece(0, arguments='"Paris", "n": 123456789012345678901234567890}'),
        ToolCallPiece(1, "call_b", "time"),
    ]
    value = await answer_with(
        app,
        fleet,
        Delta(0, "", [1, 1], None, Extras(reasoning="Hm.", reasoning_tokens=2)),
        Delta(0, "Sure", [1]),
        Delta(0, "", [1], FinishReason.TOOL_CALLS, Extras(tool_calls=calls)),
        tools=[TOOL],
    )
    assert value["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": "opta-lmx"},
        {"type": "text", "text": "Sure"},
        {
            "type": "tool_use",
            "id": "call_a",
            "name": "weather",
            "input": {"city": "Paris", "n": 123456789012345678901234567890},
        },
        {"type": "tool_use", "id": "call_b", "name": "time", "input": {}},
    ]
    assert value["stop_reason"] == "tool_use"
    assert value["usage"] == {
        "input_tokens": 6,
        "cache_read_input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "output_tokens": 4,
        "output_tokens_details": {"thinking_tokens": 2},
    }


@pytest.mark.parametrize(
    ("finish", "stop", "reason", "sequence"),
    [
        (FinishReason.STOP, None, "end_turn", None),
        (FinishReason.LENGTH, None, "max_tokens", None),
        (FinishReason.STOP, "END", "stop_sequence", "END"),
        (FinishReason.TOOL_CALLS, "END", "tool_use", None),
    ],
)
async def test_stop_reasons(
    app: ASGIApp,
    fleet: FakeFleet,
    finish: FinishReason,
    stop: str | None,
    reason: str,
    sequence: str | None,
) -> None:
    value = await answer_with(app, fleet, Delta(0, "", [1], finish, Extras(stop=stop)))
    assert (value["stop_reason"], value["stop_sequence"]) == (reason, sequence)
    assert value["content"] == []


async def test_thinking_may_be_left_out(app: ASGIApp, fleet: FakeFleet) -> None:
    value = await answer_with(
        app,
        fleet,
        Delta(0, "a", [1], FinishReason.STOP, Extras(reasoning="Hm.")),
        thinking={"type": "adaptive", "display": "omitted"},
    )
    assert value["content"][0] == {"type": "thinking", "thinking": "", "signature": "opta-lmx"}


# --- counting ---


async def test_tokens_are_counted_of_the_same_prompt(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fields: dict[str, Any] = {
        "system": "Be brief.",
        "tools": [TOOL],
        "tool_choice": {"type": "any"},
        "thinking": {"type": "disabled"},
    }
    prompt = {"model": "m", "messages": HI, **fields}
    answer = await client.post(COUNT, json=prompt, headers={"X-Request-ID": "me"})
    assert answer.json() == {"input_tokens": 12}
    assert answer.headers["request-id"] == "me"
    [inquiry] = fleet.inquiries
    assert isinstance(inquiry, Tokenize)
    assert inquiry.count_only
    same = await asked(client, fleet, **fields)
    counted = inquiry.generate
    for name in ("messages", "tools", "tool_choice", "template_options", "client"):
        assert getattr(counted, name) == getattr(same, name)


async def test_a_history_that_ends_with_an_answer_is_counted(client: httpx.AsyncClient) -> None:
    history = [*HI, {"role": "assistant", "content": "Hello"}]
    answer = await client.post(COUNT, json={"model": "m", "messages": history})
    assert answer.json() == {"input_tokens": 8}


# --- errors ---


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize(
    ("code", "status", "type"),
    [
        (ErrorCode.CONTEXT_LENGTH_EXCEEDED, 400, "invalid_request_error"),
        (ErrorCode.INVALID_API_KEY, 401, "authentication_error"),
        (ErrorCode.HOST_NOT_ALLOWED, 403, "permission_error"),
        (ErrorCode.MODEL_NOT_FOUND, 404, "not_found_error"),
        (ErrorCode.REQUEST_TIMEOUT, 408, "timeout_error"),
        (ErrorCode.MODEL_NOT_READY, 409, "conflict_error"),
        (ErrorCode.BODY_TOO_LARGE, 413, "request_too_large"),
        (ErrorCode.UNSUPPORTED_MEDIA_TYPE, 415, "invalid_request_error"),
        (ErrorCode.MODEL_UNSUPPORTED_ARCH, 422, "invalid_request_error"),
        (ErrorCode.RATE_LIMIT_EXCEEDED, 429, "rate_limit_error"),
        (ErrorCode.INTERNAL_ERROR, 500, "api_error"),
        (ErrorCode.MODEL_CRASHED, 503, "api_error"),
    ],
)
async def test_errors_are_in_their_shape(
    client: httpx.AsyncClient, fleet: FakeFleet, path: str, code: ErrorCode, status: int, type: str
) -> None:
    fleet.refusal = CodedError(
        code, "why", param="x", retry_after_s=2, details={"incident_id": "inc_1"}
    )
    answer = await client.post(path, json=body(), headers={"X-Request-ID": "me"})
    assert answer.status_code == status
    assert answer.headers["retry-after"] == "2"
    assert (answer.headers["request-id"], answer.headers["x-request-id"]) == ("me", "me")
    assert answer.json() == {
        "type": "error",
        "error": {
            "type": type,
            "message": "why",
            "param": "x",
            "code": code.value,
            "details": {"error_code": code.value},
            "incident_id": "inc_1",
        },
        "request_id": "me",
    }


async def test_errors_of_the_door_are_in_their_shape_too(
    make_app: MakeApp, fleet: FakeFleet
) -> None:
    transport = httpx.ASGITransport(make_app(max_body_bytes=100))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answers = [
            await client.get(PATH),
            await client.post(PATH, content=b"{", headers={"content-type": "application/json"}),
            await client.post(PATH, content=b" " * 101),
            await client.post(PATH, json=body(), headers={"host": "example.com"}),
            await client.post(PATH, json=body(), headers={"X-Priority": "huge"}),
        ]
        fleet.bug = RuntimeError("secret")
        answers.append(await client.post(PATH, json=body()))
    assert [answer.status_code for answer in answers] == [405, 400, 413, 403, 400, 500]
    for answer in answers:
        assert answer.json()["type"] == "error"
        assert "secret" not in answer.text
    assert answers[0].headers["allow"] == "POST"
    assert answers[2].headers["connection"] == "close"


async def test_a_failure_before_the_answer(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    call = Exchange(app, "POST", PATH, json=body())
    submitted = await fleet.request()
    submitted.accept()
    submitted.fail(ErrorCode.MODEL_CRASHED)
    await call.finish()
    assert (call.status, call.json["error"]["code"]) == (503, "model_crashed")
