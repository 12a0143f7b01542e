"""``/admin``: load, unload and release models, and look at them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.responses import Response

from protocol.errors import CodedError
from supervisor.gate import LoadSpec
from supervisor.gateway.body import read_json
from supervisor.gateway.downloads import load_from_hub, plan_from_hub
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import invalid, json_response
from supervisor.gateway.openai.models import is_routable
from supervisor.gateway.presets import load_by_name, only_model
from supervisor.gateway.routing import named_model
from supervisor.ids import complaint_about_id, complaint_about_path
from supervisor.views import LoadResult, ModelView

_Name = Annotated[str, Meta(min_length=1)]


class LoadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``wait`` false: answer at once with 202. ``dry_run``: only tell the memory plan.

    Unlike inference, an operator's misspelt option must not mean the default.
    """

    model_id: _Name
    path: _Name | None = None
    backend: _Name | None = None
    allow_unsupported_runtime: bool | None = None
    #: Download what is not on disk, without a question.
    auto_download: bool | None = None
    keep_alive_sec: Annotated[int, Meta(ge=0)] | None = None
    context_length: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    tool_format: _Name | None = None
    draft_model: _Name | None = None
    pinned: bool | None = None
    dry_run: bool | None = None
    wait: bool | None = None


class UnloadRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``drain_timeout_sec``: how long running requests may go on; None: ``unload_drain_s``."""

    model_id: _Name
    drain_timeout_sec: Annotated[float, Meta(ge=0, le=86_400)] | None = None


_load_decoder = msgspec.json.Decoder(LoadRequest)
_unload_decoder = msgspec.json.Decoder(UnloadRequest)


async def load_model(gateway: Gateway, call: Call) -> Response:
    """200 once routable; 202 ``loading`` when the caller does not wait; 202 of
    ``downloads`` for what is not on disk.

    A client that goes away while it waits changes nothing: the load goes on.
    """
    request = await read_json(call, _load_decoder, gateway.settings)
    check_names(request.model_id, request.path)
    spec = LoadSpec(
        model_id=request.model_id,
        path=request.path,
        backend=request.backend,
        allow_unsupported_runtime=bool(request.allow_unsupported_runtime),
        keep_alive_sec=request.keep_alive_sec,
        context_length=request.context_length,
        tool_format=request.tool_format,
        draft_model=request.draft_model,
        pinned=bool(request.pinned),
    )

    async def plan(spec: LoadSpec) -> Response:
        return json_response(await load_by_name(gateway, spec, gateway.fleet.plan))

    async def load(spec: LoadSpec) -> Response:
        return await _load(gateway, call, spec, wait=request.wait is not False)

    try:
        return await (plan if request.dry_run else load)(spec)
    except CodedError as refusal:
        # The hub knows nothing of our names, and may have something else under one.
        if (named := only_model(gateway, spec)) is None:
            raise
        if request.dry_run:
            return await plan_from_hub(gateway, refusal, named, plan)
        return await load_from_hub(
            gateway, refusal, named, load, consent=bool(request.auto_download), wait=request.wait
        )


async def _load(gateway: Gateway, call: Call, spec: LoadSpec, *, wait: bool) -> Response:
    if wait:
        result = await load_by_name(gateway, spec, gateway.fleet.load)
        call.model = result.model_id
        return json_response(result)
    view = await load_by_name(gateway, spec, gateway.fleet.start_load)
    call.model = view.id
    if is_routable(view):
        return json_response(_already_loaded(view))
    return json_response({**_after(gateway, view.id), "status": "loading"}, status=202)


async def unload_model(gateway: Gateway, call: Call) -> Response:
    request = await read_json(call, _unload_decoder, gateway.settings)
    model_id = named_model(gateway, request.model_id)
    await gateway.fleet.unload(model_id, request.drain_timeout_sec)
    return json_response(_after(gateway, model_id))


async def release_model(gateway: Gateway, call: Call) -> Response:
    model_id = named_model(gateway, call.path_params["id"], is_quarantined)
    await gateway.fleet.release(model_id)
    return json_response(_after(gateway, model_id))


async def list_models(gateway: Gateway, call: Call) -> Response:
    """``loaded`` is what older admin clients read: the routable ones of ``models``."""
    models = gateway.fleet.models()
    loaded = [view for view in models if is_routable(view)]
    spares = gateway.fleet.spares()
    return json_response(
        {"models": models, "loaded": loaded, "count": len(models), "spares": spares}
    )


async def get_model(gateway: Gateway, call: Call) -> Response:
    return json_response(gateway.fleet.model(named_model(gateway, call.path_params["id"])))


def is_quarantined(view: ModelView) -> bool:
    return view.readiness.state == "quarantined"


def _after(gateway: Gateway, model_id: str) -> dict[str, object]:
    """How a model stands now; ``readiness`` is null when it is not tracked any more."""
    try:
        readiness = gateway.fleet.model(model_id).readiness
    except CodedError:
        readiness = None
    return {"success": True, "model_id": model_id, "readiness": readiness}


def _already_loaded(view: ModelView) -> LoadResult:
    return LoadResult(
        success=True,
        model_id=view.id,
        memory_after_load_gb=view.memory_gb,
        time_to_load_ms=0.0,
        readiness=view.readiness,
    )


def check_names(model_id: str, path: str | None) -> None:
    """An absolute path may stand for an id: it names a file, from which the id is made."""
    is_path = model_id.startswith("/")
    complaint = (complaint_about_path if is_path else complaint_about_id)(model_id)
    if complaint is not None:
        raise invalid("model_id", complaint)
    if path is not None and (complaint := complaint_about_path(path)):
        raise invalid("path", complaint)
