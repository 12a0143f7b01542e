"""``/v1/completions``."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import ASGIApp

from protocol.errors import ErrorCode
from protocol.messages import FinishReason
from tests.support.asgi import Exchange, MakeApp, events
from tests.support.fake_fleet import FakeFleet

PATH = "/v1/completions"


def body(prompt: object = "Once", **more: object) -> dict[str, object]:
    return {"model": "m", "prompt": prompt, **more}


async def test_answer(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    value = (await client.post(PATH, json=body(max_tokens=3))).json()
    assert value.pop("id").startswith("cmpl-")
    assert isinstance(value.pop("created"), int)
    assert value == {
        "object": "text_completion",
        "model": "m",
        "choices": [{"text": "Hello", "index": 0, "finish_reason": "stop", "logprobs": None}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "system_fingerprint": "simulated-1.0",
    }
    assert fleet.requests[0].request.prompt == "Once"
    assert fleet.requests[0].request.max_tokens == 3
    assert fleet.requests[0].request.messages is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        ([1, 2, 3], [[1, 2, 3]]),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_prompts(
    client: httpx.AsyncClient, fleet: FakeFleet, prompt: object, prompts: list[object]
) -> None:
    value = (await client.post(PATH, json=body(prompt))).json()
    assert [submitted.request.prompt for submitted in fleet.requests] == prompts
    assert [choice["index"] for choice in value["choices"]] == list(range(len(prompts)))
    assert value["usage"]["total_tokens"] == 8 * len(prompts)


@pytest.mark.parametrize(
    ("prompt", "code", "param"),
    [
        ([], "invalid_value", "prompt"),
        ([[]], "invalid_value", "prompt"),
        ([1, "a"], "invalid_type", "prompt"),
        ([[1], "a"], "invalid_type", "prompt"),
        ([-1], "invalid_value", "prompt[0]"),
        ([1.5], "invalid_type", "prompt[0]"),
        (None, "invalid_type", "prompt"),
        (3, "invalid_type", "prompt"),
        (["a"] * 5, "invalid_value", "prompt"),
    ],
)
async def test_bad_prompts(make_app: MakeApp, prompt: object, code: str, param: str) -> None:
    exchange = Exchange(make_app(max_queue=4), "POST", PATH, json=body(prompt))
    await exchange.finish()
    assert exchange.status == 400
    assert (exchange.json["error"]["code"], exchange.json["error"]["param"]) == (code, param)


@pytest.mark.parametrize(
    ("name", "value"),
    [("suffix", "x"), ("echo", True), ("logprobs", 0), ("logprobs", 5), ("best_of", 2), ("n", 2)],
)
async def test_refused_by_name(client: httpx.AsyncClient, name: str, value: object) -> None:
    error = (await client.post(PATH, json=body(**{name: value}))).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


async def test_stream(client: httpx.AsyncClient) -> None:
    request = body(stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events((await client.post(PATH, json=request)).content)
    assert done == "[DONE]"
    assert [chunk["choices"] for chunk in chunks] == [
        [{"text": "Hello", "index": 0, "logprobs": None, "finish_reason": None}],
        [{"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"}],
    ]
    assert all(chunk["object"] == "text_completion" for chunk in chunks)
    assert last["usage"]["total_tokens"] == 8


async def test_a_stream_answers_one_prompt(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    answer = await client.post(PATH, json=body(["a", "b"], stream=True))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert fleet.requests == []


async def test_one_failed_prompt_gives_the_others_up(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    exchange = Exchange(app, "POST", PATH, json=body(["a", "b", "c"]))
    await fleet.request(2)
    first, second, third = fleet.requests
    first.accept()
    first.say("x", FinishReason.STOP)
    second.fail(ErrorCode.MODEL_CRASHED)
    await exchange.finish()
    assert exchange.status == 503
    assert (first.cancelled, second.cancelled, third.cancelled) == (False, False, True)


async def test_a_full_queue_takes_none_of_the_prompts(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script, fleet.capacity = None, 2
    exchange = Exchange(app, "POST", PATH, json=body(["a", "b", "c"]))
    await exchange.finish()
    assert exchange.status == 429
    assert [submitted.cancelled for submitted in fleet.requests] == [True, True]


async def test_disconnect_cancels_every_prompt(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    exchange = Exchange(app, "POST", PATH, json=body(["a", "b"]))
    await fleet.request(1)
    exchange.disconnect()
    await exchange.finish()
    assert all(submitted.cancelled for submitted in fleet.requests)
