"""The readiness table, row by row."""

from dataclasses import replace

import pytest

from protocol.errors import ErrorCode
from supervisor import lifecycle as lc
from supervisor.lifecycle import Command, Event, Readiness, State, transition
from supervisor.quarantine import MAX_REASON_CHARS, Account, FailureKind, Policy

POLICY = Policy(threshold=3, window_s=600, delay_cap_s=60, decay_s=600)
ACCEPT = lc.LoadAccepted(Account())


class Machine:
    """Applies events one after the other and keeps the last commands."""

    def __init__(self) -> None:
        self.current: State | None = None
        self.commands: list[Command] = []
        self.now = 0.0

    def __call__(self, *events: Event) -> "Machine":
        for event in events:
            self.now += 1.0
            self.current, self.commands = transition(self.current, event, POLICY, self.now)
        return self

    @property
    def state(self) -> State:
        assert self.current is not None
        return self.current

    def readiness(self) -> Readiness:
        return self.state.readiness

    def kinds(self) -> list[type[Command]]:
        return [type(command) for command in self.commands]

    def command(self, kind: type[Command]) -> Command:
        (found,) = [command for command in self.commands if isinstance(command, kind)]
        return found


def admitted() -> Machine:
    return Machine()(ACCEPT)


def loading() -> Machine:
    return admitted()(lc.WorkerSpawned(1))


def canary_pending() -> Machine:
    return loading()(lc.WorkerLoaded(1))


def routable() -> Machine:
    return canary_pending()(lc.CanaryPassed(1))


def exited(generation: int, kind: FailureKind = FailureKind.SIGNAL) -> lc.WorkerExited:
    return lc.WorkerExited(generation, kind, "killed by SIGSEGV", jitter=1.0)


def quarantined() -> Machine:
    machine = routable()(exited(1), lc.RestartDue(1))
    machine(lc.WorkerSpawned(2), exited(2), lc.RestartDue(2))
    return machine(lc.WorkerSpawned(3), exited(3))


def test_a_load_goes_through_every_state() -> None:
    machine = admitted()
    assert machine.readiness() is Readiness.ADMITTED
    assert machine.commands == [lc.SpawnWorker(1)]
    assert machine(lc.WorkerSpawned(1)).readiness() is Readiness.LOADING
    machine(lc.WorkerLoaded(1))
    assert machine.readiness() is Readiness.CANARY_PENDING
    assert machine.commands == [lc.RunCanary(1, strict=False)]
    machine(lc.CanaryPassed(1))
    assert machine.readiness() is Readiness.ROUTABLE
    assert machine.kinds() == [lc.SaveAccount, lc.RecordPass, lc.AnswerLoads, lc.OpenTraffic]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (admitted, ErrorCode.MODEL_LOADER_CRASHED),
        (loading, ErrorCode.MODEL_LOADER_CRASHED),
        (canary_pending, ErrorCode.MODEL_CANARY_FAILED),
        (routable, ErrorCode.MODEL_CRASHED),
    ],
)
def test_a_death_is_counted_and_restarted(make: type[Machine], code: ErrorCode) -> None:
    machine = make()(exited(1))
    assert machine.state.readiness is Readiness.LOADING
    assert len(machine.state.account.times) == 1
    assert machine.state.code is code
    assert machine.command(lc.ScheduleRestart) == lc.ScheduleRestart(1, 0.0)
    answer = machine.command(lc.AnswerLoads)
    assert isinstance(answer, lc.AnswerLoads)
    assert answer.code is code
    machine(lc.RestartDue(1))
    assert machine.commands == [lc.SpawnWorker(2)]


def test_a_clean_exit_nobody_asked_for_counts_too() -> None:
    machine = routable()(lc.WorkerExited(1, FailureKind.EXIT, "exited with status 0"))
    assert len(machine.state.account.times) == 1


@pytest.mark.parametrize("kind", [FailureKind.HANG, FailureKind.PROTOCOL, FailureKind.CANARY])
def test_a_failure_of_a_live_worker_stops_it_and_counts_once(kind: FailureKind) -> None:
    machine = canary_pending()(lc.WorkerFailed(1, kind, "why"))
    assert machine.command(lc.StopWorker) == lc.StopWorker(1, broken=True)
    assert lc.ScheduleRestart not in machine.kinds()
    machine(lc.WorkerFailed(1, FailureKind.PROTOCOL, "again"))
    assert machine.commands == []
    machine(exited(1))
    assert len(machine.state.account.times) == 1
    assert machine.kinds() == [lc.ScheduleRestart]


