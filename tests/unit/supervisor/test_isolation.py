"""When a cell is opened, what its end does, and that its worker is always brought down."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Cancel, Delta, FinishReason, Generate, Loaded, ToWorker
from supervisor import isolation, proof, sideworker
from supervisor.canary import Proof
from supervisor.gate import ModelSpec
from supervisor.isolation import Isolation, Quarters
from supervisor.lifecycle import (
    CanaryPassed,
    CellFailed,
    Event,
    RunCanary,
    WorkerExited,
    WorkerFailed,
    WorkerLoaded,
)
from supervisor.line import Delivery
from supervisor.metrics import Metrics
from supervisor.modelfiles import SIMULATED_TRAITS, ModelFiles
from supervisor.quarantine import FailureKind
from supervisor.requests import RequestTable
from supervisor.services import Services, open_services
from supervisor.settings import Settings
from supervisor.sideworker import NUMBER, SideWorker
from supervisor.stream import RequestStream

CRASHED = CodedError(ErrorCode.MODEL_CRASHED, "killed by SIGSEGV")
SEGFAULT = WorkerFailed(NUMBER, FailureKind.SIGNAL, "killed by SIGSEGV")
PASSED = CanaryPassed(NUMBER)
FILES = ModelFiles(Path("/m/x.sim.json"), "simulated", SIMULATED_TRAITS, 1, "digest")
SPEC = ModelSpec("m", FILES, "simulated", "1", None, None, None)


@dataclass
class Sent:
    """What a worker was sent and not told to give up; ``running`` are the prompts."""

    jobs: dict[int, str] = field(default_factory=dict)

    def __call__(self, message: ToWorker) -> Delivery:
        if isinstance(message, Cancel):
            self.jobs.pop(message.request_id, None)
        elif isinstance(message, Generate):
            self.jobs[message.request_id] = str(message.prompt)
        return Delivery.SENT

    @property
    def running(self) -> list[str]:
        return list(self.jobs.values())

    def finish(self, table: RequestTable, name: str) -> None:
        (number,) = [number for number, prompt in self.jobs.items() if prompt == name]
        del self.jobs[number]
        table.deliver([Delta(number, "x", [1], FinishReason.STOP)])


class FakeGeneration:
    """Stands in for ``Generation``: loads at once, and ends once it is stopped if ``ends``."""

    ends = True

    def __init__(
        self, number: int, *_: object, post: Callable[[Event], None], worker: Any, **__: object
    ) -> None:
        self.number, self.pid = number, worker.process.pid
        self.case = SimpleNamespace(sample=lambda size: None)
        self.model = Loaded("a", 64, 1, 9, has_chat_template=False, weights_bytes=1)
        self.exit_status: int | None = None
        self.stops: list[bool] = []
        self.stopped = asyncio.Event()
        self.sent = Sent()
        self.post = post
        post(WorkerLoaded(NUMBER))

    def send(self, message: ToWorker) -> Delivery:
        return self.sent(message)

    def stop(self, *, broken: bool) -> None:
        self.stops.append(broken)
        self.stopped.set()
        if self.ends:
            self.exit()

    def exit(self) -> None:
        self.exit_status = -9
        self.post(WorkerExited(NUMBER, FailureKind.SIGNAL, "killed by SIGKILL"))


class Rig:
    """A model with an isolation, whose own worker is ``main``; the pids of cells count up."""

    def __init__(self, services: Services) -> None:
        self.main = Sent()
        self.requests = RequestTable(max_stream_buffer_bytes=1000)
        self.requests.connect(self.main)
        self.requests.resume()
        self.spares = 0
        self.refusal: CodedError | None = None
        self.asked = 0
        self.pids = 0
        self.canaries: deque[Event] = deque()
        self.may_prove = asyncio.Event()
        self.may_prove.set()
        self.told: list[Event] = []
        #: Workers that were taken and could not be used, and how they were stopped.
        self.unused: list[bool] = []
        self.buried: list[FakeGeneration] = []
        self.beside: dict[str, SideWorker] = {}
        self.on_tell: Callable[[], object] = self.park
        spares: Any = SimpleNamespace(has=self.has, take=self.take)
        quarters = Quarters(spares, self.reserve, self.beside)
        buried: Any = self.buried.append
        self.isolation = Isolation(
            *(services, self.requests, quarters),
            known=lambda: "known",
            tell=self.tell,
            buried=buried,
        )

    def has(self, backend: str, version: str) -> bool:
        assert (backend, version) == ("simulated", "1")
        return self.spares > 0

    def take(self, _backend: str, _version: str) -> Any:
        if not self.spares:
            return None
        self.spares -= 1
        self.pids += 1
        return SimpleNamespace(process=SimpleNamespace(pid=self.pids, stop=self.stop_unused))

    async def stop_unused(self, *, grace_s: float, broken: bool) -> None:
        assert grace_s > 0
        self.unused.append(broken)

    @asynccontextmanager
    async def reserve(self, spec: ModelSpec) -> AsyncIterator[None]:
        assert spec is SPEC
        self.asked += 1
        if self.refusal is not None:
            raise self.refusal
        yield

    def tell(self, event: Event) -> None:
        self.told.append(event)
        self.on_tell()

    def park(self) -> None:
        self.isolation.ward.convict()
        self.isolation.park(CRASHED, accuse=True)

    def open(self, name: str) -> RequestStream:
        request = Generate(0, prompt=name)
        return self.requests.open(request, streaming=True, may_resume=True)

    def crash(self, *names: str) -> list[RequestStream]:
        """These have been in flight at a death of the model's own worker."""
        streams = [self.open(name) for name in names]
        self.requests.disconnect()
        self.main.jobs.clear()
        self.requests.park(CRASHED)
        self.requests.connect(self.main)
        self.requests.resume()
        self.isolation.begin(SPEC)
        return streams

    @property
    def cell(self) -> FakeGeneration:
        generation: Any = self.isolation.generation
        assert isinstance(generation, FakeGeneration)
        return generation

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if task.get_name() == "isolation m"]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - its states set no event
                await asyncio.sleep(0.001)

    async def in_cell(self, *names: str) -> None:
        """Until these run in the cell."""
        await self.until(
            lambda: self.isolation.generation and self.cell.sent.running == list(names)
        )

    async def over(self) -> None:
        await self.until(lambda: not self.tasks)
        assert self.beside == {}
        assert self.isolation.generation is None


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    services = open_services(Settings(home=tmp_path), Metrics())
    rig = Rig(services)

    async def prove(
        _table: RequestTable,
        _model: object,
        command: RunCanary,
        *,
        timeout_s: float,
        known: str | None,
    ) -> tuple[Event, Proof | None]:
        assert known == "known"
        assert not command.strict
        assert timeout_s == services.settings.canary_timeout_s
        await rig.may_prove.wait()
        return rig.canaries.popleft() if rig.canaries else PASSED, None

    monkeypatch.setattr(sideworker, "Generation", FakeGeneration)
    monkeypatch.setattr(proof, "prove", prove)
    monkeypatch.setattr(isolation, "LOOK_S", 0.001)
    monkeypatch.setattr(isolation, "PATIENCE_S", 0.05)
    yield rig
    rig.isolation.end()
    await rig.isolation.left()
    assert rig.beside == {}
    await services.flush()
    services.close()


