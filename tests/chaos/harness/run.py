"""Runs cases, on as few servers as they allow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tests.chaos.harness.case import run_case
from tests.chaos.harness.host import HOST_CASES, HostCase, run_host_case
from tests.chaos.harness.report import Row
from tests.chaos.harness.rig import Rig, new_rig
from tests.chaos.harness.specs import (
    CALM,
    CALM_REAL,
    FAULTS,
    Case,
    Phase,
    cases,
    is_missing,
)

Runner = Callable[[Case | HostCase], Row]

_Key = tuple[bool, tuple[tuple[str, str], ...]]


def all_cases(*, quick: bool = False, only: str = "") -> list[Case | HostCase]:
    """Those whose name contains ``only``, in an order that needs few servers."""
    workers = sorted(
        cases(FAULTS, quick=quick), key=lambda case: (_key(case), is_missing(case.spec))
    )
    host = [case for case in HOST_CASES if case.quick or not quick]
    wanted: list[Case | HostCase] = [*workers, *host]
    return [case for case in wanted if only.lower() in case.name.lower()]


@contextlib.contextmanager
def runner() -> Iterator[Runner]:
    """Call it with one case after the other; it keeps a server as long as it serves."""
    with contextlib.ExitStack() as stack:
        yield _Runner(stack).run


class _Runner:
    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._rig: Rig | None = None
        self._key: _Key | None = None
        self._calm: dict[tuple[str, Phase], Row] = {}
        self._number = 0

    def run(self, case: Case | HostCase) -> Row:
        """Whatever happens is in the row."""
        trouble: list[str] = []
        try:
            if isinstance(case, HostCase):
                self._key = None
                trouble = _close(self._stack)
                row = run_host_case(case)
            elif is_missing(case.spec):
                skipped = f"no {case.spec.needs}"
                return Row(case.spec.name, case.phase, case.victim, skipped=skipped)
            else:
                rig, trouble = self._rig_for(case)
                row = self._run_on(rig, case)
        except Exception as error:
            row = _empty_row(case)
            row.breach(f"{type(error).__name__}: " + " ".join(str(error).split())[-1000:])
        row.breaches += trouble
        return row

    def _rig_for(self, case: Case) -> tuple[Rig, list[str]]:
        rig, key = self._rig, _key(case)
        if rig is not None and self._key == key and rig.server.process.poll() is None:
            return rig, []
        trouble = _close(self._stack)
        self._rig = self._key = None
        rig = self._stack.enter_context(new_rig(real=key[0], settings=case.spec.settings))
        self._rig, self._key = rig, key
        return rig, trouble

    def _run_on(self, rig: Rig, case: Case) -> Row:
        calm = self._calm_of(rig, case)
        self._number += 1
        row = run_case(rig, case, self._number, calm)
        row.breaches += [f"without any fault: {breach}" for breach in calm.breaches]
        return row

    def _calm_of(self, rig: Rig, case: Case) -> Row:
        """The same phase of the same kind of victim, without a fault; done once."""
        victim = case.victim.partition("-")[0]
        key = victim, case.phase
        if key not in self._calm:
            spec = CALM if victim == "simulated" else CALM_REAL
            self._number += 1
            self._calm[key] = run_case(rig, Case(spec, case.phase, victim), self._number, None)
        return self._calm[key]


def _empty_row(case: Case | HostCase) -> Row:
    if isinstance(case, HostCase):
        return Row(case.fault, case.phase, "supervisor")
    return Row(case.spec.name, case.phase, case.victim)


def _close(stack: contextlib.ExitStack) -> list[str]:
    """Stop the server that there is; what went wrong with that."""
    try:
        stack.close()
    except RuntimeError as error:
        return [f"before this case: {error}"]
    return []


def _key(case: Case) -> _Key:
    return case.victim != "simulated", tuple(sorted(case.spec.settings.items()))
