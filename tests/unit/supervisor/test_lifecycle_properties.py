"""Any sequence of events keeps the promises of the readiness machine."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from protocol.errors import ErrorCode
from supervisor import lifecycle as lc
from supervisor.lifecycle import Readiness, State, transition
from supervisor.quarantine import Account, FailureKind, Policy

POLICY = Policy(threshold=3, window_s=50.0, delay_cap_s=8.0, decay_s=100.0)
kinds = st.sampled_from(FailureKind)
counted_kinds = st.sampled_from([FailureKind.HANG, FailureKind.PROTOCOL, FailureKind.CANARY])


class ReadinessMachine(RuleBasedStateMachine):
    """Plays the actor, its workers and a fleet that keeps the account.

    ``alive`` is the model of the outside world: which generations have a process.
    ``failures`` is an independent log of what should have been counted. The oracles of
    streak and level sum up health in arrears, at the next failure.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.saved = Account()
        self.now = 0.0
        self.alive: set[int] = set()
        self.stopping: set[int] = set()
        self.canary_passed: set[int] = set()
        self.traffic: int | None = None
        self.waiting_load = False
        self.timer: int | None = None
        self.failures: list[float] = []
        self.streak = 0
        self.level = 0
        self.healthy_s = 0.0
        self.routable_since: float | None = None
        self.counted_generations: set[int] = set()

    def apply(self, event: lc.Event) -> None:
        before = self.state
        try:
            self.state, commands = transition(before, event, POLICY, self.now)
        except lc.IllegalEvent:
            assert self.state is before
            return
        for command in commands:
            self.execute(command)
        if self.traffic is None and self.routable_since is not None:
            self.healthy_s += self.now - self.routable_since
            self.routable_since = None
        failures = [c for c in commands if isinstance(c, lc.RecordFailure) and c.kind is not None]
        if any(failure.in_cell for failure in failures) and self.routable_since is not None:
            self.healthy_s += self.now - self.routable_since
            self.routable_since = self.now
        if failures:
            self.level = max(0, self.level - int(self.healthy_s // POLICY.decay_s)) + 1
            self.healthy_s = 0.0
        if self.state is None:
            self.traffic = None
            self.timer = None
            self.counted_generations.clear()
            self.canary_passed.clear()

    def execute(self, command: lc.Command) -> None:
        match command:
            case lc.SpawnWorker():
                assert not self.alive, "two live generations"
                self.alive.add(command.generation)
                self.timer = None
            case lc.WatchProbation():
                assert command.generation in self.alive
            case lc.StopWorker():
                assert command.generation in self.alive
                self.stopping.add(command.generation)
                self.traffic = None
            case lc.OpenTraffic():
                self.traffic = command.generation
                self.routable_since = self.now
                self.streak = 0
            case lc.ParkRequests() | lc.FailRequests():
                self.traffic = None
            case lc.ScheduleRestart():
                assert not self.alive
                assert 0.0 <= command.delay_s <= POLICY.delay_cap_s
                self.timer = command.generation
            case lc.SaveAccount():
                self.saved = command.account
            case lc.AnswerLoads():
                self.waiting_load = False
            case lc.RecordFailure(kind=None):
                pass
            case lc.RecordFailure(in_cell=True):
                self.failures.append(self.now)
                self.streak += 1
            case lc.ParkSuspects():
                if self.traffic is not None:
                    self.streak = 0
            case lc.RecordFailure():
                assert self.state is not None
                assert self.state.generation not in self.counted_generations, "counted twice"
                self.counted_generations.add(self.state.generation)
                self.failures.append(self.now)
                self.streak += 1

    # --- what operators do ---

    @rule(probation=st.booleans())
    def load(self, probation: bool) -> None:
        if self.state is None or (self.state.readiness is Readiness.QUARANTINED and probation):
            self.waiting_load = True
        if self.state is None:
            self.apply(lc.LoadAccepted(self.saved, probation and self.saved.quarantined))
        else:
            self.apply(lc.LoadAccepted(self.state.account, probation))
            if self.alive and self.state.readiness is Readiness.QUARANTINED:
                self.waiting_load = False

    @rule()
    def unload(self) -> None:
        self.apply(lc.UnloadRequested())

    @rule()
    def release(self) -> None:
        was = self.state
        self.apply(lc.Released())
        if was is not self.state:
            self.failures.clear()
            self.streak = 0

    # --- what workers do ---

    @precondition(lambda self: self.alive)
    @rule()
    def spawned(self) -> None:
        self.apply(lc.WorkerSpawned(max(self.alive)))

    @precondition(lambda self: self.alive)
    @rule()
    def spawn_failed(self) -> None:
        """No process was ever there: possible only until the spawn is confirmed."""
        if self.state is not None and self.state.readiness is Readiness.ADMITTED:
            generation = self.alive.pop()
            self.stopping.discard(generation)
            self.apply(lc.SpawnFailed(generation, "no more processes"))

    @precondition(lambda self: self.alive)
    @rule()
    def probation_served(self) -> None:
        was = self.state
        self.apply(lc.ProbationServed(max(self.alive)))
        if was is not None and self.state is not None and was.probation > self.state.probation:
            self.failures.clear()
            self.streak = 0

    @precondition(lambda self: self.alive)
    @rule()
    def loaded(self) -> None:
        self.apply(lc.WorkerLoaded(max(self.alive)))

    @precondition(lambda self: self.alive)
    @rule()
    def canary(self) -> None:
        generation = max(self.alive)
        if self.state is not None and self.state.readiness is Readiness.CANARY_PENDING:
            self.canary_passed.add(generation)
        self.apply(lc.CanaryPassed(generation))

    @precondition(lambda self: self.alive)
    @rule(kind=counted_kinds, jitter=st.floats(0, 1))
    def fail(self, kind: FailureKind, jitter: float) -> None:
        self.apply(lc.WorkerFailed(max(self.alive), kind, "failed", jitter))

    @precondition(lambda self: self.state is not None)
    @rule(kind=kinds)
    def cell_failed(self, kind: FailureKind) -> None:
        before, traffic = self.state, self.traffic
        self.apply(lc.CellFailed(kind, "killed"))
        assert before is not None
        assert self.state is not None
        if self.state.readiness is not Readiness.QUARANTINED:
            # Whatever the model's own worker is at, it goes on with that.
            assert (self.state.readiness, self.traffic) == (before.readiness, traffic)
            assert self.state.worker_alive == before.worker_alive

    @precondition(lambda self: self.alive)
    @rule()
    def refuse(self) -> None:
        self.apply(lc.LoadRefused(max(self.alive), ErrorCode.MODEL_INCOMPLETE, "short"))

    @precondition(lambda self: self.alive)
    @rule(jitter=st.floats(0, 1))
    def exit(self, jitter: float) -> None:
        generation = self.alive.pop()
        self.stopping.discard(generation)
        self.apply(lc.WorkerExited(generation, FailureKind.SIGNAL, "killed", jitter))

    @precondition(lambda self: self.timer is not None)
    @rule()
    def restart(self) -> None:
        assert self.timer is not None
        self.apply(lc.RestartDue(self.timer))

    @precondition(lambda self: self.state is not None and self.state.generation > 1)
    @rule(kind=kinds)
    def stale(self, kind: FailureKind) -> None:
        assert self.state is not None
        before = self.state
        old = before.generation - 1
        for event in (
            lc.WorkerSpawned(old),
            lc.WorkerLoaded(old),
            lc.CanaryPassed(old),
            lc.WorkerFailed(old, kind, "late"),
            lc.WorkerExited(old, kind, "late"),
            lc.RestartDue(old),
            lc.LoadRefused(old, ErrorCode.MODEL_INCOMPLETE, "late"),
        ):
            assert transition(before, event, POLICY, self.now) == (before, [])

    @rule(quarters=st.integers(0, 1000))
    def wait(self, quarters: int) -> None:
        # In binary fractions, whose sums are exact in any order.
        self.now += quarters / 4

    # --- what must always hold ---

    @invariant()
    def traffic_only_when_routable_and_proven_in_this_generation(self) -> None:
        if self.traffic is not None:
            assert self.state is not None
            assert self.state.readiness is Readiness.ROUTABLE
            assert not self.state.unloading
            assert self.traffic == self.state.generation
            assert self.traffic in self.canary_passed

    @invariant()
    def one_live_generation(self) -> None:
        assert len(self.alive) <= 1
        if self.state is not None:
            assert self.state.worker_alive == bool(self.alive)
            assert not self.alive or self.alive == {self.state.generation}
        else:
            assert not self.alive

    @invariant()
    def counters_equal_a_recount(self) -> None:
        account = self.saved if self.state is None else self.state.account
        recount = [t for t in self.failures if self.now - t < POLICY.window_s]
        assert [t for t in account.times if self.now - t < POLICY.window_s] == recount
        assert account == self.saved
        assert account.streak == self.streak
        if self.routable_since is None:
            assert account.level == max(0, self.level - int(self.healthy_s // POLICY.decay_s))

    @invariant()
    def quarantine_is_what_the_account_says(self) -> None:
        if self.state is not None:
            rests = self.state.readiness is Readiness.QUARANTINED
            assert self.state.account.quarantined == (rests or self.state.probation)

    @invariant()
    def nobody_waits_for_ever(self) -> None:
        """Someone who waits for a load waits for a worker or a timer, never for nothing."""
        if self.waiting_load:
            assert self.alive or self.timer is not None

    @invariant()
    def a_model_without_a_worker_has_a_future_or_rests(self) -> None:
        if self.state is not None and not self.alive:
            resting = self.state.readiness is Readiness.QUARANTINED
            assert resting or self.timer is not None


ReadinessMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None
)
TestReadinessMachine = ReadinessMachine.TestCase
