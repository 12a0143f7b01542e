"""``/admin``: what is on record about models, and what is on this machine."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from starlette.responses import Response

from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import invalid, json_response

_MAX_RECORDS = 1000
_DEFAULT_RECORDS = 100

_INCIDENT_SUMMARY = (
    *("id", "model", "generation", "phase", "kind", "code", "reason", "timestamp"),
    *(
        "quarantined",
        "crash_count",
        "backend",
        "backend_version",
        "exit_status",
        "signal",
        "convicted",
    ),
)


async def available_models(gateway: Gateway, call: Call) -> Response:
    """What is on this machine, loaded or not, and what could run it."""
    return json_response(await gateway.fleet.records.available())


async def compatibility(gateway: Gateway, call: Call) -> Response:
    """Registry records, filtered by ``model``, ``backend``, ``outcome``, ``since``, ``limit``."""
    query = call.query_params
    outcome = query.get("outcome")
    if outcome not in (None, "pass", "fail"):
        raise invalid("outcome", "must be pass or fail")
    since = query.get("since")
    records = await gateway.fleet.records.compatibility(
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
        await gateway.fleet.records.recommendations(
            model=query.get("model"), backend=query.get("backend")
        )
    )


async def regressions(gateway: Gateway, call: Call) -> Response:
    """What a newer backend version made worse; ``model`` and ``backend`` filter."""
    query = call.query_params
    return json_response(
        await gateway.fleet.records.regressions(
            model=query.get("model"), backend=query.get("backend")
        )
    )


async def list_incidents(gateway: Gateway, call: Call) -> Response:
    """Newest first, without what is long; ``model`` and ``limit`` filter."""
    query = call.query_params
    incidents = gateway.fleet.records.incidents(
        model=query.get("model"), limit=_limit(query.get("limit"))
    )
    summaries = [
        {name: getattr(incident, name) for name in _INCIDENT_SUMMARY} for incident in incidents
    ]
    return json_response({"incidents": summaries, "count": len(summaries)})


async def get_incident(gateway: Gateway, call: Call) -> Response:
    return json_response(gateway.fleet.records.incident(call.path_params["id"]))


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_RECORDS
    # At most four digits: a number of any length would be parsed first and refused later.
    if not (
        text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= _MAX_RECORDS
    ):
        raise invalid("limit", f"must be a whole number from 1 to {_MAX_RECORDS}")
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
        raise invalid("since", "must be epoch seconds or an ISO 8601 time")
    return seconds
