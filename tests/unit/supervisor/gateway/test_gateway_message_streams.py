"""Streams of ``/v1/messages``: every event, in its place."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp

from protocol.chat import Extras, ToolCallPiece
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Delta, FinishReason
from tests.support.asgi import Exchange, MakeApp
from tests.support.fake_fleet import FakeFleet, Submitted

PATH = "/v1/messages"
TOOL = {"name": "weather", "input_schema": {}}


def body(**more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "Hi"}]
    return {"model": "m", "max_tokens": 10, "messages": messages, "stream": True, **more}


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a body; each says its name twice."""
    found = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, value = event.split("\n")
        decoded = msgspec.json.decode(value.removeprefix("data: "))
        assert name == f"event: {decoded['type']}"
        found.append(decoded)
    return found


def push(
    submitted: Submitted, text: str = "", finish: FinishReason | None = None, **extras: Any
) -> None:
    submitted.stream.push(Delta(0, text, [1], finish, Extras(**extras) if extras else None))


async def begun(app: ASGIApp, fleet: FakeFleet, **more: object) -> tuple[Exchange, Submitted]:
    fleet.script = None
    call = Exchange(app, "POST", PATH, json=body(**more))
    submitted = await fleet.request()
    submitted.accept(10)
    return call, submitted


def start(index: int, **block: object) -> dict[str, object]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, **fields: object) -> dict[str, object]:
    return {"type": "content_block_delta", "index": index, "delta": fields}


def stop(index: int) -> dict[str, object]:
    return {"type": "content_block_stop", "index": index}


PING = {"type": "ping"}
STOPPED = {"type": "message_stop"}
SIGNATURE = {"type": "signature_delta", "signature": "opta-lmx"}


def ended(reason: str, sequence: str | None = None, **usage: object) -> dict[str, object]:
    return {
        "type": "message_delta",
        "delta": {"stop_reason": reason, "stop_sequence": sequence},
        "usage": {
            "input_tokens": 10,
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 0,
            "output_tokens": 0,
            "output_tokens_details": {"thinking_tokens": 0},
            **usage,
        },
    }


