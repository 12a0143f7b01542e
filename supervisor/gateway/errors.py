"""One error envelope for every answer, and the table from codes to HTTP statuses.

``{"error": {"message", "type", "param", "code"}}``: all four keys are always
there. ``code`` is one of ``ErrorCode``; ``type`` is OpenAI's coarse class.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode

JSON_TYPE = "application/json"


class _Answer(NamedTuple):
    status: int
    type: str


_INVALID = "invalid_request_error"
_AUTHENTICATION = "authentication_error"
_PERMISSION = "permission_error"
_NOT_FOUND = "not_found_error"
_CONFLICT = "conflict_error"
_RATE_LIMIT = "rate_limit_error"
_RESOURCES = "insufficient_resources_error"
_SERVER = "server_error"

#: Every code has its line; ``tests/unit/supervisor/gateway/test_gateway_http.py`` insists.
_ANSWERS: dict[ErrorCode, _Answer] = {
    ErrorCode.MODEL_UNSUPPORTED_ARCH: _Answer(422, _INVALID),
    ErrorCode.MODEL_UNSUPPORTED_BACKEND: _Answer(422, _INVALID),
    ErrorCode.MODEL_INCOMPLETE: _Answer(409, _CONFLICT),
    ErrorCode.MODEL_NOT_FOUND: _Answer(404, _NOT_FOUND),
    ErrorCode.MODEL_AMBIGUOUS: _Answer(400, _INVALID),
    ErrorCode.MODEL_NOT_READY: _Answer(409, _CONFLICT),
    ErrorCode.MODEL_UNSTABLE: _Answer(409, _CONFLICT),
    ErrorCode.MODEL_CRASHED: _Answer(503, _SERVER),
    ErrorCode.MODEL_CANARY_FAILED: _Answer(409, _CONFLICT),
    ErrorCode.MODEL_LOAD_TIMEOUT: _Answer(409, _CONFLICT),
    ErrorCode.MODEL_LOADER_CRASHED: _Answer(409, _CONFLICT),
    ErrorCode.MODEL_UNLOADED: _Answer(409, _CONFLICT),
    ErrorCode.MODEL_CONFLICT: _Answer(409, _CONFLICT),
    ErrorCode.INSUFFICIENT_MEMORY: _Answer(507, _RESOURCES),
    ErrorCode.DOWNLOADS_DISABLED: _Answer(403, _PERMISSION),
    ErrorCode.DOWNLOAD_FAILED: _Answer(502, _SERVER),
    ErrorCode.DOWNLOAD_CANCELLED: _Answer(409, _CONFLICT),
    ErrorCode.DOWNLOAD_NOT_FOUND: _Answer(404, _NOT_FOUND),
    ErrorCode.INVALID_CONFIRMATION: _Answer(400, _INVALID),
    ErrorCode.HUB_ACCESS_DENIED: _Answer(403, _PERMISSION),
    ErrorCode.HUB_UNAVAILABLE: _Answer(502, _SERVER),
    ErrorCode.INSUFFICIENT_DISK: _Answer(507, _RESOURCES),
    ErrorCode.INVALID_JSON: _Answer(400, _INVALID),
    ErrorCode.INVALID_TYPE: _Answer(400, _INVALID),
    ErrorCode.INVALID_VALUE: _Answer(400, _INVALID),
    ErrorCode.MISSING_PARAMETER: _Answer(400, _INVALID),
    ErrorCode.UNSUPPORTED_PARAMETER: _Answer(400, _INVALID),
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: _Answer(415, _INVALID),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: _Answer(400, _INVALID),
    ErrorCode.BODY_TOO_LARGE: _Answer(413, _INVALID),
    ErrorCode.REQUEST_TIMEOUT: _Answer(408, _INVALID),
    ErrorCode.RATE_LIMIT_EXCEEDED: _Answer(429, _RATE_LIMIT),
    ErrorCode.STREAM_NOT_FOUND: _Answer(404, _NOT_FOUND),
    ErrorCode.STREAM_EVENTS_GONE: _Answer(410, _NOT_FOUND),
    ErrorCode.STREAM_OVERFLOW: _Answer(500, _SERVER),
    # As others say "the client did not wait for it"; no client library tries it again.
    ErrorCode.REQUEST_CANCELLED: _Answer(499, _INVALID),
    ErrorCode.REQUEST_POISONED: _Answer(422, _INVALID),
    ErrorCode.REQUEST_NOT_FOUND: _Answer(404, _NOT_FOUND),
    ErrorCode.RESPONSE_NOT_FOUND: _Answer(404, _NOT_FOUND),
    ErrorCode.PREVIOUS_RESPONSE_NOT_FOUND: _Answer(400, _INVALID),
    ErrorCode.INVALID_API_KEY: _Answer(401, _AUTHENTICATION),
    ErrorCode.INVALID_ADMIN_KEY: _Answer(403, _PERMISSION),
    ErrorCode.HOST_NOT_ALLOWED: _Answer(403, _PERMISSION),
    ErrorCode.NOT_FOUND: _Answer(404, _NOT_FOUND),
    ErrorCode.METHOD_NOT_ALLOWED: _Answer(405, _INVALID),
    ErrorCode.SHUTTING_DOWN: _Answer(503, _SERVER),
    ErrorCode.INTERNAL_ERROR: _Answer(500, _SERVER),
}

#: Answered in the middle of a body: what follows on the connection is the rest of it.
_UNREAD = frozenset({ErrorCode.BODY_TOO_LARGE, ErrorCode.REQUEST_TIMEOUT})

#: For a code that this table does not know yet: wrong, but never a crash.
_UNKNOWN = _Answer(500, _SERVER)


class MethodNotAllowed(CodedError):
    """The resource exists but does not know the method; ``allow`` lists those it does."""

    def __init__(self, allow: str) -> None:
        super().__init__(ErrorCode.METHOD_NOT_ALLOWED, f"method not allowed here; allowed: {allow}")
        self.allow = allow


class DeadlinePassed(CodedError):
    """The client's own deadline has passed: nobody has failed, and the connection is in order."""

    def __init__(self, timeout_s: float, tokens_sent: int) -> None:
        super().__init__(
            ErrorCode.REQUEST_TIMEOUT,
            f"not finished within the {timeout_s:g} s of X-Request-Timeout",
            details={"tokens_sent": tokens_sent},
        )


