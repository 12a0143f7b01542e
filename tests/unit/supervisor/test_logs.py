"""One line per event."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from supervisor import logs


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in logs._QUIET}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


def test_an_event_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info")
    log = logging.getLogger("opta_lmx.test")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it\r\nfailed")
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert "ERROR opta_lmx.test: it\\r\\nfailed\\nTraceback" in line
    assert line.endswith("ValueError: two\\nlines")


@pytest.mark.parametrize(
    ("level", "ours", "uvicorns"),
    [("info", True, False), ("debug", True, True), ("error", False, False)],
)
def test_libraries_are_quieter(
    capsys: pytest.CaptureFixture[str], level: str, ours: bool, uvicorns: bool
) -> None:
    logs.set_up(level)
    logging.getLogger("opta_lmx.test").info("ours")
    logging.getLogger("uvicorn.error").info("theirs")
    output = capsys.readouterr().err
    assert ("ours" in output) is ours
    assert ("theirs" in output) is uvicorns