async def test_a_cell_is_open_for_as_long_as_there_are_suspects(rig: Rig) -> None:
    rig.spares = 1
    rig.crash("a", "b")
    rig.open("new")
    await rig.in_cell("a")
    cell = rig.cell
    assert rig.main.running == ["new"]
    assert list(rig.beside) == ["/cell/1"]
    view = rig.isolation.view()
    assert view is not None
    assert (view.suspects, view.pid) == (2, 1)
    cell.sent.finish(rig.isolation.ward, "a")
    assert cell.sent.running == ["b"]
    cell.sent.finish(rig.isolation.ward, "b")
    await rig.over()
    assert (cell.stops, rig.buried, rig.told) == ([False], [cell], [])
    assert rig.isolation.view() is None


async def test_where_nobody_waits_there_is_none(rig: Rig) -> None:
    rig.spares = 1
    rig.crash("a", "b")
    view = rig.isolation.view()
    assert view is not None
    assert (view.suspects, view.pid) == (2, None)
    assert not rig.isolation.wants_spare
    rig.main.finish(rig.requests, "a")
    rig.main.finish(rig.requests, "b")
    await rig.over()
    assert (rig.spares, rig.asked) == (1, 0)


async def test_a_spare_worker_is_wanted_and_taken_when_it_comes(rig: Rig) -> None:
    rig.crash("a")
    wanted = [rig.isolation.wants_spare]
    rig.open("new")
    wanted.append(rig.isolation.wants_spare)
    rig.spares = 1
    await rig.in_cell("a")
    assert [*wanted, rig.isolation.wants_spare] == [False, True, False]


