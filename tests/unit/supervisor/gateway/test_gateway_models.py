"""``/v1/models``, probes and metrics: what the outside learns about models."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_fleet import FakeFleet, readiness, view


async def test_only_routable_models_are_listed(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.add(view("org/loading", "loading"))
    fleet.add(view("org/leaving", unloading=True))
    value = (await client.get("/v1/models")).json()
    assert value["object"] == "list"
    [model] = value["data"]
    assert model["id"] == "m"
    assert model["object"] == "model"
    assert model["created"] == 1_700_000_000
    assert model["owned_by"] == "opta-lmx"
    assert model["readiness"]["state"] == "routable"


async def test_all_tracked_models_are_listed_on_demand(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.add(view("org/loading", "loading"))
    listed = (await client.get("/v1/models?all=true")).json()["data"]
    states = {model["id"]: model["readiness"]["state"] for model in listed}
    assert states == {"m": "routable", "org/loading": "loading"}


async def test_a_model_says_what_it_can_do(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    text = {"kind": "generate", "tool_format": "hermes", "reasoning_format": "think"}
    fleet.add(view("plain", kind="generate", has_chat_template=False))
    fleet.add(view("chat", has_chat_template=True, **text))
    fleet.add(view("vectors", kind="embed", dimensions=384, has_chat_template=False))
    fleet.add(view("ranks", kind="rerank", has_chat_template=False))
    fleet.add(view("unknown", "loading"))
    plain = (await client.get("/v1/models/plain")).json()
    chat = (await client.get("/v1/models/chat")).json()
    assert plain["capabilities"] == ["completion", "json_schema", "logprobs"]
    assert set(chat["capabilities"]) - set(plain["capabilities"]) == {"chat", "tools", "reasoning"}
    assert (chat["tool_format"], chat["reasoning_format"]) == ("hermes", "think")
    vectors = (await client.get("/v1/models/vectors")).json()
    assert (vectors["capabilities"], vectors["dimensions"]) == (["embedding"], 384)
    assert (await client.get("/v1/models/ranks")).json()["capabilities"] == ["rerank"]
    listed = (await client.get("/v1/models?all=true")).json()["data"]
    assert [each["capabilities"] for each in listed if each["id"] == "unknown"] == [[]]


@pytest.mark.parametrize("written", ["org/name:q4", "org%2Fname:q4", "org%2Fname%3Aq4"])
async def test_ids_with_slashes(client: httpx.AsyncClient, fleet: FakeFleet, written: str) -> None:
    fleet.add(view("org/name:q4"))
    for path in (f"/v1/models/{written}", f"/admin/models/{written}"):
        answer = await client.get(path)
        assert answer.status_code == 200
        assert answer.json()["id"] == "org/name:q4"


async def test_a_model_that_cannot_be_used_says_why(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    fleet.add(view("a", "loading"))
    fleet.add(view("b", readiness=readiness("quarantined", "3 crashes"), last_incident_id="i"))
    fleet.add(view("c", unloading=True))
    loading, unstable, leaving, unknown = [
        await client.get(f"/v1/models/{model_id}") for model_id in "abcd"
    ]
    assert (loading.status_code, loading.json()["error"]["code"]) == (409, "model_not_ready")
    assert loading.headers["retry-after"] == "1"
    assert (unstable.status_code, unstable.json()["error"]["code"]) == (409, "model_unstable")
    assert "3 crashes" in unstable.json()["error"]["message"]
    assert unstable.json()["error"]["incident_id"] == "i"
    assert (leaving.status_code, leaving.json()["error"]["code"]) == (409, "model_not_ready")
    assert "retry-after" not in leaving.headers
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_healthz(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.views.clear()
    answer = await client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert (await client.head("/healthz")).status_code == 200


async def test_readyz(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.add(view("other", "loading"))
    answer = await client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "models": {"m": "routable", "other": "loading"}}
    del fleet.views["m"]
    answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    value = answer.json()
    assert value["status"] == "not_ready"
    assert value["reason"] == "no model is routable: other is loading"
    assert value["error"]["code"] == "model_not_ready"
    assert set(value["error"]) == {"message", "type", "param", "code"}
    fleet.views.clear()
    assert (await client.get("/readyz")).json()["reason"] == "no model is loaded"


async def test_metrics(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.add(view("m", in_flight=2, queued=3))
    await client.get("/healthz")
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["opta_lmx_in_flight", "m"] == 2
    assert samples["opta_lmx_queued", "m"] == 3
    assert samples["opta_lmx_model_state", "m", "routable"] == 1
    assert samples["opta_lmx_model_state", "m", "quarantined"] == 0
    assert samples["opta_lmx_requests_total", "", "/healthz", "ok"] == 1
    fleet.views.clear()
    assert "opta_lmx_in_flight{" not in (await client.get("/metrics")).text


async def test_unknown_routes_share_one_label(client: httpx.AsyncClient) -> None:
    for number in range(3):
        await client.get(f"/scan/{number}")
    text = (await client.get("/metrics")).text
    assert 'opta_lmx_requests_total{code="not_found",endpoint="",model=""} 3.0' in text
    assert "/scan" not in text
