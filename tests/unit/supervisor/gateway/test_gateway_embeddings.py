"""``/v1/embeddings`` and ``/v1/rerank``."""

from __future__ import annotations

import base64
import struct

import httpx
import pytest
from starlette.types import ASGIApp

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Embed, Priority
from supervisor.metrics import Metrics
from tests.support.asgi import Exchange
from tests.support.fake_fleet import FakeFleet

EMBEDDINGS = "/v1/embeddings"
RERANK = "/v1/rerank"


def body(value: object = "sea", **more: object) -> dict[str, object]:
    return {"model": "m", "input": value, **more}


def ranked(**more: object) -> dict[str, object]:
    return {"model": "m", "query": "q", "documents": ["a", {"text": "b"}, "c"], **more}


async def test_answer(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.vectors = [[1.0, 0.0], [0.0, -1.0]]
    value = (await client.post(EMBEDDINGS, json=body(["sea", "sky"]))).json()
    assert value == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [1.0, 0.0]},
            {"object": "embedding", "index": 1, "embedding": [0.0, -1.0]},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    assert not fleet.requests[0].streaming


async def test_base64_is_the_floats_as_they_are(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.vectors = [[0.5, 0.25]]
    value = (await client.post(EMBEDDINGS, json=body(encoding_format="base64"))).json()
    assert base64.b64decode(value["data"][0]["embedding"]) == struct.pack("<2f", 0.5, 0.25)


async def test_an_answer_of_many_vectors(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.vectors = [[float(n)] for n in range(2048)]
    value = (await client.post(EMBEDDINGS, json=body(["a"] * 2048))).json()
    assert [each["embedding"] for each in value["data"]] == fleet.vectors


@pytest.mark.parametrize(
    ("value", "inputs"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_inputs(
    client: httpx.AsyncClient, fleet: FakeFleet, value: object, inputs: list[object]
) -> None:
    fleet.vectors = [[1.0]]
    assert (await client.post(EMBEDDINGS, json=body(value))).status_code == 200
    assert fleet.requests[0].embed.inputs == inputs


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (body(""), "invalid_value", "input"),
        (body([]), "invalid_value", "input"),
        (body(["a", ""]), "invalid_value", "input"),
        (body([[]]), "invalid_value", "input"),
        (body([1, "a"]), "invalid_type", "input"),
        (body([[1], "a"]), "invalid_type", "input"),
        (body([-1]), "invalid_value", "input[0]"),
        (body(None), "invalid_type", "input"),
        (body(["a"] * 2049), "invalid_value", "input"),
        (body(encoding_format="int8"), "invalid_value", "encoding_format"),
        (body(dimensions=0), "invalid_value", "dimensions"),
        (body(dimensions="4"), "invalid_type", "dimensions"),
        ({"input": "a"}, "missing_required_parameter", "model"),
        ({"model": "m"}, "missing_required_parameter", "input"),
    ],
)
async def test_bad_requests(
    client: httpx.AsyncClient, fleet: FakeFleet, request_: object, code: str, param: str
) -> None:
    answer = await client.post(EMBEDDINGS, json=request_)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert not fleet.requests


async def test_the_request_as_the_worker_sees_it(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.vectors = [[1.0]]
    headers = {"X-Priority": "low"}
    request = body(dimensions=1, user="me", something_else=3)
    assert (await client.post(EMBEDDINGS, json=request, headers=headers)).status_code == 200
    job = fleet.requests[0].embed
    assert job == Embed(0, ["sea"], dimensions=1, client=job.client, priority=Priority.LOW)
    await client.post(EMBEDDINGS, json=body(user="me"), headers={"x-api-key": "other"})
    assert fleet.requests[1].embed.client == job.client


async def test_what_the_worker_refuses(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.refusal = CodedError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "9 of 8", param="input")
    answer = await client.post(EMBEDDINGS, json=body())
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert (await client.post(EMBEDDINGS, json=body(model="x"))).status_code == 404


async def test_tokens_and_requests_are_counted(
    client: httpx.AsyncClient, fleet: FakeFleet, metrics: Metrics
) -> None:
    fleet.vectors = [[1.0]]
    await client.post(EMBEDDINGS, json=body())
    await client.post(RERANK, json=ranked(documents=["a"]))
    assert metrics.value("opta_lmx_prompt_tokens_total", {"model": "m"}) == 10
    for endpoint in (EMBEDDINGS, RERANK):
        labels = {"model": "m", "endpoint": endpoint, "code": "ok"}
        assert metrics.value("opta_lmx_requests_total", labels) == 1


@pytest.mark.parametrize("path", [EMBEDDINGS, RERANK])
async def test_who_leaves_cancels(app: ASGIApp, fleet: FakeFleet, path: str) -> None:
    exchange = Exchange(app, "POST", path, json=body() if path == EMBEDDINGS else ranked())
    submitted = await fleet.request()
    exchange.disconnect()
    await submitted.cancellation.wait()
    await exchange.finish()


async def test_a_deadline_ends_it(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    answer = await client.post(EMBEDDINGS, json=body(), headers={"X-Request-Timeout": "0.05"})
    assert answer.status_code == 408
    assert fleet.requests[0].cancelled


async def test_ranks(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.vectors = [[0.25], [0.75], [0.25]]
    value = (await client.post(RERANK, json=ranked())).json()
    assert value == {
        "model": "m",
        "results": [
            {"index": 1, "relevance_score": 0.75},
            {"index": 0, "relevance_score": 0.25},
            {"index": 2, "relevance_score": 0.25},
        ],
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    job = fleet.requests[0].embed
    assert (job.query, job.inputs) == ("q", ["a", "b", "c"])


async def test_the_best_with_their_texts(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.vectors = [[0.25], [0.75], [0.5]]
    value = (await client.post(RERANK, json=ranked(top_n=2, return_documents=True))).json()
    assert value["results"] == [
        {"index": 1, "relevance_score": 0.75, "document": {"text": "b"}},
        {"index": 2, "relevance_score": 0.5, "document": {"text": "c"}},
    ]
    value = (await client.post(RERANK, json=ranked(top_n=9))).json()
    assert len(value["results"]) == 3


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (ranked(query=""), "invalid_value", "query"),
        (ranked(query=None), "invalid_type", "query"),
        (ranked(documents=[]), "invalid_value", "documents"),
        (ranked(documents=["a"] * 2049), "invalid_value", "documents"),
        (ranked(documents=[{"title": "a"}]), "missing_required_parameter", "documents[0].text"),
        (ranked(documents=[1]), "invalid_type", "documents[0]"),
        (ranked(top_n=0), "invalid_value", "top_n"),
        (ranked(rank_fields=["title"]), "unsupported_parameter", "rank_fields"),
        (ranked(max_tokens_per_doc=4), "unsupported_parameter", "max_tokens_per_doc"),
    ],
)
async def test_bad_rankings(
    client: httpx.AsyncClient, fleet: FakeFleet, request_: object, code: str, param: str
) -> None:
    answer = await client.post(RERANK, json=request_)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert not fleet.requests
