"""The ASGI application: every route, and nothing else.

Names under ``/admin/models`` that are routes of their own (``load``, ``unload``,
``compatibility`` and what is below it) come before ``{id:path}``; ids may contain slashes.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router, WebSocketRoute
from starlette.types import ASGIApp

from protocol.errors import CodedError, ErrorCode
from supervisor.config import names_of
from supervisor.fleet import Fleet
from supervisor.gateway import admin, downloads, health, presets, records, status, tokens
from supervisor.gateway.anthropic import messages
from supervisor.gateway.anthropic.errors import refusal
from supervisor.gateway.auth import Guard, Side
from supervisor.gateway.cancellation import cancel_request
from supervisor.gateway.chat_socket import ChatSocket, no_upgrade
from supervisor.gateway.endpoint import Call, Endpoint, Gateway, Handler, Method
from supervisor.gateway.events import EVENTS, follow_events
from supervisor.gateway.following import delete_stream, follow_stream
from supervisor.gateway.openai import models
from supervisor.gateway.openai.chat import chat_completions
from supervisor.gateway.openai.completions import completions
from supervisor.gateway.openai.embeddings import embeddings
from supervisor.gateway.openai.responses import create_response
from supervisor.gateway.openai.responses_store import ResponseStore
from supervisor.gateway.openai.responses_stored import (
    cancel_response,
    delete_response,
    get_response,
    list_input_items,
)
from supervisor.gateway.openapi import OPENAPI, describe
from supervisor.gateway.probe import probe_model
from supervisor.gateway.recordings import Recordings
from supervisor.gateway.reload import RELOAD, reload_config
from supervisor.gateway.rerank import rerank
from supervisor.gateway.running import RunningCalls
from supervisor.gateway.websocket import CHAT_STREAM
from supervisor.journal import ServerStarted
from supervisor.metrics import Metrics
from supervisor.settings import Settings


def create_app(fleet: Fleet, settings: Settings, metrics: Metrics) -> ASGIApp:
    """The application over a gateway whose settings never change."""
    return application(create_gateway(fleet, settings, metrics, lambda: settings))


def create_gateway(
    fleet: Fleet, settings: Settings, metrics: Metrics, reread: Callable[[], Settings]
) -> Gateway:
    """What all handlers share. ``reread`` reads the settings anew, for a reload."""
    responses = ResponseStore(settings.response_store_max, settings.response_store_max_bytes)
    guard, names, running = Guard(settings), names_of(settings), RunningCalls()
    recordings = Recordings(
        settings.stream_store_max, settings.stream_store_max_bytes, settings.stream_keep_s
    )
    return Gateway(fleet, settings, names, metrics, guard, running, responses, recordings, reread)


def application(gateway: Gateway) -> ASGIApp:
    """The application; its lifespan starts and stops the fleet."""
    fleet = gateway.fleet
    gateway.metrics.watch(fleet.models)
    recordings = gateway.recordings
    gateway.metrics.watch_recordings(recordings.__len__, lambda: recordings.size)

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        version = metadata.version("opta-lmx")
        fleet.journal.add(ServerStarted(version=version, pid=os.getpid()))
        await fleet.start()
        try:
            yield
        finally:
            fleet.journal.close()
            await fleet.stop()
            await gateway.recordings.close()

    routes = _routes(gateway)
    documented: Mapping[Method, Handler] = {"GET": describe(routes, metadata.version("opta-lmx"))}
    routes.append(Route(OPENAPI, Endpoint(gateway, Side.OPEN, OPENAPI, documented)))
    return Router(
        routes,
        redirect_slashes=False,
        default=_fallback(gateway),
        lifespan=lifespan,
    )


def _routes(gateway: Gateway) -> list[BaseRoute]:
    def route(path: str, side: Side, handlers: Mapping[Method, Handler]) -> Route:
        return Route(path, Endpoint(gateway, side, path, handlers))

    def anthropic_route(path: str, handler: Handler) -> Route:
        handlers: Mapping[Method, Handler] = {"POST": handler}
        return Route(path, Endpoint(gateway, Side.INFERENCE, path, handlers, refusal))

    release = "/admin/models/{id:path}/release"
    return [
        route("/healthz", Side.OPEN, {"GET": health.healthz}),
        route("/readyz", Side.OPEN, {"GET": health.readyz}),
        route("/admin/health", Side.ADMIN, {"GET": status.get_health}),
        route("/admin/status", Side.ADMIN, {"GET": status.get_status}),
        route("/metrics", Side.METRICS, {"GET": health.metrics}),
        route("/v1/chat/completions", Side.INFERENCE, {"POST": chat_completions}),
        route("/v1/completions", Side.INFERENCE, {"POST": completions}),
        anthropic_route("/v1/messages", messages.messages),
        anthropic_route("/v1/messages/count_tokens", messages.count_tokens),
        route("/tokenize", Side.INFERENCE, {"POST": tokens.tokenize}),
        route("/detokenize", Side.INFERENCE, {"POST": tokens.detokenize}),
        route("/v1/responses", Side.INFERENCE, {"POST": create_response}),
        route(
            "/v1/responses/{id}",
            Side.INFERENCE,
            {"GET": get_response, "DELETE": delete_response},
        ),
        route("/v1/responses/{id}/cancel", Side.INFERENCE, {"POST": cancel_response}),
        route("/v1/responses/{id}/input_items", Side.INFERENCE, {"GET": list_input_items}),
        route("/v1/stream/{id}", Side.INFERENCE, {"GET": follow_stream, "DELETE": delete_stream}),
        route("/v1/requests/{id}/cancel", Side.INFERENCE, {"POST": cancel_request}),
        route("/v1/embeddings", Side.INFERENCE, {"POST": embeddings}),
        route("/v1/rerank", Side.INFERENCE, {"POST": rerank}),
        route(CHAT_STREAM, Side.INFERENCE, {"GET": no_upgrade}),
        WebSocketRoute(CHAT_STREAM, ChatSocket(gateway, CHAT_STREAM)),
        route("/v1/models", Side.INFERENCE, {"GET": models.list_models}),
        route("/v1/models/{id:path}", Side.INFERENCE, {"GET": models.get_model}),
        route("/admin/models", Side.ADMIN, {"GET": admin.list_models}),
        route("/admin/models/available", Side.ADMIN, {"GET": records.available_models}),
        route("/admin/models/load", Side.ADMIN, {"POST": admin.load_model}),
        route("/admin/models/probe", Side.ADMIN, {"POST": probe_model}),
        route(downloads.CONFIRM, Side.ADMIN, {"POST": downloads.confirm_load}),
        route("/admin/models/download", Side.ADMIN, {"POST": downloads.download_model}),
        route("/admin/models/downloads", Side.ADMIN, {"GET": downloads.list_downloads}),
        route(downloads.PROGRESS, Side.ADMIN, {"GET": downloads.get_progress}),
        route("/admin/models/download/{id}", Side.ADMIN, {"DELETE": downloads.cancel_download}),
        route("/admin/models/unload", Side.ADMIN, {"POST": admin.unload_model}),
        route("/admin/models/compatibility", Side.ADMIN, {"GET": records.compatibility}),
        route(
            "/admin/models/compatibility/recommendations",
            Side.ADMIN,
            {"GET": records.recommendations},
        ),
        route("/admin/models/compatibility/regressions", Side.ADMIN, {"GET": records.regressions}),
        route(RELOAD, Side.ADMIN, {"POST": reload_config}),
        route("/admin/presets", Side.ADMIN, {"GET": presets.list_presets}),
        route(EVENTS, Side.ADMIN, {"GET": follow_events}),
        route("/admin/incidents", Side.ADMIN, {"GET": records.list_incidents}),
        route("/admin/incidents/{id}", Side.ADMIN, {"GET": records.get_incident}),
        # Only for POST, so that a model called "org/release" can still be looked at.
        Route(
            release,
            Endpoint(gateway, Side.ADMIN, release, {"POST": admin.release_model}),
            methods=["POST"],
        ),
        route(
            "/admin/models/{id:path}",
            Side.ADMIN,
            {"GET": admin.get_model, "DELETE": downloads.delete_model},
        ),
    ]


def _fallback(gateway: Gateway) -> ASGIApp:
    async def not_found(_gateway: Gateway, call: Call) -> Response:
        raise CodedError(ErrorCode.NOT_FOUND, f"no such route: {call.scope['path'][:200]}")

    return Endpoint(gateway, Side.OPEN, "", {"*": not_found})
