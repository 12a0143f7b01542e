"""Runs cases, on as few servers as they allow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tests.chaos.harness.case import measure_calm, run_case
from tests.chaos.harness.host import HOST_CASES, HostCase, run_host_case
from tests.chaos.harness.report import Row
from tests.chaos.harness.rig import Rig, new_rig
from tests.chaos.harness.specs import FAULTS, Case, cases, is_missing

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
        rig: Rig | None = None
        key: _Key | None = None
        calm = Row("none", "calm")
        number = 0

        def run(case: Case | HostCase) -> Row:
            nonlocal rig, key, calm, number
            number += 1
            if isinstance(case, HostCase):
                key = None
                trouble = _close(stack)
                row = run_host_case(case)
                row.breaches += trouble
                return row
            trouble = []
            if is_missing(case.spec):
                return Row(case.spec.name, case.phase, case.victim, skipped=f"no {case.spec.needs}")
            if rig is None or key != _key(case) or rig.server.process.poll() is not None:
                trouble = _close(stack)
                key = _key(case)
                rig = stack.enter_context(new_rig(real=key[0], settings=case.spec.settings))
                calm = measure_calm(rig)
            row = run_case(rig, case, number, calm)
            row.breaches += trouble
            return row

        yield run


def _close(stack: contextlib.ExitStack) -> list[str]:
    """Stop the server that there is; what went wrong with that."""
    try:
        stack.close()
    except RuntimeError as error:
        return [f"before this case: {error}"]
    return []


def _key(case: Case) -> _Key:
    return case.victim != "simulated", tuple(sorted(case.spec.settings.items()))
