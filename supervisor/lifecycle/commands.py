"""What has to be done for a model: verbs, carried out by its actor."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import ErrorCode
from supervisor.quarantine import Account, FailureKind


@dataclass(frozen=True, slots=True)
class SpawnWorker:
    generation: int


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Bring the process down; ``WorkerExited`` follows. ``broken``: do not ask it first."""

    generation: int
    broken: bool


@dataclass(frozen=True, slots=True)
class RunCanary:
    generation: int
    strict: bool


@dataclass(frozen=True, slots=True)
class ScheduleRestart:
    generation: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class WatchProbation:
    """Post ``ProbationServed`` after so long, if this generation is still routable."""

    generation: int
    after_s: float


@dataclass(frozen=True, slots=True)
class OpenTraffic:
    """Give the worker what waited for it, then everything new."""

    generation: int


@dataclass(frozen=True, slots=True)
class ParkRequests:
    """The worker is lost: keep what can go on or run again on the next one, fail the rest."""

    reason: str


@dataclass(frozen=True, slots=True)
class ParkSuspects:
    """The cell is lost: as ``ParkRequests``, of those that run there."""

    reason: str


@dataclass(frozen=True, slots=True)
class FailRequests:
    """Nothing will serve the requests that are left."""

    code: ErrorCode
    reason: str


@dataclass(frozen=True, slots=True)
class RecordPass:
    """The model proved itself: remember it."""


@dataclass(frozen=True, slots=True)
class RecordFailure:
    """Remember a failure; ``kind`` None: refused, not counted. ``in_cell``: of the cell, not
    of the model's worker."""

    kind: FailureKind | None
    code: ErrorCode
    reason: str
    in_cell: bool = False


@dataclass(frozen=True, slots=True)
class AnswerLoads:
    """Tell everyone who waits for a load; ``code`` None: it is routable."""

    code: ErrorCode | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SaveAccount:
    """Persist the account, if it has changed: a restart is no amnesty.

    ``released`` says how its quarantine ended, should this be the end of one.
    """

    account: Account
    released: str = "released by the operator"


Command = (
    SpawnWorker
    | StopWorker
    | RunCanary
    | ScheduleRestart
    | WatchProbation
    | OpenTraffic
    | ParkRequests
    | ParkSuspects
    | FailRequests
    | RecordPass
    | RecordFailure
    | AnswerLoads
    | SaveAccount
)
