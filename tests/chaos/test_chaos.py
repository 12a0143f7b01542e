"""The quick version of the fault harness: nothing that breaks breaks anything else."""

import pytest

from tests.chaos.harness.host import HostCase
from tests.chaos.harness.report import Row
from tests.chaos.harness.run import Runner, all_cases
from tests.chaos.harness.specs import Case


@pytest.mark.parametrize("case", all_cases(quick=True), ids=lambda case: case.name)
def test_fault(case: Case | HostCase, run: Runner, rows: list[Row]) -> None:
    row = run(case)
    rows.append(row)
    if row.skipped:
        pytest.skip(row.skipped)
    assert not row.breaches, "\n".join(row.breaches)
