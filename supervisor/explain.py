"""Why is this model not routable: since when, what happened, what to do next.

Pure: made of the server's own JSON, for the command line and whoever else asks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

#: How many incidents are told one by one.
_SHOWN = 3


def explain(
    model_id: str,
    view: Mapping[str, Any] | None,
    incidents: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Lines to read. ``view`` is the model object, None when it is not tracked;
    ``incidents`` and ``records`` are the model's, newest first."""
    lines = _state(model_id, view, records)
    for incident in incidents[:_SHOWN]:
        lines += _incident(incident)
    if len(incidents) > _SHOWN:
        lines.append(f"  and {len(incidents) - _SHOWN} earlier incidents")
    if incidents:
        lines.append(f"all about the last one: GET /admin/incidents/{incidents[0]['id']}")
    return [*lines, f"next: {_next_step(model_id, view, incidents)}"]


def _state(
    model_id: str, view: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]]
) -> list[str]:
    if view is None:
        lines = [f"{model_id} is not loaded"]
        if records:
            last = records[0]
            lines.append(
                f"  last known: {last['outcome']} on {last['backend']} "
                f"{last['backend_version']}, {_when(last['timestamp'])}: {last['reason']}"
            )
        return lines
    readiness = view["readiness"]
    probation = " on probation" if readiness["probation"] else ""
    lines = [
        f"{model_id} is {readiness['state']}{probation} since {_when(readiness['updated_at'])}",
        f"  reason: {readiness['reason']}",
        f"  failures in the window: {readiness['crash_count']}",
    ]
    if readiness["retry_at"] is not None:
        lines.append(f"  next try: {_when(readiness['retry_at'])}")
    return lines


def _incident(incident: Mapping[str, Any]) -> list[str]:
    return [
        f"{_when(incident['timestamp'])}: {incident['kind']} in {incident['phase']} "
        f"(generation {incident['generation']})",
        f"  {incident['reason']}",
    ]


def _next_step(
    model_id: str, view: Mapping[str, Any] | None, incidents: Sequence[Mapping[str, Any]]
) -> str:
    if view is None:
        return f"opta-lmx load {model_id}"
    state = view["readiness"]["state"]
    if state == "routable":
        return "nothing; it takes traffic"
    if state != "quarantined":
        return "wait; it becomes routable by itself, or is quarantined"
    advice = {
        "memory": "give it more memory, a smaller context, or a smaller model",
        "loader": "check or fetch its files again",
        "load_timeout": "look at the disk it is on, then raise load_stall_s",
        "canary": "its files or this backend version are at fault: try another of either",
    }
    kind = incidents[0]["kind"] if incidents else ""
    fix = advice.get(kind, "try another backend version, or report the incident upstream")
    return (
        f"{fix}; then opta-lmx release {model_id} and load it again, or "
        f"opta-lmx load {model_id} --allow-unsupported-runtime to try it on probation"
    )


def _when(epoch_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch_s))
