"""How a fleet stops when something goes wrong on the way, and unloads that are called off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor.fleet import Fleet
from supervisor.gate import LoadSpec
from supervisor.metrics import Metrics
from supervisor.settings import Settings


class FakeActor:
    """A loaded model; each thing that is done to it may fail."""

    tracked = True
    rests = leaving = False
    left_behind = None

    def __init__(self, name: str, done: list[str], fails: str = "") -> None:
        self.spec = SimpleNamespace(model_id=name, backend="simulated")
        self._done = done
        self._fails = fails
        self.drained = asyncio.Event()

    def unload(self, *_: object) -> None:
        self._do("unload")

    async def left(self) -> None:
        self._do("left")

    async def close(self) -> None:
        self._do("close")

    async def drain(self, _timeout_s: float) -> None:
        await self.drained.wait()

    def _do(self, what: str) -> None:
        self._done.append(f"{self.spec.model_id} {what}")
        if what == self._fails:
            raise CodedError(ErrorCode.MODEL_CONFLICT, f"{what} fails")


class FakeJanitor:
    dismissed = False

    def dismiss(self) -> None:
        self.dismissed = True


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(Settings(home=tmp_path), Metrics(), [], on_autoload=lambda *_: None)
    yield fleet
    await fleet.stop()


def add(fleet: Fleet, *actors: Any) -> None:
    fleet._actors.update({actor.spec.model_id: actor for actor in actors})


def break_down(*_: object) -> Any:
    raise OSError("no more disk")


async def cancelled() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("fails", ["", "unload", "left", "close"])
async def test_every_worker_is_stopped_whatever_fails(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    done: list[str] = []
    add(fleet, FakeActor("a", done, fails), FakeActor("b", done))
    flushed = asyncio.Event()
    monkeypatch.setattr(fleet.downloads, "stop", break_down)
    monkeypatch.setattr(fleet._prober, "stop", break_down)
    monkeypatch.setattr(fleet._spares, "drop", cancelled)
    monkeypatch.setattr(type(fleet._services), "flush", break_down)
    monkeypatch.setattr(type(fleet._services), "close", lambda _: flushed.set())
    fleet._janitor = janitor = FakeJanitor()  # type: ignore[assignment]
    await fleet.stop()
    assert {"a unload", "b unload", "b left", "b close"} <= set(done)
    assert flushed.is_set()
    # What may be left is the janitor's.
    assert not janitor.dismissed
    told = [each.message for each in caplog.records if each.message.startswith("while stopping")]
    assert len(told) == 3 + bool(fails)
    monkeypatch.undo()
    fleet._services.close()


async def test_where_all_goes_well_there_is_nothing_to_clean_up(fleet: Fleet) -> None:
    done: list[str] = []
    add(fleet, FakeActor("a", done))
    fleet._janitor = janitor = FakeJanitor()  # type: ignore[assignment]
    await fleet.stop()
    assert done == ["a unload", "a left", "a close"]
    assert janitor.dismissed


async def test_an_unload_that_is_called_off_forgets_nothing(fleet: Fleet) -> None:
    add(fleet, FakeActor("a", []))
    spec = LoadSpec(model_id="a", context_length=512)
    fleet._loads.remember("a", spec)
    unloading = asyncio.create_task(fleet.unload("a"))
    await asyncio.sleep(0)
    unloading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await unloading
    assert fleet._loads.forget("a") == spec
