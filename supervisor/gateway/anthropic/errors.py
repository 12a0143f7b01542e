"""Errors in Anthropic's shape, with our code and whatever else is known kept inside.

``{"type": "error", "error": {"type", "message", ...}, "request_id"}``. The statuses are
those of every other route: by them the clients choose the class that they raise.
"""

from __future__ import annotations

from starlette.responses import Response

from protocol.errors import CodedError
from supervisor.gateway import errors
from supervisor.gateway.endpoint import Call
from supervisor.gateway.errors import JSON_TYPE, error_headers, status_of
from supervisor.gateway.streaming import encode_json

#: Anthropic's class of an error. Other statuses below 500 are requests at fault.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
}

#: The header that the clients show with an error, beside our ``x-request-id``.
REQUEST_ID = b"request-id"


def error_body(error: CodedError, request_id: bytes) -> bytes:
    status = status_of(error.code)
    fallback = "invalid_request_error" if status < 500 else "api_error"
    fields = {
        **errors.error_object(error),
        "type": _TYPES.get(status, fallback),
        # Where the clients look for a code.
        "details": {"error_code": error.code.value},
    }
    return encode_json({"type": "error", "error": fields, "request_id": request_id.decode()})


def refusal(error: CodedError, call: Call) -> Response:
    response = Response(
        error_body(error, call.request_id),
        status_of(error.code),
        error_headers(error),
        media_type=JSON_TYPE,
    )
    response.raw_headers.append((REQUEST_ID, call.request_id))
    return response
