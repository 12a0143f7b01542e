"""``POST /v1/responses``: what is asked of the worker, what is refused, whole answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx2
import msgspec
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.responses import Response
from pydantic import BaseModel
from starlette.types import ASGIApp

from protocol.chat import (
    ChatMessage,
    Constraint,
    ConstraintKind,
    Extras,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallPiece,
    ToolChoice,
)
from protocol.errors import ErrorCode
from protocol.messages import Delta, FinishReason, Generate, Sampling
from supervisor.gateway.openai.responses_items import seal
from tests.support.asgi import Exchange
from tests.support.fake_fleet import FakeFleet, Submitted

PATH = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
NAMESPACE = {"type": "namespace", "name": "geo", "description": "Places", "tools": [TOOL]}
LOGPROBS = "message.output_text.logprobs"


def body(given: object = "Hi", **more: object) -> dict[str, object]:
    return {"model": "m", "input": given, **more}


def push(
    submitted: Submitted, text: str = "", finish: FinishReason | None = None, **extras: Any
) -> None:
    submitted.stream.push(Delta(0, text, [1], finish, Extras(**extras) if extras else None))


async def generate_of(client: httpx.AsyncClient, fleet: FakeFleet, request: object) -> Generate:
    answer = await client.post(PATH, json=request)
    assert answer.status_code == 200, answer.text
    return fleet.requests[-1].request


async def turns_of(
    client: httpx.AsyncClient, fleet: FakeFleet, given: object, **more: object
) -> list[ChatMessage]:
    generate = await generate_of(client, fleet, body(given, **more))
    assert generate.messages is not None
    return generate.messages


async def refusal_of(client: httpx.AsyncClient, request: object) -> tuple[int, Any, Any]:
    answer = await client.post(PATH, json=request)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


# --- requests ---


async def test_defaults(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    generate = await generate_of(client, fleet, body())
    asked = msgspec.structs.replace(generate, client="")
    assert asked == Generate(request_id=0, messages=[ChatMessage("user", "Hi")])


async def test_every_honoured_field_reaches_the_worker(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    request = body(
        instructions="Be brief.",
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=3,
        stop=["x"],
        max_output_tokens=5,
        tools=[TOOL, {"type": "function", "name": "other", "parameters": None, "strict": None}],
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        chat_template_kwargs={"enable_thinking": True},
        include=[LOGPROBS],
        top_logprobs=4,
        cache_prompt=False,
        metadata={"a": "b"},
        store=False,
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        service_tier="flex",
        max_tool_calls=3,
        truncation="disabled",
        background=False,
        stream_options={"include_obfuscation": False},
        some_local_extension=[1],
    )
    generate = await generate_of(client, fleet, request)
    assert generate.messages == [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")]
    assert generate.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=40, seed=3)
    assert (generate.stop, generate.max_tokens) == (["x"], 5)
    assert generate.tools == [Tool("weather", None, SCHEMA, strict=True), Tool("other")]
    assert (generate.tool_choice, generate.named_tool) == (ToolChoice.NAMED, "weather")
    assert not generate.parallel_tool_calls
    assert generate.template_options == {"enable_thinking": True, "reasoning_effort": "low"}
    assert generate.top_logprobs == 4
    assert not generate.cache_prompt


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint(ConstraintKind.JSON)),
        (
            {"type": "json_schema", "name": "x", "schema": {"type": "null"}, "strict": True},
            Constraint(ConstraintKind.SCHEMA, '{"type":"null"}'),
        ),
        ({"type": "regex", "pattern": "a+"}, Constraint(ConstraintKind.REGEX, "a+")),
    ],
)
async def test_text_formats_are_constraints_and_are_echoed(
    client: httpx.AsyncClient, fleet: FakeFleet, asked: dict[str, object], constraint: object
) -> None:
    answer = await client.post(PATH, json=body(text={"format": asked, "verbosity": "medium"}))
    assert fleet.requests[0].request.constraint == constraint
    echoed = answer.json()["text"]
    assert asked.items() <= echoed["format"].items()


@pytest.mark.parametrize("choice", ["none", "auto", "required"])
async def test_tool_choices(client: httpx.AsyncClient, fleet: FakeFleet, choice: str) -> None:
    request = body(tools=[TOOL], tool_choice=choice)
    assert (await generate_of(client, fleet, request)).tool_choice == ToolChoice(choice)


async def test_an_effort_of_none_is_no_thinking(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    generate = await generate_of(client, fleet, body(reasoning={"effort": "none"}))
    assert generate.template_options == {"reasoning_effort": "none", "enable_thinking": False}


HARMLESS: dict[str, object] = {
    "n": 1,
    "tools": [],
    "tool_choice": "auto",
    "background": False,
    "context_management": [],
    "prompt_cache_options": {"mode": "implicit"},
    "truncation": "disabled",
    "text": {},
    "reasoning": {"context": "auto", "mode": "standard", "generate_summary": "auto"},
    "include": [],
    "top_logprobs": 0,
    "stream_options": {},
    "metadata": {},
}


async def test_values_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient) -> None:
    assert (await client.post(PATH, json=body(**HARMLESS))).status_code == 200
    names = [*HARMLESS, "instructions", "max_output_tokens", "store", "previous_response_id"]
    nothing = dict.fromkeys([*names, "conversation", "prompt", "moderation", "stream", "user"])
    assert (await client.post(PATH, json=body(**nothing))).status_code == 200
    text: dict[str, object] = {"format": None, "verbosity": None}
    assert (await client.post(PATH, json=body(text=text))).status_code == 200


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"background_options": {"completion_window": "2h"}}, "background_options"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"access_programs": {"cyber": "standard"}}, "access_programs"),
        ({"image": {"context_compression": "enabled"}}, "image"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"reasoning": {"generate_summary": "concise"}}, "reasoning.generate_summary"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"tools": [{"type": "file_search"}]}, "tools[0]"),
        ({"tools": [{**NAMESPACE, "tools": [{"type": "custom"}]}]}, "tools[0].tools[0]"),
        ({"tools": [TOOL, {"type": "custom", "name": "x"}]}, "tools[1]"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{**TOOL, "async": True}]}, "tools[0].async"),
        ({"tools": [{**TOOL, "output_schema": {}}]}, "tools[0].output_schema"),
        ({"tools": [{**TOOL, "allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOL]}},
            "tool_choice",
        ),
    ],
)
async def test_documented_fields_that_cannot_be_honoured_are_refused_by_name(
    client: httpx.AsyncClient, fleet: FakeFleet, more: dict[str, object], param: str
) -> None:
    assert await refusal_of(client, body(**more)) == (400, "unsupported_parameter", param)
    assert fleet.requests == []


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"input": None}, "invalid_type", "input"),
        ({"input": 3}, "invalid_type", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"model": None}, "invalid_type", "model"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"instructions": ["x"]}, "invalid_type", "instructions"),
        ({"include": ["everything"]}, "invalid_value", "include[0]"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 21, "include": [LOGPROBS]}, "invalid_value", "top_logprobs"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "invalid_value", "metadata"),
        ({"metadata": {"a" * 65: ""}}, "invalid_value", "metadata"),
        ({"previous_response_id": 1}, "invalid_type", "previous_response_id"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
        ({"tools": [{"name": "x"}]}, "missing_required_parameter", "tools[0].type"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "invalid_value", "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "missing_required_parameter", "tool_choice.name"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "invalid_value", "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x"}}},
            "missing_required_parameter",
            "text.format.schema",
        ),
        (
            {"text": {"format": {"type": "json_schema", "schema": {}}}},
            "missing_required_parameter",
            "text.format.name",
        ),
        ({"chat_template_kwargs": {"tools": []}}, "invalid_value", "chat_template_kwargs"),
        ({"previous_response_id": "x"}, "previous_response_not_found", "previous_response_id"),
    ],
)
async def test_bad_values_are_named(
    client: httpx.AsyncClient, more: dict[str, object], code: str, param: str
) -> None:
    assert await refusal_of(client, body(**more) | more) == (400, code, param)


# --- input ---


def text_part(text: str, kind: str = "input_text") -> dict[str, object]:
    return {"type": kind, "text": text}


async def test_functions_of_namespaces(app: ASGIApp, fleet: FakeFleet) -> None:
    given = [
        {"role": "user", "content": "Hi"},
        {**call_item("1"), "namespace": "geo"},
        result_item("1"),
    ]
    request = body(given, tools=[TOOL, NAMESPACE, {"type": "web_search"}])
    call, submitted = await answer_to(app, fleet, request)
    tools = submitted.request.tools
    assert [tool.name for tool in tools] == ["weather", "geo__weather"]
    assert tools[1].description == "Places"
    assert submitted.request.messages is not None
    _, asked, result = submitted.request.messages
    assert asked.tool_calls[0].name == result.name == "geo__weather"
    push(submitted, tool_calls=[ToolCallPiece(0, "call_a", "geo__weather", "{}")])
    push(submitted, tool_calls=[ToolCallPiece(1, "call_b", "weather", "{}")])
    submitted.stream.push(Delta(0, "", [1], FinishReason.TOOL_CALLS))
    await call.finish()
    first, second = call.json["output"]
    assert (first["namespace"], first["name"]) == ("geo", "weather")
    assert "namespace" not in second
    # A search that is never used is not named.
    assert [tool["type"] for tool in call.json["tools"]] == ["function", "namespace"]
    assert call.json["tools"][1]["tools"][0]["name"] == "weather"


async def test_a_namespace_needs_a_name(client: httpx.AsyncClient) -> None:
    request = body(tools=[{**NAMESPACE, "name": None}])
    assert await refusal_of(client, request) == (400, "missing_required_parameter", "tools[0].name")


def call_item(call_id: str, name: str = "weather") -> dict[str, object]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}"}


def result_item(call_id: str, output: object = "rain") -> dict[str, object]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def said(text: str) -> dict[str, object]:
    return {"type": "message", "role": "assistant", "content": [text_part(text, "output_text")]}


def thought(**more: object) -> dict[str, object]:
    return {"type": "reasoning", "id": "rs_1", "summary": [], **more}


async def test_messages(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    given = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"type": "message", "role": "user", "content": [text_part("b"), text_part("c", "text")]},
        {**said("d"), "id": "msg_1", "status": "completed", "phase": "final_answer"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "system", "content": "Be quick."},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": ""},
    ]
    assert await turns_of(client, fleet, given) == [
        ChatMessage("system", "Be kind."),
        ChatMessage("user", "a"),
        ChatMessage("user", "b\nc"),
        ChatMessage("assistant", "d"),
        ChatMessage("assistant", "no"),
        ChatMessage("system", "Be quick."),
        ChatMessage("assistant", "e"),
        ChatMessage("user", ""),
    ]


async def test_instructions_and_the_first_system_messages_are_one(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    given = [{"role": role, "content": role} for role in ("developer", "system", "user")]
    assert await turns_of(client, fleet, given, instructions="first") == [
        ChatMessage("system", "first\n\ndeveloper\n\nsystem"),
        ChatMessage("user", "user"),
    ]


async def test_what_an_assistant_did_is_one_turn(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    given = [
        {"role": "user", "content": "Hi"},
        thought(content=[text_part("hm", "reasoning_text")]),
        said("Let me look."),
        call_item("1"),
        call_item("2", "time"),
        result_item("1"),
        result_item("2", [text_part("no"), text_part("on")]),
        said("It rains."),
    ]
    calls = [ToolCall("1", "weather", "{}"), ToolCall("2", "time", "{}")]
    assert await turns_of(client, fleet, given) == [
        ChatMessage("user", "Hi"),
        ChatMessage("assistant", "Let me look.", None, calls, None, "hm"),
        ChatMessage("tool", "rain", "weather", [], "1"),
        ChatMessage("tool", "no\non", "time", [], "2"),
        ChatMessage("assistant", "It rains."),
    ]


@pytest.mark.parametrize(
    ("items", "turns"),
    [
        ([call_item("1"), said("a")], [("a", None, 1)]),
        ([said("a"), call_item("1"), said("b"), call_item("2")], [("a\nb", None, 2)]),
        ([said("a"), said("b")], [("a", None, 0), ("b", None, 0)]),
        (
            [said("a"), thought(content=[text_part("x", "reasoning_text")]), said("b")],
            [("a", None, 0), ("b", "x", 0)],
        ),
        ([thought(summary=[text_part("s", "summary_text")]), said("b")], [("b", "s", 0)]),
        ([thought(content="x", encrypted_content=seal("y")), said("b")], [("b", "x", 0)]),
        ([thought(encrypted_content=seal("y"), content=None), said("b")], [("b", "y", 0)]),
        ([thought(content=[text_part("x", "reasoning_text")])], [("", "x", 0)]),
        ([thought(), said("b")], [("b", None, 0)]),
    ],
)
async def test_how_items_become_turns(
    client: httpx.AsyncClient, fleet: FakeFleet, items: list[object], turns: list[object]
) -> None:
    messages = await turns_of(client, fleet, [*items, {"role": "user", "content": "Hi"}])
    assert messages.pop() == ChatMessage("user", "Hi")
    assert {message.role for message in messages} == {"assistant"}
    assert [(each.content, each.reasoning, len(each.tool_calls)) for each in messages] == turns


@pytest.mark.parametrize(
    ("item", "code", "param"),
    [
        ({}, "missing_required_parameter", "role"),
        ({"role": "user"}, "missing_required_parameter", "content"),
        ({"role": "tool", "content": "x"}, "invalid_value", "role"),
        ({"role": "user", "content": []}, "invalid_value", "content"),
        ({"role": "user", "content": 3}, "invalid_type", "content"),
        ({"role": "user", "content": [{}]}, "missing_required_parameter", "content[0].type"),
        (
            {"role": "user", "content": [{"type": "input_text"}]},
            "missing_required_parameter",
            "content[0].text",
        ),
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            "unsupported_parameter",
            "content[0]",
        ),
        (
            {"role": "user", "content": [text_part("a"), {"type": "input_file", "file_id": "x"}]},
            "unsupported_parameter",
            "content[1]",
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal"}]},
            "missing_required_parameter",
            "content[0].refusal",
        ),
        (
            {"role": "user", "content": [{"type": "refusal", "refusal": "x"}]},
            "unsupported_parameter",
            "content[0]",
        ),
        ({"type": "function_call", "name": "x"}, "missing_required_parameter", "call_id"),
        ({"type": "function_call", "call_id": "1"}, "missing_required_parameter", "name"),
        (
            {"type": "function_call", "call_id": "1", "name": "x"},
            "missing_required_parameter",
            "arguments",
        ),
        ({**result_item("1"), "namespace": "x"}, "unsupported_parameter", "namespace"),
        (
            {"type": "function_call_output", "call_id": "1"},
            "missing_required_parameter",
            "output",
        ),
        (
            {"type": "function_call_output", "output": "x"},
            "missing_required_parameter",
            "call_id",
        ),
        (
            result_item("1", [{"type": "input_image", "image_url": "x"}]),
            "unsupported_parameter",
            "output[0]",
        ),
        (thought(encrypted_content="gAAAA"), "unsupported_parameter", "encrypted_content"),
        (thought(encrypted_content="ä"), "unsupported_parameter", "encrypted_content"),
        (thought(content=[text_part("x")]), "unsupported_parameter", "content[0]"),
        (thought(summary=[text_part("x")]), "unsupported_parameter", "summary[0]"),
        ({"type": "item_reference", "id": "msg_x"}, "invalid_value", "id"),
        ({"type": "item_reference"}, "missing_required_parameter", "id"),
        ({"id": "msg_x"}, "invalid_value", "id"),
        ({"type": "web_search_call", "id": "x"}, "unsupported_parameter", ""),
        ({"type": "computer_call_output", "output": "x"}, "unsupported_parameter", ""),
    ],
)
async def test_bad_items_are_named(
    client: httpx.AsyncClient, fleet: FakeFleet, item: object, code: str, param: str
) -> None:
    request = body([{"role": "user", "content": "Hi"}, item])
    where = f"input[1].{param}".rstrip(".")
    assert await refusal_of(client, request) == (400, code, where)
    assert fleet.requests == []


# --- whole answers ---


async def answer_to(
    app: ASGIApp, fleet: FakeFleet, request: dict[str, object]
) -> tuple[Exchange, Submitted]:
    fleet.script = None
    call = Exchange(app, "POST", PATH, json=request)
    submitted = await fleet.request()
    submitted.accept()
    submitted.start(cached_tokens=2)
    return call, submitted


def checked(value: Any) -> Response:
    """As the official client reads it, but with every required field insisted upon."""
    return Response.model_validate(value)


async def test_a_plain_answer(client: httpx.AsyncClient) -> None:
    value = (await client.post(PATH, json=body())).json()
    assert value.pop("id").startswith("resp_")
    created, completed = value.pop("created_at"), value.pop("completed_at")
    assert 0 <= completed - created < 60
    [message] = value.pop("output")
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert value == {
        "object": "response",
        "status": "completed",
        "background": False,
        "conversation": None,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "model": "m",
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 8,
        },
        "user": None,
    }


async def test_what_was_asked_is_echoed(client: httpx.AsyncClient) -> None:
    choice = {"type": "function", "name": "weather"}
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "max_tool_calls": 2,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "store": False,
        "temperature": 0.0,
        "tool_choice": choice,
        "tools": [{**TOOL, "description": "d"}],
        "top_p": 0.5,
        "user": "u",
    }
    answer = await client.post(PATH, json=body(**asked, reasoning={"effort": "low"}))
    value = answer.json()
    assert {name: value[name] for name in asked} == asked
    assert value["reasoning"] == {"effort": "low", "summary": None}
    checked(value)


async def test_reasoning_text_and_calls(app: ASGIApp, fleet: FakeFleet) -> None:
    sealed = "reasoning.encrypted_content"
    call, submitted = await answer_to(app, fleet, body(tools=[TOOL], include=[sealed]))
    push(submitted, reasoning="Let me ", reasoning_tokens=1)
    push(submitted, reasoning="see.", reasoning_tokens=1)
    push(submitted, "Sure")
    push(submitted, tool_calls=[ToolCallPiece(0, "call_a", "weather")])
    push(submitted, tool_calls=[ToolCallPiece(0, arguments='{"city":"Paris"}')])
    push(submitted, tool_calls=[ToolCallPiece(1, "call_b", "weather", "{}")])
    submitted.stream.push(Delta(0, "", [1], FinishReason.TOOL_CALLS))
    await call.finish()
    response = checked(call.json)
    reasoning, message, first, second = call.json["output"]
    assert reasoning.pop("id").startswith("rs_")
    assert reasoning == {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Let me see."}],
        "encrypted_content": seal("Let me see."),
        "status": "completed",
    }
    assert message["content"][0]["text"] == "Sure"
    assert first.pop("id").startswith("fc_")
    assert first == {
        "type": "function_call",
        "call_id": "call_a",
        "name": "weather",
        "arguments": '{"city":"Paris"}',
        "status": "completed",
    }
    assert (second["call_id"], second["arguments"]) == ("call_b", "{}")
    assert response.status == "completed"
    assert response.output_text == "Sure"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 2
    assert response.usage.input_tokens_details.cached_tokens == 2


async def test_calls_without_text_are_no_message(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await answer_to(app, fleet, body(tools=[TOOL]))
    push(submitted, tool_calls=[ToolCallPiece(0, "call_a", "weather", "{}")])
    submitted.stream.push(Delta(0, "", [1], FinishReason.TOOL_CALLS))
    await call.finish()
    assert [item["type"] for item in call.json["output"]] == ["function_call"]
    assert "encrypted_content" not in call.body.decode()


async def test_an_answer_that_is_cut_off_is_incomplete(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await answer_to(app, fleet, body(max_output_tokens=2))
    push(submitted, reasoning="Hm")
    push(submitted, "So", FinishReason.LENGTH)
    await call.finish()
    response = checked(call.json)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert call.json["completed_at"] is None
    assert [item["status"] for item in call.json["output"]] == ["completed", "incomplete"]


@pytest.mark.parametrize(
    ("finish", "kinds"),
    [(FinishReason.STOP, ["reasoning", "message"]), (FinishReason.LENGTH, ["reasoning"])],
)
async def test_an_answer_without_text(
    app: ASGIApp, fleet: FakeFleet, finish: FinishReason, kinds: list[str]
) -> None:
    call, submitted = await answer_to(app, fleet, body())
    push(submitted, reasoning="Hm")
    submitted.stream.push(Delta(0, "", [1], finish))
    await call.finish()
    assert [item["type"] for item in call.json["output"]] == kinds
    assert checked(call.json).output_text == ""


async def test_log_probabilities_are_those_of_the_text(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await answer_to(app, fleet, body(include=[LOGPROBS], top_logprobs=1))
    tokens = ["<think>", "Yes", "</think>", "\n", "Yes", "!"]
    found = [TokenLogprob(i, text.encode(), -0.5) for i, text in enumerate(tokens)]
    for logprob in found[:4]:
        reasoning = "Yes" if logprob is found[1] else ""
        push(submitted, reasoning=reasoning, reasoning_tokens=1, logprobs=[logprob])
    for logprob in found[4:]:
        push(submitted, logprob.text.decode(), logprobs=[logprob])
    submitted.finish()
    await call.finish()
    [_, message] = call.json["output"]
    assert [each["token"] for each in message["content"][0]["logprobs"]] == ["Yes", "!"]
    assert message["content"][0]["logprobs"][0] == {
        "token": "Yes",
        "logprob": -0.5,
        "bytes": [89, 101, 115],
        "top_logprobs": [],
    }
    checked(call.json)


@pytest.mark.parametrize(
    ("code", "status"),
    [(ErrorCode.MODEL_CRASHED, 503), (ErrorCode.CONTEXT_LENGTH_EXCEEDED, 400)],
)
async def test_a_failure_is_an_error_as_everywhere(
    app: ASGIApp, fleet: FakeFleet, code: ErrorCode, status: int
) -> None:
    call, submitted = await answer_to(app, fleet, body())
    submitted.fail(code)
    await call.finish()
    assert (call.status, call.json["error"]["code"]) == (status, code.value)


async def test_unknown_models_are_not_found(client: httpx.AsyncClient) -> None:
    assert await refusal_of(client, body() | {"model": "x"}) == (404, "model_not_found", "model")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "id", "call_id", "name"]),
            inner | st.sampled_from(["user", "message", "reasoning", "function", "input_text"]),
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("input", "instructions", "tools", "tool_choice", "text", "reasoning", "include"),
        *("metadata", "store", "previous_response_id", "stream_options", "truncation"),
        *("max_tool_calls", "user", "top_logprobs", "prompt", "conversation", "model"),
    ]
)


@given(fields=st.dictionaries(FIELDS, JSON, max_size=5))
@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)
async def test_no_json_is_a_server_error(
    client: httpx.AsyncClient, fields: dict[str, object]
) -> None:
    answer = await client.post(PATH, json={**body(), **fields})
    assert answer.status_code in (200, 400, 404)


# --- the official client ---


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture
async def sdk(app: ASGIApp) -> AsyncIterator[openai.AsyncOpenAI]:
    url = "http://127.0.0.1:8000/v1"
    async with (
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as transport,
        openai.AsyncOpenAI(base_url=url, api_key="none", http_client=transport) as client,
    ):
        yield client


async def test_the_parse_helper_asks_for_its_schema(
    sdk: openai.AsyncOpenAI, fleet: FakeFleet
) -> None:
    fleet.script = ('{"name": "Ann', '", "age": 7}')
    response = await sdk.responses.parse(model="m", input="Who?", text_format=Person)
    assert response.output_parsed == Person(name="Ann", age=7)
    constraint = fleet.requests[0].request.constraint
    assert constraint is not None
    assert constraint.kind is ConstraintKind.SCHEMA
    schema = msgspec.json.decode(constraint.text)
    assert schema["required"] == ["name", "age"]
    async with sdk.responses.stream(model="m", input="Who?", text_format=Person) as stream:
        assert (await stream.get_final_response()).output_parsed == Person(name="Ann", age=7)
    assert fleet.requests[1].request.constraint == constraint


async def test_the_tool_helper_asks_for_its_schema(
    sdk: openai.AsyncOpenAI, fleet: FakeFleet
) -> None:
    tool: Any = {
        "type": "function",
        "name": "Person",
        "parameters": openai.pydantic_function_tool(Person)["function"]["parameters"],
        "strict": True,
    }
    await sdk.responses.create(model="m", input="Who?", tools=[tool])
    [asked] = fleet.requests[0].request.tools
    assert asked.strict
    assert asked.parameters["required"] == ["name", "age"]
