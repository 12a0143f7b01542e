"""Models that had nothing to do for long enough are unloaded, and that is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor.idle_watch import IdleWatch
from supervisor.journal import Journal


class FakeActor:
    def __init__(self, idle_s: float | None, *, pinned: bool = False, busy: bool = False) -> None:
        self.spec = SimpleNamespace(model_id="m", keep_alive_sec=10, pinned=pinned)
        self._idle_s, self._busy = idle_s, busy
        self.unloaded = ""

    def idle_s(self) -> float | None:
        return self._idle_s

    def unload(self, code: ErrorCode, reason: str) -> None:
        if self._busy:
            raise CodedError(ErrorCode.MODEL_CONFLICT, "not now")
        self.unloaded = reason


@pytest.mark.parametrize(
    ("actor", "goes"),
    [
        (FakeActor(10.04), True),
        (FakeActor(9.9), False),
        (FakeActor(None), False),
        (FakeActor(99.0, pinned=True), False),
        (FakeActor(99.0, busy=True), False),
    ],
    ids=["idle", "not long enough", "busy", "pinned", "in a conflict"],
)
def test_what_is_idle_for_long_enough_goes(actor: Any, goes: bool) -> None:
    journal = Journal()
    IdleWatch({"m": actor}, lambda: None, journal)._look(actor)
    assert bool(actor.unloaded) is goes
    assert journal.end == goes
    if goes:
        event = msgspec.json.decode(journal.at(0).data)
        assert (event["event"], event["model"], event["idle_s"]) == ("model_evicted", "m", 10.0)
