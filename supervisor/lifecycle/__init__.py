"""The readiness machine of one model, pure: states, events, commands, and ``transition``."""

from __future__ import annotations

from supervisor.lifecycle.commands import (
    AnswerLoads,
    Command,
    FailRequests,
    OpenTraffic,
    ParkRequests,
    RecordFailure,
    RecordPass,
    RunCanary,
    SaveAccount,
    ScheduleRestart,
    SpawnWorker,
    StopWorker,
    WatchProbation,
)
from supervisor.lifecycle.events import (
    CanaryPassed,
    Event,
    LoadAccepted,
    LoadRefused,
    ProbationServed,
    Released,
    RestartDue,
    SpawnFailed,
    UnloadRequested,
    WorkerExited,
    WorkerFailed,
    WorkerLoaded,
    WorkerSpawned,
)
from supervisor.lifecycle.machine import IllegalEvent, transition
from supervisor.lifecycle.state import Readiness, State

__all__ = [
    "AnswerLoads",
    "CanaryPassed",
    "Command",
    "Event",
    "FailRequests",
    "IllegalEvent",
    "LoadAccepted",
    "LoadRefused",
    "OpenTraffic",
    "ParkRequests",
    "ProbationServed",
    "Readiness",
    "RecordFailure",
    "RecordPass",
    "Released",
    "RestartDue",
    "RunCanary",
    "SaveAccount",
    "ScheduleRestart",
    "SpawnFailed",
    "SpawnWorker",
    "State",
    "StopWorker",
    "UnloadRequested",
    "WatchProbation",
    "WorkerExited",
    "WorkerFailed",
    "WorkerLoaded",
    "WorkerSpawned",
    "transition",
]