async def test_without_memory_it_is_not_asked_for_again(rig: Rig) -> None:
    rig.spares = 1
    rig.refusal = CodedError(ErrorCode.INSUFFICIENT_MEMORY, "no room")
    rig.crash("a")
    rig.open("new")
    await rig.over()
    assert (rig.asked, rig.spares, rig.main.running) == (1, 1, ["a"])
    # The next crash is another matter.
    rig.refusal = None
    rig.main.finish(rig.requests, "a")
    rig.crash("b")
    rig.open("newer")
    await rig.in_cell("new")


async def test_one_that_fails_its_canary_gets_nobody(rig: Rig) -> None:
    rig.spares = 2
    rig.canaries.append(WorkerFailed(NUMBER, FailureKind.CANARY, "canary: repeats itself"))
    rig.crash("a")
    rig.open("new")
    await rig.over()
    (cell,) = rig.buried
    assert (cell.stops, cell.sent.running, rig.told) == ([True], [], [])
    assert (rig.spares, rig.main.running) == (1, ["a"])
    rig.main.finish(rig.requests, "a")
    assert rig.main.running == ["new"]


async def test_one_that_comes_too_late_gets_nobody(rig: Rig) -> None:
    rig.spares = 1
    rig.may_prove.clear()
    rig.crash("a")
    waiting = rig.open("new")
    await rig.until(lambda: rig.isolation.generation)
    waiting.close()
    rig.may_prove.set()
    cell = rig.cell
    await rig.until(lambda: cell.stops)
    assert (cell.stops, cell.sent.running, rig.main.running) == ([False], [], ["a"])


async def test_the_suspects_of_the_next_crash_join_them(rig: Rig) -> None:
    rig.spares = 2
    rig.crash("a")
    rig.open("new")
    await rig.in_cell("a")
    cell = rig.cell
    rig.crash("b")
    assert (rig.main.running, cell.sent.running) == (["new"], ["a"])
    rig.open("newer")
    await rig.until(lambda: rig.main.running == ["newer"])
    for name in ("a", "new", "b"):
        assert cell.sent.running == [name]
        cell.sent.finish(rig.isolation.ward, name)
    await rig.over()
    assert (rig.buried, rig.spares) == ([cell], 1)


async def test_its_failure_is_told_once_and_the_rest_go_to_the_next(rig: Rig) -> None:
    rig.spares = 2
    bad, _ = rig.crash("bad", "b")
    rig.open("new")
    await rig.in_cell("bad")
    first = rig.cell
    first.post(SEGFAULT)
    first.post(WorkerExited(NUMBER, FailureKind.SIGNAL, "killed by SIGSEGV"))
    await rig.in_cell("b")
    assert rig.told == [CellFailed(FailureKind.SIGNAL, "killed by SIGSEGV")]
    with pytest.raises(CodedError) as error:
        await bad.next()
    assert error.value.code is ErrorCode.REQUEST_POISONED
    assert (rig.cell is first, rig.buried, rig.main.running) == (False, [first], ["new"])


