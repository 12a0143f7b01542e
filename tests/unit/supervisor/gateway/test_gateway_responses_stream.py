"""Streamed responses: which events come, in which order, and that they add up."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response
from starlette.types import ASGIApp

from protocol.chat import Extras, TokenLogprob, ToolCallPiece, join_extras
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Delta, FinishReason
from supervisor.gateway.openai.responses_answers import Response as OurResponse
from supervisor.gateway.openai.responses_answers import new_response
from supervisor.gateway.openai.responses_events import ResponseEvents
from supervisor.gateway.openai.responses_items import OutputItem, seal
from supervisor.gateway.openai.responses_output import OutputBuilder, split_at_text
from supervisor.gateway.openai.responses_request import ResponseRequest
from supervisor.metrics import Metrics
from supervisor.stream import RequestStream
from tests.support.asgi import Exchange
from tests.support.fake_fleet import FakeFleet, Submitted
from tests.support.responses_api import parsed

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
LOGPROBS = "message.output_text.logprobs"

BEGIN = ["response.created", "response.in_progress"]
OPEN = ["response.output_item.added", "response.content_part.added"]
CLOSE = ["response.content_part.done", "response.output_item.done"]
TEXT = "response.output_text"
REASONING = "response.reasoning_text"
ARGUMENTS = "response.function_call_arguments"


def message_events(deltas: int) -> list[str]:
    return [*OPEN, *[f"{TEXT}.delta"] * deltas, f"{TEXT}.done", *CLOSE]


def reasoning_events(deltas: int) -> list[str]:
    return [*OPEN, *[f"{REASONING}.delta"] * deltas, f"{REASONING}.done", *CLOSE]


def call_events(deltas: int) -> list[str]:
    return [OPEN[0], *[f"{ARGUMENTS}.delta"] * deltas, f"{ARGUMENTS}.done", CLOSE[1]]


def kinds(events: list[Any]) -> list[str]:
    return [event["type"] for event in events]


def body(**more: object) -> dict[str, object]:
    return {"model": "m", "input": "Hi", "stream": True, **more}


def push(
    submitted: Submitted, text: str = "", finish: FinishReason | None = None, **extras: Any
) -> None:
    submitted.stream.push(Delta(0, text, [1], finish, Extras(**extras) if extras else None))


async def stream_of(app: ASGIApp, fleet: FakeFleet, **more: object) -> tuple[Exchange, Submitted]:
    """A stream that has begun: so all that is pushed is one piece each."""
    fleet.script = None
    call = Exchange(app, "POST", PATH, json=body(**more))
    submitted = await fleet.request()
    submitted.accept()
    await call.wait_for_messages(2)
    return call, submitted


# --- sequences ---


async def test_text(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await stream_of(app, fleet)
    push(submitted, "Hel")
    await call.wait_for_messages(3)
    push(submitted, "lo\u2028")
    submitted.finish()
    await call.finish()
    assert call.headers["content-type"].startswith("text/event-stream")
    events = parsed(call.body)
    assert kinds(events) == [*BEGIN, *message_events(2), "response.completed"]
    assert b"\xe2\x80\xa8" not in call.body
    created, in_progress, added, part, first, second, done, part_done, item_done, last = events
    for event in (created, in_progress):
        assert event["response"]["status"] == "in_progress"
        assert event["response"]["output"] == []
        assert event["response"]["usage"] is None
    item_id = added["item"]["id"]
    assert added["output_index"] == 0
    assert added["item"] == {
        "type": "message",
        "id": item_id,
        "role": "assistant",
        "content": [],
        "status": "in_progress",
    }
    place = {"item_id": item_id, "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    whole = {**empty, "text": "Hello\u2028"}
    assert part == {"type": part["type"], "sequence_number": 3, **place, "part": empty}
    for event, delta in ((first, "Hel"), (second, "lo\u2028")):
        del event["type"], event["sequence_number"]
        assert event == {**place, "delta": delta, "logprobs": []}
    assert (done["text"], done["logprobs"]) == ("Hello\u2028", [])
    assert part_done["part"] == whole
    assert item_done["item"]["content"] == [whole]
    assert item_done["item"]["status"] == "completed"
    response = last["response"]
    assert response["output"] == [item_done["item"]]
    assert response["id"] == created["response"]["id"]
    assert response["usage"]["total_tokens"] == 8
    assert response["status"] == "completed"


async def test_reasoning_text_and_calls(app: ASGIApp, fleet: FakeFleet) -> None:
    sealed = "reasoning.encrypted_content"
    call, submitted = await stream_of(app, fleet, tools=[TOOL], include=[sealed])
    pieces: list[tuple[str, dict[str, Any]]] = [
        ("", {"reasoning": "Let me ", "reasoning_tokens": 1}),
        ("", {"reasoning": "see.", "reasoning_tokens": 1}),
        ("Sure", {}),
        ("", {"tool_calls": [ToolCallPiece(0, "call_a", "weather")]}),
        ("", {"tool_calls": [ToolCallPiece(0, arguments='{"city":')]}),
        ("", {"tool_calls": [ToolCallPiece(0, arguments='"Paris"}')]}),
        ("", {"tool_calls": [ToolCallPiece(1, "call_b", "weather", "{}")]}),
    ]
    for number, (text, extras) in enumerate(pieces):
        push(submitted, text, **extras)
        await call.wait_for_messages(3 + number)
    submitted.stream.push(Delta(0, "", [1], FinishReason.TOOL_CALLS))
    await call.finish()
    events = parsed(call.body)
    assert kinds(events) == [
        *BEGIN,
        *reasoning_events(2),
        *message_events(1),
        *call_events(2),
        *call_events(1),
        "response.completed",
    ]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1, 2, 3]
    assert added[0]["item"]["content"] == added[0]["item"]["summary"] == []
    assert "encrypted_content" not in added[0]["item"]
    assert added[2]["item"]["status"] == "in_progress"
    assert (added[2]["item"]["call_id"], added[2]["item"]["arguments"]) == ("call_a", "")
    done = [event for event in events if event["type"] == f"{ARGUMENTS}.done"]
    assert [event["arguments"] for event in done] == ['{"city":"Paris"}', "{}"]
    assert {event["name"] for event in done} == {"weather"}
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert items[0]["encrypted_content"] == seal("Let me see.")
    assert events[-1]["response"]["output"] == items
    assert [item["type"] for item in items] == [
        *("reasoning", "message", "function_call", "function_call")
    ]


async def test_what_a_token_brought_is_written_at_once(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await stream_of(app, fleet)
    push(submitted, "a")
    await call.wait_for_messages(3)
    push(submitted, "b")
    assert len(call.messages) == 4
    call.behind = True
    push(submitted, "c")
    push(submitted, "d")
    assert len(call.messages) == 4
    call.behind = False
    submitted.finish()
    await call.finish()
    events = parsed(call.body)
    deltas = [event["delta"] for event in events if event["type"] == f"{TEXT}.delta"]
    assert deltas == ["a", "b", "cd"]


async def test_an_empty_answer_is_an_empty_message(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await stream_of(app, fleet)
    submitted.finish()
    await call.finish()
    events = parsed(call.body)
    assert kinds(events) == [*BEGIN, *message_events(0), "response.completed"]


async def test_an_answer_that_is_cut_off_is_incomplete(app: ASGIApp, fleet: FakeFleet) -> None:
    call, submitted = await stream_of(app, fleet, max_output_tokens=2)
    push(submitted, "a")
    await call.wait_for_messages(3)
    push(submitted, "b", FinishReason.LENGTH)
    await call.finish()
    events = parsed(call.body)
    assert kinds(events) == [*BEGIN, *message_events(2), "response.incomplete"]
    assert events[-2]["item"]["status"] == "incomplete"
    response = events[-1]["response"]
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["usage"]["output_tokens"] == 2


async def test_a_failure_is_told_as_an_error_and_as_the_end(
    app: ASGIApp, fleet: FakeFleet, metrics: Metrics
) -> None:
    call, submitted = await stream_of(app, fleet)
    push(submitted, "a")
    await call.wait_for_messages(3)
    facts: dict[str, str | int] = {"incident_id": "inc_1", "tokens_sent": 1}
    submitted.stream.fail(CodedError(ErrorCode.MODEL_CRASHED, "it broke", details=facts))
    await call.finish()
    events = parsed(call.body)
    assert kinds(events) == [*BEGIN, *OPEN, f"{TEXT}.delta", "error", "response.failed"]
    error, failed = events[-2:]
    assert (error["code"], error["message"], error["param"]) == ("model_crashed", "it broke", None)
    assert error["error"]["incident_id"] == "inc_1"
    response = failed["response"]
    assert response["status"] == "failed"
    assert (
        response["error"]
        == error["error"]
        == {
            "code": "model_crashed",
            "message": "it broke",
            "type": "server_error",
            "param": None,
            **facts,
        }
    )
    [item] = response["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "a")
    assert b'code="model_crashed"' in metrics.render()


async def test_a_refusal_before_the_stream_is_an_http_error(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    call = Exchange(app, "POST", PATH, json=body())
    (await fleet.request()).fail(ErrorCode.CONTEXT_LENGTH_EXCEEDED)
    await call.finish()
    assert call.status == 400
    assert call.json["error"]["code"] == "context_length_exceeded"


async def test_log_probabilities_are_in_the_deltas_and_in_the_whole(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    call, submitted = await stream_of(app, fleet, include=[LOGPROBS])
    # The second token's text comes with the third's; the first two wrote no text.
    tokens = [("<think>", ""), ("</think>", ""), ("<", ""), ("b", "<b"), (">", ">")]
    for number, (token, text) in enumerate(tokens):
        push(submitted, text, logprobs=[TokenLogprob(number, token.encode(), -0.5)])
    submitted.finish()
    await call.finish()
    events = parsed(call.body)
    told = [
        each
        for event in events
        if event["type"].endswith("text.delta")
        for each in event["logprobs"]
    ]
    assert [each["token"] for each in told] == ["<", "b", ">"]
    [done] = [event for event in events if event["type"] == f"{TEXT}.done"]
    assert done["logprobs"] == told
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == told


async def test_comments_keep_a_stream_alive(app: ASGIApp, fleet: FakeFleet) -> None:
    assert ResponseEvents(_response(), OutputBuilder(), _forget).keep_alive().startswith(b":")


# --- whatever the pieces are, they add up ---


def _forget(response: OurResponse) -> None:
    pass


def _response() -> OurResponse:
    return new_response(ResponseRequest(model="m", input="Hi"), store=False)


def _stream() -> RequestStream:
    return RequestStream(max_buffer_bytes=None, on_close=lambda: None)


SHORT = st.text(min_size=1, max_size=4)


@st.composite
def answers(draw: st.DrawFn) -> list[tuple[str, Extras | None]]:
    """What the steps of an answer bring: text, reasoning, and calls that never overlap."""
    steps: list[tuple[str, Extras | None]] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "reasoning", "call"]), max_size=5)):
        if kind == "call":
            begin = ToolCallPiece(calls, f"call_{calls}", "weather")
            more = [ToolCallPiece(calls, arguments=text) for text in draw(st.lists(SHORT))]
            steps += [("", Extras(tool_calls=[piece])) for piece in (begin, *more)]
            calls += 1
        else:
            for text in draw(st.lists(SHORT, min_size=1)):
                steps.append((text, None) if kind == "text" else ("", Extras(reasoning=text)))
    return steps


@st.composite
def coalesced(
    draw: st.DrawFn, steps: list[tuple[str, Extras | None]]
) -> list[tuple[str, Extras | None]]:
    """The same steps as a client gets them that is behind at times: joined in random runs."""
    pieces = []
    while steps:
        size = draw(st.integers(1, len(steps)))
        run, steps = steps[:size], steps[size:]
        extras = join_extras([extras for _, extras in run if extras is not None])
        pieces.append(("".join(text for text, _ in run), extras))
    return pieces


FINISHES = [FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS]


@given(data=st.data(), finish=st.sampled_from(FINISHES))
def test_the_deltas_of_any_split_add_up(data: st.DataObject, finish: FinishReason) -> None:
    steps = data.draw(answers())
    pieces = data.draw(coalesced(steps))
    kept: list[OurResponse] = []
    stream = _stream()
    events = ResponseEvents(_response(), OutputBuilder(), kept.append)
    sent = events.first([stream])
    for text, extras in pieces:
        sent += events.piece(0, text, extras)
    sent += events.last(0, finish, stream) + events.end([stream])
    items = _added_up(parsed(sent))
    assert len(kept) == 1
    # Nothing is lost, nothing is doubled, and each kind is in its order.
    texts = "".join(text for text, _ in steps)
    thoughts = "".join(extras.reasoning for _, extras in steps if extras is not None)
    assert "".join(item["content"][0]["text"] for item in items["message"]) == texts
    assert "".join(item["content"][0]["text"] for item in items["reasoning"]) == thoughts
    arguments: dict[str, str] = {}
    for _, extras in steps:
        for piece in extras.tool_calls if extras is not None else ():
            call_id = f"call_{piece.index}"
            arguments[call_id] = arguments.get(call_id, "") + piece.arguments
    calls = {item["call_id"]: item["arguments"] for item in items["function_call"]}
    assert list(calls.items()) == list(arguments.items())


def _added_up(events: list[Any]) -> dict[str, list[Any]]:
    """The output's items by type. Checks every event against what came before it."""
    assert kinds(events[:2]) == BEGIN
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    items: list[Any] = []
    said = ""
    open_item: Any = None
    for event in events[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert open_item is None
            assert event["output_index"] == len(items)
            open_item, said = event["item"], ""
            continue
        assert open_item is not None
        assert event["output_index"] == len(items)
        if kind == "response.output_item.done":
            item = event["item"]
            assert item["id"] == open_item["id"]
            assert said == (
                item["arguments"] if "arguments" in item else item["content"][0]["text"]
            )
            items.append(item)
            open_item = None
            continue
        assert event["item_id"] == open_item["id"]
        if kind.endswith(".delta"):
            assert event["delta"]
            said += event["delta"]
        elif kind == f"{ARGUMENTS}.done":
            assert event["arguments"] == said
        elif kind.endswith("_text.done"):
            assert event["text"] == said
        elif kind == "response.content_part.done":
            assert event["part"]["text"] == said
    assert open_item is None
    assert events[-1]["response"]["output"] == items
    Response.model_validate(events[-1]["response"])
    whole = events[-1]["type"] == "response.completed"
    assert [item["status"] for item in items] == ["completed"] * (len(items) - 1) + (
        ["completed" if whole else "incomplete"] if items else []
    )
    by_type: dict[str, list[Any]] = {"message": [], "reasoning": [], "function_call": []}
    for item in items:
        by_type[item["type"]].append(item)
    return by_type


@given(steps=answers())
def test_a_whole_answer_says_what_its_stream_says(
    steps: list[tuple[str, Extras | None]],
) -> None:
    def output(pieces: list[tuple[str, Extras | None]]) -> list[OutputItem]:
        builder = OutputBuilder()
        for text, extras in pieces:
            builder.feed(text, extras)
        builder.finish(FinishReason.STOP)
        return builder.items

    joined = join_extras([extras for _, extras in steps if extras is not None])
    whole = msgspec.to_builtins(output([("".join(text for text, _ in steps), joined)]))
    streamed = msgspec.to_builtins(output(steps))

    def said(items: list[Any], kind: str) -> list[str]:
        return [
            item["arguments"] if kind == "function_call" else item["content"][0]["text"]
            for item in items
            if item["type"] == kind
        ]

    assert said(whole, "function_call") == said(streamed, "function_call")
    for kind in ("message", "reasoning"):
        assert "".join(said(whole, kind)) == "".join(said(streamed, kind))


@pytest.mark.parametrize(
    ("tokens", "text", "mine", "after"),
    [
        ([b"a", b"b"], "ab", [b"a", b"b"], []),
        ([b"<t>", b"a", b"b", b"c"], "ab", [b"a", b"b"], [b"c"]),
        ([b"xa", b"bc"], "ab", [b"xa", b"bc"], []),
        ([b"\xc3", b"\xa4", b"x"], "ä", [b"\xc3", b"\xa4"], [b"x"]),
        ([b"a", b"", b"b"], "b", [b"b"], []),
    ],
)
def test_tokens_of_a_text(
    tokens: list[bytes], text: str, mine: list[bytes], after: list[bytes]
) -> None:
    found = split_at_text([TokenLogprob(0, token, -1.0) for token in tokens], text)
    assert found is not None
    assert [[token.text for token in part] for part in found] == [mine, after]


def test_tokens_that_do_not_make_a_text() -> None:
    assert split_at_text([TokenLogprob(0, b"a", -1.0)], "b") is None
