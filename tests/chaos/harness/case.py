"""One fault in one phase of a worker's life: do it, watch, and judge."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from tests.chaos.harness.observe import Bystander, Sighting, Watcher
from tests.chaos.harness.report import Row, percentile
from tests.chaos.harness.rig import Rig
from tests.chaos.harness.specs import LOADING, PLACES, STRIKE, Case, Expect, Phase, is_missing
from tests.chaos.harness.wire import Call, ask, chat_body, plain_call, polls, stream_call
from worker.faults import trace_of

#: A bystander that pauses for longer has been disturbed. A machine with few cores
#: gives it pauses of some tenths when a process starts, see the calm column.
STALL_LIMIT_S = 1.0
#: Detection to routable again, with a start of Python and its libraries in between.
RECOVERY_LIMIT_S = 15.0
RECOVERY_LIMIT_REAL_S = 30.0
#: What may go on unseen until it is called "nothing happened".
QUIET_S = 1.0

VICTIM_TOKENS = [f"{n} " for n in range(40)]
VICTIM_SCRIPT: dict[str, object] = {
    "tokens": VICTIM_TOKENS,
    "step_delay_s": 0.01,
    "prefill_delay_s": 0.02,
    "load_delay_s": 0.1,
}
REAL_ANSWER: dict[str, object] = {"temperature": 0, "max_tokens": 1200, "ignore_eos": True}
#: Long enough for its prefill to be struck.
LONG_PROMPT = "Once more unto the breach, dear friends. " * 120


class CaseError(Exception):
    """The case could not be tried: what should have come before the fault did not."""


def run_case(rig: Rig, case: Case, number: int, calm: Row) -> Row:
    """``number`` is unique within the rig; ``calm`` is from ``measure_calm``."""
    row = Row(
        case.spec.name,
        case.phase,
        case.victim,
        calm_s=calm.stall_s,
        calm_p50_s=calm.gap_p50_s,
        calm_p99_s=calm.gap_p99_s,
    )
    if is_missing(case.spec):
        row.skipped = f"no setting {case.spec.needs}"
        return row
    run = Run(rig, case, row, f"victim-{number}")
    bystanders = rig.bystanders(case.victim)
    try:
        if not all(bystander.begun() for bystander in bystanders):
            raise CaseError("a bystander does not get going")
        run.strike_and_watch()
    except CaseError as error:
        row.breach(str(error))
    finally:
        run.clean_up()
        judge_bystanders(row, bystanders)
    row.orphans = rig.surplus(rig.calm_processes)
    if row.orphans:
        row.breach("processes are left: " + _describe(rig))
        rig.kill_strays()
    return row


def measure_calm(rig: Rig, seconds: float = 3.0) -> Row:
    """The bystanders' pauses while somebody watches and nothing breaks."""
    bystanders = rig.bystanders("nobody")
    watcher = Watcher(rig.port, "bystander")
    for bystander in bystanders:
        bystander.begun()
    time.sleep(seconds)
    watcher.stop()
    row = Row("none", "calm")
    judge_bystanders(row, bystanders)
    if row.breaches:
        raise RuntimeError(f"disturbed without any fault: {row.breaches}")
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
    if row.stall_s > STALL_LIMIT_S + (row.calm_s or 0.0):
        row.breach(f"a bystander waited {row.stall_s:.2f} s for its next token")