class RequestCancelled(CodedError):
    """Somebody asked for the request's end by its id: nobody has failed."""

    def __init__(self, tokens_sent: int) -> None:
        super().__init__(
            ErrorCode.REQUEST_CANCELLED,
            "the request was cancelled",
            details={"tokens_sent": tokens_sent},
        )


def status_of(code: ErrorCode) -> int:
    return _ANSWERS.get(code, _UNKNOWN).status


def error_object(error: CodedError) -> dict[str, str | int | None]:
    """The value of ``error`` in the envelope: the four keys, and what else is known."""
    return {
        **error.details,
        "message": error.message,
        "type": _ANSWERS.get(error.code, _UNKNOWN).type,
        "param": error.param,
        "code": error.code.value,
    }


def error_body(error: CodedError) -> bytes:
    return msgspec.json.encode({"error": error_object(error)})


def retry_after(error: CodedError) -> str | None:
    """Whole seconds for a ``Retry-After`` header, at least 1; None when waiting is no help."""
    if error.retry_after_s is None:
        return None
    return str(max(1, math.ceil(error.retry_after_s)))


def error_headers(error: CodedError) -> dict[str, str]:
    headers = {}
    seconds = retry_after(error)
    if seconds is not None:
        headers["retry-after"] = seconds
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
    if error.code is ErrorCode.INVALID_API_KEY:
        headers["www-authenticate"] = "Bearer"
    if error.code in _UNREAD and not isinstance(error, DeadlinePassed):
        headers["connection"] = "close"
    return headers


def error_response(error: CodedError) -> Response:
    return Response(
        error_body(error), status_of(error.code), error_headers(error), media_type=JSON_TYPE
    )


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=JSON_TYPE)


def invalid(param: str, message: str) -> CodedError:
    """The refusal of a parameter; the message goes on from its name."""
    return CodedError(ErrorCode.INVALID_VALUE, f"{param} {message}", param=param)


def coded(error: Exception) -> CodedError:
    """Give any exception a code. What it says stays inside unless it was coded."""
    if isinstance(error, CodedError):
        return error
    if isinstance(error, RecursionError):
        # Of what is nested, some is read with the body and the rest where it is passed on.
        return CodedError(ErrorCode.INVALID_JSON, "the body is nested too deeply")
    return CodedError(ErrorCode.INTERNAL_ERROR, "internal error; the server's log has the details")
