"""``GET /v1/models`` and ``/v1/models/{id}``.

The list holds what can be used right now, that is the routable models, and with
``?all=true`` every tracked one, with its readiness. A model
that is tracked but not routable is refused by name with the code that inference
would give, ``model_not_ready`` or ``model_unstable``: a client that checks
before it sends learns the same as one that just sends.

After the models come the aliases and presets that stand for one that is in the list; each is
that model under another id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.routing import candidates
from supervisor.names import PRESET_PREFIX
from supervisor.views import ModelView, ReadinessView


class Model(msgspec.Struct, kw_only=True):
    """OpenAI's model object; the last fields are ours.

    ``capabilities``: what requests to it may ask for. ``dimensions``: of an embedding.
    ``alias_of``: the model that the alias or preset stands for now.
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
    alias_of: str | UnsetType = UNSET


async def list_models(gateway: Gateway, call: Call) -> Response:
    everything = call.query_params.get("all", "").lower() in {"1", "true"}
    views = [view for view in gateway.fleet.models() if everything or is_routable(view)]
    models = [_model(view) for view in views]
    listed = {model.id: model for model in models}
    for name, route in gateway.names.routes.items():
        # By its prefix a preset would be there twice.
        if name in listed or name.startswith(PRESET_PREFIX):
            continue
        found = [listed[each] for each in route.candidates if each in listed]
        if found:
            # The one that would serve: with ``everything`` the first may not.
            best = next((model for model in found if model.readiness.state == "routable"), found[0])
            models.append(msgspec.structs.replace(best, id=name, alias_of=best.id))
    return json_response({"object": "list", "data": models})


async def get_model(gateway: Gateway, call: Call) -> Response:
    name = call.path_params["id"]
    route = gateway.names.routes.get(name)
    if route is None:
        return json_response(_usable(gateway, call, name))

    async def look(model_id: str, _options: Mapping[str, Any]) -> Model:
        return _usable(gateway, call, model_id)

    model = await (await candidates(gateway, name, route, look)).first()
    return json_response(msgspec.structs.replace(model, id=name, alias_of=model.id))


def _usable(gateway: Gateway, call: Call, model_id: str) -> Model:
    """Raises what inference would be refused with."""
    view = gateway.fleet.model(model_id)
    call.model = view.id
    if is_routable(view):
        return _model(view)
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