async def test_a_plain_stream(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await begun(app, fleet)
    for text in ("Hel", "lo\u2028"):
        await call.wait_for_messages(2)
        push(submitted, text)
    submitted.finish()
    await call.finish()
    assert call.headers["content-type"].startswith("text/event-stream")
    assert call.headers["request-id"] == call.headers["x-request-id"]
    first, *others = events(call.body)
    assert first["message"].pop("id").startswith("msg_")
    assert first == {
        "type": "message_start",
        "message": {
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": ended("")["usage"],
        },
    }
    text = "".join(event["delta"]["text"] for event in others if "text" in event.get("delta", {}))
    assert text == "Hello\u2028"
    assert [event for event in others if event["type"] != "content_block_delta"] == [
        PING,
        start(0, type="text", text=""),
        stop(0),
        ended("end_turn", output_tokens=3),
        STOPPED,
    ]
    assert b"\xe2\x80\xa8" not in call.body, "somebody's line end"


async def test_every_kind_of_block(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await begun(app, fleet, tools=[TOOL])
    submitted.start(cached_tokens=4)
    written = 2

    async def said(text: str = "", **extras: Any) -> None:
        nonlocal written
        await call.wait_for_messages(written)
        push(submitted, text, **extras)
        written += 1

    await said(reasoning="Let me ", reasoning_tokens=1)
    await said(reasoning="see.", reasoning_tokens=1)
    await said("Sure")
    await said(", now")
    await said(tool_calls=[ToolCallPiece(0, "call_a", "weather")])
    await said(tool_calls=[ToolCallPiece(0, arguments='{"city":')])
    await said(tool_calls=[ToolCallPiece(0, arguments='"Paris"}')])
    await said(tool_calls=[ToolCallPiece(1, "call_b", "weather", "{}")])
    await said("after")
    await call.wait_for_messages(written)
    push(submitted, finish=FinishReason.TOOL_CALLS)
    await call.finish()
    assert events(call.body)[1:] == [
        PING,
        start(0, type="thinking", thinking="", signature=""),
        delta(0, type="thinking_delta", thinking="Let me "),
        delta(0, type="thinking_delta", thinking="see."),
        delta(0, **SIGNATURE),
        stop(0),
        start(1, type="text", text=""),
        delta(1, type="text_delta", text="Sure"),
        delta(1, type="text_delta", text=", now"),
        stop(1),
        start(2, type="tool_use", id="call_a", name="weather", input={}),
        delta(2, type="input_json_delta", partial_json='{"city":'),
        delta(2, type="input_json_delta", partial_json='"Paris"}'),
        stop(2),
        start(3, type="tool_use", id="call_b", name="weather", input={}),
        delta(3, type="input_json_delta", partial_json="{}"),
        stop(3),
        start(4, type="text", text=""),
        delta(4, type="text_delta", text="after"),
        stop(4),
        ended(
            "tool_use",
            input_tokens=6,
            cache_read_input_tokens=4,
            output_tokens=10,
            output_tokens_details={"thinking_tokens": 2},
        ),
        STOPPED,
    ]


async def test_what_a_slow_client_gets_in_one_piece_is_in_order(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    call, submitted = await begun(app, fleet, tools=[TOOL])
    await call.wait_for_messages(2)
    push(submitted, tool_calls=[ToolCallPiece(0, "call_a", "weather", '{"a"')])
    await call.wait_for_messages(3)
    call.behind = True
    push(submitted, tool_calls=[ToolCallPiece(0, arguments=":1}")])
    push(submitted, "then")
    push(submitted, tool_calls=[ToolCallPiece(1, "call_b", "weather", "{}")])
    assert len(call.messages) == 3
    await call.wait_for_messages(4)
    call.behind = False
    submitted.finish()
    await call.finish()
    assert events(call.body)[2:-2] == [
        start(0, type="tool_use", id="call_a", name="weather", input={}),
        delta(0, type="input_json_delta", partial_json='{"a"'),
        delta(0, type="input_json_delta", partial_json=":1}"),
        stop(0),
        start(1, type="text", text=""),
        delta(1, type="text_delta", text="then"),
        stop(1),
        start(2, type="tool_use", id="call_b", name="weather", input={}),
        delta(2, type="input_json_delta", partial_json="{}"),
        stop(2),
    ]


async def test_a_client_that_was_behind_is_told_of_each_block_once(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    call, submitted = await begun(app, fleet)
    await call.wait_for_messages(2)
    push(submitted, reasoning="Hm.")
    await call.wait_for_messages(3)
    call.behind = True
    push(submitted, "a")
    await call.wait_for_messages(4)
    call.behind = False
    submitted.finish()
    await call.finish()
    assert [event["index"] for event in events(call.body) if "content_block" in event] == [0, 1]


async def test_thinking_may_be_left_out(app: ASGIApp, fleet: FakeFleet) -> None:
    thinking = {"type": "enabled", "budget_tokens": 5, "display": "omitted"}
    call, submitted = await begun(app, fleet, thinking=thinking)
    push(submitted, reasoning="Hm.", reasoning_tokens=1)
    push(submitted, reasoning_tokens=1)
    submitted.say("a", FinishReason.STOP)
    await call.finish()
    assert events(call.body)[2:5] == [
        start(0, type="thinking", thinking="", signature=""),
        delta(0, **SIGNATURE),
        stop(0),
    ]


@pytest.mark.parametrize(
    ("finish", "stop_string", "reason", "sequence"),
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
    stop_string: str | None,
    reason: str,
    sequence: str | None,
) -> None:
    call, submitted = await begun(app, fleet)
    push(submitted, finish=finish, stop=stop_string)
    await call.finish()
    _, *others = events(call.body)
    assert others == [PING, ended(reason, sequence, output_tokens=1), STOPPED]


async def test_an_error_ends_the_stream(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await begun(app, fleet)
    submitted.say("a")
    await call.wait_for_messages(3)
    details: dict[str, str | int] = {"incident_id": "inc_1", "tokens_sent": 1}
    submitted.stream.fail(CodedError(ErrorCode.MODEL_CRASHED, "gone", details=details))
    await call.finish()
    *before, last = events(call.body)
    assert before[-1] == delta(0, type="text_delta", text="a")
    assert last == {
        "type": "error",
        "error": {
            "type": "api_error",
            "message": "gone",
            "param": None,
            "code": "model_crashed",
            "details": {"error_code": "model_crashed"},
            **details,
        },
        "request_id": call.headers["x-request-id"],
    }


async def test_a_refusal_before_the_stream_is_a_proper_error(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    call = Exchange(app, "POST", PATH, json=body())
    submitted = await fleet.request()
    submitted.fail(ErrorCode.CONTEXT_LENGTH_EXCEEDED)
    await call.finish()
    assert (call.status, call.json["error"]["type"]) == (400, "invalid_request_error")


async def test_pings_keep_it_alive(make_app: MakeApp, fleet: FakeFleet) -> None:
    call, submitted = await begun(make_app(sse_keepalive_s=0.01), fleet)
    async with asyncio.timeout(5):
        await call.wait_for_messages(5)
    submitted.finish()
    await call.finish()
    kinds = [event["type"] for event in events(call.body)]
    assert kinds[:4] == ["message_start", "ping", "ping", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
