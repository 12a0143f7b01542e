"""Why is this model not routable: since when, what happened, what to do next.

Pure: made of the server's own JSON, for the command line and whoever else asks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

_Json = Mapping[str, Any]

#: How many incidents are told one by one.
_SHOWN = 3

#: By the kind of the last incident.
_ADVICE = {
    "memory": "give it more memory, a smaller context, or a smaller model",
    "loader": "check or fetch its files again",
    "load_timeout": "look at the disk it is on, then raise load_stall_s",
    "canary": "its files or this backend version are at fault: try another of either",
}

#: By the code of a load that was refused.
_REMEDY = {
    "model_incomplete": "complete its files",
    "model_unsupported_arch": "try another backend, or another version of it",
    "model_unsupported_backend": "try another backend, or another version of it",
}


def explain(
    model_id: str,
    view: _Json | None,
    incidents: Sequence[_Json],
    records: Sequence[_Json],
    *,
    refusal: str = "",
) -> list[str]:
    """Lines to read. ``view`` is the model object; without one ``refusal`` is the error
    code that the server gave instead. ``incidents`` and ``records`` are the model's,
    newest first."""
    # Quarantines and releases are stored as failures, and are none.
    outcomes = [record for record in records if "event" not in record["metadata"]]
    lines = _state(model_id, view, refusal)
    if view is None or view["readiness"]["state"] != "routable":
        lines += _on_record(outcomes)
    for incident in incidents[:_SHOWN]:
        lines += _incident(incident)
    if len(incidents) > _SHOWN:
        lines.append(f"  and {len(incidents) - _SHOWN} earlier incidents")
    if incidents:
        lines.append(f"all about the last one: GET /admin/incidents/{incidents[0]['id']}")
    return [*lines, f"next: {_next_step(model_id, view, incidents, outcomes, refusal)}"]


def _state(model_id: str, view: _Json | None, refusal: str) -> list[str]:
    if view is None:
        about_to = refusal == "model_not_ready"
        return [f"{model_id} is {'about to be' if about_to else 'not'} loaded"]
    readiness = view["readiness"]
    state = "being unloaded" if view["unloading"] else readiness["state"]
    probation = " on probation" if readiness["probation"] else ""
    lines = [
        f"{model_id} is {state}{probation} since {_when(readiness['updated_at'])}",
        f"  reason: {readiness['reason']}",
        f"  failures in the window: {readiness['crash_count']}",
    ]
    if readiness["retry_at"] is not None:
        lines.append(f"  next try: {_when(readiness['retry_at'])}")
    return lines


def _on_record(outcomes: Sequence[_Json]) -> list[str]:
    """The last word of the registry, and the last good one."""
    lines = []
    if outcomes:
        last = outcomes[0]
        lines.append(f"  last known: {last['outcome']} on {_where_and_when(last)}")
        if last["outcome"] == "fail":
            lines[-1] += f": {last['reason']}"
            passed = next((one for one in outcomes if one["outcome"] == "pass"), None)
            lines.append(
                "  last passed: "
                + ("never, as far as is on record" if passed is None else _where_and_when(passed))
            )
    return lines


def _where_and_when(record: _Json) -> str:
    backend = " ".join(filter(None, (record["backend"], record["backend_version"])))
    return f"{backend}, {_when(record['timestamp'])}"


def _incident(incident: _Json) -> list[str]:
    kind, phase = incident["kind"], incident["phase"]
    what = kind if kind == phase else f"{kind} in {phase}"
    return [
        f"{_when(incident['timestamp'])}: {what} (generation {incident['generation']})",
        f"  {incident['reason']}",
    ]


def _next_step(
    model_id: str,
    view: _Json | None,
    incidents: Sequence[_Json],
    outcomes: Sequence[_Json],
    refusal: str,
) -> str:
    wait = "wait; it becomes routable by itself, or is quarantined"
    if view is None:
        if refusal == "model_not_ready":
            return wait
        code = outcomes[0]["metadata"].get("code") if outcomes else None
        remedy = _REMEDY.get(code) if isinstance(code, str) else None
        return f"{remedy}; then opta-lmx load {model_id}" if remedy else f"opta-lmx load {model_id}"
    if view["unloading"]:
        return "wait; its worker is being stopped"
    state = view["readiness"]["state"]
    if state == "routable":
        return "nothing; it takes traffic"
    if state != "quarantined":
        return wait
    kind = incidents[0]["kind"] if incidents else ""
    fix = _ADVICE.get(kind, "try another backend version, or report the incident upstream")
    return (
        f"{fix}; then opta-lmx release {model_id} and load it again, or "
        f"opta-lmx load {model_id} --allow-unsupported-runtime to try it on probation"
    )


def _when(epoch_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch_s))
