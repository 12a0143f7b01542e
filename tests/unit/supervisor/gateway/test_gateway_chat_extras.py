"""``/v1/chat/completions`` beyond plain text: tools, reasoning, logprobs, several answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
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
from protocol.messages import Delta, FinishReason
from tests.support.asgi import Exchange, events
from tests.support.fake_fleet import FakeFleet, Submitted

CHAT = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}


def body(**more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **more}


def push(
    submitted: Submitted, text: str = "", finish: FinishReason | None = None, **extras: Any
) -> None:
    submitted.stream.push(Delta(0, text, [1], finish, Extras(**extras) if extras else None))


def speak(submitted: Submitted) -> None:
    """An answer with all there can be."""
    submitted.accept()
    submitted.start(cached_tokens=2)
    found = TokenLogprob(5, b"Sure", -0.25, [TokenLogprob(5, b"Sure", -0.25)])
    push(submitted, reasoning="Let me ", reasoning_tokens=1)
    push(submitted, reasoning="see.", reasoning_tokens=1)
    push(submitted, "Sure", logprobs=[found])
    push(submitted, tool_calls=[ToolCallPiece(0, "call_a", "weather")])
    push(submitted, tool_calls=[ToolCallPiece(0, arguments='{"city":')])
    push(submitted, tool_calls=[ToolCallPiece(0, arguments='"Paris"}')])
    push(
        submitted,
        tool_calls=[ToolCallPiece(1, "call_b", "weather"), ToolCallPiece(1, None, None, "{}")],
    )
    submitted.stream.push(Delta(0, "", [1], FinishReason.TOOL_CALLS))


async def test_a_whole_answer_has_reasoning_calls_and_log_probabilities(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    call = Exchange(app, "POST", CHAT, json=body(tools=[TOOL], logprobs=True, top_logprobs=1))
    speak(await fleet.request())
    await call.finish()
    [choice] = call.json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Sure",
        "refusal": None,
        "reasoning_content": "Let me see.",
        "tool_calls": [
            {
                "id": "call_a",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city":"Paris"}'},
            },
            {
                "id": "call_b",
                "type": "function",
                "function": {"name": "weather", "arguments": "{}"},
            },
        ],
    }
    assert choice["logprobs"]["content"] == [
        {
            "token": "Sure",
            "logprob": -0.25,
            "bytes": [83, 117, 114, 101],
            "top_logprobs": [{"token": "Sure", "logprob": -0.25, "bytes": [83, 117, 114, 101]}],
        }
    ]
    assert call.json["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert call.json["timings"]["cache_n"] == 2


async def test_calls_without_text_have_no_content(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    call = Exchange(app, "POST", CHAT, json=body(tools=[TOOL]))
    submitted = await fleet.request()
    submitted.accept()
    push(submitted, tool_calls=[ToolCallPiece(0, "call_a", "weather", "{}")])
    submitted.stream.push(Delta(0, "", [1], FinishReason.TOOL_CALLS))
    await call.finish()
    assert call.json["choices"][0]["message"]["content"] is None


async def test_a_stream_adds_up_to_the_whole(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    request = body(tools=[TOOL], logprobs=True, stream=True)
    call = Exchange(app, "POST", CHAT, json=request)
    submitted = await fleet.request()
    speak(submitted)
    await call.finish()
    *chunks, done = events(call.body)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert sum("role" in delta for delta in deltas) == 1
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Let me see."
    assert "".join(delta.get("content", "") for delta in deltas) == "Sure"
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
    first = [piece for piece in pieces if piece["index"] == 0]
    assert (first[0]["id"], first[0]["type"]) == ("call_a", "function")
    assert first[0]["function"]["name"] == "weather"
    assert "".join(piece["function"]["arguments"] for piece in first) == '{"city":"Paris"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [each["content"][0]["token"] for each in found if each] == ["Sure"]


async def test_pieces_go_out_one_by_one(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    call = Exchange(app, "POST", CHAT, json=body(tools=[TOOL], stream=True))
    submitted = await fleet.request()
    submitted.accept()
    await call.wait_for_messages(2)
    push(submitted, reasoning="hm", reasoning_tokens=1)
    await call.wait_for_messages(3)
    push(submitted, tool_calls=[ToolCallPiece(0, "call_a", "weather")])
    push(submitted, tool_calls=[ToolCallPiece(0, arguments="{}")])
    push(submitted, reasoning_tokens=1)
    assert len(call.messages) == 5, "written at once, and only what there is"
    submitted.stream.push(Delta(0, "", [1], FinishReason.TOOL_CALLS))
    await call.finish()


@pytest.mark.parametrize("streaming", [False, True])
async def test_several_answers(app: ASGIApp, fleet: FakeFleet, streaming: bool) -> None:
    fleet.script = None
    options = {"include_usage": True} if streaming else None
    request = body(n=2, seed=7, stream=streaming, stream_options=options)
    call = Exchange(app, "POST", CHAT, json=request)
    first, second = await fleet.request(0), await fleet.request(1)
    assert [each.request.sampling.seed for each in (first, second)] == [7, 8]
    for submitted in (first, second):
        submitted.accept(prompt_tokens=10)
    second.say("b", FinishReason.LENGTH)
    first.say("a")
    first.finish()
    await call.finish()
    if not streaming:
        answers = {choice["index"]: choice for choice in call.json["choices"]}
        assert [answers[i]["message"]["content"] for i in (0, 1)] == ["a", "b"]
        assert [answers[i]["finish_reason"] for i in (0, 1)] == ["stop", "length"]
        assert call.json["usage"]["prompt_tokens"] == 10
        return
    *chunks, last, done = events(call.body)
    assert done == "[DONE]"
    assert last["usage"]["prompt_tokens"] == 10
    assert last["usage"]["completion_tokens"] == 3
    for index, text, reason in ((0, "a", "stop"), (1, "b", "length")):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == [reason]


async def test_one_failed_answer_ends_the_stream_and_gives_the_others_up(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    call = Exchange(app, "POST", CHAT, json=body(n=3, stream=True))
    submitted = [await fleet.request(number) for number in range(3)]
    for each in submitted:
        each.accept()
    submitted[0].say("a")
    submitted[1].fail(ErrorCode.MODEL_CRASHED)
    await call.finish()
    *_, last = events(call.body)
    assert last["error"]["code"] == "model_crashed"
    assert submitted[0].cancelled
    assert submitted[2].cancelled


async def test_tools_and_their_history_reach_the_worker(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    called = {
        "id": "call_a",
        "type": "function",
        "function": {"name": "weather", "arguments": "{}"},
    }
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [called], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_a", "content": "rain"},
    ]
    request = body(
        messages=messages,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="high",
    )
    assert (await client.post(CHAT, json=request)).status_code == 200
    asked = fleet.requests[0].request
    assert asked.messages == [
        ChatMessage("user", "Hi"),
        ChatMessage("assistant", "", None, [ToolCall("call_a", "weather", "{}")], None, "hm"),
        ChatMessage("tool", "rain", "weather", [], "call_a"),
    ]
    assert asked.tools == [Tool("weather", None, SCHEMA, strict=True)]
    assert (asked.tool_choice, asked.named_tool) == (ToolChoice.NAMED, "weather")
    assert not asked.parallel_tool_calls
    assert asked.template_options == {"enable_thinking": False, "reasoning_effort": "high"}


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint(ConstraintKind.JSON)),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}},
            Constraint(ConstraintKind.SCHEMA, '{"type":"null"}'),
        ),
        ({"type": "regex", "pattern": "a+"}, Constraint(ConstraintKind.REGEX, "a+")),
        (
            {"type": "grammar", "grammar": 'start: "a"'},
            Constraint(ConstraintKind.LARK, 'start: "a"'),
        ),
    ],
)
async def test_response_formats_are_constraints(
    client: httpx.AsyncClient, fleet: FakeFleet, asked: object, constraint: Constraint | None
) -> None:
    assert (await client.post(CHAT, json=body(response_format=asked))).status_code == 200
    assert fleet.requests[0].request.constraint == constraint


async def test_log_probabilities_are_asked_for(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    for more in ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 4}):
        await client.post(CHAT, json=body(**more))
    assert [each.request.top_logprobs for each in fleet.requests] == [None, 0, 4]
