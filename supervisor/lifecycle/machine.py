"""The readiness machine: what happens to one model, as a pure function.

``transition(state, event, policy, now)`` returns the next state and the
commands that the actor has to carry out. No clock, no I/O. ``None`` stands for
a model that is not tracked. An event that makes no sense raises
``IllegalEvent``; one of an earlier generation changes nothing.

=================================  =====================  ====================
from                               on                     to
=================================  =====================  ====================
none, quarantined (override)       LoadAccepted           admitted
admitted, loading                  SpawnFailed            loading
admitted                           WorkerSpawned          loading
loading                            WorkerLoaded           canary_pending
canary_pending                     CanaryPassed           routable
admitted, loading, canary_pending  counted failure        loading, quarantined
routable                           counted failure        loading, quarantined
admitted .. routable               CellFailed             the same, quarantined
admitted, loading, canary_pending  LoadRefused            none
any but quarantined                UnloadRequested        none
quarantined                        UnloadRequested        quarantined
quarantined                        Released               none
on probation                       Released               the same, off probation
=================================  =====================  ====================
"""

from __future__ import annotations

from dataclasses import replace

from protocol.errors import UNCOUNTED_LOAD_FAILURES, ErrorCode
from supervisor.lifecycle.commands import (
    AnswerLoads,
    Command,
    FailRequests,
    OpenTraffic,
    ParkRequests,
    ParkSuspects,
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
    CellFailed,
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
from supervisor.lifecycle.state import Readiness, State
from supervisor.quarantine import (
    Account,
    FailureKind,
    Policy,
    record_failure,
    record_health,
    record_routable,
    release,
    restart_delay,
)


class IllegalEvent(Exception):
    """The event cannot happen in this state; the state is unchanged."""


Outcome = tuple[State | None, list[Command]]

#: Until the next try after a failure of our own to start a process.
SPAWN_RETRY_S = 5.0


def transition(state: State | None, event: Event, policy: Policy, now: float) -> Outcome:
    """Apply one event. Raises ``IllegalEvent``."""
    if state is None:
        if isinstance(event, LoadAccepted):
            if event.account.quarantined and not event.probation:
                return _restore_quarantine(event.account, now)
            return _admit(event.account, generation=0, now=now)
        raise IllegalEvent(f"{type(event).__name__} for a model that is not tracked")
    match event:
        case LoadAccepted():
            if state.readiness is not Readiness.QUARANTINED or not event.probation:
                raise IllegalEvent(f"a load cannot start in state {state.readiness}")
            if state.worker_alive:
                raise IllegalEvent("the quarantined worker is not gone yet")
            return _admit(state.account, generation=state.generation, now=now)
        case UnloadRequested():
            return _unload(state, event, policy, now)
        case Released():
            return _release(state)
        case CellFailed():
            return _cell_failed(state, event, policy, now)
        case _ if event.generation > state.generation:
            raise IllegalEvent(f"{type(event).__name__} of a generation never spawned")
        case _ if event.generation < state.generation:
            return state, []
        case WorkerSpawned():
            _require(state, event, Readiness.ADMITTED, Readiness.LOADING)
            if state.unloading:
                return state, []
            # After a failure, that is the reason until the model is well again.
            reason = "loading" if state.code is None else state.reason
            return replace(state, readiness=Readiness.LOADING, reason=reason, updated_at=now), []
        case SpawnFailed():
            return _spawn_failed(state, event, now)
        case WorkerLoaded():
            return _loaded(state, event, now)
        case CanaryPassed():
            return _canary_passed(state, event, policy, now)
        case ProbationServed():
            return _probation_served(state, event)
        case LoadRefused():
            return _load_refused(state, event, now)
        case WorkerFailed():
            if state.failed or state.unloading or not state.worker_alive:
                return state, []
            return _count_failure(state, event.kind, event.reason, event.jitter, policy, now)
        case WorkerExited():
            return _exited(state, event, policy, now)
        case RestartDue():
            if state.retry_at is None:
                return state, []
            return _spawn(replace(state, retry_at=None, updated_at=now))


def _require(state: State, event: Event, *allowed: Readiness) -> None:
    if state.readiness not in allowed or not state.worker_alive:
        raise IllegalEvent(f"{type(event).__name__} in state {state.readiness}")


def _admit(account: Account, *, generation: int, now: float) -> Outcome:
    state = State(
        readiness=Readiness.ADMITTED,
        reason="on probation" if account.quarantined else "accepted",
        updated_at=now,
        account=account,
        generation=generation,
        probation=account.quarantined,
    )
    return _spawn(state)


def _restore_quarantine(account: Account, now: float) -> Outcome:
    state = State(
        readiness=Readiness.QUARANTINED,
        reason=account.last_reason or "failed too often",
        # It is quarantined since it failed, not since somebody asked.
        updated_at=account.times[-1] if account.times else now,
        account=account,
        code=ErrorCode.MODEL_UNSTABLE,
    )
    return state, [AnswerLoads(ErrorCode.MODEL_UNSTABLE, state.reason)]


def _spawn_failed(state: State, event: SpawnFailed, now: float) -> Outcome:
    _require(state, event, Readiness.ADMITTED, Readiness.LOADING)
    if state.unloading:
        return None, []
    state = replace(
        state,
        readiness=Readiness.LOADING,
        reason=event.reason,
        code=ErrorCode.INTERNAL_ERROR,
        updated_at=now,
        worker_alive=False,
        retry_at=now + SPAWN_RETRY_S,
    )
    return state, [
        AnswerLoads(ErrorCode.INTERNAL_ERROR, event.reason),
        # Nobody knows when a process can be made again.
        FailRequests(ErrorCode.INTERNAL_ERROR, event.reason),
        ScheduleRestart(state.generation, SPAWN_RETRY_S),
    ]


def _spawn(state: State) -> Outcome:
    generation = state.generation + 1
    state = replace(state, generation=generation, worker_alive=True, failed=False)
    return state, [SpawnWorker(generation)]


def _loaded(state: State, event: WorkerLoaded, now: float) -> Outcome:
    if state.failed or state.unloading:
        return state, []
    _require(state, event, Readiness.LOADING)
    state = replace(
        state, readiness=Readiness.CANARY_PENDING, reason="running the canary", updated_at=now
    )
    return state, [RunCanary(state.generation, strict=state.probation)]


def _canary_passed(state: State, event: CanaryPassed, policy: Policy, now: float) -> Outcome:
    if state.failed or state.unloading:
        return state, []
    _require(state, event, Readiness.CANARY_PENDING)
    account = record_routable(state.account)
    state = replace(
        state,
        account=account,
        readiness=Readiness.ROUTABLE,
        reason="canary passed",
        code=None,
        updated_at=now,
        routable_since=now,
    )
    commands: list[Command] = [
        SaveAccount(account),
        RecordPass(),
        AnswerLoads(),
        OpenTraffic(state.generation),
    ]
    if state.probation:
        commands.append(WatchProbation(state.generation, policy.window_s))
    return state, commands


def _probation_served(state: State, event: ProbationServed) -> Outcome:
    if state.failed or state.unloading or not state.probation:
        return state, []
    _require(state, event, Readiness.ROUTABLE)
    account = release(state.account)
    save = SaveAccount(account, released="probation served")
    return replace(state, account=account, probation=False), [save]


def _load_refused(state: State, event: LoadRefused, now: float) -> Outcome:
    if state.failed or state.unloading:
        return state, []
    _require(state, event, Readiness.ADMITTED, Readiness.LOADING, Readiness.CANARY_PENDING)
    state = replace(state, unloading=True, reason=event.reason, code=event.code, updated_at=now)
    commands: list[Command] = [
        AnswerLoads(event.code, event.reason),
        FailRequests(event.code, event.reason),
        StopWorker(state.generation, broken=True),
    ]
    # The others tell about the request for a load, not about the model.
    if event.code in UNCOUNTED_LOAD_FAILURES:
        commands.insert(0, RecordFailure(None, event.code, event.reason))
    return state, commands


_LOAD_ENDED_AT = {
    FailureKind.LOAD_TIMEOUT: ErrorCode.MODEL_LOAD_TIMEOUT,
    FailureKind.CANARY: ErrorCode.MODEL_CANARY_FAILED,
}


def failure_code(readiness: Readiness, kind: FailureKind) -> ErrorCode:
    """What a failure of this kind is called that befell a model in this state."""
    if readiness is Readiness.ROUTABLE:
        return ErrorCode.MODEL_CRASHED
    if readiness is Readiness.CANARY_PENDING:
        return ErrorCode.MODEL_CANARY_FAILED
    return _LOAD_ENDED_AT.get(kind, ErrorCode.MODEL_LOADER_CRASHED)


def _count_failure(
    state: State, kind: FailureKind, reason: str, jitter: float, policy: Policy, now: float
) -> Outcome:
    """Count a failure of the current generation, whose process is still there."""
    account = record_failure(_settled(state, policy, now), policy, now, reason=reason)
    code = failure_code(state.readiness, kind)
    state = replace(
        state,
        account=account,
        readiness=Readiness.QUARANTINED if account.quarantined else Readiness.LOADING,
        reason=reason,
        code=ErrorCode.MODEL_UNSTABLE if account.quarantined else code,
        updated_at=now,
        failed=True,
        probation=False,
        retry_at=None,
        restart_delay_s=restart_delay(account, policy, jitter),
        routable_since=None,
    )
    aftermath: Command = ParkRequests(reason)
    if account.quarantined:
        aftermath = FailRequests(ErrorCode.MODEL_UNSTABLE, f"quarantined: {reason}")
    return state, [
        SaveAccount(account),
        RecordFailure(kind, code, reason),
        AnswerLoads(code, reason),
        aftermath,
        StopWorker(state.generation, broken=True),
    ]


def _cell_failed(state: State, event: CellFailed, policy: Policy, now: float) -> Outcome:
    """Counted as a failure of the model's own worker is, which goes on if it can."""
    if state.unloading or state.readiness is Readiness.QUARANTINED:
        return state, []
    failed, commands = _count_failure(state, event.kind, event.reason, 0.0, policy, now)
    assert failed is not None
    record = RecordFailure(event.kind, ErrorCode.MODEL_CRASHED, event.reason, in_cell=True)
    if failed.readiness is not Readiness.QUARANTINED:
        account = failed.account
        if state.routable_since is not None:
            # It still is: there is no row of failures.
            account = record_routable(account)
            state = replace(state, routable_since=now)
        state = replace(state, account=account)
        return state, [SaveAccount(account), record, ParkSuspects(event.reason)]
    failed = replace(failed, failed=state.worker_alive)
    commands = [record if isinstance(c, RecordFailure) else c for c in commands]
    if not state.worker_alive or state.failed:
        commands = [c for c in commands if not isinstance(c, StopWorker)]
    return failed, commands


def _settled(state: State, policy: Policy, now: float) -> Account:
    """The account with the healthy time until now, at the end of being routable."""
    if state.routable_since is None:
        return state.account
    return record_health(state.account, policy, now - state.routable_since)


def _exited(state: State, event: WorkerExited, policy: Policy, now: float) -> Outcome:
    if not state.worker_alive:
        raise IllegalEvent("the worker exited twice")
    commands: list[Command] = []
    if not state.failed and not state.unloading:
        counted, commands = _count_failure(
            state, event.kind, event.reason, event.jitter, policy, now
        )
        assert counted is not None
        state = counted
        commands = [c for c in commands if not isinstance(c, StopWorker)]
    state = replace(state, worker_alive=False)
    if state.readiness is Readiness.QUARANTINED:
        return replace(state, unloading=False), commands
    if state.unloading:
        return None, commands
    state = replace(state, retry_at=now + state.restart_delay_s)
    return state, [*commands, ScheduleRestart(state.generation, state.restart_delay_s)]


def _unload(state: State, event: UnloadRequested, policy: Policy, now: float) -> Outcome:
    if state.unloading:
        return state, []
    stop: list[Command] = []
    if state.worker_alive and not state.failed:
        # A worker that has not loaded yet has nothing to finish, and would not listen.
        loading = state.readiness in {Readiness.ADMITTED, Readiness.LOADING}
        stop = [StopWorker(state.generation, broken=loading)]
    if state.readiness is Readiness.QUARANTINED:
        return replace(state, unloading=state.worker_alive), stop
    account = _settled(state, policy, now)
    commands: list[Command] = [
        SaveAccount(account),
        AnswerLoads(event.code, event.reason),
        FailRequests(event.code, event.reason),
        *stop,
    ]
    state = replace(state, account=account, routable_since=None)
    if not state.worker_alive:
        return None, commands
    return replace(state, unloading=True, reason="unloading", updated_at=now), commands


def _release(state: State) -> Outcome:
    if state.probation:
        account = release(state.account)
        return replace(state, account=account, probation=False), [SaveAccount(account)]
    if state.readiness is not Readiness.QUARANTINED:
        raise IllegalEvent(f"nothing to release in state {state.readiness}")
    if state.worker_alive:
        raise IllegalEvent("the quarantined worker is not gone yet")
    return None, [SaveAccount(release(state.account))]
