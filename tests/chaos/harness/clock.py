"""The wall clock moves: between two starts of the server, or while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.harness.case import judge_bystanders
from tests.chaos.harness.homes import ACCOUNTS, REGISTRY, check_nothing_set_aside
from tests.chaos.harness.report import Row
from tests.chaos.harness.rig import new_rig
from tests.chaos.harness.victim import VICTIM_SCRIPT

RECOVERY_LIMIT_S = 15.0

#: Imported by every Python of the rig before anything else: its wall clock is off by the
#: number in a file, from the moment it is there. The system's own stays as it is.
_SHIM = """
import time
_real = time.time
def _shifted():
    try:
        with open({path!r}) as file:
            return _real() + float(file.read() or 0)
    except OSError:
        return _real()
time.time = _shifted
"""


def moved_before(shift_s: float, *, expected: int) -> Callable[[Row], None]:
    """Two failures, then a restart with their time stamps moved, then another failure."""

    def judge(row: Row) -> None:
        with new_rig() as rig:
            rig.script("victim", **VICTIM_SCRIPT)
            rig.must_load("victim")
            for generation in (2, 3):
                rig.server.kill_worker("victim")
                rig.server.await_state("victim", "routable", generation=generation)
            rig.server.stop()
            _shift(rig.home / ACCOUNTS, shift_s)
            _shift(rig.home / REGISTRY, shift_s)
            restarted_at = time.monotonic()
            rig.restart()
            rig.must_load("victim")
            row.recovered_s = time.monotonic() - restarted_at
            counted = rig.server.model("victim")["readiness"]["crash_count"]
            if counted != expected:
                row.breach(f"{counted} failures are in the window, not {expected}")
            rig.server.kill_worker("victim")
            # Three within the window quarantine it.
            row.outcome = "quarantined" if expected == 2 else "routable"
            rig.server.await_state("victim", row.outcome, timeout_s=RECOVERY_LIMIT_S)
            check_nothing_set_aside(rig, row)

    return judge


def _shift(path: Path, seconds: float) -> None:
    content = json.loads(path.read_text())

    def move(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: move(inner, key) for key, inner in value.items()}
        if isinstance(value, list):
            return [move(inner, name) for inner in value]
        return value + seconds if name in {"failed_at", "timestamp"} else value

    path.write_text(json.dumps(move(content)))


def moved_meanwhile(shift_s: float) -> Callable[[Row], None]:
    """A failure before, two after: they are three within the window all the same."""

    def judge(row: Row) -> None:
        with new_rig(with_python=_SHIM) as rig:
            rig.script("victim", **VICTIM_SCRIPT)
            rig.must_load("victim")
            bystanders = rig.bystanders("simulated")
            assert all(bystander.begun() for bystander in bystanders)
            rig.server.kill_worker("victim")
            rig.server.await_state("victim", "routable", generation=2)
            rig.shim_file.write_text(str(shift_s))
            moved_at = time.monotonic()
            rig.server.kill_worker("victim")
            view = rig.server.await_state(
                "victim", "routable", generation=3, timeout_s=RECOVERY_LIMIT_S
            )
            row.recovered_s = time.monotonic() - moved_at
            if view["readiness"]["crash_count"] != 2:
                row.breach(f"{view['readiness']['crash_count']} failures are counted, not 2")
            rig.server.kill_worker("victim")
            row.outcome = "quarantined"
            rig.server.await_state("victim", row.outcome, timeout_s=RECOVERY_LIMIT_S)
            judge_bystanders(row, bystanders)
            incidents = rig.server.http.get("/admin/incidents?model=victim").json()["incidents"]
            gap_s = incidents[0]["timestamp"] - incidents[-1]["timestamp"]
            if abs(gap_s - shift_s) > 60 and abs(gap_s + shift_s) > 60:
                row.breach(f"the clock has not moved: {gap_s:.0f} s between the incidents")
            check_nothing_set_aside(rig, row)

    return judge
