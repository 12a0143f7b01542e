"""Blame by isolation: one poisoned request among good ones, on a worker that is played here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Cancel, Delta, FinishReason, Generate, Job, ToWorker
from supervisor.line import Delivery
from supervisor.requests import RequestTable
from supervisor.stream import RequestStream
from supervisor.suspects import CLEARED_AFTER

CRASHED = CodedError(ErrorCode.MODEL_CRASHED, "killed by SIGSEGV", details={"incident_id": "i"})


@dataclass
class Machine:
    """A model whose worker makes a token of every request in a step, numbered from 0, and dies
    where a request is about to make its fatal one."""

    lengths: dict[str, int]
    fatal: dict[str, int] = field(default_factory=dict)
    crashes: int = 0
    convicted: list[Job] = field(default_factory=list)
    #: What ran together in each step.
    steps: list[set[str]] = field(default_factory=list)
    running: dict[int, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.table = RequestTable(max_stream_buffer_bytes=1_000_000)
        self.table.connect(self)
        self.table.resume()

    def __call__(self, message: ToWorker) -> Delivery:
        if isinstance(message, Cancel):
            self.running.pop(message.request_id, None)
        else:
            assert isinstance(message, Generate)
            assert isinstance(message.prompt, str)
            made = message.resume_tokens
            assert made == list(range(len(made)))
            self.running[message.request_id] = message.prompt, len(made)
        return Delivery.SENT

    def open(self, name: str, *, may_resume: bool = True) -> RequestStream:
        request = Generate(0, prompt=name)
        return self.table.open(request, streaming=True, may_resume=may_resume)

    def step(self) -> None:
        self.steps.append({name for name, _ in self.running.values()})
        if any(self.fatal.get(name) == at for name, at in self.running.values()):
            self.crash()
            return
        deltas = []
        for number, (name, at) in list(self.running.items()):
            last = at + 1 == self.lengths[name]
            deltas.append(Delta(number, f"{at} ", [at], FinishReason.STOP if last else None))
            if last:
                del self.running[number]
            else:
                self.running[number] = name, at + 1
        self.table.deliver(deltas)

    def crash(self, *, from_outside: bool = False) -> None:
        self.crashes += 1
        self.running.clear()
        if not from_outside and (convict := self.table.convict()) is not None:
            self.convicted.append(convict)
        self.table.disconnect()
        self.table.park(CRASHED, accuse=not from_outside)
        self.table.connect(self)
        self.table.resume()

    def run(self, limit: int = 10_000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            if not len(self.table):
                return
            self.step()
        raise AssertionError(f"it never ends: {self.running}")


async def text_of(stream: RequestStream) -> str:
    return (await stream.collect()).text


def counted(length: int) -> str:
    return "".join(f"{n} " for n in range(length))


async def test_suspects_run_one_at_a_time_and_others_wait() -> None:
    machine = Machine({"a": 30, "b": 30, "new": 5})
    streams = [machine.open("a"), machine.open("b")]
    machine.step()
    machine.crash()
    streams.append(machine.open("new"))
    del machine.steps[:]
    for _ in range(2 * CLEARED_AFTER):
        machine.step()
    assert machine.steps == CLEARED_AFTER * [{"a"}] + CLEARED_AFTER * [{"b"}]
    machine.step()
    assert machine.steps[-1] == {"a", "b", "new"}
    machine.run()
    assert [await text_of(each) for each in streams] == [counted(30), counted(30), counted(5)]
    assert (machine.crashes, machine.convicted) == (1, [])


async def test_who_kills_alone_is_convicted_and_the_others_finish() -> None:
    machine = Machine({"a": 20, "bad": 20, "b": 20}, {"bad": 3})
    good, bad, other = machine.open("a"), machine.open("bad"), machine.open("b")
    machine.run()
    assert machine.crashes == 2
    assert [each.prompt for each in machine.convicted if isinstance(each, Generate)] == ["bad"]
    assert (await text_of(good), await text_of(other)) == (counted(20), counted(20))
    assert (await bad.next()).text == counted(3)
    with pytest.raises(CodedError) as error:
        await bad.next()
    assert error.value.code is ErrorCode.REQUEST_POISONED
    assert error.value.details == {"incident_id": "i", "tokens_sent": 0}


async def test_one_that_cannot_go_on_later_is_not_taken_from_its_worker() -> None:
    machine = Machine({"a": 20, "b": 20})
    first = machine.open("a", may_resume=False)
    second = machine.open("b")
    machine.crash()  # before a token of it was made: it begins anew
    for _ in range(CLEARED_AFTER + 1):
        machine.step()
    assert machine.steps[-1] == {"a", "b"}
    machine.run()
    assert (await text_of(first), await text_of(second)) == (counted(20), counted(20))


async def test_who_leaves_makes_room_for_the_next() -> None:
    machine = Machine({"a": 20, "b": 20})
    first, second = machine.open("a"), machine.open("b")
    machine.step()
    machine.crash()
    first.close()
    machine.step()
    assert machine.steps[-1] == {"b"}
    machine.run()
    assert await text_of(second) == counted(20)


async def test_a_model_that_dies_with_nothing_in_flight_blames_nobody() -> None:
    machine = Machine({"a": 3})
    machine.crash()
    stream = machine.open("a")
    machine.run()
    assert await text_of(stream) == counted(3)
    assert machine.convicted == []


async def test_who_is_killed_from_outside_blames_nobody() -> None:
    machine = Machine({"a": 20, "b": 20})
    streams = [machine.open("a"), machine.open("b")]
    machine.step()
    for _ in range(2):
        machine.crash(from_outside=True)
    machine.step()
    assert machine.steps[-1] == {"a", "b"}
    machine.run()
    assert [await text_of(each) for each in streams] == [counted(20)] * 2
    assert machine.convicted == []


async def test_the_convict_is_told_also_when_the_model_is_given_up() -> None:
    machine = Machine({"bad": 9}, {"bad": 0})
    bad = machine.open("bad")
    machine.step()
    assert machine.table.convict() is not None
    machine.table.fail_all(CodedError(ErrorCode.MODEL_UNSTABLE, "quarantined"))
    with pytest.raises(CodedError, match="quarantined; it was this request") as error:
        await bad.next()
    assert error.value.code is ErrorCode.REQUEST_POISONED


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=7),
    st.integers(0, 6),
    st.integers(0, 39),
    st.lists(st.integers(0, 12), max_size=7),
)
def test_one_bad_request_costs_two_crashes_and_nobody_else_an_answer(
    lengths: list[int], bad: int, fatal_at: int, pauses: list[int]
) -> None:
    async def scenario() -> None:
        names = [f"r{n}" for n in range(len(lengths))]
        poison = names[bad % len(names)]
        machine = Machine(dict(zip(names, lengths, strict=True)), {poison: fatal_at})
        streams = {}
        for number, name in enumerate(names):
            for _ in range(pauses[number] if number < len(pauses) else 0):
                machine.step()
            streams[name] = machine.open(name)
        machine.run()
        strikes = fatal_at < machine.lengths[poison]
        assert machine.crashes == 2 * strikes
        assert len(machine.convicted) == strikes
        for name, stream in streams.items():
            if name == poison and strikes:
                assert stream.failed
            else:
                assert await text_of(stream) == counted(machine.lengths[name])

    asyncio.run(scenario())
