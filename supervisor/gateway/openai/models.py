"""``GET /v1/models`` and ``/v1/models/{id}``.

The list holds what can be used right now, that is the routable models, and with
``?all=true`` every tracked one, with its readiness. A model
that is tracked but not routable is refused by name with the code that inference
would give, ``model_not_ready`` or ``model_unstable``: a client that checks
before it sends learns the same as one that just sends.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.views import ModelView, ReadinessView


class Model(msgspec.Struct, kw_only=True):
    """OpenAI's model object; the last fields are ours.

    ``capabilities``: what requests to it may ask for. ``dimensions``: of an embedding.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "opta-lmx"
    context_length: int | None
    backend: str
    readiness: ReadinessView
    capabilities: list[str]
    dimensions: int | None
    tool_format: str | None
    reasoning_format: str | None


async def list_models(gateway: Gateway, call: Call) -> Response:
    everything = call.query_params.get("all", "").lower() in {"1", "true"}
    models = [_model(view) for view in gateway.fleet.models() if everything or is_routable(view)]
    return json_response({"object": "list", "data": models})


async def get_model(gateway: Gateway, call: Call) -> Response:
    view = gateway.fleet.model(call.path_params["id"])
    call.model = view.id
    if is_routable(view):
        return json_response(_model(view))
    readiness = view.readiness
    if readiness.state == "quarantined":
        incident_id = view.last_incident_id
        raise CodedError(
            ErrorCode.MODEL_UNSTABLE,
            f"{view.id} is quarantined: {readiness.reason}",
            param="model",
            details={} if incident_id is None else {"incident_id": incident_id},
        )
    raise CodedError(
        ErrorCode.MODEL_NOT_READY,
        f"{view.id} is {'unloading' if view.unloading else readiness.state}: {readiness.reason}",
        param="model",
        retry_after_s=None if view.unloading else 1,
    )


def is_routable(view: ModelView) -> bool:
    return view.readiness.state == "routable" and not view.unloading


def _model(view: ModelView) -> Model:
    since = view.loaded_at if view.loaded_at is not None else view.readiness.updated_at
    return Model(
        id=view.id,
        created=int(since),
        context_length=view.context_length,
        backend=view.backend,
        readiness=view.readiness,
        capabilities=_capabilities(view),
        dimensions=view.dimensions,
        tool_format=view.tool_format,
        reasoning_format=view.reasoning_format,
    )


def _capabilities(view: ModelView) -> list[str]:
    match view.kind:
        case None:
            return []
        case "embed":
            return ["embedding"]
        case "rerank":
            return ["rerank"]
    found = ["completion", "json_schema", "logprobs"]
    if view.has_chat_template:
        found += ["chat", "tools"]
    if view.reasoning_format is not None:
        found.append("reasoning")
    return sorted(found)
