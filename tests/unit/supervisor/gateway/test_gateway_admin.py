"""``/admin/models``."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import ASGIApp

from protocol.errors import CodedError, ErrorCode
from supervisor.gate import LoadSpec
from tests.support.asgi import Exchange
from tests.support.fake_fleet import FakeFleet, readiness, view

MODEL_FIELDS = {
    "id",
    "path",
    "backend",
    "backend_version",
    "pid",
    "generation",
    "readiness",
    "unloading",
    "memory_gb",
    "memory_planned_gb",
    "loaded_at",
    "context_length",
    "request_count",
    "in_flight",
    "queued",
    "last_used_at",
    "keep_alive_sec",
    "pinned",
    "last_incident_id",
    "isolating",
    "kind",
    "dimensions",
    "has_chat_template",
    "tool_format",
    "reasoning_format",
}
LOAD = "/admin/models/load"


async def test_load(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.load_may_end.set()
    answer = await client.post(LOAD, json={"model_id": "org/new"})
    assert answer.status_code == 200
    value = answer.json()
    assert value["readiness"].pop("updated_at")
    assert value == {
        "success": True,
        "model_id": "org/new",
        "memory_after_load_gb": 0.5,
        "time_to_load_ms": 12.5,
        "readiness": {
            "state": "routable",
            "reason": "ready",
            "crash_count": 0,
            "retry_at": None,
            "code": None,
            "probation": False,
        },
    }
    assert fleet.loads == [LoadSpec(model_id="org/new")]


async def test_every_field_reaches_the_fleet(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.load_may_end.set()
    request = {
        "model_id": "x",
        "path": "/models/x.gguf",
        "backend": "llama",
        "allow_unsupported_runtime": True,
        "auto_download": False,
        "keep_alive_sec": 60,
        "context_length": 4096,
        "tool_format": "hermes",
        "draft_model": "small",
        "wait": None,
    }
    assert (await client.post(LOAD, json=request)).status_code == 200
    assert fleet.loads == [
        LoadSpec(
            model_id="x",
            path="/models/x.gguf",
            backend="llama",
            allow_unsupported_runtime=True,
            keep_alive_sec=60,
            context_length=4096,
            tool_format="hermes",
            draft_model="small",
        )
    ]


async def test_load_without_waiting(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    answer = await client.post(LOAD, json={"model_id": "new", "wait": False})
    assert answer.status_code == 202
    value = answer.json()
    assert value["success"] is True
    assert value["model_id"] == "new"
    assert value["status"] == "loading"
    assert value["readiness"]["state"] == "loading"


async def test_a_loaded_model_is_not_said_to_be_loading(client: httpx.AsyncClient) -> None:
    answer = await client.post(LOAD, json={"model_id": "m", "wait": False})
    assert answer.status_code == 200
    assert answer.json()["readiness"]["state"] == "routable"
    assert answer.json()["memory_after_load_gb"] == 0.5


async def test_the_load_goes_on_without_its_client(app: ASGIApp, fleet: FakeFleet) -> None:
    exchange = Exchange(app, "POST", LOAD, json={"model_id": "new"})
    await fleet.loading()
    exchange.disconnect()
    fleet.load_may_end.set()
    await exchange.finish()
    assert fleet.finished_loads == 1


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ErrorCode.MODEL_UNSTABLE, 409),
        (ErrorCode.MODEL_INCOMPLETE, 409),
        (ErrorCode.MODEL_UNSUPPORTED_ARCH, 422),
        (ErrorCode.MODEL_NOT_FOUND, 404),
        (ErrorCode.SHUTTING_DOWN, 503),
    ],
)
async def test_a_load_that_fails_says_how(
    client: httpx.AsyncClient, fleet: FakeFleet, code: ErrorCode, status: int
) -> None:
    fleet.refusal = CodedError(code, "because")
    for wait in (True, False):
        answer = await client.post(LOAD, json={"model_id": "new", "wait": wait})
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code.value


@pytest.mark.parametrize(
    ("request_body", "code", "param"),
    [
        ({}, "missing_required_parameter", "model_id"),
        ({"model_id": ""}, "invalid_value", "model_id"),
        ({"model_id": 1}, "invalid_type", "model_id"),
        ({"model_id": "x", "keep_alive_sec": -1}, "invalid_value", "keep_alive_sec"),
        ({"model_id": "x", "context_length": 0}, "invalid_value", "context_length"),
        ({"model_id": "x", "allow_unsupported_runtime": "yes"}, "invalid_type", None),
        ({"model_id": "x", "wait": 1}, "invalid_type", "wait"),
        ({"model_id": "x", "contxt_length": 1}, "unsupported_parameter", "contxt_length"),
        ({"model_id": "x", "path": "/a\0b"}, "invalid_value", "path"),
        ({"model_id": "x", "path": "/" * 5000}, "invalid_value", "path"),
        ([], "invalid_type", None),
    ],
)
async def test_bad_loads(
    client: httpx.AsyncClient, request_body: object, code: str, param: str | None
) -> None:
    answer = await client.post(LOAD, json=request_body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == code
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "model_id",
    [
        *("/a\0b", "/" * 4097, "a\nb", "a\x7f", "a" * 257),
        *("a/", "a//b", "a/./b", "..", "a/../b", "a:../b"),
        *("load", "unload", "compatibility", "available", "download", "downloads", "probe"),
        *("compatibility/recommendations", "compatibility/regressions"),
        *("load/confirm", "download/x", "download/x/progress"),
    ],
)
async def test_ids_that_could_not_be_addressed(
    client: httpx.AsyncClient, fleet: FakeFleet, model_id: str
) -> None:
    answer = await client.post(LOAD, json={"model_id": model_id, "wait": False})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "model_id")
    assert not fleet.loads


@pytest.mark.parametrize("model_id", ["org/name:file", "a b", "loads", "a..b", "ü", "/a/../b.gguf"])
async def test_ids_that_are_good(client: httpx.AsyncClient, model_id: str) -> None:
    answer = await client.post(LOAD, json={"model_id": model_id, "wait": False})
    assert answer.status_code == 202


async def test_unload_takes_no_unknown_fields(client: httpx.AsyncClient) -> None:
    answer = await client.post("/admin/models/unload", json={"model_id": "m", "force": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "force"


async def test_unload(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    answer = await client.post("/admin/models/unload", json={"model_id": "m"})
    assert answer.status_code == 200
    assert answer.json() == {"success": True, "model_id": "m", "readiness": None}
    assert fleet.views == {}
    answer = await client.post("/admin/models/unload", json={"model_id": "m"})
    assert answer.status_code == 404


@pytest.mark.parametrize("written", ["org/release", "org%2Frelease", "m"])
async def test_release(client: httpx.AsyncClient, fleet: FakeFleet, written: str) -> None:
    model_id = written.replace("%2F", "/")
    path = f"/admin/models/{written}/release"
    fleet.add(view(model_id))
    assert (await client.post(path)).json()["error"]["code"] == "model_conflict"
    fleet.add(view(model_id, readiness=readiness("quarantined")))
    assert (await client.get(f"/admin/models/{written}")).json()["id"] == model_id
    answer = await client.post(path)
    assert answer.status_code == 200
    assert answer.json()["model_id"] == model_id
    assert (await client.post(path)).status_code == 404


async def test_list(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    fleet.add(view("a", "quarantined"))
    value = (await client.get("/admin/models")).json()
    assert [model["id"] for model in value["models"]] == ["a", "m"]
    assert value["loaded"] == [value["models"][1]]
    assert value["count"] == 2


async def test_model_object_has_every_field(client: httpx.AsyncClient) -> None:
    value = (await client.get("/admin/models/m")).json()
    assert set(value) == MODEL_FIELDS
