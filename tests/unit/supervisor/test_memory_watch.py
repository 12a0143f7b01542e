"""Who is looked at, and that nobody is stopped for an estimate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from supervisor.memory import Footprint
from supervisor.memory_watch import MemoryWatch
from supervisor.oom_kills import OomKills
from supervisor.trial import NAME

LIMIT = 1_000
MB = 1024 * 1024


class _Actor:
    model_id = "m"
    worker = (1, 4711)
    dying = False

    def __init__(self) -> None:
        self.failed: list[str] = []

    def footprint(self, generation: int, size: int) -> Footprint:
        return Footprint(self.model_id, generation, size, baseline=900, limit=LIMIT)

    def fail(self, _generation: int, _kind: object, reason: str) -> None:
        self.failed.append(reason)


class _Sizes:
    """By pid, exactly."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes

    def measure(self, pids: Sequence[int], *, exactly: bool = False) -> dict[int, int]:
        return {pid: self.sizes[pid] for pid in pids}


class _Meter:
    def __init__(self, estimate: int, exact: int) -> None:
        self.estimate, self.exact = estimate, exact
        self.walks = 0

    def measure(self, pids: Sequence[int], *, exactly: bool = False) -> dict[int, int]:
        self.walks += exactly
        return dict.fromkeys(pids, self.exact if exactly else self.estimate)


def watch(actors: dict[str, Any], kills: OomKills, meter: _Meter | None = None) -> MemoryWatch:
    found = MemoryWatch(actors, kills, interval_s=1.0, low_water=0)
    if meter is not None:
        found._meter = meter  # type: ignore[assignment]
    return found


async def look(estimate: int, exact: int) -> tuple[_Actor, _Meter]:
    actor, meter = _Actor(), _Meter(estimate, exact)
    await watch({"m": actor}, OomKills(), meter)._look()
    return actor, meter


async def test_an_estimate_over_the_limit_is_looked_at_again() -> None:
    actor, meter = await look(LIMIT + 50, LIMIT - 10)
    assert (actor.failed, meter.walks) == ([], 1)


async def test_what_is_over_its_limit_is_stopped() -> None:
    actor, meter = await look(LIMIT + 50, LIMIT + 20)
    assert (len(actor.failed), meter.walks) == (1, 1)


async def test_below_the_limit_an_estimate_is_enough() -> None:
    actor, meter = await look(LIMIT - 50, LIMIT + 20)
    assert (actor.failed, meter.walks) == ([], 0)


async def test_kills_are_looked_at_while_nobody_runs(tmp_path: Path) -> None:
    source = tmp_path / "vmstat"
    source.write_text("oom_kill 4\n")
    now = 100.0
    kills = OomKills([source], lambda: now)
    source.write_text("oom_kill 5\n")
    await watch({}, kills)._look()
    now = 200.0
    assert not kills.claim(0.0)


async def test_what_is_on_trial_is_watched_as_well_and_loses_alone() -> None:
    kills, trials = OomKills(), dict[str, Any]()
    loaded, tried = _Actor(), _Actor()
    tried.worker, tried.model_id = (0, 4712), NAME
    found = MemoryWatch({"m": loaded}, kills, interval_s=1.0, low_water=0, trials=trials)
    found._meter = _Sizes({4711: LIMIT - 50, 4712: LIMIT + 50})  # type: ignore[assignment]
    await found._look()
    assert (loaded.failed, tried.failed) == ([], [])
    trials[NAME] = tried
    await found._look()
    assert (loaded.failed, len(tried.failed)) == ([], 1)


class _Spares:
    def __init__(self, count: int) -> None:
        self.count = count

    def recall(self, _reason: str) -> bool:
        left, self.count = self.count, max(0, self.count - 1)
        return left > 0


async def test_when_memory_is_short_spare_workers_go_before_any_model() -> None:
    actor, spares = _Actor(), _Spares(1)
    found = MemoryWatch({"m": actor}, OomKills(), interval_s=1.0, low_water=2**62, spares=spares)
    actor.footprint = lambda generation, size: Footprint("m", generation, size, 900, None)  # type: ignore[method-assign]
    found._meter = _Meter(900 * MB, 900 * MB)  # type: ignore[assignment]
    await found._look()
    assert (actor.failed, spares.count) == ([], 0)
    await found._look()
    assert len(actor.failed) == 1
    assert "low-water mark" in actor.failed[0]


async def test_a_limit_of_its_own_counts_while_spare_workers_go() -> None:
    actor = _Actor()
    spares = _Spares(1)
    found = MemoryWatch({"m": actor}, OomKills(), interval_s=1.0, low_water=2**62, spares=spares)
    found._meter = _Meter(LIMIT + 50, LIMIT + 20)  # type: ignore[assignment]
    await found._look()
    assert len(actor.failed) == 1
    assert "its limit" in actor.failed[0]


async def test_while_there_is_memory_spare_workers_stay() -> None:
    spares = _Spares(1)
    found = MemoryWatch({"m": _Actor()}, OomKills(), interval_s=1.0, low_water=0, spares=spares)
    found._meter = _Meter(10, 10)  # type: ignore[assignment]
    await found._look()
    assert spares.count == 1
