"""How a model stands, in the words of the outside: its readiness, or why it takes no request."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from protocol.errors import CodedError, ErrorCode
from supervisor.journal import Journal, LoadRefused
from supervisor.lifecycle import LoadAccepted, Readiness, State, transition
from supervisor.quarantine import Account, Policy, count_in_window
from supervisor.resumption import NextRun
from supervisor.views import ReadinessView

log = logging.getLogger(__name__)


#: Codes of errors that a counted failure has caused.
_OF_FAILURES = frozenset(
    {
        ErrorCode.MODEL_CRASHED,
        ErrorCode.MODEL_UNSTABLE,
        ErrorCode.MODEL_CANARY_FAILED,
        ErrorCode.MODEL_LOAD_TIMEOUT,
        ErrorCode.MODEL_LOADER_CRASHED,
    }
)


def readiness_view(state: State, policy: Policy) -> ReadinessView:
    """The state with its monotonic times turned into epoch seconds."""
    now = time.monotonic()
    to_wall = time.time() - now
    return ReadinessView(
        state=state.readiness,
        reason=state.reason,
        crash_count=count_in_window(state.account, policy, now),
        updated_at=state.updated_at + to_wall,
        retry_at=None if state.retry_at is None else state.retry_at + to_wall,
        code=state.code,
        probation=state.probation,
    )


def resting_readiness(account: Account, policy: Policy) -> ReadinessView:
    """How a quarantined model stands that is not tracked: as it will once a load is tried."""
    state, _ = transition(None, LoadAccepted(account), policy, time.monotonic())
    assert state is not None
    return readiness_view(state, policy)


def require_routable(
    model_id: str, state: State, incident_id: str | None, *, may_wait: bool = False
) -> None:
    """Raise ``model_unstable`` or ``model_not_ready`` unless the model takes traffic.

    ``incident_id`` is that of the model's last failure. ``may_wait``: nor if it is on its way
    to do so.
    """
    if state.readiness is Readiness.ROUTABLE and not state.unloading:
        return
    on_its_way = state.readiness is not Readiness.QUARANTINED and not state.unloading
    if may_wait and on_its_way and not state.probation:
        return
    if state.readiness is Readiness.QUARANTINED:
        raise unstable(model_id, state.reason, incident_id)
    if state.unloading:
        raise being_unloaded(model_id)
    wait_s = 1.0
    if state.retry_at is not None:
        wait_s = max(wait_s, state.retry_at - time.monotonic())
    raise CodedError(
        ErrorCode.MODEL_NOT_READY,
        f"model {model_id!r} is not ready: {state.readiness} ({state.reason})",
        retry_after_s=wait_s,
        details=_evidence(state.code, incident_id),
    )


def being_unloaded(model_id: str) -> CodedError:
    """The refusal of a model that is on its way out."""
    return CodedError(ErrorCode.MODEL_NOT_READY, f"model {model_id!r} is being unloaded")


def unstable(model_id: str, reason: str, incident_id: str | None) -> CodedError:
    """The refusal of a quarantined model, with the ways out."""
    return CodedError(
        ErrorCode.MODEL_UNSTABLE,
        f"model {model_id!r} is quarantined: {reason}; "
        "release it, or load it with allow_unsupported_runtime=true to put it on probation",
        details=_evidence(ErrorCode.MODEL_UNSTABLE, incident_id),
    )


def model_error(model_id: str, code: ErrorCode, reason: str, incident_id: str | None) -> CodedError:
    """What those get who waited for the model; with the incident if a failure is to blame."""
    return CodedError(code, f"model {model_id!r}: {reason}", details=_evidence(code, incident_id))


def _evidence(code: ErrorCode | None, incident_id: str | None) -> dict[str, str | int]:
    return {} if incident_id is None or code not in _OF_FAILURES else {"incident_id": incident_id}


def log_parked(model_id: str, reason: str, fates: Mapping[NextRun, int]) -> None:
    """Say what becomes of the requests that were in flight at a crash, if there were any."""
    told = {
        NextRun.RESUMED: "go on where they were",
        NextRun.AGAIN: "begin anew",
        NextRun.NONE: "have failed",
    }
    counts = [f"{fates[fate]} {what}" for fate, what in told.items() if fates.get(fate)]
    if counts:
        log.info("%s: %s; in flight: %s", model_id, reason, ", ".join(counts))


def log_transition(model_id: str, before: State | None, after: State | None) -> None:
    """Say that a model's public state has changed, if it has."""
    old = "untracked" if before is None else before.readiness
    if after is None:
        log.info("%s: %s -> untracked", model_id, old)
    elif before is None or before.readiness is not after.readiness:
        bad = after.readiness is Readiness.QUARANTINED or after.failed
        level = logging.WARNING if bad else logging.INFO
        log.log(level, "%s: %s -> %s (%s)", model_id, old, after.readiness, after.reason)


def note_refusal(journal: Journal, model_id: str, error: CodedError) -> None:
    """Say that a model was not let in."""
    log.warning("%s: load refused: %s (%s)", model_id, error.message, error.code)
    journal.add(LoadRefused(model=model_id, code=error.code.value, message=error.message))
