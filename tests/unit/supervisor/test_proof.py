"""Which canary a worker has to pass, and what is remembered of it."""

from __future__ import annotations

import asyncio

import pytest

from protocol.messages import Accepted, Delta, FinishReason, Generate, Loaded, ToWorker
from supervisor.canary import RECALL_TOKENS, TOKENS
from supervisor.lifecycle import CanaryPassed, Event, RunCanary, WorkerFailed
from supervisor.line import Delivery
from supervisor.proof import Prover
from supervisor.requests import RequestTable

MODEL = Loaded(
    architecture="llama",
    context_length=512,
    max_sequences=2,
    vocab_size=64,
    has_chat_template=True,
    weights_bytes=1,
)
WORDS = ["one ", "two ", "three "]


class Scene:
    """A prover and a worker that says ``words`` over and over, until it is silent."""

    def __init__(self) -> None:
        self.words = WORDS
        self.silent = False
        #: Lengths of the answers that it was asked for.
        self.asked: list[int] = []
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.requests = RequestTable(max_stream_buffer_bytes=1_000_000)
        self.prover = Prover(self.requests, self.events.put_nowait)

    def send(self, message: ToWorker) -> Delivery:
        if isinstance(message, Generate) and not self.silent:
            asyncio.get_running_loop().call_soon(self._answer, message)
        return Delivery.SENT

    def _answer(self, request: Generate) -> None:
        assert request.max_tokens is not None
        self.asked.append(request.max_tokens)
        self.requests.accept(Accepted(request.request_id, 7))
        for n in range(request.max_tokens):
            finish = FinishReason.LENGTH if n + 1 == request.max_tokens else None
            text = self.words[n % len(self.words)]
            self.requests.deliver([Delta(request.request_id, text, [n], finish)])

    async def prove(self, *, strict: bool = False) -> Event:
        self.asked.clear()
        self.requests.connect(self.send)
        self.prover.start(MODEL, RunCanary(1, strict=strict), timeout_s=1)
        return await self.events.get()


async def test_the_first_worker_passes_the_whole_canary() -> None:
    scene = Scene()
    assert await scene.prove() == CanaryPassed(1)
    assert TOKENS in scene.asked
    assert scene.prover.report is not None


async def test_one_that_answers_as_before_passes_a_short_one() -> None:
    scene = Scene()
    await scene.prove()
    assert await scene.prove() == CanaryPassed(1)
    assert TOKENS not in scene.asked
    assert scene.asked[-1] == RECALL_TOKENS
    # Nothing was measured: what the registry is told must not be what another one has shown.
    assert scene.prover.report is None
    assert await scene.prove() == CanaryPassed(1)
    assert TOKENS not in scene.asked


async def test_one_that_answers_otherwise_has_to_pass_the_whole() -> None:
    scene = Scene()
    await scene.prove()
    scene.words = ["uno ", "dos "]
    assert await scene.prove() == CanaryPassed(1)
    assert TOKENS in scene.asked
    # And is known by that from then on.
    await scene.prove()
    assert TOKENS not in scene.asked


async def test_one_that_has_gone_wrong_fails() -> None:
    scene = Scene()
    await scene.prove()
    scene.words = ["!"]
    event = await scene.prove()
    assert isinstance(event, WorkerFailed)
    assert "repeats itself" in event.reason
    # Whatever comes next is not to be known by an answer of a model that has failed since.
    scene.words = WORDS
    await scene.prove()
    assert TOKENS in scene.asked


async def test_on_probation_the_whole_canary_is_asked_for() -> None:
    scene = Scene()
    await scene.prove()
    await scene.prove(strict=True)
    assert max(scene.asked) > TOKENS


async def test_after_a_death_in_the_canary_comes_a_whole_one() -> None:
    scene = Scene()
    await scene.prove()
    scene.silent = True
    scene.requests.connect(scene.send)
    scene.prover.start(MODEL, RunCanary(1, strict=False), timeout_s=1)
    await asyncio.sleep(0)
    scene.prover.cancel()
    scene.silent = False
    await scene.prove()
    assert TOKENS in scene.asked


async def test_a_canary_that_we_fail_at_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no idea")

    monkeypatch.setattr("supervisor.proof.run_canary", broken)
    event = await Scene().prove()
    assert isinstance(event, WorkerFailed)
    assert "no idea" in event.reason
