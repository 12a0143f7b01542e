"""What a trial makes of what its worker does, and that the worker is always brought down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ErrorCode
from protocol.messages import Loaded
from supervisor import proof, sideworker
from supervisor.canary import CanaryReport, Proof
from supervisor.casefile import CaseFile
from supervisor.gate import ModelSpec
from supervisor.lifecycle import (
    CanaryPassed,
    Event,
    LoadRefused,
    RunCanary,
    WorkerExited,
    WorkerFailed,
    WorkerLoaded,
)
from supervisor.metrics import Metrics
from supervisor.modelfiles import SIMULATED_TRAITS, ModelFiles
from supervisor.quarantine import FailureKind
from supervisor.requests import RequestTable
from supervisor.services import Services, open_services
from supervisor.settings import Settings
from supervisor.sideworker import NUMBER
from supervisor.trial import NAME, Ended, Trial

SEGFAULT = WorkerFailed(NUMBER, FailureKind.SIGNAL, "killed by SIGSEGV")
EXITED = WorkerExited(NUMBER, FailureKind.SIGNAL, "killed by SIGKILL")
LOADED = WorkerLoaded(NUMBER)
REPORT = CanaryReport("asked", 0.5, 100.0, "said", 5, 16)
LIMIT = 1000


class Worker:
    """Stands in for ``Generation``; ends as soon as it is stopped, unless told otherwise."""

    #: What it does, and whether it ends when it is stopped.
    script: tuple[Event, ...] = ()
    ends = True
    made: list[Worker]

    def __init__(
        self,
        number: int,
        *_: object,
        post: Callable[[Event], None],
        requests: RequestTable,
        worker: object,
    ) -> None:
        assert worker is None
        self.made.append(self)
        self.case = CaseFile(model="m", generation=number, backend="b", backend_version="1")
        self.model = Loaded("a", 64, 1, 9, has_chat_template=False, weights_bytes=1)
        self.pid = 2**30
        self.exit_status: int | None = None
        self.output_tail = "last words"
        self.stops: list[bool] = []
        self.stopped = asyncio.Event()
        self.post = post
        for event in self.script:
            post(event)

    def send(self, message: object) -> None:
        raise AssertionError(f"nobody should send {message}")

    def stop(self, *, broken: bool) -> None:
        self.stops.append(broken)
        self.stopped.set()
        self.output_tail += ", and the very last"
        if self.ends:
            self.exit()

    def exit(self) -> None:
        self.exit_status = -9
        self.post(EXITED)


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[Services]:
    services = open_services(Settings(home=tmp_path), Metrics())
    yield services
    await services.flush()
    services.close()


@dataclass
class Scene:
    trial: Trial
    workers: list[Worker]

    @property
    def worker(self) -> Worker:
        (worker,) = self.workers
        return worker

    async def run(self, timeout_s: float = 10.0) -> Ended:
        async with asyncio.timeout(10):
            return await self.trial.run(timeout_s)


MakeScene = Callable[..., Scene]


@pytest.fixture
def make(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeScene:
    """A trial whose worker does this, and whose canary ends so, if at all."""

    def make(*script: Event, canary: Event | None = None, ends: bool = True) -> Scene:
        async def prove(
            _table: RequestTable,
            _model: object,
            command: RunCanary,
            *,
            timeout_s: float,
            known: str | None,
        ) -> tuple[Event, Proof | None]:
            assert known is None
            assert timeout_s == services.settings.canary_timeout_s
            assert command.strict
            if canary is None:
                await asyncio.Event().wait()
            assert canary is not None
            return canary, Proof(REPORT) if isinstance(canary, CanaryPassed) else None

        members: dict[str, Any] = {"script": script, "ends": ends, "made": []}
        kind = type("ScriptedWorker", (Worker,), members)
        monkeypatch.setattr(sideworker, "Generation", kind)
        monkeypatch.setattr(proof, "prove", prove)
        files = ModelFiles(tmp_path / "x.sim.json", "simulated", SIMULATED_TRAITS, 1, "digest")
        spec = ModelSpec("m", files, "simulated", "1", None, None, memory_limit_bytes=LIMIT)
        return Scene(Trial(spec, services, strict=True), kind.made)  # type: ignore[attr-defined]

    return make


async def test_a_pass_is_measured_and_its_worker_asked_to_leave(make: MakeScene) -> None:
    scene = make(LOADED, canary=CanaryPassed(NUMBER))
    ended = await scene.run()
    assert (ended.code, ended.kind, ended.telling) == (None, None, True)
    assert ended.report == REPORT
    assert ended.parts_s.keys() == {"start", "import", "load", "canary"}
    assert scene.worker.stops == [False]


@pytest.mark.parametrize(
    ("events", "canary", "code", "kind", "telling"),
    [
        ((SEGFAULT,), None, ErrorCode.MODEL_LOADER_CRASHED, FailureKind.SIGNAL, True),
        ((EXITED,), None, ErrorCode.MODEL_LOADER_CRASHED, FailureKind.SIGNAL, True),
        ((LOADED, SEGFAULT), None, ErrorCode.MODEL_CANARY_FAILED, FailureKind.SIGNAL, True),
        (
            (WorkerFailed(NUMBER, FailureKind.LOAD_TIMEOUT, "x"),),
            *(None, ErrorCode.MODEL_LOAD_TIMEOUT, FailureKind.LOAD_TIMEOUT, True),
        ),
        (
            (LOADED,),
            WorkerFailed(NUMBER, FailureKind.CANARY, "canary: repeats itself"),
            *(ErrorCode.MODEL_CANARY_FAILED, FailureKind.CANARY, True),
        ),
        (
            (LoadRefused(NUMBER, ErrorCode.MODEL_UNSUPPORTED_ARCH, "x"),),
            *(None, ErrorCode.MODEL_UNSUPPORTED_ARCH, None, True),
        ),
        (
            (LoadRefused(NUMBER, ErrorCode.MODEL_CONFLICT, "another version by now"),),
            *(None, ErrorCode.MODEL_CONFLICT, None, False),
        ),
        (
            (LOADED,),
            LoadRefused(NUMBER, ErrorCode.INVALID_VALUE, "no prompt could be tried"),
            *(ErrorCode.INVALID_VALUE, None, False),
        ),
    ],
)
async def test_failures_have_the_code_of_a_load(
    make: MakeScene,
    events: tuple[Event, ...],
    canary: Event | None,
    code: ErrorCode,
    kind: FailureKind | None,
    telling: bool,
) -> None:
    scene = make(*events, canary=canary)
    ended = await scene.run()
    assert (ended.code, ended.kind, ended.telling) == (code, kind, telling)
    assert ended.report is None
    assert scene.worker.stops == [True]
    assert ended.output_tail == "last words, and the very last"


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ((), ErrorCode.MODEL_LOAD_TIMEOUT),
        ((LOADED,), ErrorCode.MODEL_CANARY_FAILED),
    ],
)
async def test_a_deadline_tells_nothing_of_the_model(
    make: MakeScene, events: tuple[Event, ...], code: ErrorCode
) -> None:
    scene = make(*events)
    ended = await scene.run(timeout_s=0.01)
    assert (ended.code, ended.telling) == (code, False)
    assert "0.01 s" in ended.reason
    assert scene.worker.stops == [True]


async def test_who_calls_it_off_waits_for_the_end_of_the_worker(make: MakeScene) -> None:
    scene = make(LOADED, ends=False)
    running = asyncio.create_task(scene.run())
    await asyncio.sleep(0)
    assert scene.trial.worker.worker is not None
    running.cancel()
    await scene.worker.stopped.wait()
    assert not running.done()
    assert scene.trial.worker.dying
    scene.worker.exit()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert scene.worker.exit_status is not None
    assert not scene.trial.worker.dying


async def test_no_process_is_no_fault_of_the_model(
    make: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    scene = make()
    monkeypatch.setattr(sideworker, "Generation", fails)
    ended = await scene.run()
    assert (ended.code, ended.telling) == (ErrorCode.INTERNAL_ERROR, False)
    assert "no more processes" in ended.reason


async def test_all_that_it_holds_is_growth(make: MakeScene) -> None:
    footprint = make().trial.worker.footprint(NUMBER, 500)
    assert footprint is not None
    assert (footprint.model_id, footprint.growth, footprint.limit) == (NAME, 500, LIMIT)


@pytest.mark.parametrize(
    ("size", "code", "telling"),
    [
        (LIMIT + 1, ErrorCode.MODEL_LOADER_CRASHED, True),
        (LIMIT, ErrorCode.INSUFFICIENT_MEMORY, False),
    ],
)
async def test_a_host_without_memory_tells_nothing_of_the_model(
    make: MakeScene, size: int, code: ErrorCode, telling: bool
) -> None:
    scene = make()
    scene.trial.worker.footprint(NUMBER, size)
    scene.trial.worker.footprint(NUMBER, 10)
    scene.trial.worker.fail(NUMBER, FailureKind.MEMORY, "memory")
    ended = await scene.run()
    assert (ended.code, ended.telling) == (code, telling)
    assert ended.memory_gb == size / 1e9
