"""The look at the whole server: never held up, whatever the home folder does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from supervisor import overview as room
from supervisor.autoload import Autoload
from supervisor.jsonfile import BackgroundWriter
from supervisor.metrics import Metrics
from supervisor.overview import Overview
from supervisor.services import Services, open_services
from supervisor.settings import Settings


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with closing(open_services(Settings(home=tmp_path), Metrics())) as services:
        yield services


@pytest.fixture
def overview(services: Services, tmp_path: Path) -> Overview:
    async def installed() -> dict[str, str | None]:
        return {}

    return Overview({}, services, lambda: [], Autoload(tmp_path, [], 3), installed)


async def codes(overview: Overview) -> list[str]:
    health = await overview.health(0.0)
    # How full this machine is is not the question here.
    return [each.code for each in health.reasons if each.code not in ("disk_low", "memory_low")]


async def test_a_disk_that_does_not_answer_holds_nobody_up(
    overview: Overview, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, asked = threading.Event(), []

    def hang(home: Path) -> room._Home:
        asked.append(home)
        answers.wait(20)
        return room._Home(10**12)

    monkeypatch.setattr(room, "_PATIENCE_S", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(room, "_look_at", hang)
        async with asyncio.timeout(5):
            for found in await asyncio.gather(codes(overview), codes(overview)):
                assert found == ["home_unavailable"]
            assert await codes(overview) == ["home_unavailable"]
            # No thread more for each who asks.
            assert len(asked) == 1
            answers.set()
            while await codes(overview):
                pass
        assert await codes(overview) == []


async def test_files_that_were_set_aside_are_told_until_somebody_deletes_them(
    overview: Overview, tmp_path: Path
) -> None:
    aside = tmp_path / "x.json.unreadable-1"
    aside.touch()
    assert await codes(overview) == ["state_file_set_aside"]
    aside.unlink()
    assert await codes(overview) == []


async def test_what_could_not_be_written_is_told_until_it_is(
    overview: Overview, tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    path.mkdir()
    (path / "in the way").touch()
    writer = BackgroundWriter(path)
    writer.save({"schema_version": 1})
    await writer.flush()
    health = await overview.health(0.0)
    assert [each.code for each in health.reasons] == ["state_not_written"]
    assert health.reasons[0].message.startswith("state.json could not be written")
    (path / "in the way").unlink()
    path.rmdir()
    await writer.flush()
    assert await codes(overview) == []


async def test_a_process_that_was_left_is_told_until_it_ends(
    overview: Overview, services: Services
) -> None:
    gone = next(number for number in range(2**22, 2**21, -1) if not psutil.pid_exists(number))
    services.left_behind.add(gone)
    assert await codes(overview) == []
    services.left_behind.add(psutil.Process().pid)
    assert await codes(overview) == ["process_left_behind"]


def test_memory_is_that_of_all_models(overview: Overview) -> None:
    memory = overview.memory()
    assert (memory.promised_bytes, memory.measured_bytes) == (0, 0)
    assert memory.total_bytes >= memory.available_bytes > 0