async def test_where_no_other_comes_they_are_isolated_at_home(rig: Rig) -> None:
    rig.spares = 1
    rig.crash("bad", "b")
    rig.open("new")
    await rig.in_cell("bad")
    rig.cell.post(SEGFAULT)
    await rig.until(lambda: rig.told)
    # For a while they wait, and nobody else does.
    assert rig.isolation.wants_spare
    assert rig.main.running == ["new"]
    await rig.until(lambda: rig.main.running == ["b"])
    rig.main.finish(rig.requests, "b")
    assert rig.main.running == ["new"]
    await rig.over()


async def test_one_that_goes_for_the_others_sake_has_not_failed(rig: Rig) -> None:
    rig.spares = 2
    rig.crash("a")
    rig.open("new")
    await rig.in_cell("a")
    cell = rig.cell
    (worker,) = rig.beside.values()
    worker.fail(NUMBER, FailureKind.MEMORY, "the host has no memory left")
    await rig.over()
    assert (rig.told, cell.sent.running, rig.main.running) == ([], [], ["a"])
    assert (cell.stops, rig.spares) == ([True], 1)


async def test_to_end_it_is_to_wait_for_its_process(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGeneration, "ends", False)
    rig.spares = 1
    rig.crash("a")
    rig.open("new")
    await rig.in_cell("a")
    cell = rig.cell
    rig.requests.fail_all(CRASHED)
    rig.isolation.end()
    leaving = asyncio.create_task(rig.isolation.left())
    await cell.stopped.wait()
    # Once more changes nothing.
    rig.isolation.end()
    await asyncio.sleep(0)
    assert (leaving.done(), list(rig.beside)) == (False, ["/cell/1"])
    cell.exit()
    await leaving
    await rig.over()
    assert rig.buried == [cell]


async def test_to_end_it_while_it_closes_does_not_cut_that_short(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGeneration, "ends", False)
    rig.spares = 1
    rig.crash("a")
    rig.open("new")
    await rig.in_cell("a")
    cell = rig.cell
    cell.sent.finish(rig.isolation.ward, "a")
    await cell.stopped.wait()
    rig.isolation.end()
    leaving = asyncio.create_task(rig.isolation.left())
    await asyncio.sleep(0)
    assert (leaving.done(), list(rig.beside)) == (False, ["/cell/1"])
    # Suspects of a later load wait for that.
    rig.spares = 1
    rig.crash("b")
    rig.open("newer")
    cell.exit()
    await leaving
    monkeypatch.setattr(FakeGeneration, "ends", True)
    await rig.in_cell("new")
    assert rig.buried == [cell]


async def test_a_failure_that_ends_the_model_ends_its_cell(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGeneration, "ends", False)

    def quarantine() -> None:
        rig.requests.fail_all(CRASHED)
        rig.isolation.end()

    rig.on_tell = quarantine
    rig.spares = 2
    streams = rig.crash("a", "b")
    rig.open("new")
    await rig.in_cell("a")
    cell = rig.cell
    cell.post(SEGFAULT)
    await cell.stopped.wait()
    leaving = asyncio.create_task(rig.isolation.left())
    await asyncio.sleep(0)
    assert (leaving.done(), list(rig.beside)) == (False, ["/cell/1"])
    cell.exit()
    await leaving
    await rig.over()
    assert (cell.stops, rig.buried, rig.spares) == ([True], [cell], 1)
    assert all(stream.failed for stream in streams)


async def test_what_cannot_be_started_changes_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no more files")

    monkeypatch.setattr(sideworker, "Generation", fails)
    rig.spares = 1
    rig.crash("a")
    rig.open("new")
    await rig.over()
    assert (rig.main.running, rig.unused) == (["a"], [True])
    assert "no more files" in caplog.text
