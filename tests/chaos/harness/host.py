"""Faults of what the workers stand on: the supervisor itself, its home, its clock."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.harness.case import judge_bystanders
from tests.chaos.harness.clock import moved_before, moved_meanwhile
from tests.chaos.harness.homes import ACCOUNTS, REGISTRY, check_nothing_set_aside
from tests.chaos.harness.observe import Watcher
from tests.chaos.harness.report import Row
from tests.chaos.harness.rig import Rig, new_rig
from tests.chaos.harness.specs import CALM_REAL, SCRIPTED, Case, FaultSpec, Phase, acts
from tests.chaos.harness.victim import VICTIM_SCRIPT, Victim

#: Until every worker of a dead supervisor is gone.
ORPHANS_LIMIT_S = 5.0
RECOVERY_LIMIT_S = 15.0
DAY_S = 86_400.0


class Skipped(Exception):
    """This machine does not let us break it in that way."""


@dataclass(frozen=True)
class HostCase:
    """``judge`` does it and fills in the row."""

    fault: str
    phase: str
    judge: Callable[[Row], None]
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.fault}-{self.phase}".replace(" ", "-")


def run_host_case(case: HostCase) -> Row:
    row = Row(case.fault, case.phase, "supervisor")
    try:
        case.judge(row)
    except Skipped as reason:
        row.skipped = str(reason)
    except Exception as error:
        row.breach(f"{type(error).__name__}: " + " ".join(str(error).split())[-1000:])
    return row


# --- the supervisor dies -----------------------------------------------------------


def _killed(phase: Phase, *kinds: str, victim: str = "simulated") -> Callable[[Row], None]:
    """SIGKILL to the supervisor while its worker is in a phase, held there by ``kinds``."""

    def judge(row: Row) -> None:
        real = victim != "simulated"
        spec = CALM_REAL if real else FaultSpec(row.fault, (phase,), acts(*kinds))
        with new_rig(real=real) as rig:
            run = Victim(rig, Case(spec, phase, victim), "victim")
            run.approach()
            run.strike()
            run.watcher.stop()
            killed_at = time.monotonic()
            rig.server.stop(signal.SIGKILL)
            row.orphans = rig.surplus(0, timeout_s=ORPHANS_LIMIT_S)
            row.detected_s = time.monotonic() - killed_at
            if row.orphans:
                names = [p.name() for p in rig.processes()]
                row.breach(f"workers outlive their supervisor: {', '.join(names)}")
            row.waiters = sum(not call.answered(5.0) for call in run.calls)
            if row.waiters:
                row.breach("a call was never ended")
            restarted_at = time.monotonic()
            rig.boot_faults.unlink(missing_ok=True)
            rig.restart()
            path = {name: run.load_options[name] for name in run.load_options if name == "path"}
            rig.must_load("victim", **path)
            row.recovered_s = time.monotonic() - restarted_at
            row.outcome = "serves again"
            if rig.server.model("victim")["readiness"]["crash_count"]:
                row.breach("the death of the supervisor was counted against the model")
            if row.orphans and not rig.surplus(rig.calm_processes, timeout_s=1.0):
                row.outcome += ", swept"
            check_nothing_set_aside(rig, row)

    return judge


# --- what it finds at its start ----------------------------------------------------


def _damaged(files: dict[str, bytes | None], *, stays: bool = False) -> Callable[[Row], None]:
    """A start on a home with these files in it; None makes a folder of that name.

    They have to be set aside whole, or, with ``stays``, to be left whole where they are.
    """

    @contextlib.contextmanager
    def prepare(home: Path) -> Iterator[None]:
        for name, content in files.items():
            if content is None:
                (home / name).mkdir()
            else:
                (home / name).write_bytes(content)
        yield

    def judge(row: Row) -> None:
        started_at = time.monotonic()
        with new_rig(prepare=prepare) as rig:
            row.recovered_s = time.monotonic() - started_at
            row.outcome = "serves"
            for name, content in files.items():
                kept = [rig.home / name] if stays else [*rig.home.glob(f"{name}.unreadable-*")]
                if len(kept) != 1:
                    row.breach(f"{name} was not set aside")
                elif content is not None and kept[0].read_bytes() != content:
                    row.breach(f"{name} was changed")
                if name not in rig.server.text:
                    row.breach(f"not a word about {name}")
            rig.server.stop()
            for name in files:
                if (path := rig.home / name).exists() and not stays:
                    json.loads(path.read_text())

    return judge


def _read_only_start(row: Row) -> None:
    started_at = time.monotonic()
    with new_rig(prepare=_read_only):
        row.recovered_s = time.monotonic() - started_at
        row.outcome = "serves"


# --- what happens to its home and its limits while it runs ---------------------------

Prepare = Callable[[Path], contextlib.AbstractContextManager[None]]
Breaking = Callable[[Rig], contextlib.AbstractContextManager[None]]


def _while(
    breaking: Breaking, *, recovers: bool, prepare: Prepare | None = None
) -> Callable[[Row], None]:
    """A worker dies while something else is broken. Without ``recovers``, the model
    comes back only when that is over; nothing else may suffer meanwhile."""

    def judge(row: Row) -> None:
        with new_rig(prepare=prepare) as rig:
            rig.script("victim", **VICTIM_SCRIPT)
            rig.must_load("victim")
            watcher = Watcher(rig.port, "victim")
            bystanders = rig.bystanders("simulated")
            assert all(bystander.begun() for bystander in bystanders)
            try:
                with breaking(rig):
                    struck_at = _kill(watcher)
                    _await_failure(row, watcher, struck_at)
                    if recovers:
                        _await_routable(row, watcher, struck_at)
                    time.sleep(1.0)
                if not recovers:
                    _await_routable(row, watcher, struck_at)
            finally:
                watcher.stop()
                judge_bystanders(row, bystanders)
            row.orphans = rig.surplus(rig.calm_processes + 1)
            if row.breaches:
                return
            # What could not be written is written with the next change.
            rig.script("next", **VICTIM_SCRIPT)
            rig.must_load("next")
            rig.server.kill_worker("victim")
            rig.server.await_state("victim", "routable", generation=3)
            rig.server.stop()
            accounts = json.loads((rig.home / ACCOUNTS).read_text())["accounts"]
            if not accounts or len(accounts[0]["failed_at"]) != 2:
                row.breach(f"the failures did not reach the disk afterwards: {accounts}")
            check_nothing_set_aside(rig, row)

    return judge


def _kill(watcher: Watcher) -> float:
    seen = watcher.first(lambda s: s.state == "routable" and bool(s.pid), timeout_s=10.0)
    assert seen is not None
    assert seen.pid is not None
    os.kill(seen.pid, signal.SIGKILL)
    return time.monotonic()


def _await_failure(row: Row, watcher: Watcher, struck_at: float) -> None:
    seen = watcher.first(lambda s: s.failures > 0, since=struck_at, timeout_s=5.0)
    if seen is None:
        row.breach("the death was not noticed")
    else:
        row.detected_s = seen.at - struck_at


def _await_routable(row: Row, watcher: Watcher, struck_at: float) -> None:
    seen = watcher.first(
        lambda s: s.state == "routable" and s.generation > 1,
        since=struck_at,
        timeout_s=RECOVERY_LIMIT_S,
    )
    if seen is None:
        row.breach(f"not routable within {RECOVERY_LIMIT_S:.0f} s: {watcher.last}")
    else:
        row.recovered_s = seen.at - struck_at
        row.outcome = "recovered"


@contextlib.contextmanager
def _full_disk(rig: Rig) -> Iterator[None]:
    filler = rig.home / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    yield
    filler.unlink()


@contextlib.contextmanager
def _small_disk(home: Path) -> Iterator[None]:
    with _mounted(home, "-t", "tmpfs", "-o", "size=1m,mode=700", "none"):
        yield


@contextlib.contextmanager
def _read_only(home: Path) -> Iterator[None]:
    # A bind mount, since files that are open for writing forbid a remount.
    with _mounted(home, "--bind", str(home)):
        _mount("-o", "remount,bind,ro", str(home))
        yield


@contextlib.contextmanager
def _mounted(where: Path, *arguments: str) -> Iterator[None]:
    _mount(*arguments, str(where))
    try:
        yield
    finally:
        # Lazily: whoever still has a file open there keeps it.
        subprocess.run(["umount", "-l", str(where)], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Skipped("mounting is not allowed here")


@contextlib.contextmanager
def _limit(rig: Rig, which: int, value: int) -> Iterator[None]:
    process = psutil.Process(rig.pid)
    if not hasattr(process, "rlimit"):
        raise Skipped("no limits of another process here")
    before = process.rlimit(which)
    process.rlimit(which, (value, before[1]))
    try:
        yield
    finally:
        process.rlimit(which, before)


def _no_file_grows(rig: Rig) -> contextlib.AbstractContextManager[None]:
    return _limit(rig, resource.RLIMIT_FSIZE, 0)


def _no_descriptors(rig: Rig) -> contextlib.AbstractContextManager[None]:
    # Fewer than are open: every new one fails.
    return _limit(rig, resource.RLIMIT_NOFILE, 8)


FUTURE = b'{"schema_version": 999, "records": "of another kind"}'

HOST_CASES = [
    *(
        HostCase("supervisor SIGKILL", phase, _killed(phase, "hang"), quick=phase is Phase.DECODE)
        for phase in (*SCRIPTED, Phase.IDLE)
    ),
    *(
        HostCase(f"supervisor SIGKILL, {victim}", phase, _killed(phase, victim=victim))
        for victim in ("llama", "mlx")
        for phase in (Phase.LOAD, Phase.DECODE)
    ),
    HostCase("supervisor SIGKILL, GIL held", "decode", _killed(Phase.DECODE, "hold_gil")),
    HostCase("supervisor SIGKILL, worker stopped", "decode", _killed(Phase.DECODE, "stop")),
    HostCase("supervisor SIGKILL, helper", "decode", _killed(Phase.DECODE, "helper", "hang")),
    HostCase(
        "supervisor SIGKILL, detached helper",
        "decode",
        _killed(Phase.DECODE, "detached_helper", "hang"),
        quick=True,
    ),
    HostCase(
        "garbage state files",
        "start",
        _damaged({REGISTRY: b"\xff\x00 no json", ACCOUNTS: b"[1, 2"}),
        quick=True,
    ),
    HostCase("truncated registry", "start", _damaged({REGISTRY: b'{"schema_version": 1, "re'})),
    HostCase("empty state files", "start", _damaged({REGISTRY: b"", ACCOUNTS: b""})),
    HostCase(
        "state files of a later version",
        "start",
        _damaged({REGISTRY: FUTURE, ACCOUNTS: FUTURE}, stays=True),
    ),
    HostCase("state files are folders", "start", _damaged({REGISTRY: None, ACCOUNTS: None})),
    HostCase("read-only home", "start", _read_only_start),
    HostCase("disk full", "run", _while(_full_disk, recovers=True, prepare=_small_disk)),
    HostCase("read-only home", "run", _while(lambda rig: _read_only(rig.home), recovers=True)),
    HostCase("no file grows", "run", _while(_no_file_grows, recovers=True), quick=True),
    HostCase("no descriptors left", "run", _while(_no_descriptors, recovers=False), quick=True),
    HostCase("clock a day ahead before", "restart", moved_before(DAY_S, expected=2)),
    HostCase("clock a day behind before", "restart", moved_before(-DAY_S, expected=0)),
    HostCase("clock set a day ahead", "run", moved_meanwhile(DAY_S), quick=True),
    HostCase("clock set a day back", "run", moved_meanwhile(-DAY_S)),
]
