"""What a worker says after it has failed counts for nothing, however it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from protocol.codec import Encoder
from protocol.handshake import WorkerBoot
from protocol.messages import (
    PROTOCOL_VERSION,
    BackendFault,
    Delta,
    FinishReason,
    FromWorker,
    Generate,
    Hello,
    Step,
    ToWorker,
)
from supervisor import generation
from supervisor.accounts import AccountStore
from supervisor.channel import Channel, SocketFolder
from supervisor.footprint import OomKills
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.incidents import Fingerprints, IncidentStore
from supervisor.ledger import WorkerLedger
from supervisor.lifecycle import Event, WorkerExited, WorkerFailed
from supervisor.metrics import Metrics
from supervisor.modelfiles import ModelFiles
from supervisor.quarantine import FailureKind, Policy
from supervisor.registry import Registry
from supervisor.requests import Delivery, RequestTable
from supervisor.services import Services
from supervisor.settings import Settings
from supervisor.stream import RequestStream

PID = 4_000_000
encode = Encoder()


class NoProcess:
    """Stands in for a worker's process; the test speaks in its place."""

    mark = "no-such-mark"
    pid = PID
    exit_status = 0
    output_tail = ""

    def __init__(self, boot: WorkerBoot, _: int, *, on_exit: Callable[[], None], **__: str) -> None:
        self.exit = on_exit
        self.boot = boot

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

        monkeypatch.setattr(generation, "WorkerProcess", process)
        monkeypatch.setattr(generation, "Channel", channel)
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
            ledger=WorkerLedger(home),
            metrics=Metrics(),
            zmq_context=self.context,
            sockets=self.sockets,
            server_mark="mark",
            oom_kills=OomKills(),
        )
        files = ModelFiles(home / "x.sim.json", "simulated", "simulated", "", 1, "digest")
        Generation(
            1,
            ModelSpec("x", files, "simulated", "1", None, None, None),
            services,
            requests=self.requests,
            post=self.events.put_nowait,
        )
        (self.process,), (self.channel,) = made, channels
        self.peer: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        self.peer.connect(self.process.boot.data_endpoint)

    def ask(self) -> tuple[RequestStream, Step]:
        """A request that the worker has, and the whole answer to it."""
        sent: list[ToWorker] = []

        def send(message: ToWorker) -> Delivery:
            sent.append(message)
            return Delivery.SENT

        self.requests.connect(send)
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

    async def end(self) -> None:
        self.process.exit()
        async with asyncio.timeout(5):
            while not isinstance(await self.events.get(), WorkerExited):
                pass
        self.context.destroy(linger=0)
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
