"""When a spare worker is made, and who gets it."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from protocol.messages import PROTOCOL_VERSION, Beat, Hello, LoadFailed, Phase
from supervisor import spares
from supervisor.journal import Journal
from supervisor.memory_plan import OVERHEAD_BYTES
from supervisor.spares import MAX_FAILURES, NO_ROOM_S, PATIENCE_S, VERSIONS_S, Spares


class FakeProcess:
    """A process that does nothing until it is told to end."""

    name = mark = "spare"

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit_status: int | None = None
        self.stopped = False

    def is_stopped(self) -> bool:
        return self.stopped

    def is_dead(self) -> bool:
        return self.exit_status is not None

    async def stop(self, **_: object) -> bool:
        self.exit_status = -15
        return True

    def describe_exit(self) -> tuple[str, str]:
        return "exit", "exited"


class FakeWorker:
    def __init__(self, backend: str, _services: Any, listener: Any, **_: object) -> None:
        self.listener, self.hello = listener, None
        self.boot = SimpleNamespace(nonce="n", generation=0, backend=backend)
        self.process = FakeProcess(len(made) + 1)
        self.channel = SimpleNamespace(close=lambda: None)
        made.append(self)

    def greet(self, version: str = "1") -> None:
        pid, backend = self.process.pid, self.boot.backend
        self.listener.on_message(Hello(PROTOCOL_VERSION, "n", pid, 0, backend, version))

    def beat(self) -> None:
        self.listener.on_message(Beat(Phase.IDLE, 0, 0))

    def die(self) -> None:
        self.process.exit_status = 1
        self.listener.on_exit()


made: list[FakeWorker] = []


class Rig:
    def __init__(self) -> None:
        self.in_use = {"llama"}
        self.calm = self.room = True
        self.asked = 0
        self.installed: dict[str, str | None] = {"llama": "1", "mlx": "1"}
        settings = SimpleNamespace(
            warm_spares=1,
            start_timeout_s=60.0,
            beat_interval_s=1.0,
            beat_timeout_s=30.0,
            stop_grace_s=5.0,
        )
        self.journal = Journal()
        services: Any = SimpleNamespace(settings=settings, journal=self.journal)
        self.spares = Spares(
            services,
            in_use=lambda: self.in_use,
            calm=lambda: self.calm,
            has_room=self.has_room,
            installed=self.find_installed,
        )

    async def has_room(self, _backend: str) -> bool:
        self.asked += 1
        return self.room

    async def find_installed(self) -> dict[str, str | None]:
        return dict(self.installed)

    def told(self) -> list[tuple[str, str]]:
        kept = (self.journal.at(number).data for number in range(self.journal.end))
        return [(event["status"], event["reason"]) for event in map(msgspec.json.decode, kept)]

    async def look(self) -> int:
        """Look once; how many workers were ever made."""
        await self.spares._look()
        return len(made)


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    made.clear()
    monkeypatch.setattr(spares, "Worker", FakeWorker)

    async def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(spares, "end_helpers", nothing)
    return Rig()


async def test_one_for_each_backend_in_use_one_after_the_other(rig: Rig) -> None:
    rig.in_use = {"llama", "mlx"}
    assert await rig.look() == 1
    assert await rig.look() == 1
    made[0].greet()
    assert await rig.look() == 2
    made[1].greet()
    assert await rig.look() == 2
    assert {made[0].boot.backend, made[1].boot.backend} == {"llama", "mlx"}


async def test_it_is_given_to_one_who_needs_this_version(rig: Rig) -> None:
    await rig.look()
    assert rig.spares.take("llama", "1") is None
    made[0].greet("1")
    assert rig.spares.take("llama", "2") is None
    assert rig.spares.take("mlx", "1") is None
    taken: Any = rig.spares.take("llama", "1")
    assert taken is made[0]
    assert rig.spares.take("llama", "1") is None
    assert rig.told() == [("ready", ""), ("taken", "")]
    assert await rig.look() == 2


async def test_a_dead_or_silent_one_is_given_to_nobody(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.look()
    made[0].greet()
    now = time.monotonic()
    # It may have been stopped: not taken, and not given up yet.
    monkeypatch.setattr("supervisor.spares.time.monotonic", lambda: now + 4)
    assert rig.spares.take("llama", "1") is None
    assert await rig.look() == 1
    monkeypatch.undo()
    made[0].process.stopped = True
    assert rig.spares.take("llama", "1") is None
    made[0].process.stopped = False
    made[0].process.exit_status = -9
    assert rig.spares.take("llama", "1") is None


async def test_it_waits_for_a_calm_moment_but_not_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.calm = False
    now = 1000.0
    monkeypatch.setattr("supervisor.spares.time.monotonic", lambda: now)
    assert await rig.look() == 0
    now += PATIENCE_S - 1
    assert await rig.look() == 0
    now += 2
    assert await rig.look() == 1


async def test_a_backend_that_does_not_start_is_let_be(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(MAX_FAILURES):
        assert await rig.look() == number + 1
        made[-1].listener.on_message(LoadFailed("model_unsupported_backend", "no library"))  # type: ignore[arg-type]
        made[-1].die()
    assert await rig.look() == MAX_FAILURES
    assert "none starts" in caplog.text


async def test_one_that_dies_later_is_replaced(rig: Rig) -> None:
    for number in range(2 * MAX_FAILURES):
        assert await rig.look() == number + 1
        made[-1].greet()
        made[-1].die()
    assert rig.spares.views() == []


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr("supervisor.spares.time.monotonic", lambda: self.now)

    def go(self, seconds: float) -> None:
        self.now += seconds
        for worker in made:
            worker.beat()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def settle(rig: Rig) -> None:
    """Until those that were told to end have ended."""
    await asyncio.gather(*(each._ending for each in rig.spares._spares if each._ending))


async def test_one_that_was_called_off_has_not_failed(rig: Rig) -> None:
    for number in range(2 * MAX_FAILURES):
        assert await rig.look() == number + 1
        assert rig.spares.recall("memory is short")
        await settle(rig)


async def test_none_is_made_where_there_is_no_room(rig: Rig, clock: Clock) -> None:
    rig.room = False
    assert await rig.look() == 0
    clock.go(1)
    # It is a look at every worker: not every second.
    rig.room = True
    assert await rig.look() == 0
    assert rig.asked == 1
    clock.go(NO_ROOM_S)
    assert await rig.look() == 1


async def test_they_are_recalled_together(rig: Rig) -> None:
    assert not rig.spares.recall("memory is short")
    await rig.look()
    made[0].greet()
    assert rig.spares.planned == {1: OVERHEAD_BYTES["llama"]}
    assert rig.spares.recall("memory is short")
    assert rig.spares.take("llama", "1") is None
    await settle(rig)
    assert not rig.spares.recall("memory is short")


async def test_after_an_upgrade_another_takes_its_place(rig: Rig, clock: Clock) -> None:
    await rig.look()
    made[0].greet("1")
    clock.go(VERSIONS_S)
    assert await rig.look() == 1
    rig.installed["llama"] = "2"
    clock.go(VERSIONS_S)
    await rig.look()
    await settle(rig)
    assert rig.spares.views() == []
    assert await rig.look() == 2
    made[1].greet("2")
    assert rig.spares.take("llama", "2") is not None


async def test_one_of_a_backend_that_is_gone_is_not_replaced(rig: Rig, clock: Clock) -> None:
    await rig.look()
    made[0].greet("1")
    rig.installed["llama"] = None
    clock.go(VERSIONS_S)
    await rig.look()
    await settle(rig)
    assert rig.spares.views() == []
    assert await rig.look() == 1


async def test_a_version_that_is_never_the_installed_one_is_let_be(rig: Rig, clock: Clock) -> None:
    for number in range(MAX_FAILURES):
        assert await rig.look() == number + 1
        made[-1].greet("odd")
        clock.go(VERSIONS_S)
        await rig.look()
        await settle(rig)
    assert rig.spares.views() == []
    assert await rig.look() == MAX_FAILURES
    # Another version may be another thing.
    rig.installed["llama"] = "odd"
    clock.go(VERSIONS_S)
    assert await rig.look() == MAX_FAILURES + 1


async def test_to_ask_for_one_does_not_take_it(rig: Rig) -> None:
    await rig.look()
    assert not rig.spares.has("llama", "1")
    made[0].greet("1")
    assert rig.spares.has("llama", "1")
    assert not rig.spares.has("llama", "2")
    assert rig.spares.take("llama", "1") is not None
    assert not rig.spares.has("llama", "1")
