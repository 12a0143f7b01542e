"""The victim of one case: brought to its phase, with others who wait, and struck."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from tests.chaos.harness.observe import Sighting, Watcher
from tests.chaos.harness.rig import Rig
from tests.chaos.harness.specs import LOADING, PLACES, SERVING, STRIKE, Case, Phase
from tests.chaos.harness.wire import Call, chat_body, plain_call, polls, stream_call
from worker.faults import trace_of

VICTIM_TOKENS = [f"{n} " for n in range(40)]
VICTIM_SCRIPT: dict[str, object] = {
    "tokens": VICTIM_TOKENS,
    "step_delay_s": 0.01,
    "prefill_delay_s": 0.02,
    "load_delay_s": 0.1,
}
REAL_ANSWER: dict[str, object] = {"temperature": 0, "ignore_eos": True}
#: An answer that lasts until it is struck, and a prompt whose prefill does: tokens of the
#: one, repetitions of the other. Beside one another on two cores, a tiny model on MLX makes
#: some hundred tokens a second, on llama.cpp thousands.
REAL_SIZES = {"llama": (1200, 120), "mlx": (400, 40)}
LONG_PROMPT = "Once more unto the breach, dear friends. "

#: Requests that the worker has when the one to be struck comes, and that come after it:
#: together, more than it has slots. Those that come after may come too late.
EARLIER, LATER = 3, 2


class CaseError(Exception):
    """The case could not be tried: what should have come before the fault did not."""


class Victim:
    """From its script until it is struck. ``calls`` are all who wait for an answer.

    ``others`` are those of them who only happen to be there: they join a load, or ask
    something while a request is struck. ``late`` ones may find the model down already.
    """

    def __init__(self, rig: Rig, case: Case, model_id: str) -> None:
        self.rig, self.case, self.model_id = rig, case, model_id
        self.spec, self.phase = case.spec, case.phase
        self.real = case.victim != "simulated"
        self.calls: list[Call] = []
        self.others: list[Call] = []
        self.late: list[Call] = []
        self.request: Call | None = None
        self._traces: list[Path] = []
        self.load_options: dict[str, object] = {"model_id": model_id}
        self._arm()
        self.watcher = Watcher(rig.port, model_id)

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

    def approach(self) -> Call:
        """Bring the victim to the phase; the call that waits there."""
        load = self.call("/admin/models/load", self.load_options)
        if self.phase in LOADING:
            self.others = [self.call("/admin/models/load", self.load_options)]
            return load
        if not load.answered() or load.answer != "answered":
            raise CaseError(f"the victim does not load: {load.answer} {load.message}")
        if not self.watcher.first(routable, timeout_s=5.0):
            raise CaseError("the victim is never seen routable")
        if self.phase is Phase.IDLE:
            return load
        if self.phase is Phase.UNLOAD:
            unload = self.call("/admin/models/unload", {"model_id": self.model_id})
            self.others = [self.call("/admin/models/unload", {"model_id": self.model_id})]
            return unload
        prompt = self.spec.prompt
        options: dict[str, object] = {}
        expected: str | None = "".join(VICTIM_TOKENS)
        if self.real:
            max_tokens, repetitions = REAL_SIZES[self.case.victim]
            prompt = LONG_PROMPT * repetitions if self.phase is Phase.PREFILL else STRIKE
            options = {**REAL_ANSWER, "max_tokens": max_tokens}
            # Beside others its logits differ in the last bits, which may turn a token.
            expected = None
        elif self.phase in SERVING:
            self.others = [self.ask_something() for _ in range(EARLIER)]
            self.watcher.first(lambda seen: seen.in_flight >= EARLIER, timeout_s=1.0)
        body = chat_body(self.model_id, prompt, **options)
        self.request = stream_call(self.rig.port, body, expected)
        self.calls.append(self.request)
        self.late = [self.ask_something() for _ in range(LATER)]
        return self.request

    def call(self, path: str, body: object) -> Call:
        call = plain_call(self.rig.port, path, body)
        self.calls.append(call)
        return call

    def ask_something(self) -> Call:
        """A short answer in one piece: nothing of it is seen before it is whole."""
        body = chat_body(self.model_id, "Hi", max_tokens=10)
        return self.call("/v1/chat/completions", {**body, "stream": False})

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


def routable(seen: Sighting) -> bool:
    return seen.state == "routable"


def untracked(seen: Sighting) -> bool:
    return not seen.state