def test_the_load_timeout_has_its_code() -> None:
    machine = loading()(lc.WorkerFailed(1, FailureKind.LOAD_TIMEOUT, "not loaded within 600 s"))
    assert machine.state.code is ErrorCode.MODEL_LOAD_TIMEOUT


def test_delays_grow_with_the_failures() -> None:
    machine = routable()(exited(1), lc.RestartDue(1), lc.WorkerSpawned(2), exited(2))
    assert machine.command(lc.ScheduleRestart) == lc.ScheduleRestart(2, 1.0)
    assert machine.state.retry_at == machine.now + 1.0


def test_the_threshold_quarantines_and_nothing_is_spawned() -> None:
    machine = quarantined()
    assert machine.state.readiness is Readiness.QUARANTINED
    assert machine.state.code is ErrorCode.MODEL_UNSTABLE
    assert not machine.state.worker_alive
    assert lc.SpawnWorker not in machine.kinds()
    assert lc.ScheduleRestart not in machine.kinds()
    assert lc.FailRequests in machine.kinds()


def test_an_unsupported_model_is_dropped_without_a_count() -> None:
    machine = loading()(lc.LoadRefused(1, ErrorCode.MODEL_UNSUPPORTED_ARCH, "no such arch"))
    assert machine.command(lc.StopWorker) == lc.StopWorker(1, broken=True)
    assert machine.state.account == Account()
    machine(exited(1))
    assert machine.current is None


@pytest.mark.parametrize("make", [admitted, loading, canary_pending, routable])
def test_unload_stops_the_worker_then_drops_the_model(make: type[Machine]) -> None:
    machine = make()(lc.UnloadRequested())
    assert machine.state.unloading
    assert lc.StopWorker in machine.kinds()
    assert lc.AnswerLoads in machine.kinds()
    machine(exited(1))
    assert machine.current is None
    assert machine.commands == []


def test_unload_between_two_tries_drops_at_once() -> None:
    machine = routable()(exited(1), lc.UnloadRequested())
    assert machine.current is None


def test_unload_while_a_failed_worker_is_being_stopped() -> None:
    machine = routable()(lc.WorkerFailed(1, FailureKind.HANG, "hung"), lc.UnloadRequested())
    assert lc.StopWorker not in machine.kinds()
    assert machine(exited(1)).current is None


def test_unload_does_not_end_a_quarantine() -> None:
    machine = quarantined()(lc.UnloadRequested())
    assert machine.state.readiness is Readiness.QUARANTINED


def test_release_drops_the_model_with_an_empty_window() -> None:
    machine = quarantined()(lc.Released())
    assert machine.current is None
    save = machine.command(lc.SaveAccount)
    assert isinstance(save, lc.SaveAccount)
    assert (save.account.times, save.account.quarantined) == ((), False)


@pytest.mark.parametrize("make", [admitted, loading, canary_pending, routable])
def test_there_is_nothing_to_release_elsewhere(make: type[Machine]) -> None:
    with pytest.raises(lc.IllegalEvent):
        make()(lc.Released())


def test_the_override_puts_a_quarantined_model_on_probation() -> None:
    machine = quarantined()
    account = machine.state.account
    machine(lc.LoadAccepted(account, probation=True))
    assert machine.readiness() is Readiness.ADMITTED
    assert machine.commands[-1] == lc.SpawnWorker(4)
    machine(lc.WorkerSpawned(4), lc.WorkerLoaded(4))
    assert machine.commands == [lc.RunCanary(4, strict=True)]
    machine(lc.CanaryPassed(4))
    assert machine.state.probation
    assert machine.command(lc.WatchProbation) == lc.WatchProbation(4, POLICY.window_s)
    machine(exited(4))
    assert machine.readiness() is Readiness.QUARANTINED
    assert machine.state.account.quarantines == 2


def test_probation_ends_after_a_window_in_health() -> None:
    machine = quarantined()
    machine(lc.LoadAccepted(machine.state.account, probation=True))
    machine(lc.WorkerSpawned(4), lc.WorkerLoaded(4), lc.CanaryPassed(4))
    machine(lc.ProbationServed(4))
    assert not machine.state.probation
    save = machine.command(lc.SaveAccount)
    assert isinstance(save, lc.SaveAccount)
    assert not save.account.quarantined
    assert machine(exited(4)).state.readiness is Readiness.LOADING


