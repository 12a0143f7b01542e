"""What a worker says after it has failed counts for nothing, however it arrives."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from protocol.codec import Encoder
from protocol.errors import ErrorCode
from protocol.handshake import EXIT_FAULT, WorkerBoot
from protocol.messages import (
    PROTOCOL_VERSION,
    BackendFault,
    Delta,
    FinishReason,
    FromWorker,
    Generate,
    Hello,
    LoadFailed,
    Step,
    ToWorker,
)
from supervisor import generation, marks, worker
from supervisor.accounts import AccountStore
from supervisor.channel import Channel, SocketFolder
from supervisor.convicts import Convicts
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.incidents import Fingerprints, IncidentStore
from supervisor.ledger import WorkerLedger
from supervisor.lifecycle import Event, LoadRefused, WorkerExited, WorkerFailed
from supervisor.line import Delivery
from supervisor.memory_lessons import MemoryLessons
from supervisor.metrics import Metrics
from supervisor.modelfiles import SIMULATED_TRAITS, ModelFiles
from supervisor.oom_kills import OomKills
from supervisor.quarantine import FailureKind, Policy
from supervisor.registry import Registry
from supervisor.requests import RequestTable
from supervisor.services import Services
from supervisor.settings import Settings
from supervisor.stream import RequestStream

PID = 4_000_000
encode = Encoder()


class NoProcess:
    """Stands in for a worker's process; the test speaks in its place."""

    mark = "no-such-mark"
    pid = PID
    exit_status: int | None = None
    output_tail = ""

    def __init__(self, boot: WorkerBoot, _: int, *, on_exit: Callable[[], None], **__: str) -> None:
        self._on_exit = on_exit
        self.boot = boot

    async def stop(self, *, grace_s: float, broken: bool) -> bool:
        """It cannot be killed."""
        return False

    def exit(self, status: int = 0) -> None:
        self.exit_status = status
        self._on_exit()

    def describe_exit(self) -> tuple[FailureKind, str]:
        return FailureKind.EXIT, "exited with status 0"


class CountingChannel(Channel):
    """Tells of every frame that was looked at."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sizes: asyncio.Queue[int] = asyncio.Queue()

    def _handle(self, frame: memoryview) -> None:
        super()._handle(frame)
        self.sizes.put_nowait(len(frame))


class Scene:
    """A generation and the worker's end of its wire."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[NoProcess] = []
        channels: list[CountingChannel] = []

        def process(*arguments: Any, **options: Any) -> NoProcess:
            made.append(NoProcess(*arguments, **options))
            return made[0]

        def channel(*arguments: Any, **options: Any) -> CountingChannel:
            channels.append(CountingChannel(*arguments, **options))
            return channels[0]

        monkeypatch.setattr(worker, "WorkerProcess", process)
        monkeypatch.setattr(worker, "Channel", channel)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets = SocketFolder(home)
        self.requests = RequestTable(max_stream_buffer_bytes=1000)
        services = Services(
            settings=Settings(home=home),
            policy=Policy(),
            registry=Registry(home),
            accounts=AccountStore(home),
            incidents=IncidentStore(home),
            fingerprints=Fingerprints(home),
            convicts=Convicts(Fingerprints(home), []),
            ledger=WorkerLedger(home),
            metrics=Metrics(),
            zmq_context=self.context,
            sockets=self.sockets,
            server_mark="mark",
            oom_kills=OomKills(),
            lessons=MemoryLessons(home),
        )
        files = ModelFiles(home / "x.sim.json", "simulated", SIMULATED_TRAITS, 1, "digest")
        self.ledger = services.ledger
        self.generation = Generation(
            1,
            ModelSpec("x", files, "simulated", "1", None, None, None),
            services,
            requests=self.requests,
            post=self.events.put_nowait,
        )
        (self.process,), (self.channel,) = made, channels
        self.worker_context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.peer: zmq.Socket[bytes] = self.worker_context.socket(zmq.DEALER)
        self.peer.connect(self.process.boot.data_endpoint)

    def ask(self) -> tuple[RequestStream, Step]:
        """A request that the worker has, and the whole answer to it."""
        sent: list[ToWorker] = []

        def send(message: ToWorker) -> Delivery:
            sent.append(message)
            return Delivery.SENT

        self.requests.connect(send)
        self.requests.resume()
        stream = self.requests.open(Generate(0, prompt="x"), streaming=True)
        (request,) = sent
        assert isinstance(request, Generate)
        return stream, Step([Delta(request.request_id, "text", [1], FinishReason.STOP)])

    async def hear(self, *said: FromWorker | bytes) -> None:
        """Wait until the supervisor has looked at a greeting and at all of this."""
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            nonce=self.process.boot.nonce,
            pid=PID,
            generation=1,
            backend="simulated",
            backend_version="1",
        )
        for message in (hello, *said):
            self.peer.send(message if isinstance(message, bytes) else encode(message))
        async with asyncio.timeout(5):
            for _ in (hello, *said):
                await self.channel.sizes.get()

    async def told(self, *kinds: type[Event]) -> list[Event]:
        """Wait for these events, in this order and without any other."""
        async with asyncio.timeout(5):
            events = [await self.events.get() for _ in kinds]
        assert [type(event) for event in events] == [*kinds]
        return events

    async def end(self) -> None:
        if self.process.exit_status is None:
            self.process.exit()
            async with asyncio.timeout(5):
                while not isinstance(await self.events.get(), WorkerExited):
                    pass
        self.context.destroy(linger=0)
        self.worker_context.destroy(linger=0)
        self.sockets.cleanup()


