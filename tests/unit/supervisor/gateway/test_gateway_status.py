"""``/admin/health`` and ``/admin/status`` over the fake fleet."""

from __future__ import annotations

from dataclasses import replace

import httpx
import msgspec
from starlette.types import ASGIApp

from supervisor.gateway.status import Status
from supervisor.journal import ConfigReloaded
from supervisor.metrics import Metrics
from tests.support.asgi import Exchange, MakeApp
from tests.support.fake_fleet import FakeFleet, readiness, view


async def test_health_is_an_answer_and_no_status(
    client: httpx.AsyncClient, fleet: FakeFleet
) -> None:
    answer = await client.get("/admin/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "reasons": []})
    fleet.overview.facts = replace(fleet.overview.facts, safe_start="three bad starts")
    answer = await client.get("/admin/health")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "degraded",
        "reasons": [{"code": "safe_start", "message": "three bad starts", "model": None}],
    }


async def test_status_tells_what_there_is_without_secrets(
    make_app: MakeApp, fleet: FakeFleet, metrics: Metrics
) -> None:
    fleet.add(view("q", readiness=readiness("quarantined", "3 crashes"), in_flight=2, queued=3))
    fleet.journal.add(ConfigReloaded(changed=[], needs_restart=[]))
    metrics.request_ended("m", "/v1/chat/completions", "ok")
    metrics.request_ended("m", "/v1/chat/completions", "model_crashed")
    metrics.worker_failed("m", "signal")
    metrics.convicted("m")
    metrics.resumed("m", completed=True)
    metrics.resumed("m", completed=False)
    app = make_app(
        admin_key="secret-a", api_key="secret-i", hub_endpoint="https://me:secret-h@hub.example/x"
    )
    call = Exchange(app, "GET", "/admin/status", headers={"x-admin-key": "secret-a"})
    await call.finish()
    assert call.status == 200
    assert b"secret-" not in call.body
    status = msgspec.json.decode(call.body, type=Status)
    assert status.health.status == "ok"
    assert status.settings["admin_key"] == "(secret)"
    assert status.settings["hub_endpoint"] == "https://hub.example/x"
    assert status.settings["max_queue"] == 64
    assert [(model.id, model.state) for model in status.models] == [
        *(("m", "routable"), ("q", "quarantined")),
    ]
    assert (status.queues.in_flight, status.queues.queued) == (2, 3)
    assert status.versions.backends == {"simulated": "1", "mlx": None}
    assert status.last_event_id == f"{fleet.journal.start_id}-0"
    assert status.recordings.count == 0
    assert status.counters == {
        **{"requests": 2, "requests_ok": 1, "prompt_tokens": 0, "completion_tokens": 0},
        **{"worker_failures": 1, "worker_restarts": 0},
        **{"answers_resumed": 1, "requests_convicted": 1},
    }


async def test_both_need_the_admin_key(make_app: MakeApp) -> None:
    app = make_app(admin_key="a", api_key="i")
    for path in ("/admin/health", "/admin/status"):
        call = Exchange(app, "GET", path, headers={"authorization": "Bearer i"})
        await call.finish()
        assert (call.status, call.json["error"]["code"]) == (403, "invalid_admin_key")


async def test_recordings_are_counted_in_the_metrics(app: ASGIApp, metrics: Metrics) -> None:
    assert metrics.value("opta_lmx_recordings") == 0
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    call = Exchange(
        app, "POST", "/v1/chat/completions", json=body, headers={"x-conversation-id": "talk"}
    )
    await call.finish()
    assert metrics.value("opta_lmx_recordings") == 1
    size = metrics.value("opta_lmx_recordings_bytes")
    assert size is not None
    assert size > len(call.body)
    forget = Exchange(app, "DELETE", f"/v1/stream/{call.headers['x-stream-id']}")
    await forget.finish()
    assert metrics.value("opta_lmx_recordings") == 0
    assert metrics.value("opta_lmx_recordings_bytes") == 0