def test_unloading_is_no_way_out_of_probation() -> None:
    machine = quarantined()
    machine(lc.LoadAccepted(machine.state.account, probation=True), lc.WorkerSpawned(4))
    account = machine.state.account
    assert account.quarantined
    machine(lc.UnloadRequested(), exited(4))
    assert machine.current is None
    assert Machine()(lc.LoadAccepted(account)).readiness() is Readiness.QUARANTINED


def test_release_ends_a_probation_and_leaves_the_model_running() -> None:
    machine = quarantined()
    machine(lc.LoadAccepted(machine.state.account, probation=True), lc.WorkerSpawned(4))
    machine(lc.Released())
    assert not machine.state.probation
    assert not machine.state.account.quarantined


def test_a_process_that_cannot_be_made_is_tried_again_and_not_counted() -> None:
    machine = admitted()(lc.SpawnFailed(1, "too many open files"))
    assert machine.readiness() is Readiness.LOADING
    assert machine.state.account == Account()
    assert machine.kinds() == [lc.AnswerLoads, lc.FailRequests, lc.ScheduleRestart]
    assert machine(lc.RestartDue(1)).commands == [lc.SpawnWorker(2)]


def test_an_unload_meets_a_process_that_could_not_be_made() -> None:
    machine = admitted()(lc.UnloadRequested(), lc.SpawnFailed(1, "too many open files"))
    assert machine.current is None


def test_an_isolated_failure_long_after_others_does_not_quarantine() -> None:
    """Two loads fail; then it serves for ten hours, is unloaded, loaded, and crashes once."""
    machine = loading()(exited(1), lc.RestartDue(1), lc.WorkerSpawned(2), exited(2))
    machine(lc.RestartDue(2), lc.WorkerSpawned(3), lc.WorkerLoaded(3), lc.CanaryPassed(3))
    assert (machine.state.account.streak, machine.state.account.level) == (0, 2)
    machine.now += 36_000
    machine(lc.UnloadRequested())
    save = machine.command(lc.SaveAccount)
    assert isinstance(save, lc.SaveAccount)
    assert (save.account.level, save.account.healthy_s) == (0, 0.0)
    machine(exited(3))
    assert machine.current is None
    machine(lc.LoadAccepted(save.account), lc.WorkerSpawned(1), exited(1))
    assert machine.readiness() is Readiness.LOADING
    assert machine.command(lc.ScheduleRestart) == lc.ScheduleRestart(1, 0.0)


@pytest.mark.parametrize(
    "event",
    [
        lc.WorkerFailed(1, FailureKind.BACKEND_EXCEPTION, "x" * 10**6),
        lc.WorkerExited(1, FailureKind.EXIT, "x" * 10**6),
        lc.LoadRefused(1, ErrorCode.MODEL_INCOMPLETE, "x" * 10**6),
        lc.UnloadRequested(reason="x" * 10**6),
    ],
)
def test_what_a_backend_says_is_bounded_from_here_on(event: Event) -> None:
    machine = loading()(event)
    assert len(machine.state.reason) <= MAX_REASON_CHARS
    assert len(machine.state.account.last_reason) <= MAX_REASON_CHARS
    for command in machine.commands:
        assert len(getattr(command, "reason", "")) <= MAX_REASON_CHARS


def test_an_unload_itself_decays_nothing() -> None:
    machine = loading()(exited(1), lc.RestartDue(1), lc.WorkerSpawned(2))
    machine.now += 36_000
    machine(lc.UnloadRequested())
    save = machine.command(lc.SaveAccount)
    assert isinstance(save, lc.SaveAccount)
    assert (save.account.streak, save.account.level) == (1, 1)


def test_a_load_that_was_asked_for_wrongly_is_no_record_of_the_model() -> None:
    machine = loading()(lc.LoadRefused(1, ErrorCode.INVALID_VALUE, "context too long"))
    assert lc.RecordFailure not in machine.kinds()


def test_the_reason_of_a_failure_stays_until_the_model_is_well() -> None:
    machine = routable()(exited(1), lc.RestartDue(1), lc.WorkerSpawned(2))
    assert machine.state.reason == "killed by SIGSEGV"
    machine(lc.WorkerLoaded(2), lc.CanaryPassed(2))
    assert machine.state.reason == "canary passed"