@pytest.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path, monkeypatch)
    yield scene
    await scene.end()


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        pytest.param(b"\xc1", FailureKind.PROTOCOL, id="no message"),
        pytest.param(msgspec.msgpack.encode(["Nobody"]), FailureKind.PROTOCOL, id="wrong tag"),
        pytest.param(BackendFault("out of luck"), FailureKind.BACKEND_EXCEPTION, id="fault"),
    ],
)
async def test_what_follows_a_failure_reaches_no_request(
    scene: Scene, failure: FromWorker | bytes, kind: FailureKind
) -> None:
    stream, answer = scene.ask()
    await scene.hear(failure, answer, b"\xc1")
    assert not stream.ended
    assert stream.completion_tokens == 0
    told = scene.events.get_nowait()
    assert isinstance(told, WorkerFailed)
    assert told.kind is kind
    assert scene.events.empty()


async def test_an_answer_before_the_failure_counts(scene: Scene) -> None:
    stream, answer = scene.ask()
    await scene.hear(answer, b"\xc1")
    assert (await stream.next()).text == "text"


@pytest.mark.parametrize("status", [-signal.SIGABRT, EXIT_FAULT])
async def test_a_death_without_last_words_is_told_at_once(scene: Scene, status: int) -> None:
    await scene.hear()
    scene.peer.close(linger=0)
    died_at = time.monotonic()
    scene.process.exit(status)
    await scene.told(WorkerFailed)
    assert time.monotonic() - died_at < 0.05
    await scene.told(WorkerExited)


async def test_nobody_is_waited_for_who_never_connected(scene: Scene) -> None:
    scene.peer.close(linger=0)
    died_at = time.monotonic()
    scene.process.exit(-signal.SIGABRT)
    await scene.told(WorkerFailed)
    assert time.monotonic() - died_at < 0.05
    await scene.told(WorkerExited)


@pytest.mark.parametrize("status", [-signal.SIGABRT, EXIT_FAULT])
async def test_last_words_on_their_way_are_heard(scene: Scene, status: int) -> None:
    scene.peer.send(encode(LoadFailed(ErrorCode.MODEL_INCOMPLETE, "cut off")))
    # As a worker does at its end: it is gone once all of that is on its way.
    scene.peer.close(linger=1000)
    await asyncio.to_thread(scene.worker_context.term)
    scene.process.exit(status)
    refused, _, _ = await scene.told(LoadRefused, WorkerFailed, WorkerExited)
    assert isinstance(refused, LoadRefused)
    assert refused.reason == "cut off"


async def test_the_end_is_told_when_the_helpers_are_gone_as_well(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "end_marked", lambda *_: time.sleep(0.3))
    died_at = time.monotonic()
    scene.process.exit(1)
    await scene.told(WorkerFailed)
    assert time.monotonic() - died_at < 0.2
    await scene.told(WorkerExited)
    assert time.monotonic() - died_at > 0.3


async def test_helpers_that_do_not_end_hold_nobody_up_for_ever(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "HELPERS_TIMEOUT_S", 0.1)
    monkeypatch.setattr(marks, "end_marked", lambda *_: time.sleep(1.0))
    died_at = time.monotonic()
    scene.process.exit(1)
    await scene.told(WorkerFailed, WorkerExited)
    assert time.monotonic() - died_at < 0.9


async def test_a_process_that_cannot_be_killed_is_given_up_and_reaped_later(scene: Scene) -> None:
    scene.ledger.add(os.getpid())  # in its place: the ledger knows living processes only
    scene.process.pid = os.getpid()
    scene.generation.stop(broken=True)
    (exited,) = await scene.told(WorkerExited)
    assert isinstance(exited, WorkerExited)
    assert "cannot be killed" in exited.reason
    assert scene.generation.stuck == exited.reason
    assert scene.generation.exit_status is None
    assert os.getpid() in scene.ledger._workers
    scene.process.exit(-signal.SIGKILL)
    assert os.getpid() not in scene.ledger._workers
    await asyncio.sleep(0.1)
    assert scene.events.empty()
