"""What happens to a model: named in the past tense, told by the edges."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import ErrorCode
from supervisor.quarantine import Account, FailureKind, brief


@dataclass(frozen=True, slots=True)
class _Told:
    """Somebody gave a reason, of whatever length; a bounded one goes on from here."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", brief(self.reason))  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class LoadAccepted:
    """The gate let a load pass; ``probation`` overrides a quarantine."""

    account: Account
    probation: bool = False


@dataclass(frozen=True, slots=True)
class WorkerSpawned:
    generation: int


@dataclass(frozen=True, slots=True)
class SpawnFailed(_Told):
    """No process could be made: our own trouble, never the model's."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerLoaded:
    generation: int


@dataclass(frozen=True, slots=True)
class CanaryPassed:
    generation: int


@dataclass(frozen=True, slots=True)
class LoadRefused(_Told):
    """The worker named a cause that says nothing about the model's behaviour."""

    generation: int
    code: ErrorCode
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerFailed(_Told):
    """A failure of a live worker, which has to be stopped for it. ``jitter`` is 0..1."""

    generation: int
    kind: FailureKind
    reason: str
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerExited(_Told):
    """The process is gone. A failure in itself unless one was counted or asked for."""

    generation: int
    kind: FailureKind
    reason: str
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class CellFailed(_Told):
    """The worker beside the model's own, which has its suspects, has failed in service.
    It is brought down by whoever tells."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True)
class RestartDue:
    generation: int


@dataclass(frozen=True, slots=True)
class ProbationServed:
    """A model on probation has been routable for a whole window."""

    generation: int


@dataclass(frozen=True, slots=True)
class UnloadRequested(_Told):
    """``code`` and ``reason`` are for those who wait for the model."""

    code: ErrorCode = ErrorCode.MODEL_UNLOADED
    reason: str = "it was unloaded"


@dataclass(frozen=True, slots=True)
class Released:
    pass


Event = (
    LoadAccepted
    | WorkerSpawned
    | SpawnFailed
    | WorkerLoaded
    | CanaryPassed
    | LoadRefused
    | WorkerFailed
    | WorkerExited
    | CellFailed
    | RestartDue
    | ProbationServed
    | UnloadRequested
    | Released
)
