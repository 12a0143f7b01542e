"""``/admin``: load, unload and release models, and look at them."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor.gate import LoadSpec
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.openai.models import is_routable
from supervisor.gateway.presets import load_by_name
from supervisor.ids import complaint_about_id, complaint_about_path
from supervisor.views import LoadResult, ModelView

_MAX_RECORDS = 1000
_DEFAULT_RECORDS = 100

_INCIDENT_SUMMARY = (
    *("id", "model", "generation", "phase", "kind", "code", "reason", "timestamp"),
    *("quarantined", "crash_count", "backend", "backend_version", "exit_status", "signal"),
)

_Name = Annotated[str, Meta(min_length=1)]


class LoadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``wait`` false: answer at once with 202.

    Unlike inference, an operator's misspelt option must not mean the default.
    """

    model_id: _Name
    path: _Name | None = None
    backend: _Name | None = None
    allow_unsupported_runtime: bool | None = None
    #: For when downloads exist; until then a model that is not on disk is not found.
    auto_download: bool | None = None
    keep_alive_sec: Annotated[int, Meta(ge=0)] | None = None
    context_length: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    tool_format: _Name | None = None
    draft_model: _Name | None = None
    wait: bool | None = None


class UnloadRequest(msgspec.Struct, forbid_unknown_fields=True):
    model_id: _Name


_load_decoder = msgspec.json.Decoder(LoadRequest)
_unload_decoder = msgspec.json.Decoder(UnloadRequest)


async def load_model(gateway: Gateway, call: Call) -> Response:
    """200 once routable; 202 ``loading`` when the caller does not wait.

    A client that goes away while it waits changes nothing: the load goes on.
    """
    request = await read_json(call, _load_decoder, gateway.settings)
    _check_names(request)
    spec = LoadSpec(
        model_id=request.model_id,
        path=request.path,
        backend=request.backend,
        allow_unsupported_runtime=bool(request.allow_unsupported_runtime),
        keep_alive_sec=request.keep_alive_sec,
        context_length=request.context_length,
        tool_format=request.tool_format,
        draft_model=request.draft_model,
    )
    if request.wait is not False:
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
    await gateway.fleet.unload(request.model_id)
    return json_response(_after(gateway, request.model_id))


async def release_model(gateway: Gateway, call: Call) -> Response:
    model_id = call.path_params["id"]
    await gateway.fleet.release(model_id)
    return json_response(_after(gateway, model_id))


async def list_models(gateway: Gateway, call: Call) -> Response:
    """``loaded`` is what older admin clients read: the routable ones of ``models``."""
    models = gateway.fleet.models()
    loaded = [view for view in models if is_routable(view)]
    return json_response({"models": models, "loaded": loaded, "count": len(models)})


async def get_model(gateway: Gateway, call: Call) -> Response:
    return json_response(gateway.fleet.model(call.path_params["id"]))


async def available_models(gateway: Gateway, call: Call) -> Response:
    """What is on this machine, loaded or not, and what could run it."""
    return json_response(await gateway.fleet.available())


async def compatibility(gateway: Gateway, call: Call) -> Response:
    """Registry records, filtered by ``model``, ``backend``, ``outcome``, ``since``, ``limit``."""
    query = call.query_params
    outcome = query.get("outcome")
    if outcome not in (None, "pass", "fail"):
        raise _invalid("outcome", "must be pass or fail")
    since = query.get("since")
    records = await gateway.fleet.compatibility(
        model=query.get("model"),
        backend=query.get("backend"),
        outcome=outcome,
        since=None if since is None else _epoch(since),
        limit=_limit(query.get("limit")),
    )
    return json_response(records)


async def recommendations(gateway: Gateway, call: Call) -> Response:
    """Verdicts on every model, backend and version; ``model`` and ``backend`` filter."""
    query = call.query_params
    return json_response(
        await gateway.fleet.recommendations(model=query.get("model"), backend=query.get("backend"))
    )


async def regressions(gateway: Gateway, call: Call) -> Response:
    """What a newer backend version made worse; ``model`` and ``backend`` filter."""
    query = call.query_params
    return json_response(
        await gateway.fleet.regressions(model=query.get("model"), backend=query.get("backend"))
    )


async def list_incidents(gateway: Gateway, call: Call) -> Response:
    """Newest first, without what is long; ``model`` and ``limit`` filter."""
    query = call.query_params
    incidents = gateway.fleet.incidents(model=query.get("model"), limit=_limit(query.get("limit")))
    summaries = [
        {name: getattr(incident, name) for name in _INCIDENT_SUMMARY} for incident in incidents
    ]
    return json_response({"incidents": summaries, "count": len(summaries)})


async def get_incident(gateway: Gateway, call: Call) -> Response:
    return json_response(gateway.fleet.incident(call.path_params["id"]))


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


def _check_names(request: LoadRequest) -> None:
    """An absolute path may stand for an id: it names a file, from which the id is made."""
    is_path = request.model_id.startswith("/")
    complaint = (complaint_about_path if is_path else complaint_about_id)(request.model_id)
    if complaint is not None:
        raise _invalid("model_id", complaint)
    if request.path is not None and (complaint := complaint_about_path(request.path)):
        raise _invalid("path", complaint)


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_RECORDS
    # At most four digits: a number of any length would be parsed first and refused later.
    if not (
        text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= _MAX_RECORDS
    ):
        raise _invalid("limit", f"must be a whole number from 1 to {_MAX_RECORDS}")
    return int(text)


def _epoch(text: str) -> float:
    """Epoch seconds, or ISO 8601 (UTC when it names no zone)."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            seconds = math.nan
    if not math.isfinite(seconds):
        raise _invalid("since", "must be epoch seconds or an ISO 8601 time")
    return seconds


def _invalid(param: str, message: str) -> CodedError:
    return CodedError(ErrorCode.INVALID_VALUE, f"{param} {message}", param=param)
