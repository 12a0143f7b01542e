"""Room for a model: what is promised to others is theirs, and who must stay stays."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import CodedError, ErrorCode
from protocol.messages import ModelKind
from supervisor import memory_room
from supervisor.footprint import Usage
from supervisor.gate import ModelSpec
from supervisor.geometry import Geometry
from supervisor.journal import Journal
from supervisor.memory_lessons import MemoryLessons
from supervisor.memory_plan import OVERHEAD_BYTES
from supervisor.memory_room import MemoryRoom
from supervisor.memory_share import lesson_key
from supervisor.modelfiles import ModelFiles
from supervisor.settings import Settings
from supervisor.traits import Traits

MB = 1024 * 1024
TRAITS = Traits("llama", "", 0, 4096, ModelKind.GENERATE, True, Geometry(kv=6400))
#: 50 MB of KV cache at 4,096 tokens.
FILES = ModelFiles(Path("/m/x.gguf"), "gguf", TRAITS, 100 * MB, "digest")
MODEL = ModelSpec("new", FILES, "llama", "1.0", None, None, None)
NEEDED = 100 * MB + 50 * MB + OVERHEAD_BYTES["llama"] + 4 * 512 * 3 * 2048


@dataclass
class FakeActor:
    """An actor as the room sees it; its end frees its memory at once."""

    spec: ModelSpec
    host: Host
    size: int
    promised: int
    evictable_s: float | None
    ending: bool = False
    stays: bool = True

    @property
    def worker(self) -> tuple[int, int] | None:
        return 1, id(self)

    def unload(self, _code: ErrorCode, reason: str) -> None:
        assert self.evictable_s is not None
        self.host.unloaded.append(self.spec.model_id)
        self.ending = True

    async def left(self) -> None:
        await asyncio.sleep(0)
        if self.ending:
            self.host.actors.pop(self.spec.model_id, None)


@dataclass
class FakeSpares:
    host: Host
    sizes: dict[int, int] = field(default_factory=dict)
    #: What one of them may take.
    plan: int = 0

    @property
    def planned(self) -> dict[int, int]:
        return dict.fromkeys(self.sizes, self.plan)

    async def drop(self) -> None:
        self.host.unloaded.append("spares")
        self.sizes.clear()


class Host:
    """A machine with so much memory, and what is loaded on it."""

    def __init__(self, total: int, tmp_path: Path, **settings: Any) -> None:
        self.total = total
        self.mapped: dict[int, int] = {}
        self.actors: dict[str, Any] = {}
        self.unloaded: list[str] = []
        self.tried: dict[int, int] = {}
        self.spares = FakeSpares(self)
        spares: Any = self.spares
        settings.setdefault("memory_low_water_bytes", 0)
        self.services = SimpleNamespace(
            settings=Settings(home=tmp_path, **settings),
            lessons=MemoryLessons(tmp_path),
            journal=Journal(),
        )
        services: Any = self.services
        self.room = MemoryRoom(self.actors, services, spares)

    def add(self, name: str, size: int, idle_s: float | None, *, promised: int = 0) -> None:
        spec = replace(MODEL, model_id=name)
        self.actors[name] = FakeActor(spec, self, size, max(size, promised), idle_s)

    def look(self, _pids: object) -> tuple[dict[int, Usage], int]:
        usages = {
            id(actor): Usage(actor.size, self.mapped.get(id(actor), 0))
            for actor in self.actors.values()
        }
        # As the kernel has it, what is mapped from files is available.
        others = {**self.spares.sizes, **self.tried}
        usages |= {pid: Usage(size, 0) for pid, size in others.items()}
        taken = sum(usage.total - usage.mapped for usage in usages.values())
        return usages, self.total - taken

    async def make(self, model: ModelSpec = MODEL, *, may_evict: bool = True) -> int:
        async with self.room.turn:
            return (await self.room.make(model, may_evict=may_evict)).total


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host(1000 * MB, tmp_path)
    monkeypatch.setattr(memory_room, "_look", lambda pids: found.look(pids))
    monkeypatch.setattr(memory_room, "total_bytes", lambda: 16_000 * MB)
    return found


async def refused(host: Host, *, may_evict: bool = True) -> CodedError:
    with pytest.raises(CodedError) as error:
        await host.make(may_evict=may_evict)
    assert error.value.code is ErrorCode.INSUFFICIENT_MEMORY
    assert host.unloaded == []
    return error.value


async def test_what_fits_costs_nobody_anything(host: Host) -> None:
    host.add("a", 100 * MB, 50.0)
    assert await host.make() == NEEDED + 50 * MB
    assert host.unloaded == []


async def test_the_prompt_cache_is_what_is_left(host: Host) -> None:
    host.total = NEEDED + 20 * MB
    assert await host.make() == host.total


async def test_idle_models_make_room_the_least_recently_used_first(host: Host) -> None:
    host.add("new", 300 * MB, 1.0)
    host.add("old", 300 * MB, 100.0)
    host.add("busy", 300 * MB, None)
    await host.make(replace(MODEL, model_id="wanted"))
    assert host.unloaded == ["old"]
    assert set(host.actors) == {"new", "busy"}
    assert host.services.journal.end == 1
    event = msgspec.json.decode(host.services.journal.at(0).data)
    assert (event["event"], event["model"]) == ("model_evicted", "old")
    assert event["made_room_for"] == "wanted"


async def test_a_load_that_would_not_fit_anyway_costs_nobody_anything(host: Host) -> None:
    host.add("idle", 100 * MB, 100.0)
    host.add("busy", 810 * MB, None)
    error = await refused(host)
    for part in ("needs 0.2", "'idle'", "'busy'", "weights 0.10 GB", "context_length of"):
        assert part in error.message
    assert error.retry_after_s == 5.0


async def test_it_says_when_no_context_would_fit(host: Host) -> None:
    host.total = 100 * MB
    error = await refused(host)
    assert "context_length of" not in error.message
    assert error.retry_after_s is None


async def test_what_is_promised_is_not_promised_again(host: Host) -> None:
    host.add("loading", 10 * MB, None, promised=900 * MB)
    await refused(host)


async def test_weights_that_are_mapped_are_not_free(host: Host) -> None:
    host.add("mapped", 900 * MB, None)
    host.mapped[id(host.actors["mapped"])] = 850 * MB
    await refused(host)


async def test_a_budget_counts_for_all_workers(host: Host, tmp_path: Path) -> None:
    host.services.settings = Settings(home=tmp_path, memory_budget_bytes=400 * MB)
    host.add("a", 100 * MB, None)
    await host.make()
    host.add("b", 100 * MB, None)
    await refused(host)


async def test_the_low_water_mark_is_nobodys(host: Host, tmp_path: Path) -> None:
    host.total = NEEDED + 10 * MB
    await host.make()
    host.services.settings = Settings(home=tmp_path, memory_low_water_bytes=20 * MB)
    await refused(host)


async def test_a_load_at_the_start_costs_no_other_model(host: Host) -> None:
    host.add("idle", 900 * MB, 100.0)
    error = await refused(host, may_evict=False)
    assert error.retry_after_s is None


async def test_memory_that_is_about_to_be_free_is_waited_for(host: Host) -> None:
    host.add("leaving", 900 * MB, None)
    host.actors["leaving"].ending = True
    await host.make()
    assert host.unloaded == []


async def test_what_was_learned_counts(host: Host) -> None:
    host.services.lessons.learn(lesson_key(MODEL), 900 * MB)
    assert "as it was measured before" in (await refused(host)).message
    await host.services.lessons.flush()


async def test_spare_workers_go_before_any_model(host: Host) -> None:
    host.add("idle", 700 * MB, 100.0)
    host.spares.sizes[1] = 100 * MB
    preview = await host.room.preview(MODEL, may_evict=True)
    assert (preview.fits, preview.would_unload) == (True, [])
    await host.make()
    assert host.unloaded == ["spares"]


async def test_what_a_spare_worker_will_take_is_promised_as_well(host: Host) -> None:
    host.total = NEEDED + 60 * MB
    host.spares.sizes[1], host.spares.plan = 10 * MB, 64 * MB
    await host.make()
    assert host.unloaded == ["spares"]
    host.spares.sizes[1], host.spares.plan = 10 * MB, 60 * MB
    await host.make(replace(MODEL, model_id="next"))
    assert host.unloaded == ["spares"]


async def test_a_spare_worker_needs_room_too(host: Host, tmp_path: Path) -> None:
    host.total = 100 * MB + OVERHEAD_BYTES["llama"]
    host.add("a", 60 * MB, 50.0, promised=100 * MB)
    assert await host.room.has_room_for_spare("llama")
    host.total -= 1
    assert not await host.room.has_room_for_spare("llama")
    # Nobody goes for it, though nothing else is checked.
    host.services.settings = Settings(home=tmp_path, memory_check=False)
    assert not await host.room.has_room_for_spare("llama")
    assert host.unloaded == []


async def test_a_preview_changes_nothing(host: Host) -> None:
    host.add("idle", 900 * MB, 100.0)
    preview = await host.room.preview(MODEL, may_evict=True)
    assert preview.fits
    assert preview.would_unload == ["idle"]
    assert preview.needed_bytes == NEEDED
    assert host.unloaded == []
    host.add("busy", 900 * MB, None)
    preview = await host.room.preview(MODEL, may_evict=True)
    assert not preview.fits
    assert preview.would_unload == []


async def test_what_is_there_already_needs_nothing(host: Host) -> None:
    host.add("new", 900 * MB, 50.0)
    preview = await host.room.preview(MODEL, may_evict=True)
    assert (preview.fits, preview.needed_bytes, preview.would_unload) == (True, 0, [])
    assert "is loaded" in preview.message


async def test_what_is_held_is_not_promised_to_others(host: Host) -> None:
    host.total = 2 * NEEDED
    async with host.room.hold(MODEL):
        await refused(host)
    await host.make()


async def test_what_is_held_and_taken_counts_once(host: Host) -> None:
    host.total = 2 * NEEDED + 60 * MB  # of it the prompt cache of what is held
    async with host.room.hold(MODEL):
        host.add("trial", 80 * MB, None)
        trial: Any = host.actors.pop("trial")
        host.room.trials = {"trial": trial}
        host.tried[id(trial)] = 80 * MB
        await host.make()


async def test_an_operator_can_do_without_the_check(host: Host, tmp_path: Path) -> None:
    host.services.settings = Settings(home=tmp_path, memory_check=False)
    host.total = 1
    await host.make()


@given(
    st.lists(
        st.tuples(
            st.integers(1, 400), st.integers(0, 200), st.none() | st.floats(0, 99, allow_nan=False)
        ),
        max_size=6,
    ),
    st.integers(200, 1500),
    st.lists(st.integers(0, 3), max_size=6),
)
def test_loads_at_once_never_promise_more_than_there_is(
    tmp_path_factory: pytest.TempPathFactory,
    loaded: list[tuple[int, int, float | None]],
    total: int,
    turns: list[int],
) -> None:
    async def scenario() -> None:
        host = Host(total * MB, tmp_path_factory.getbasetemp())
        for number, (size, growth, idle_s) in enumerate(loaded):
            host.add(f"m{number}", size * MB, idle_s, promised=(size + growth) * MB)
        before = sum(actor.promised for actor in host.actors.values())

        async def load(number: int, pauses: int) -> None:
            for _ in range(pauses):
                await asyncio.sleep(0)
            name = f"new{number}"
            async with host.room.turn:
                try:
                    plan = await host.room.make(replace(MODEL, model_id=name), may_evict=True)
                except CodedError:
                    return
                host.add(name, 10 * MB, None, promised=plan.total)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory_room, "_look", lambda pids: host.look(pids))
            patch.setattr(memory_room, "total_bytes", lambda: 16_000 * MB)
            async with asyncio.timeout(10):
                await asyncio.gather(*(load(*each) for each in enumerate(turns)))
        promised = sum(actor.promised for actor in host.actors.values())
        assert promised <= max(host.total, before)

    asyncio.run(scenario())
