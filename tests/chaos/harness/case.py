"""One fault in one phase of a worker's life: do it, watch, and judge."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.harness.observe import Bystander, Sighting
from tests.chaos.harness.report import Row, percentile
from tests.chaos.harness.rig import Rig
from tests.chaos.harness.specs import LOADING, Case, Expect, Phase, is_missing
from tests.chaos.harness.victim import VICTIM_TOKENS, CaseError, Victim, routable, untracked
from tests.chaos.harness.wire import Call, ask, chat_body, stream_call

#: A bystander that pauses for longer has been disturbed. A machine with few cores
#: gives it pauses of some tenths when a process starts, see the calm column.
STALL_LIMIT_S = 1.0
#: Detection to routable again, with a start of Python and its libraries in between.
RECOVERY_LIMIT_S = 15.0
RECOVERY_LIMIT_REAL_S = 30.0
#: A plain death is told within 50 ms: breached if the API, asked later than that and what
#: two busy cores take to run whom they should, still said that all was well. What lies
#: between the last such answer and the first other one is the resolution of the watcher.
DEATH_LIMIT_S = 0.05
SCHEDULING_S = 0.10
#: What may go on unseen until it is called "nothing happened".
QUIET_S = 1.0
#: What the server and its bystanders may have grown by in the course of one case.
GROWTH_LIMIT_MB = 96.0


def run_case(rig: Rig, case: Case, number: int, calm: Row | None) -> Row:
    """``number`` is unique within the rig; ``calm`` is the row of the same without a fault."""
    row = Row(case.spec.name, case.phase, case.victim)
    if calm is not None:
        row.calm_s, row.calm_p50_s, row.calm_p99_s = calm.stall_s, calm.gap_p50_s, calm.gap_p99_s
    if is_missing(case.spec):
        row.skipped = f"no setting {case.spec.needs}"
        return row
    bystanders: list[Bystander] = []
    run: Run | None = None
    try:
        before_mb = rig.memory_mb()
        run = Run(rig, case, row, f"victim-{number}")
        bystanders = rig.bystanders(case.victim)
        if not all(bystander.begun() for bystander in bystanders):
            raise CaseError("a bystander does not get going")
        run.strike_and_watch()
    except CaseError as error:
        row.breach(str(error))
    except Exception as error:
        # Such as a supervisor that is not there any more: that is what is looked for.
        row.breach(f"{type(error).__name__}: {error}; {rig.last_words()}")
    try:
        if run is not None:
            run.clean_up()
        judge_bystanders(row, bystanders)
        row.orphans = rig.surplus(rig.calm_processes)
        if row.orphans:
            row.breach("processes are left: " + _describe(rig))
            rig.kill_strays()
        row.grown_mb = rig.memory_mb() - before_mb
        if row.grown_mb > GROWTH_LIMIT_MB:
            row.breach(f"the server and its bystanders have {row.grown_mb:.0f} MB more than before")
    except Exception as error:
        row.breach(f"afterwards: {type(error).__name__}: {error}; {rig.last_words()}")
    return row


def judge_bystanders(row: Row, bystanders: list[Bystander]) -> None:
    for bystander in bystanders:
        bystander.stop()
    gaps_s = [gap for bystander in bystanders for gap in bystander.gaps_s]
    row.stall_s = max(gaps_s, default=0.0)
    row.gap_p50_s, row.gap_p99_s = percentile(gaps_s, 50), percentile(gaps_s, 99)
    row.lost = sum(bystander.lost for bystander in bystanders)
    for bystander in bystanders:
        if bystander.trouble:
            row.breach(f"bystander: {bystander.trouble}")
    if row.lost:
        row.breach(f"bystanders lost or doubled {row.lost} tokens")
    # Without a fault, it is what the machine makes of the phase; see the calm column.
    if row.calm_s is not None and row.stall_s > STALL_LIMIT_S + row.calm_s:
        row.breach(f"a bystander waited {row.stall_s:.2f} s for its next token")


class Run(Victim):
    """A victim, and the judgement of what came of it."""

    def __init__(self, rig: Rig, case: Case, row: Row, model_id: str) -> None:
        self.row = row
        super().__init__(rig, case, model_id)

    def strike_and_watch(self) -> None:
        answered = self.approach()
        before = self.watcher.last
        struck_at = self.strike()
        if self.phase is Phase.IDLE and not self.real:
            # A worker that does not take it up is found by this.
            self.late = [self.ask_something()]
        try:
            self._judge(before, struck_at)
        finally:
            waiters = (answered, *self.others, *self.late)
            unanswered = [call for call in waiters if not call.answered()]
            self.row.waiters += len(unanswered)
            if unanswered:
                self.row.breach(f"{len(unanswered)} who waited in {self.phase} were not answered")
        if not self.row.breaches:
            self._judge_answers(answered)

    # --- judge ---

    def _judge(self, before: Sighting, struck_at: float) -> None:
        row, spec = self.row, self.spec
        limit_s = spec.within_s + (RECOVERY_LIMIT_REAL_S if self.real else RECOVERY_LIMIT_S)
        if self.phase is Phase.UNLOAD:
            self._await(untracked, "unloaded", struck_at, limit_s)
            self._check_count(0)
            return
        match spec.expect:
            case Expect.UNHARMED:
                for call in self.calls:
                    call.answered(limit_s)
                self._await(routable, "unharmed", struck_at, limit_s, timed=False)
                time.sleep(QUIET_S)
                self._check_generation(max(1, before.generation))
                self._check_count(0)
                self._probe()
            case Expect.RECOVERS:
                self._detect(before, struck_at, limit_s)
                generation = max(1, before.generation) + 1
                self._await(
                    lambda seen: routable(seen) and seen.generation >= generation,
                    "recovered",
                    struck_at,
                    limit_s,
                )
                self._check_generation(generation)
                self._check_count(1)
                self._probe()
                row.parts_s = self._parts_s()
            case Expect.QUARANTINED:
                self._detect(before, struck_at, limit_s)
                self._await(lambda s: s.state == "quarantined", "quarantined", struck_at, 60.0)
                self._check_generation(3)
                self._check_count(3)
                self._check_refused("model_unstable")
            case Expect.DROPPED:
                self._await(untracked, "dropped", struck_at, limit_s)
                row.detected_s = row.recovered_s
                self._check_refused("model_not_found")

    def _detect(self, before: Sighting, struck_at: float, limit_s: float) -> None:
        def detected(seen: Sighting) -> bool:
            return (
                seen.failures > before.failures
                or seen.generation > max(1, before.generation)
                or seen.state == "quarantined"
            )

        seen = self.watcher.first(detected, since=struck_at, timeout_s=limit_s)
        if seen is None:
            self.row.breach(f"not detected within {limit_s:.0f} s: {self.watcher.last}")
            return
        self.row.detected_s = seen.at - struck_at
        if self.row.detected_s > self.spec.within_s:
            self.row.breach(
                f"detected after {self.row.detected_s:.2f} s, limit {self.spec.within_s:.2f} s"
            )
        unseen_s = self.watcher.last_asked_before(seen) - struck_at
        if self.spec.plain and unseen_s > DEATH_LIMIT_S + SCHEDULING_S:
            self.row.breach(f"{unseen_s:.3f} s after the death it was still not told")

    def _await(
        self,
        wanted: Callable[[Sighting], bool],
        outcome: str,
        struck_at: float,
        limit_s: float,
        *,
        timed: bool = True,
    ) -> None:
        seen = self.watcher.first(wanted, since=struck_at, timeout_s=limit_s)
        if seen is None:
            self.row.breach(f"not {outcome} within {limit_s:.0f} s: {self.watcher.last}")
            return
        self.row.outcome = outcome
        if timed:
            self.row.recovered_s = seen.at - struck_at

    def _check_generation(self, expected: int) -> None:
        if self.watcher.last.generation != expected:
            self.row.breach(f"generation {self.watcher.last.generation}, expected {expected}")

    def _check_count(self, expected: int) -> None:
        """Counted exactly so often, under a kind that it is."""
        if self.phase is not Phase.UNLOAD and self.watcher.last.failures != expected:
            self.row.breach(f"counted {self.watcher.last.failures} times, not {expected}")
        query = f"/admin/models/compatibility?model={self.model_id}&outcome=fail"
        records = ask(self.rig.port, "GET", query)[1]["records"]
        kinds = [str(record["metadata"].get("kind")) for record in records]
        counted = [kind for kind in kinds if kind != "None"]
        if len(counted) != expected:
            self.row.breach(f"{len(counted)} failures in the registry, not {expected}: {kinds}")
        if wrong := set(counted) - self.spec.kinds:
            self.row.breach(f"counted as {', '.join(wrong)}: {records[0]['reason']}")

    def _parts_s(self) -> dict[str, float]:
        """Where the time of the newest load went."""
        query = f"/admin/models/compatibility?model={self.model_id}&outcome=pass&limit=1"
        records = ask(self.rig.port, "GET", query)[1]["records"]
        found: dict[str, float] = records[0]["metadata"]["load_parts_s"] if records else {}
        return found

    def _check_refused(self, code: str) -> None:
        body = chat_body(self.model_id, "Hi")
        call = stream_call(self.rig.port, body, "")
        if not call.answered(5.0) or call.answer != f"refused:{code}":
            self.row.breach(f"a request is answered {call.answer}, not refused:{code}")

    def _probe(self) -> None:
        """The victim is well again: it answers, all of it."""
        if self.row.breaches or self.real:
            return
        if "tokens" in self.spec.script:
            return
        call = stream_call(self.rig.port, chat_body(self.model_id, "Hi"), "".join(VICTIM_TOKENS))
        if not call.answered(15.0) or call.answer != "whole":
            self.row.breach(f"afterwards a request is answered {call.answer}: {call.message}")

    def _judge_answers(self, call: Call) -> None:
        expected = self._expected_answers()
        judged = [(call, expected)]
        others = self._expected_of_others(expected)
        judged += [(other, others) for other in self.others]
        # The refusal says when to come again; a hang is not known yet.
        down = set() if self.spec.hangs else {"refused:model_not_ready"}
        judged += [(late, others | down) for late in self.late]
        for who, allowed in judged:
            if who.answer not in allowed:
                self.row.breach(
                    f"a call in {self.phase} was answered {who.answer}, not "
                    f"{' or '.join(sorted(allowed))}: {who.message}"
                )

    def _expected_of_others(self, expected: set[str]) -> set[str]:
        """Whoever joined a load may find the next one under way, or the end of all."""
        if self.phase in LOADING:
            return expected | {"answered", "refused:model_unstable"}
        if self.phase is Phase.UNLOAD:
            return {"answered", "refused:model_not_found"}
        # Nothing of their answers was seen: they run again.
        return {"answered"}

    def _expected_answers(self) -> set[str]:
        spec, phase = self.spec, self.phase
        if phase in {Phase.IDLE, Phase.UNLOAD}:
            return {"answered"}
        if phase in LOADING:
            if spec.codes:
                return {f"refused:{code}" for code in spec.codes}
            if spec.expect is Expect.UNHARMED:
                return {"answered"}
            if phase is Phase.CANARY:
                return {"refused:model_canary_failed"}
            if spec.hangs:
                return {"refused:model_load_timeout"}
            return {"refused:model_loader_crashed"}
        # What is interrupted runs again, unseen, or goes on where it was.
        return {"whole"}

    # --- after ---

    def clean_up(self) -> None:
        """Unload the victim, and count what does not come back."""
        row, port = self.row, self.rig.port
        self.rig.boot_faults.unlink(missing_ok=True)
        if self.watcher.last.state:
            unload = self.call("/admin/models/unload", {"model_id": self.model_id})
            unload.answered()
            with contextlib.suppress(OSError):
                ask(port, "POST", f"/admin/models/{self.model_id}/release")
        forgotten = [call for call in self.calls if not call.answered(10.0)]
        if len(forgotten) > row.waiters:
            row.waiters = len(forgotten)
            row.breach(f"{len(forgotten)} calls were never answered")
        self.watcher.stop()
        memory = self.watcher.workers
        left = [pid for pid in memory if Path(f"/proc/{pid}").exists()]
        if left:
            row.breach(f"workers {left} of the victim are still there, with their memory")
        row.freed_mb = sum(gb for pid, gb in memory.items() if pid not in left) * 1000


def _describe(rig: Rig) -> str:
    names = []
    for process in rig.processes():
        with contextlib.suppress(Exception):
            names.append(f"{process.pid} {' '.join(process.cmdline()[-3:])}")
    return "; ".join(names)
