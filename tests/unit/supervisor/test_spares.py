"""When a spare worker is made, and who gets it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.messages import PROTOCOL_VERSION, Hello, LoadFailed
from supervisor import spares
from supervisor.spares import MAX_FAILURES, PATIENCE_S, Spares


class FakeProcess:
    """A process that does nothing until it is told to end."""

    name = mark = "spare"

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit_status: int | None = None

    def is_dead(self) -> bool:
        return self.exit_status is not None

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

    def die(self) -> None:
        self.process.exit_status = 1
        self.listener.on_exit()


made: list[FakeWorker] = []


class Rig:
    def __init__(self) -> None:
        self.in_use = {"llama"}
        self.calm = True
        settings = SimpleNamespace(
            warm_spares=1, start_timeout_s=60.0, beat_timeout_s=30.0, stop_grace_s=5.0
        )
        services: Any = SimpleNamespace(settings=settings)
        self.spares = Spares(services, in_use=lambda: self.in_use, calm=lambda: self.calm)

    def look(self) -> int:
        """Look once; how many workers were ever made."""
        self.spares._look()
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
    assert rig.look() == 1
    assert rig.look() == 1
    made[0].greet()
    assert rig.look() == 2
    made[1].greet()
    assert rig.look() == 2
    assert {made[0].boot.backend, made[1].boot.backend} == {"llama", "mlx"}


async def test_it_is_given_to_one_who_needs_this_version(rig: Rig) -> None:
    rig.look()
    assert rig.spares.take("llama", "1") is None
    made[0].greet("1")
    assert rig.spares.take("llama", "2") is None
    assert rig.spares.take("mlx", "1") is None
    taken: Any = rig.spares.take("llama", "1")
    assert taken is made[0]
    assert rig.spares.take("llama", "1") is None
    assert rig.look() == 2


async def test_a_dead_or_silent_one_is_given_to_nobody(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.look()
    made[0].greet()
    now = time.monotonic()
    monkeypatch.setattr("supervisor.spares.time.monotonic", lambda: now + 31)
    assert rig.spares.take("llama", "1") is None
    monkeypatch.undo()
    made[0].process.exit_status = -9
    assert rig.spares.take("llama", "1") is None


async def test_it_waits_for_a_calm_moment_but_not_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.calm = False
    now = 1000.0
    monkeypatch.setattr("supervisor.spares.time.monotonic", lambda: now)
    assert rig.look() == 0
    now += PATIENCE_S - 1
    assert rig.look() == 0
    now += 2
    assert rig.look() == 1


async def test_a_backend_that_does_not_start_is_let_be(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(MAX_FAILURES):
        assert rig.look() == number + 1
        made[-1].listener.on_message(LoadFailed("model_unsupported_backend", "no library"))  # type: ignore[arg-type]
        made[-1].die()
    assert rig.look() == MAX_FAILURES
    assert "none starts" in caplog.text


async def test_one_that_dies_later_is_replaced(rig: Rig) -> None:
    for number in range(2 * MAX_FAILURES):
        assert rig.look() == number + 1
        made[-1].greet()
        made[-1].die()
    assert rig.spares.views() == []


async def test_to_ask_for_one_does_not_take_it(rig: Rig) -> None:
    rig.look()
    assert not rig.spares.has("llama", "1")
    made[0].greet("1")
    assert rig.spares.has("llama", "1")
    assert not rig.spares.has("llama", "2")
    assert rig.spares.take("llama", "1") is not None
    assert not rig.spares.has("llama", "1")