class Run:
    """The victim of one case, from its script to its end."""

    def __init__(self, rig: Rig, case: Case, row: Row, model_id: str) -> None:
        self.rig, self.case, self.row, self.model_id = rig, case, row, model_id
        self.spec, self.phase = case.spec, case.phase
        self.real = case.victim != "simulated"
        self.calls: list[Call] = []
        self.request: Call | None = None
        self._traces: list[Path] = []
        self.load_options: dict[str, object] = {"model_id": model_id}
        self._arm()
        self.watcher = Watcher(rig.port, model_id)

    # --- before ---

    def _arm(self) -> None:
        """Write the victim's script with its faults in place, or make its file."""
        for trace in self.rig.folder.glob("boot-faults.*"):
            trace.unlink()
        if self.real:
            self.load_options["path"] = str(self.rig.model_file(self.case.victim))
            return
        faults = [
            {**PLACES.get(self.phase, {}), "times": self.spec.times, **act}
            for act in self.spec.acts
        ]
        for fault in faults:
            if fault["at"] not in {"token"}:
                fault["n"] = 0
        at_boot = [fault for fault in faults if fault["at"] in {"spawn", "hello"}]
        scripted = [fault for fault in faults if fault not in at_boot]
        script = {**VICTIM_SCRIPT, **self.spec.script, "faults": scripted}
        self.rig.script(self.model_id, **script)
        base = self.rig.folder / f"{self.model_id}.sim.json"
        if at_boot:
            base = self.rig.boot_faults
            base.write_text(json.dumps(at_boot))
        self._traces = [trace_of(base, index) for index in range(len(at_boot or scripted))]

    # --- strike ---

    def strike_and_watch(self) -> None:
        answered = self.approach()
        before = self.watcher.last
        struck_at = self.strike()
        try:
            self._judge(before, struck_at)
        finally:
            if not answered.answered():
                self.row.waiters += 1
                self.row.breach(f"nobody answered the {self.phase} call")
        if not self.row.breaches:
            self._judge_answer(answered)

    def approach(self) -> Call:
        """Bring the victim to the phase; the call that waits there."""
        load = self._call("/admin/models/load", self.load_options)
        if self.phase in LOADING:
            return load
        if not load.answered() or load.answer != "answered":
            raise CaseError(f"the victim does not load: {load.answer} {load.message}")
        if not self.watcher.first(_routable, timeout_s=5.0):
            raise CaseError("the victim is never seen routable")
        if self.phase is Phase.IDLE:
            return load
        if self.phase is Phase.UNLOAD:
            return self._call("/admin/models/unload", {"model_id": self.model_id})
        prompt = STRIKE
        options: dict[str, object] = {}
        expected = "".join(VICTIM_TOKENS)
        if self.real:
            prompt = LONG_PROMPT if self.phase is Phase.PREFILL else STRIKE
            options = REAL_ANSWER
            expected = self.rig.answer_of(self.case.victim, prompt, **options)
        body = chat_body(self.model_id, prompt, **options)
        self.request = stream_call(self.rig.port, body, expected)
        self.calls.append(self.request)
        return self.request

    def _call(self, path: str, body: object) -> Call:
        call = plain_call(self.rig.port, path, body)
        self.calls.append(call)
        return call

    def strike(self) -> float:
        """Break it, or wait until its script does; the monotonic time of that."""
        if self.spec.number is not None:
            pid = self._await_phase()
            struck_at = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self.spec.number)
            return struck_at
        if not self._traces:
            # What is wrong is in the file: it strikes as soon as that is loaded.
            tracked = self.watcher.first(lambda seen: bool(seen.state), timeout_s=10.0)
            return tracked.at if tracked is not None else time.monotonic()
        for _ in polls(20.0):
            if self._traces[-1].exists() and (text := self._traces[-1].read_text()):
                return float(text.split()[0])
        raise CaseError("the fault never struck")

    def _await_phase(self) -> int:
        """Wait until the victim is in the phase; its pid."""
        for _ in polls(20.0):
            last = self.watcher.last
            if last.pid is not None and self._is_there(last):
                return last.pid
        raise CaseError(f"the victim is never seen in {self.phase}")

    def _is_there(self, last: Sighting) -> bool:
        match self.phase:
            case Phase.SPAWN | Phase.IDLE | Phase.UNLOAD:
                return True
            case Phase.LOAD:
                library = "libllama" if self.case.victim == "llama" else "libmlx"
                return library in Path(f"/proc/{last.pid}/maps").read_text()
            case Phase.CANARY:
                return last.state == "canary_pending"
            case Phase.PREFILL:
                return last.in_flight > 0
        assert self.request is not None
        return self.request.pieces >= 3

    # --- judge ---

    def _judge(self, before: Sighting, struck_at: float) -> None:
        row, spec = self.row, self.spec
        limit_s = spec.within_s + (RECOVERY_LIMIT_REAL_S if self.real else RECOVERY_LIMIT_S)
        if self.phase is Phase.UNLOAD:
            self._await(_untracked, "unloaded", struck_at, limit_s)
            self._check_count(0)
            return
        match spec.expect:
            case Expect.UNHARMED:
                assert self.calls[-1].answered(limit_s)
                self._await(_routable, "unharmed", struck_at, limit_s, timed=False)
                time.sleep(QUIET_S)
                self._check_generation(max(1, before.generation))
                self._check_count(0)
                self._probe()
            case Expect.RECOVERS:
                self._detect(before, struck_at, limit_s)
                generation = max(1, before.generation) + 1
                self._await(
                    lambda seen: _routable(seen) and seen.generation >= generation,
                    "recovered",
                    struck_at,
                    limit_s,
                )
                self._check_generation(generation)
                self._check_count(1)
                self._probe()
            case Expect.QUARANTINED:
                self._detect(before, struck_at, limit_s)
                self._await(lambda s: s.state == "quarantined", "quarantined", struck_at, 60.0)
                self._check_generation(3)
                self._check_count(3)
                self._check_refused("model_unstable")
            case Expect.DROPPED:
                self._await(_untracked, "dropped", struck_at, limit_s)
                row.detected_s = row.recovered_s
                self._check_refused("model_not_found")

    def _detect(self, before: Sighting, struck_at: float, limit_s: float) -> None:
        seen = self.watcher.first(
            lambda s: (
                s.failures > before.failures
                or s.generation > max(1, before.generation)
                or s.state == "quarantined"
            ),
            since=struck_at,
            timeout_s=limit_s,
        )
        if seen is None:
            self.row.breach(f"not detected within {limit_s:.0f} s: {self.watcher.last}")
            return
        self.row.detected_s = seen.at - struck_at
        if self.row.detected_s > self.spec.within_s:
            self.row.breach(
                f"detected after {self.row.detected_s:.2f} s, limit {self.spec.within_s:.2f} s"
            )

    def _await(
        self, wanted: object, outcome: str, struck_at: float, limit_s: float, *, timed: bool = True
    ) -> None:
        assert callable(wanted)
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

    def _judge_answer(self, call: Call) -> None:
        expected = self._expected_answers()
        if call.answer not in expected:
            allowed = " or ".join(sorted(expected))
            self.row.breach(
                f"the {self.phase} call was answered {call.answer}, not {allowed}: {call.message}"
            )

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
        if spec.expect is Expect.UNHARMED:
            return {"whole"}
        if phase is Phase.PREFILL:
            # Nothing was sent yet: it runs again, unseen. A real prefill may have
            # ended before the signal came.
            return {"whole", "error:model_crashed"} if self.real else {"whole"}
        return {"error:model_crashed"}

    # --- after ---

    def clean_up(self) -> None:
        """Unload the victim, and count what does not come back."""
        row, port = self.row, self.rig.port
        self.rig.boot_faults.unlink(missing_ok=True)
        if self.watcher.last.state:
            unload = self._call("/admin/models/unload", {"model_id": self.model_id})
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
        row.freed_mb = sum(gb for pid, gb in memory.items() if pid not in left) * 1000


def _routable(seen: Sighting) -> bool:
    return seen.state == "routable"


def _untracked(seen: Sighting) -> bool:
    return not seen.state


def _describe(rig: Rig) -> str:
    names = []
    for process in rig.processes():
        with contextlib.suppress(Exception):
            names.append(f"{process.pid} {' '.join(process.cmdline()[-3:])}")
    return "; ".join(names)
