"""The document of the routes: complete, and true to what the server answers."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import pytest
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from protocol.errors import ErrorCode
from supervisor.gateway.openapi import BODIES
from tests.support.asgi import MakeApp

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, Any] = answer.json()
    return found


def fits(document: dict[str, Any], name: str, value: object) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def test_every_route_that_takes_a_body_names_its_type(app: ASGIApp) -> None:
    assert isinstance(app, Router)
    takers = {
        route.path
        for route in app.routes
        if isinstance(route, Route) and "POST" in getattr(route.endpoint, "methods", ())
    }
    assert takers - BODIES.keys() == set()
    assert BODIES.keys() - {getattr(route, "path", "") for route in app.routes} == set()


def test_every_route_is_described(app: ASGIApp, document: dict[str, Any]) -> None:
    assert isinstance(app, Router)
    paths = {getattr(route, "path", "").replace(":path", "") for route in app.routes}
    assert document["paths"].keys() == paths
    assert document["paths"]["/admin/models/{id}/release"].keys() == {"post"}
    assert document["paths"]["/admin/models/{id}"].keys() == {"get", "delete"}
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    assert len({each["operationId"] for each in operations}) == len(operations)


def test_bodies_are_those_of_the_decoders(document: dict[str, Any]) -> None:
    operation = document["paths"]["/v1/chat/completions"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert fits(document, "ChatRequest", {**CHAT, "temperature": 2, "stop": ["a"]})
    for wrong in ({"temperature": 3}, {"n": 0}, {"messages": [{"role": "king"}]}):
        assert not fits(document, "ChatRequest", {**CHAT, **wrong})
    assert not fits(document, "LoadRequest", {"model_id": "m", "paht": "x"})


async def test_answers_fit_their_types(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert fits(document, "ChatCompletion", answer.json())
    text = await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
    assert fits(document, "TextCompletion", text.json())
    assert fits(document, "Model", (await client.get("/v1/models/m")).json())
    assert fits(document, "ModelView", (await client.get("/admin/models/m")).json())
    refused = await client.post("/v1/completions", json={"model": "x", "prompt": "x"})
    assert fits(document, "ErrorEnvelope", refused.json())
    responses = document["paths"]["/v1/completions"]["post"]["responses"]
    assert str(refused.status_code) in responses
    assert ErrorCode.MODEL_NOT_FOUND in responses["404"]["description"]


async def test_it_is_open_where_the_rest_has_keys(make_app: MakeApp) -> None:
    transport = httpx.ASGITransport(make_app(api_key="a", admin_key="b"))
    async with httpx.AsyncClient(transport=transport, base_url="http://box.lan") as client:
        document = (await client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/models"]["get"]
    assert operation["security"] == [{}, {"bearer": []}, {"apiKey": []}]
    assert "401" in operation["responses"]
