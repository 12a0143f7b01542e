"""``/v1/completions``."""

from __future__ import annotations

import math

import httpx
import pytest
from starlette.types import ASGIApp

from protocol.chat import Extras, TokenLogprob
from protocol.errors import ErrorCode
from protocol.messages import Delta, FinishReason
from tests.support.asgi import Exchange, MakeApp, events
from tests.support.fake_fleet import FakeFleet

PATH = "/v1/completions"


def body(prompt: object = "Once", **more: object) -> dict[str, object]:
    return {"model": "m", "prompt": prompt, **more}


async def test_answer(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    value = (await client.post(PATH, json=body(max_tokens=3))).json()
    assert value.pop("id").startswith("cmpl-")
    assert isinstance(value.pop("created"), int)
    assert value.pop("timings")["predicted_n"] == 3
    assert value == {
        "object": "text_completion",
        "model": "m",
        "choices": [{"text": "Hello", "index": 0, "finish_reason": "stop", "logprobs": None}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
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
    [("suffix", "x"), ("best_of", 2)],
)
async def test_refused_by_name(client: httpx.AsyncClient, name: str, value: object) -> None:
    error = (await client.post(PATH, json=body(**{name: value}))).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


async def test_log_probabilities_of_an_echo_are_refused(client: httpx.AsyncClient) -> None:
    error = (await client.post(PATH, json=body(echo=True, logprobs=1))).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "echo")


async def test_each_prompt_has_n_answers_with_seeds_of_their_own(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    request = body(["a", "b"], n=2, seed=2**63 - 1, logprobs=3, cache_prompt=False)
    value = (await client.post(PATH, json=request)).json()
    assert [choice["index"] for choice in value["choices"]] == [0, 1, 2, 3]
    asked = [submitted.request for submitted in fleet.requests]
    assert [generate.prompt for generate in asked] == ["a", "a", "b", "b"]
    assert [generate.sampling.seed for generate in asked] == [2**63 - 1, -(2**63)] * 2
    assert {(generate.top_logprobs, generate.cache_prompt) for generate in asked} == {(3, False)}
    # The prompt of two answers counts once.
    assert (value["usage"]["prompt_tokens"], value["usage"]["completion_tokens"]) == (10, 12)


async def test_log_probabilities_and_their_offsets(app: ASGIApp, fleet: FakeFleet) -> None:
    fleet.script = None
    call = Exchange(app, "POST", PATH, json=body(logprobs=1, stream=True))
    submitted = await fleet.request()
    submitted.accept()
    await call.wait_for_messages(2)
    for sent, (text, logprob) in enumerate((("ab", -0.5), ("c", -math.inf))):
        top = [TokenLogprob(3, b"z", -0.1)]
        found = TokenLogprob(1, text.encode(), logprob, top)
        submitted.stream.push(Delta(0, text, [1], extras=Extras(logprobs=[found])))
        await call.wait_for_messages(3 + sent)
    submitted.finish()
    await call.finish()
    chunks = [chunk["choices"][0] for chunk in events(call.body)[:-1]]
    assert [chunk["text"] for chunk in chunks] == ["ab", "c", ""]
    found_all = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    assert [each for found in found_all for each in found["tokens"]] == ["ab", "c"]
    assert [each for found in found_all for each in found["text_offset"]] == [0, 2]
    assert [each for found in found_all for each in found["token_logprobs"]] == [-0.5, -9999.0]
    assert found_all[0]["top_logprobs"][0] == {"z": -0.1}


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


async def test_a_stream_answers_several_prompts(client: httpx.AsyncClient) -> None:
    request = body(["a", "b"], stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events((await client.post(PATH, json=request)).content)
    assert done == "[DONE]"
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "Hello"
        assert [choice["finish_reason"] for choice in mine][-1] == "stop"
    assert last["usage"]["total_tokens"] == 16


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


async def test_offsets_of_a_client_that_was_behind_count_each_token_once(
    app: ASGIApp, fleet: FakeFleet
) -> None:
    fleet.script = None
    call = Exchange(app, "POST", PATH, json=body(logprobs=0, stream=True))
    submitted = await fleet.request()
    submitted.accept()

    def say(text: str) -> None:
        found = TokenLogprob(5, text.encode(), -0.5)
        submitted.stream.push(Delta(0, text, [1], extras=Extras(logprobs=[found])))

    say("ab")
    await call.wait_for_messages(3)
    call.behind = True
    say("cd")
    await call.wait_for_messages(4)
    call.behind = False
    say("ef")
    submitted.finish()
    await call.finish()
    *chunks, _ = events(call.body)
    found_all = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [found["text_offset"] for found in found_all if found] == [[0], [2], [4]]
