"""``POST /admin/models/probe``."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import ASGIApp

from protocol.errors import CodedError, ErrorCode
from supervisor.gate import LoadSpec
from supervisor.probe import TIMEOUT_S, ProbeSpec
from supervisor.views import BackendProbe, ProbeResult
from tests.support.asgi import Exchange
from tests.support.fake_fleet import FakeFleet

PROBE = "/admin/models/probe"
FAILED = ProbeResult(
    model_id="x",
    results=[
        BackendProbe(
            backend="llama",
            backend_version="1",
            outcome="fail",
            code=ErrorCode.MODEL_LOADER_CRASHED,
            reason="killed by SIGSEGV",
        )
    ],
    recommended=None,
    reason="no backend passed: llama: killed by SIGSEGV",
)


async def test_what_fails_is_an_answer(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.found = FAILED
    answer = await client.post(PROBE, json={"model_id": "x"})
    assert answer.status_code == 200
    assert answer.json() == {
        "model_id": "x",
        "results": [
            {
                "backend": "llama",
                "backend_version": "1",
                "outcome": "fail",
                "code": "model_loader_crashed",
                "reason": "killed by SIGSEGV",
                "time_to_load_ms": None,
                "time_to_first_token_s": None,
                "tokens_per_s": None,
                "memory_gb": None,
            }
        ],
        "recommended": None,
        "reason": "no backend passed: llama: killed by SIGSEGV",
    }
    assert fleet.probes == [ProbeSpec(load=LoadSpec(model_id="x"))]


async def test_every_field_reaches_the_fleet(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.found = FAILED
    body = {
        "model_id": "x",
        "path": "/models/x.gguf",
        "backends": ["mlx", "llama"],
        "context_length": 512,
        "allow_unsupported_runtime": True,
        "timeout_s": 30,
    }
    assert (await client.post(PROBE, json=body)).status_code == 200
    nulls = {**dict.fromkeys(body), "model_id": "/models/x.gguf"}
    assert (await client.post(PROBE, json=nulls)).status_code == 200
    load = LoadSpec(
        model_id="x", path="/models/x.gguf", allow_unsupported_runtime=True, context_length=512
    )
    assert fleet.probes == [
        ProbeSpec(load=load, backends=("mlx", "llama"), timeout_s=30.0),
        ProbeSpec(load=LoadSpec(model_id="/models/x.gguf"), timeout_s=TIMEOUT_S),
    ]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "model_id"),
        ({"model_id": "../x"}, "invalid_value", "model_id"),
        ({"model_id": "x", "path": "\n"}, "invalid_value", "path"),
        ({"model_id": "x", "backends": []}, "invalid_value", "backends"),
        ({"model_id": "x", "backends": ["a"] * 17}, "invalid_value", "backends"),
        ({"model_id": "x", "backends": "llama"}, "invalid_type", "backends"),
        ({"model_id": "x", "backend": "llama"}, "unsupported_parameter", "backend"),
        ({"model_id": "x", "timeout_s": 0}, "invalid_value", "timeout_s"),
        ({"model_id": "x", "timeout_s": 1e9}, "invalid_value", "timeout_s"),
        ({"model_id": "x", "context_length": 0}, "invalid_value", "context_length"),
    ],
)
async def test_bad_requests_are_refused_by_field(
    client: httpx.AsyncClient, fleet: FakeFleet, body: dict[str, object], code: str, param: str
) -> None:
    answer = await client.post(PROBE, json=body)
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)
    assert fleet.probes == []


async def test_a_second_probe_is_told_to_come_back(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.refusal = CodedError(ErrorCode.MODEL_CONFLICT, "one at a time", retry_after_s=5.0)
    answer = await client.post(PROBE, json={"model_id": "x"})
    assert answer.status_code == 409
    assert answer.headers["retry-after"] == "5"


async def test_who_leaves_calls_the_probe_off(app: ASGIApp, fleet: FakeFleet) -> None:
    exchange = Exchange(app, "POST", PROBE, json={"model_id": "x"})
    await fleet.probing()
    assert fleet.probes_called_off == 0
    exchange.disconnect()
    await exchange.finish()
    assert fleet.probes_called_off == 1


async def test_only_operators_probe(make_app: object, fleet: FakeFleet) -> None:
    assert callable(make_app)
    transport = httpx.ASGITransport(make_app(admin_key="a", api_key="i"))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        headers = {"authorization": "Bearer i"}
        answer = await client.post(PROBE, json={"model_id": "x"}, headers=headers)
    assert answer.status_code == 403
    assert fleet.probes == []
