"""Probes and metrics. ``/healthz`` and ``/readyz`` never ask for a key."""

from __future__ import annotations

from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import error_object, json_response, retry_after
from supervisor.gateway.openai.models import is_routable
from supervisor.metrics import CONTENT_TYPE
from supervisor.views import ModelView

_RETRY_S = 1.0


async def healthz(gateway: Gateway, call: Call) -> Response:
    """The process answers; says nothing about models."""
    return json_response({"status": "ok"})


async def readyz(gateway: Gateway, call: Call) -> Response:
    """200 once any model is routable, else 503 with the reason.

    The refusal is a probe's answer and an error at once, so it has the fields of
    both: ``status`` and ``reason`` beside the usual envelope.
    """
    views = gateway.fleet.models()
    models = {view.id: view.readiness.state for view in views}
    if any(is_routable(view) for view in views):
        return json_response({"status": "ready", "models": models})
    reason = _why_not(views)
    if gateway.fleet.safe_start is not None:
        reason = f"{reason}; {gateway.fleet.safe_start}"
    error = CodedError(ErrorCode.MODEL_NOT_READY, reason, retry_after_s=_RETRY_S)
    call.outcome = error.code.value
    response = json_response(
        {"status": "not_ready", "reason": reason, "models": models, "error": error_object(error)},
        status=503,
    )
    response.headers["retry-after"] = retry_after(error) or "1"
    return response


async def metrics(gateway: Gateway, call: Call) -> Response:
    return Response(gateway.metrics.render(), headers={"content-type": CONTENT_TYPE})


def _why_not(views: list[ModelView]) -> str:
    if not views:
        return "no model is loaded"
    states = ", ".join(f"{view.id} is {view.readiness.state}" for view in views)
    return f"no model is routable: {states}"
