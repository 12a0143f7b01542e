"""What the log says of the requests of a crash."""

from __future__ import annotations

from collections import Counter

import pytest

from supervisor.resumption import NextRun
from supervisor.status import log_parked


def test_what_becomes_of_those_in_flight_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log_parked("m", "killed by SIGSEGV", Counter({NextRun.RESUMED: 2, NextRun.NONE: 1}))
    assert caplog.messages == [
        "m: killed by SIGSEGV; in flight: 2 go on where they were, 1 have failed"
    ]


def test_a_death_with_nothing_in_flight_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log_parked("m", "killed by SIGSEGV", Counter({NextRun.NONE: 0}))
    assert caplog.messages == []
