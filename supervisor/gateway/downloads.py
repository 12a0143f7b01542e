"""Downloads over HTTP: the question before one, its progress, its end; and deleting models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.responses import Response, StreamingResponse

from protocol.errors import CodedError, ErrorCode
from supervisor.downloads.downloads import Asked
from supervisor.downloads.operation import DownloadView, Operation, operation_id
from supervisor.gate import LoadSpec
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response

CONFIRM = "/admin/models/load/confirm"
PROGRESS = "/admin/models/download/{id}/progress"

#: Of a question, what it takes to say yes.
_TO_CONFIRM = frozenset({"confirmation_token", "expires_in_s", "confirm_url", "progress_url"})
#: Between two events of one stream.
_EVENT_INTERVAL_S = 0.25


class ConfirmRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The token of a ``download_required`` answer."""

    confirmation_token: Annotated[str, Meta(min_length=1, max_length=256)]


class DownloadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A model of the hub, to be downloaded and not loaded."""

    model_id: Annotated[str, Meta(min_length=1, max_length=256)]


_confirm_decoder = msgspec.json.Decoder(ConfirmRequest)
_download_decoder = msgspec.json.Decoder(DownloadRequest)


async def load_from_hub(
    gateway: Gateway,
    refusal: CodedError,
    spec: LoadSpec,
    load: Callable[[LoadSpec], Awaitable[Response]],
    *,
    consent: bool,
    wait: bool | None,
) -> Response:
    """Answer a load that was refused since the model is not here. Raises ``CodedError``.

    202 ``download_required`` with a token, or 202 ``downloading``; with ``wait``, or when
    nothing is left to fetch, the answer of the load itself. ``load`` is for a model that is
    here under another id.
    """
    downloads = gateway.fleet.downloads
    found = await downloads.offer(refusal, spec, consent=consent)
    if isinstance(found, LoadSpec):
        try:
            return await load(found)
        except CodedError as again:
            # Half of it is here, say; by its full id it is not sought again.
            found = await downloads.offer(again, found, consent=consent)
    if isinstance(found, Asked):
        return json_response(_question(found), status=202)
    assert isinstance(found, Operation)
    if wait or (wait is None and not found.plan.missing_bytes):
        await found.end()
        return json_response(found.result)
    return json_response(_begun(found), status=202)


async def plan_from_hub(
    gateway: Gateway,
    refusal: CodedError,
    spec: LoadSpec,
    plan: Callable[[LoadSpec], Awaitable[Response]],
) -> Response:
    """What ``load_from_hub`` would answer, without a token; nothing begins."""
    downloads = gateway.fleet.downloads
    found = await downloads.preview(refusal, spec)
    if isinstance(found, LoadSpec):
        try:
            return await plan(found)
        except CodedError as again:
            found = await downloads.preview(again, found)
    if isinstance(found, Operation):
        return json_response(_begun(found), status=202)
    assert isinstance(found, Asked)
    return json_response(_estimate(found), status=202)


async def confirm_load(gateway: Gateway, call: Call) -> Response:
    request = await read_json(call, _confirm_decoder, gateway.settings)
    operation = await gateway.fleet.downloads.confirm(request.confirmation_token)
    return json_response(_begun(operation), status=202)


async def download_model(gateway: Gateway, call: Call) -> Response:
    request = await read_json(call, _download_decoder, gateway.settings)
    operation = await gateway.fleet.downloads.fetch(request.model_id)
    return json_response(_begun(operation), status=202)


async def list_downloads(gateway: Gateway, call: Call) -> Response:
    """The newest first, also those that have ended."""
    views = gateway.fleet.downloads.views()
    return json_response({"downloads": views, "count": len(views)})


async def get_progress(gateway: Gateway, call: Call) -> Response:
    """Where it stands; as a stream, every change until its end."""
    view = gateway.fleet.downloads.view(call.path_params["id"])
    if "text/event-stream" not in call.headers.get("accept", ""):
        return json_response(view)
    operation = gateway.fleet.downloads.operation(view.id)
    events = _events(view, operation, gateway.settings.sse_keepalive_s)
    return StreamingResponse(
        events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )


async def cancel_download(gateway: Gateway, call: Call) -> Response:
    return json_response(await gateway.fleet.downloads.cancel(call.path_params["id"]))


async def delete_model(gateway: Gateway, call: Call) -> Response:
    """Delete the files of a model that nobody uses."""
    model_id = call.path_params["id"]
    fleet = gateway.fleet
    try:
        view = fleet.model(model_id)
    except CodedError as error:
        if error.code is not ErrorCode.MODEL_NOT_FOUND:
            raise
    else:
        if view.readiness.state != "quarantined" or view.pid is not None:
            raise CodedError(
                ErrorCode.MODEL_CONFLICT,
                f"model {model_id!r} is {view.readiness.state}: unload it first",
                param="id",
            )
    full_id, freed = await fleet.downloads.remove(model_id, fleet.files_in_use())
    return json_response({"success": True, "model_id": full_id, "freed_bytes": freed})


def _question(asked: Asked) -> dict[str, object]:
    plan = asked.plan
    return {
        "success": False,
        "status": "download_required",
        "model_id": plan.model_id,
        "message": f"{plan.model_id} is not on this machine: confirm to download it",
        "confirmation_token": asked.token,
        "expires_in_s": asked.lifetime_s,
        "estimated_size_bytes": plan.missing_bytes,
        "total_size_bytes": plan.total_bytes,
        "free_disk_bytes": asked.free_bytes,
        "files": [{"name": file.name, "size_bytes": file.size} for file in plan.files],
        "confirm_url": CONFIRM,
        "progress_url": PROGRESS.format(id=operation_id(plan.model_id)),
    }


def _estimate(asked: Asked) -> dict[str, object]:
    """The question as far as nobody is asked."""
    told = {name: value for name, value in _question(asked).items() if name not in _TO_CONFIRM}
    message = (
        f"{asked.plan.model_id} is not on this machine: a load would ask to download it; "
        "how much memory it needs is known when its files are here"
    )
    return {**told, "message": message}


def _begun(operation: Operation) -> dict[str, object]:
    return {
        "success": True,
        "status": operation.status if operation.settled else "downloading",
        "model_id": operation.plan.model_id,
        "download_id": operation.id,
        "estimated_size_bytes": operation.plan.missing_bytes,
        "progress_url": PROGRESS.format(id=operation.id),
    }


async def _events(
    view: DownloadView, operation: Operation | None, keepalive_s: float
) -> AsyncIterator[bytes]:
    """Each change as an event, not more often than anybody looks; the last one is how it ended."""
    yield _event(view)
    while operation is not None and not operation.settled:
        try:
            async with asyncio.timeout(keepalive_s):
                await operation.changed()
        except TimeoutError:
            yield b": keepalive\n\n"
            continue
        if not operation.settled:
            await asyncio.sleep(_EVENT_INTERVAL_S)
        yield _event(operation.view())


def _event(view: DownloadView) -> bytes:
    return b"data: " + msgspec.json.encode(view) + b"\n\n"
