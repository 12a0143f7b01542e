"""One runner for all cases, and their table at the end."""

from collections.abc import Iterator

import pytest

from tests.chaos.harness.report import Row, table
from tests.chaos.harness.run import Runner, runner

_ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture(scope="package")
def run() -> Iterator[Runner]:
    with runner() as ready:
        yield ready


@pytest.fixture(scope="package")
def rows(pytestconfig: pytest.Config) -> list[Row]:
    return pytestconfig.stash.setdefault(_ROWS, [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if rows := config.stash.get(_ROWS, []):
        terminalreporter.section("chaos")
        terminalreporter.write_line(table(rows))
