"""What is known of one model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from protocol.errors import ErrorCode
from supervisor.quarantine import Account


class Readiness(StrEnum):
    """The public states."""

    ADMITTED = "admitted"
    LOADING = "loading"
    CANARY_PENDING = "canary_pending"
    ROUTABLE = "routable"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that is known of a tracked model.

    ``worker_alive`` is true from the spawn until the process is reaped; at most
    one generation is alive. ``failed`` marks a generation whose failure has been
    counted while its process still has to go. ``retry_at`` is set while a
    restart waits for its delay. On ``probation`` the account stays quarantined,
    so that neither an unload nor a restart of the server is a way out.
    """

    readiness: Readiness
    reason: str
    updated_at: float
    account: Account
    generation: int = 0
    worker_alive: bool = False
    failed: bool = False
    unloading: bool = False
    probation: bool = False
    code: ErrorCode | None = None
    retry_at: float | None = None
    restart_delay_s: float = 0.0
    routable_since: float | None = None
