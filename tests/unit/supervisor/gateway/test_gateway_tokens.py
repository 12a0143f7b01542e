"""``/tokenize`` and ``/detokenize``, and how long an inquiry is worth asking."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from protocol.chat import ChatMessage, Tool
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Detokenize, Generate, Priority, Tokenize
from supervisor.metrics import Metrics
from tests.support.asgi import Exchange
from tests.support.fake_fleet import FakeFleet

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
CHAT = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


async def error_of(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json={"model": "m", **body})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "ab"}, [1, 97, 98]),
        ({"prompt": "ab", "add_special_tokens": False}, [97, 98]),
        ({"prompt": "ab", "add_special": False}, [97, 98]),
        ({"content": "ab"}, [97, 98]),
        ({"content": "ab", "add_special": True}, [1, 97, 98]),
        ({"content": "ab", "add_special_tokens": True, "parse_special": True}, [1, 97, 98]),
        ({"content": "", "with_pieces": False}, []),
    ],
)
async def test_text(client: httpx.AsyncClient, body: dict[str, Any], tokens: list[int]) -> None:
    answer = await client.post(TOKENIZE, json={"model": "m", **body})
    assert answer.json() == {"tokens": tokens, "count": len(tokens), "max_model_len": 2048}


async def test_a_chat_with_its_tools(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    body = {
        "model": "m",
        "messages": CHAT,
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
        "add_generation_prompt": True,
    }
    answer = await client.post(TOKENIZE, json=body, headers={"X-Priority": "low"})
    assert answer.status_code == 200
    [asked] = fleet.inquiries
    assert isinstance(asked, Tokenize)
    assert asked.generate == Generate(
        0,
        messages=[ChatMessage("user", "Hi")],
        tools=[Tool("f")],
        template_options={"enable_thinking": False},
        client=asked.generate.client,
        priority=Priority.LOW,
    )
    assert asked.generate.client
    assert not asked.count_only


async def test_text_of_tokens(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    answer = await client.post(DETOKENIZE, json={"model": "m", "tokens": [72, 105]})
    assert answer.json() == {"prompt": "Hi", "content": "Hi"}
    [asked] = fleet.inquiries
    assert isinstance(asked, Detokenize)
    assert (asked.tokens, bool(asked.client)) == ([72, 105], True)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "prompt"),
        ({"prompt": "a", "content": "b"}, "invalid_value", "content"),
        ({"prompt": "a", "messages": CHAT}, "invalid_value", "messages"),
        ({"prompt": "a", "tools": [TOOL]}, "invalid_value", "tools"),
        ({"prompt": [1]}, "invalid_type", "prompt"),
        ({"prompt": "a", "parse_special": False}, "unsupported_parameter", "parse_special"),
        ({"prompt": "a", "with_pieces": True}, "unsupported_parameter", "with_pieces"),
        ({"messages": CHAT, "return_token_strs": True}, "unsupported_parameter", None),
        ({"messages": CHAT, "add_generation_prompt": False}, "unsupported_parameter", None),
        ({"messages": CHAT, "chat_template": "x"}, "unsupported_parameter", "chat_template"),
        ({"messages": CHAT, "add_special": True}, "unsupported_parameter", "add_special_tokens"),
        ({"messages": CHAT, "chat_template_kwargs": {"tools": 1}}, "invalid_value", None),
        ({"messages": []}, "invalid_value", "messages"),
    ],
)
async def test_what_cannot_be_tokenised(
    client: httpx.AsyncClient, body: dict[str, Any], code: str, param: str | None
) -> None:
    error = await error_of(client, TOKENIZE, body)
    assert error["code"] == code
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("tokens", "code"),
    [
        (None, "invalid_type"),
        ([-1], "invalid_value"),
        (["a"], "invalid_type"),
        ("a", "invalid_type"),
    ],
)
async def test_what_are_no_tokens(client: httpx.AsyncClient, tokens: object, code: str) -> None:
    assert (await error_of(client, DETOKENIZE, {"tokens": tokens}))["code"] == code


@pytest.mark.parametrize(
    ("path", "body"), [(TOKENIZE, {"prompt": "a"}), (DETOKENIZE, {"tokens": [1]})]
)
async def test_refusals_of_the_fleet(
    client: httpx.AsyncClient, fleet: FakeFleet, path: str, body: dict[str, Any]
) -> None:
    answer = await client.post(path, json={"model": "other", **body})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    fleet.refusal = CodedError(ErrorCode.MODEL_NOT_READY, "loading", retry_after_s=2.0)
    answer = await client.post(path, json={"model": "m", **body})
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "2")


async def test_a_client_that_leaves_calls_the_inquiry_off(
    app: ASGIApp, fleet: FakeFleet, metrics: Metrics
) -> None:
    fleet.script = None
    call = Exchange(app, "POST", TOKENIZE, json={"model": "m", "prompt": "a"})
    await fleet.inquiry()
    call.disconnect()
    await call.finish()
    await asyncio.sleep(0)
    assert fleet.inquiries_called_off == 1
    labels = {"model": "m", "endpoint": TOKENIZE, "code": "client_disconnected"}
    assert metrics.value("opta_lmx_requests_total", labels) == 1


@pytest.mark.parametrize("seconds", ["0.02", "0.000001"])
async def test_a_deadline_calls_the_inquiry_off(
    client: httpx.AsyncClient, fleet: FakeFleet, seconds: str
) -> None:
    fleet.script = None
    headers = {"X-Request-Timeout": seconds}
    answer = await client.post(DETOKENIZE, json={"model": "m", "tokens": [1]}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")
    await asyncio.sleep(0)
    assert fleet.inquiries_called_off == len(fleet.inquiries)


async def test_an_answer_in_time_has_no_deadline(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    headers = {"X-Request-Timeout": "5"}
    answer = await client.post(DETOKENIZE, json={"model": "m", "tokens": [97]}, headers=headers)
    assert answer.json()["prompt"] == "a"
