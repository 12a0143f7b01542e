"""Stable error codes, shared by every layer.

A code is part of the HTTP contract: clients branch on it. The gateway decides
the HTTP status; lower layers only ever name the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class ErrorCode(StrEnum):
    """Machine-readable reason of a refusal or a failure."""

    # The model cannot be served here; never retried, never counted.
    MODEL_UNSUPPORTED_ARCH = "model_unsupported_arch"
    MODEL_UNSUPPORTED_BACKEND = "model_unsupported_backend"
    MODEL_INCOMPLETE = "model_incomplete"

    # The state of a model.
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_AMBIGUOUS = "model_ambiguous"
    MODEL_NOT_READY = "model_not_ready"
    MODEL_UNSTABLE = "model_unstable"
    MODEL_CRASHED = "model_crashed"

    # How a load ended.
    MODEL_CANARY_FAILED = "model_canary_failed"
    MODEL_LOAD_TIMEOUT = "model_load_timeout"
    MODEL_LOADER_CRASHED = "model_loader_crashed"
    MODEL_UNLOADED = "model_unloaded"
    MODEL_CONFLICT = "model_conflict"
    INSUFFICIENT_MEMORY = "insufficient_memory"

    # Getting a model from the hub.
    DOWNLOADS_DISABLED = "downloads_disabled"
    DOWNLOAD_FAILED = "download_failed"
    DOWNLOAD_CANCELLED = "download_cancelled"
    DOWNLOAD_NOT_FOUND = "download_not_found"
    INVALID_CONFIRMATION = "invalid_confirmation_token"
    HUB_ACCESS_DENIED = "hub_access_denied"
    HUB_UNAVAILABLE = "hub_unavailable"
    INSUFFICIENT_DISK = "insufficient_disk"

    # A request.
    INVALID_JSON = "invalid_json"
    INVALID_TYPE = "invalid_type"
    INVALID_VALUE = "invalid_value"
    MISSING_PARAMETER = "missing_required_parameter"
    UNSUPPORTED_PARAMETER = "unsupported_parameter"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    BODY_TOO_LARGE = "request_too_large"
    REQUEST_TIMEOUT = "request_timeout"
    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    STREAM_OVERFLOW = "stream_overflow"
    STREAM_NOT_FOUND = "stream_not_found"
    STREAM_EVENTS_GONE = "stream_events_gone"
    REQUEST_CANCELLED = "request_cancelled"
    REQUEST_POISONED = "request_poisoned"
    REQUEST_NOT_FOUND = "request_not_found"
    RESPONSE_NOT_FOUND = "response_not_found"
    PREVIOUS_RESPONSE_NOT_FOUND = "previous_response_not_found"
    INVALID_API_KEY = "invalid_api_key"
    INVALID_ADMIN_KEY = "invalid_admin_key"
    HOST_NOT_ALLOWED = "host_not_allowed"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"

    # The server.
    SHUTTING_DOWN = "server_shutting_down"
    INTERNAL_ERROR = "internal_error"


#: Load failures that say something about the model's files or this
#: installation, not about its behaviour: never retried, never counted.
UNCOUNTED_LOAD_FAILURES = frozenset(
    {
        ErrorCode.MODEL_UNSUPPORTED_ARCH,
        ErrorCode.MODEL_UNSUPPORTED_BACKEND,
        ErrorCode.MODEL_INCOMPLETE,
    }
)


class CodedError(Exception):
    """An error that carries its stable code to whoever answers for it.

    ``param`` names the request field at fault, when there is one.
    ``retry_after_s`` (seconds) is set when waiting may help. ``details`` are
    further facts for the one who reads the answer, such as an incident's id.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        details: Mapping[str, str | int] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.details = details or {}
