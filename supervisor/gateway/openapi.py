"""``/openapi.json``: the routes there are, with the types that their bodies are decoded into.

Nothing is written twice: paths, methods and sides come from the routes, bodies from the
structs, statuses and codes from the table of errors. What a type cannot say, such as which
documented fields are refused, is in docs/api.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import msgspec
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from protocol.errors import ErrorCode
from supervisor.downloads.operation import DownloadView
from supervisor.gateway.admin import LoadRequest, UnloadRequest
from supervisor.gateway.anthropic.answers import Message
from supervisor.gateway.anthropic.messages import TokenCount
from supervisor.gateway.anthropic.parameters import MessageRequest, PromptRequest
from supervisor.gateway.auth import Side
from supervisor.gateway.downloads import CONFIRM, PROGRESS, ConfirmRequest, DownloadRequest
from supervisor.gateway.endpoint import Call, Endpoint, Gateway, Handler
from supervisor.gateway.errors import JSON_TYPE, status_of
from supervisor.gateway.events import EVENTS
from supervisor.gateway.openai import responses_answers
from supervisor.gateway.openai.answers import ChatCompletion, TextCompletion
from supervisor.gateway.openai.chat import ChatRequest
from supervisor.gateway.openai.completions import CompletionRequest
from supervisor.gateway.openai.embeddings import EmbeddingRequest
from supervisor.gateway.openai.models import Model
from supervisor.gateway.openai.responses_request import ResponseRequest
from supervisor.gateway.presets import Presets
from supervisor.gateway.probe import ProbeRequest
from supervisor.gateway.reload import RELOAD, Reloaded
from supervisor.gateway.rerank import Ranking, RerankRequest
from supervisor.gateway.status import Status
from supervisor.gateway.tokens import DetokenizeRequest, Text, TokenizeRequest, Tokens
from supervisor.gateway.websocket import CHAT_STREAM
from supervisor.health import Health
from supervisor.views import LoadResult, ModelView, ProbeResult

OPENAPI = "/openapi.json"

_SCHEMAS = "#/components/schemas/{name}"


class Error(msgspec.Struct):
    """What every error says; some say more, see docs/api.md."""

    message: str
    type: str
    param: str | None
    code: ErrorCode


class ErrorEnvelope(msgspec.Struct):
    error: Error


class AnthropicError(msgspec.Struct, tag="error"):
    error: dict[str, Any]
    request_id: str


class Body(NamedTuple):
    """What a route takes and answers, and whether the answer may be a stream."""

    request: type[msgspec.Struct] | None
    answer: type[msgspec.Struct] | None = None
    streams: bool = False
    error: type[msgspec.Struct] = ErrorEnvelope


#: By path, as in the routes; every route that reads a body is here.
BODIES: Mapping[str, Body] = {
    "/v1/chat/completions": Body(ChatRequest, ChatCompletion, streams=True),
    "/v1/completions": Body(CompletionRequest, TextCompletion, streams=True),
    "/v1/messages": Body(MessageRequest, Message, streams=True, error=AnthropicError),
    "/v1/messages/count_tokens": Body(PromptRequest, TokenCount, error=AnthropicError),
    "/v1/responses": Body(ResponseRequest, responses_answers.Response, streams=True),
    "/v1/responses/{id}": Body(None, responses_answers.Response, streams=True),
    "/v1/responses/{id}/cancel": Body(None, responses_answers.Response),
    "/v1/stream/{id}": Body(None, streams=True),
    "/v1/requests/{id}/cancel": Body(None),
    "/v1/embeddings": Body(EmbeddingRequest),
    "/v1/rerank": Body(RerankRequest, Ranking),
    "/tokenize": Body(TokenizeRequest, Tokens),
    "/detokenize": Body(DetokenizeRequest, Text),
    "/v1/models/{id:path}": Body(None, Model),
    "/admin/presets": Body(None, Presets),
    RELOAD: Body(None, Reloaded),
    EVENTS: Body(None, streams=True),
    "/admin/health": Body(None, Health),
    "/admin/status": Body(None, Status),
    "/admin/models/load": Body(LoadRequest, LoadResult),
    CONFIRM: Body(ConfirmRequest),
    "/admin/models/download": Body(DownloadRequest),
    PROGRESS: Body(None, DownloadView, streams=True),
    "/admin/models/download/{id}": Body(None, DownloadView),
    "/admin/models/unload": Body(UnloadRequest),
    "/admin/models/probe": Body(ProbeRequest, ProbeResult),
    "/admin/models/{id:path}/release": Body(None),
    "/admin/models/{id:path}": Body(None, ModelView),
}

_References = Mapping[type[msgspec.Struct] | None, dict[str, Any]]

_FILTERS = ("model", "backend")
#: Parameters in the query, by path.
_QUERIES: Mapping[str, Sequence[str]] = {
    "/v1/models": ("all",),
    "/admin/models/compatibility": (*_FILTERS, "outcome", "since", "limit"),
    "/admin/models/compatibility/recommendations": _FILTERS,
    "/admin/models/compatibility/regressions": _FILTERS,
    EVENTS: ("from", "model", "kind", "follow"),
    "/admin/incidents": ("model", "limit"),
    "/v1/responses/{id}": ("stream", "starting_after"),
    "/v1/stream/{id}": ("from",),
    "/v1/responses/{id}/input_items": ("order", "after", "limit"),
}

#: What may have lost its first events.
_REPLAYS = ("/v1/stream/{id}", "/v1/responses/{id}")

_READING = (400, 408, 413, 415)
_OF_MODELS = (404, 409, 422)
_OF_REQUESTS = (429, 503)
_OF_DOWNLOADS = (502, 507)
#: What may begin a download.
_DOWNLOADING = ("/admin/models/load", CONFIRM, "/admin/models/download")


_SERVED_BY: Mapping[str, Any] = {
    "description": "the id of the model that has answered, if that was known beforehand",
    "schema": {"type": "string"},
}


_STREAM_ID: Mapping[str, Any] = {
    "description": "by which a stream is found again, if it was asked for with X-Conversation-Id",
    "schema": {"type": "string"},
}


class _Scheme(NamedTuple):
    """A way to present a key."""

    name: str
    definition: dict[str, str]


_BEARER = _Scheme("bearer", {"type": "http", "scheme": "bearer"})
_API_KEY = _Scheme("apiKey", {"type": "apiKey", "in": "header", "name": "X-Api-Key"})
_ADMIN_KEY = _Scheme("adminKey", {"type": "apiKey", "in": "header", "name": "X-Admin-Key"})
_SCHEMES: Mapping[Side, Sequence[_Scheme]] = {
    Side.OPEN: (),
    Side.INFERENCE: (_BEARER, _API_KEY),
    Side.ADMIN: (_BEARER, _ADMIN_KEY),
    Side.METRICS: (_BEARER, _API_KEY, _ADMIN_KEY),
}


def describe(routes: Sequence[BaseRoute], version: str) -> Handler:
    """A handler that answers with the document of these routes."""

    @cache
    def body() -> bytes:
        return msgspec.json.encode(document(routes, version))

    async def openapi(_gateway: Gateway, _call: Call) -> Response:
        return Response(body(), media_type=JSON_TYPE)

    return openapi


def document(routes: Iterable[BaseRoute], version: str) -> dict[str, Any]:
    types: dict[type[msgspec.Struct] | None, None] = {}
    for each in (Body(None), *BODIES.values()):
        types |= dict.fromkeys((each.request, each.answer, each.error))
    types.pop(None)
    schemas, components = msgspec.json.schema_components(types, ref_template=_SCHEMAS)
    # Two types of one name have longer ones there.
    references = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not isinstance(route, Route) or not isinstance(route.endpoint, Endpoint):
            continue
        operations = paths.setdefault(route.path.replace(":path}", "}"), {})
        for method in route.endpoint.methods:
            if method != "HEAD" and (route.methods is None or method in route.methods):
                operations[method.lower()] = _operation(
                    route.path, method, route.endpoint.side, references
                )
    schemes = {scheme.name: scheme.definition for scheme in (_BEARER, _API_KEY, _ADMIN_KEY)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Opta-LMX", "version": version},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": schemes},
    }


def _operation(path: str, method: str, side: Side, references: _References) -> dict[str, Any]:
    body = BODIES.get(path, Body(None))
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path.replace(':path', '')}").strip(
            "_"
        ),
        "tags": [side.name.lower()],
        "responses": {
            **_answers(path, body, references),
            **_errors(_statuses(path, method, side, body), references[body.error]),
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)", path)
    ] + [
        {"name": name, "in": "query", "schema": {"type": "string"}}
        for name in _QUERIES.get(path, ())
    ]
    if parameters:
        operation["parameters"] = parameters
    if schemes := _SCHEMES[side]:
        # A side without a key is open.
        operation["security"] = [{}, *({scheme.name: []} for scheme in schemes)]
    if body.request is not None:
        content = {JSON_TYPE: {"schema": references[body.request]}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _answers(path: str, body: Body, references: _References) -> dict[str, Any]:
    if path == CHAT_STREAM:
        return {"101": {"description": "a WebSocket connection, see docs/api.md"}}
    if path == "/metrics":
        return {"200": {"description": "Prometheus's text format", "content": {"text/plain": {}}}}
    schema = {"type": "object"} if body.answer is None else references[body.answer]
    content: dict[str, Any] = {JSON_TYPE: {"schema": schema}}
    if body.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    answers: dict[str, Any] = {"200": {"description": "done", "content": content}}
    if body.request is not None and "model" in body.request.__struct_fields__:
        answers["200"]["headers"] = {"X-Served-Model": _SERVED_BY}
        if body.streams:
            answers["200"]["headers"]["X-Stream-Id"] = _STREAM_ID
    begun = {JSON_TYPE: {"schema": {"type": "object"}}}
    if path in _DOWNLOADING:
        answers["202"] = {
            "description": "it is under way, or has to be confirmed",
            "content": begun,
        }
    return answers


def _statuses(path: str, method: str, side: Side, body: Body) -> set[int]:
    statuses = {403, 405}
    if side is not Side.OPEN:
        statuses |= {401}
    if body.request is not None:
        statuses |= {*_READING}
    if path in _QUERIES or path in (CHAT_STREAM, RELOAD):
        statuses |= {400}
    if path in _REPLAYS:
        statuses |= {410}
    if method == "POST" or "{" in path:
        statuses |= {*_OF_MODELS}
    if path in _DOWNLOADING:
        statuses |= {*_OF_DOWNLOADS}
    if body.streams or path in ("/readyz", "/admin/models/load", "/admin/models/probe"):
        statuses |= {*_OF_REQUESTS}
    return statuses


def _errors(statuses: Iterable[int], schema: dict[str, Any]) -> dict[str, Any]:
    content = {JSON_TYPE: {"schema": schema}}
    return {
        str(status): {
            "description": ", ".join(code for code in ErrorCode if status_of(code) == status),
            "content": content,
        }
        for status in sorted(statuses)
    }