def test_a_quarantine_is_restored_at_the_first_load_after_a_restart() -> None:
    account = Account(times=(-90.0, -70.0), quarantined=True, last_reason="killed by SIGBUS")
    machine = Machine()(lc.LoadAccepted(account))
    assert machine.state.reason == "killed by SIGBUS"
    assert machine.state.updated_at == -70.0
    assert machine.state.readiness is Readiness.QUARANTINED
    assert lc.SpawnWorker not in machine.kinds()


def test_a_restored_quarantine_can_be_overridden() -> None:
    account = replace(Account(), quarantined=True)
    machine = Machine()(lc.LoadAccepted(account, probation=True))
    assert machine.state.readiness is Readiness.ADMITTED
    assert machine.state.probation


@pytest.mark.parametrize(
    "event", [lc.WorkerSpawned(1), lc.CanaryPassed(1), lc.UnloadRequested(), lc.Released()]
)
def test_an_untracked_model_takes_loads_only(event: Event) -> None:
    with pytest.raises(lc.IllegalEvent):
        transition(None, event, POLICY, 0.0)


@pytest.mark.parametrize(
    ("make", "event"),
    [
        (admitted, lc.WorkerLoaded(1)),
        (admitted, lc.CanaryPassed(1)),
        (loading, lc.CanaryPassed(1)),
        (routable, lc.WorkerLoaded(1)),
        (routable, lc.LoadRefused(1, ErrorCode.MODEL_INCOMPLETE, "late")),
        (routable, ACCEPT),
        (routable, lc.WorkerLoaded(2)),
    ],
)
def test_an_illegal_event_raises_and_changes_nothing(make: type[Machine], event: Event) -> None:
    machine = make()
    before = machine.state
    with pytest.raises(lc.IllegalEvent):
        machine(event)
    assert machine.state == before


def test_events_of_an_earlier_generation_change_nothing() -> None:
    machine = routable()(exited(1), lc.RestartDue(1), lc.WorkerSpawned(2))
    before = machine.state
    for event in (
        lc.WorkerLoaded(1),
        lc.CanaryPassed(1),
        exited(1),
        lc.WorkerFailed(1, FailureKind.HANG, "late"),
        lc.RestartDue(1),
    ):
        machine(event)
        assert (machine.state, machine.commands) == (before, [])


CELL_FAILED = lc.CellFailed(FailureKind.SIGNAL, "killed by SIGABRT")


def test_a_failure_of_the_cell_counts_and_the_worker_goes_on() -> None:
    machine = routable()
    before = machine.state
    machine(CELL_FAILED)
    account = machine.state.account
    assert replace(machine.state, account=before.account, routable_since=None) == replace(
        before, routable_since=None
    )
    assert (len(account.times), account.streak) == (1, 0)
    assert machine.commands == [
        lc.SaveAccount(account),
        lc.RecordFailure(
            FailureKind.SIGNAL, ErrorCode.MODEL_CRASHED, CELL_FAILED.reason, in_cell=True
        ),
        lc.ParkSuspects(CELL_FAILED.reason),
    ]


def test_at_the_threshold_a_failure_of_the_cell_ends_the_worker_too() -> None:
    machine = routable()(CELL_FAILED, CELL_FAILED, CELL_FAILED)
    assert machine.readiness() is Readiness.QUARANTINED
    assert machine.command(lc.StopWorker) == lc.StopWorker(1, broken=True)
    failed = machine.command(lc.FailRequests)
    assert isinstance(failed, lc.FailRequests)
    assert failed.code is ErrorCode.MODEL_UNSTABLE
    assert lc.ParkSuspects not in machine.kinds()
    machine(exited(1))
    assert (machine.readiness(), machine.kinds()) == (Readiness.QUARANTINED, [])
    assert len(machine.state.account.times) == 3


def test_a_failure_of_the_cell_while_the_worker_is_to_be_restarted() -> None:
    machine = routable()(exited(1))
    machine(CELL_FAILED)
    assert (machine.readiness(), machine.state.retry_at is None) == (Readiness.LOADING, False)
    machine(CELL_FAILED)
    assert machine.readiness() is Readiness.QUARANTINED
    # There is no worker to stop, and none is started any more.
    assert lc.StopWorker not in machine.kinds()
    assert machine(lc.RestartDue(1)).commands == []
    assert machine(lc.UnloadRequested()).readiness() is Readiness.QUARANTINED


def test_what_is_on_its_way_out_hears_nothing_of_its_cell() -> None:
    for machine in (routable()(lc.UnloadRequested()), quarantined()):
        before = machine.state
        assert machine(CELL_FAILED).state == before
        assert machine.commands == []
