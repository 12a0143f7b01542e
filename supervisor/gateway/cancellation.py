"""``POST /v1/requests/{id}/cancel``: ends a running call by its ``X-Request-ID``."""

from __future__ import annotations

from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.generation import cancel


async def cancel_request(gateway: Gateway, call: Call) -> Response:
    """Of the same key only. The cancelled call ends with ``request_cancelled``."""
    request_id: str = call.path_params["id"]
    streams = gateway.running.unfinished(request_id.encode(), call)
    if not streams:
        raise CodedError(
            ErrorCode.REQUEST_NOT_FOUND, f"no request with id {request_id[:128]!r} is running"
        )
    cancel(streams)
    return json_response({"id": request_id, "object": "request", "cancelled": True})
