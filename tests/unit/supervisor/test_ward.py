"""Suspects with a worker of their own: nobody is lost on the way there or back, none runs twice.

Both workers are played here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Cancel, Delta, Embed, FinishReason, Generate, Job, Tokenize, ToWorker
from supervisor.line import Delivery
from supervisor.requests import RequestTable
from supervisor.stream import RequestStream
from supervisor.suspects import CLEARED_AFTER
from supervisor.ward import Ward

CRASHED = CodedError(ErrorCode.MODEL_CRASHED, "killed by SIGSEGV")
GONE = CodedError(ErrorCode.MODEL_CRASHED, "the cell is gone")


@dataclass
class Worker:
    """Makes a token of every request in a step, numbered from 0."""

    running: dict[int, tuple[str, int]] = field(default_factory=dict)
    #: Whoever came to it, in order.
    seen: list[str] = field(default_factory=list)
    up: bool = True

    def __call__(self, message: ToWorker) -> Delivery:
        if isinstance(message, Cancel):
            self.running.pop(message.request_id, None)
        elif isinstance(message, Generate):
            assert isinstance(message.prompt, str)
            made = message.resume_tokens
            assert made == list(range(len(made)))
            self.running[message.request_id] = message.prompt, len(made)
            self.seen.append(message.prompt)
        elif isinstance(message, Embed):
            self.running[message.request_id] = "embed", 0
            self.seen.append("embed")
        return Delivery.SENT

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.running.values()]


class Model:
    """A worker, and at times a cell beside it. It dies of a request at its fatal token."""

    def __init__(self, lengths: dict[str, int], fatal: dict[str, int] | None = None) -> None:
        self.lengths, self.fatal = lengths, fatal or {}
        self.home = RequestTable(max_stream_buffer_bytes=1_000_000)
        self.ward = Ward(self.home, max_stream_buffer_bytes=1_000_000)
        self.main, self.cell = Worker(), Worker(up=False)
        self.crashes = 0
        self.convicted: list[Job] = []
        self.streams: dict[str, RequestStream] = {}
        self.gone: set[str] = set()
        self.home.connect(self.main)
        self.home.resume()

    def open(self, name: str, *, may_resume: bool = True) -> RequestStream:
        request = Generate(0, prompt=name)
        stream = self.home.open(request, streaming=True, may_resume=may_resume)
        self.streams[name] = stream
        return stream

    def step(self, worker: Worker) -> None:
        if any(self.fatal.get(name) == at for name, at in worker.running.values()):
            self.crash(worker)
            return
        deltas = []
        for number, (name, at) in list(worker.running.items()):
            last = at + 1 == self.lengths[name]
            deltas.append(Delta(number, f"{at} ", [at], FinishReason.STOP if last else None))
            if last:
                del worker.running[number]
            else:
                worker.running[number] = name, at + 1
        (self.home if worker is self.main else self.ward).deliver(deltas)

    def crash(self, worker: Worker) -> None:
        table = self.home if worker is self.main else self.ward
        self.crashes += 1
        worker.running.clear()
        if (convict := table.convict()) is not None:
            self.convicted.append(convict)
        table.disconnect()
        table.park(CRASHED)
        if worker is self.main:
            table.connect(self.main)
            table.resume()
        else:
            self.cell.up = False

    def open_cell(self) -> None:
        if not self.cell.up:
            self.cell.up = True
            self.ward.connect(self.cell)
            self.ward.resume()

    def close_cell(self) -> None:
        if self.cell.up:
            self.ward.dissolve(GONE)
            self.ward.disconnect()
            assert self.cell.running == {}
            self.cell.up = False

    def check(self) -> None:
        main, cell = self.main.names, self.cell.names
        assert len(set(main + cell)) == len(main + cell), "it runs twice"
        left = {name for name, stream in self.streams.items() if not stream.ended}
        unfinished = left - self.gone
        assert len(self.home) == len(unfinished), "somebody is lost, or there twice"
        assert {*main, *cell} <= unfinished
        assert len(cell) <= 1
        if cell:
            order, there = list(self.streams), self.ward.turns.entries.values()
            # The oldest of those who are there.
            assert order.index(cell[0]) == min(order.index(name_of(each.asked)) for each in there)
        if self.home.suspects:
            assert len(main) <= 1

    def finish(self) -> None:
        """Until nothing is left to do: the cell, where there are suspects in it, and the rest."""
        for _ in range(10_000):
            if not len(self.home):
                return
            if len(self.ward):
                self.open_cell()
                self.step(self.cell)
            self.step(self.main)
            self.check()
        raise AssertionError("it never ends")


def name_of(request: Job) -> str:
    assert isinstance(request, Generate)
    assert isinstance(request.prompt, str)
    return request.prompt


async def text_of(stream: RequestStream) -> str:
    return (await stream.collect()).text


def counted(length: int) -> str:
    return "".join(f"{n} " for n in range(length))


def is_called_for(model: Model) -> bool:
    return model.ward.is_called_for


async def test_who_is_new_goes_on_beside_the_suspects() -> None:
    model = Model({"a": 30, "b": 30, "new": 5})
    old = [model.open("a"), model.open("b")]
    model.step(model.main)
    model.crash(model.main)
    assert not is_called_for(model)
    new = model.open("new")
    assert is_called_for(model)
    assert model.main.names == ["a"]
    model.open_cell()
    assert model.ward.admit() == 2
    assert not is_called_for(model)
    assert (model.main.names, model.cell.names) == (["new"], ["a"])
    for _ in range(5):
        model.step(model.main)
    assert await text_of(new) == counted(5)
    assert len(model.home) == 2
    for _ in range(CLEARED_AFTER):
        model.step(model.cell)
    # Cleared, the first goes on at home.
    assert (model.main.names, model.cell.names) == (["a"], ["b"])
    model.finish()
    assert [await text_of(each) for each in old] == [counted(30)] * 2
    assert model.convicted == []


async def test_an_inquiry_that_waits_calls_for_a_cell_too() -> None:
    model = Model({"a": 30})
    model.open("a")
    model.step(model.main)
    model.crash(model.main)
    asking = asyncio.create_task(model.home.ask(Tokenize(0, Generate(0, prompt="x"))))
    await asyncio.sleep(0)
    assert is_called_for(model)
    model.open_cell()
    model.ward.admit()
    assert model.home.turns.inquiries.sent()
    asking.cancel()
    await asyncio.wait({asking})


async def test_who_kills_the_cell_is_convicted_and_the_rest_isolated_further() -> None:
    model = Model({"bad": 30, "b": 30, "new": 50}, {"bad": 4})
    bad, good = model.open("bad"), model.open("b")
    for _ in range(5):
        model.step(model.main)
    new = model.open("new")
    model.open_cell()
    model.ward.admit()
    model.step(model.cell)
    assert (model.crashes, bad.failed, model.main.names) == (2, True, ["new"])
    assert [name_of(each) for each in model.convicted] == ["bad"]
    # No other cell is to be had: home they go, and everybody waits for them.
    model.ward.dissolve(GONE)
    assert model.main.names == ["b"]
    for _ in range(CLEARED_AFTER):
        model.step(model.main)
    assert sorted(model.main.names) == ["b", "new"]
    model.finish()
    assert (await text_of(good), await text_of(new)) == (counted(30), counted(50))


async def test_who_has_made_nothing_yet_begins_anew_in_the_cell() -> None:
    model = Model({"a": 9, "new": 3})
    old = model.open("a")
    model.crash(model.main)
    model.open("new")
    model.open_cell()
    assert model.ward.admit() == 1
    assert (model.main.names, model.cell.names) == (["new"], ["a"])
    model.finish()
    assert await text_of(old) == counted(9)


async def test_what_was_seen_and_cannot_go_on_stays_where_it_is_until_it_is_cleared() -> None:
    model = Model({"a": 30, "b": 30, "new": 3})
    old = model.open("a", may_resume=False)
    model.open("b")
    model.crash(model.main)
    model.step(model.main)
    assert (await old.next()).text == counted(1)
    model.open("new")
    model.open_cell()
    assert model.ward.admit() == 0
    assert (model.main.names, model.cell.names) == (["a"], [])
    for _ in range(CLEARED_AFTER):
        model.step(model.main)
    # It stays beside the next suspect, which can be taken away now.
    assert model.ward.admit() == 1
    assert (sorted(model.main.names), model.cell.names) == (["a", "new"], ["b"])
    model.finish()


async def test_vectors_begin_anew_in_the_cell() -> None:
    model = Model({})
    stream = model.home.open(Embed(0, inputs=["x"]), streaming=False)
    model.crash(model.main)
    model.open_cell()
    assert model.ward.admit() == 1
    assert (model.main.names, model.cell.names) == ([], ["embed"])
    stream.close()
    assert (model.cell.names, len(model.home)) == ([], 0)


async def test_tokens_before_the_move_speak_for_a_suspect() -> None:
    model = Model({"a": 30, "new": 30})
    model.open("a")
    model.crash(model.main)
    for _ in range(3):
        model.step(model.main)
    model.open("new")
    model.open_cell()
    model.ward.admit()
    # It has come further than at the crash: that this one is its doing is not certain.
    model.crash(model.cell)
    assert model.convicted == []
    model.finish()


async def test_a_death_of_the_worker_leaves_those_in_the_cell_alone() -> None:
    model = Model({"a": 30, "new": 30, "late": 3})
    streams = [model.open("a")]
    model.step(model.main)
    model.crash(model.main)
    streams.append(model.open("new"))
    model.open_cell()
    model.ward.admit()
    model.step(model.main)
    model.crash(model.main)
    assert (model.main.names, model.cell.names) == (["new"], ["a"])
    # The same cell takes who is suspected now.
    streams.append(model.open("late"))
    assert is_called_for(model)
    assert model.ward.admit() == 1
    assert (model.main.names, model.cell.names) == (["late"], ["a"])
    model.finish()
    assert [await text_of(each) for each in streams] == [counted(30), counted(30), counted(3)]


async def test_they_take_places_at_home_and_end_with_it() -> None:
    model = Model({"a": 30, "b": 30})
    streams = [model.open("a"), model.open("b")]
    model.crash(model.main)
    model.open_cell()
    model.ward.admit()
    assert (len(model.home), model.home.busy) == (2, True)
    with pytest.raises(CodedError, match="2 requests in hand"):
        model.home.open(Generate(0, prompt="c"), streaming=True, limit=2)
    model.home.fail_all(CodedError(ErrorCode.MODEL_UNLOADED, "it was unloaded"))
    assert (len(model.home), len(model.ward), model.home.busy) == (0, 0, False)
    assert all(stream.failed for stream in streams)


async def test_the_canary_of_a_cell_is_no_request_of_the_model() -> None:
    model = Model({"canary": 3})
    model.ward.connect(model.cell)
    model.ward.open(Generate(0, prompt="canary"), streaming=True, is_canary=True)
    assert (len(model.home), model.home.busy, model.cell.names) == (0, False, ["canary"])
    assert not is_called_for(model)


async def test_the_end_of_the_last_one_in_the_cell_is_when_the_model_became_idle() -> None:
    model = Model({"a": 3})
    model.open("a")
    model.crash(model.main)
    model.open_cell()
    model.ward.admit()
    before = model.home.idle_since
    model.finish()
    assert model.home.idle_since > before


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=7),
    st.integers(0, 6),
    st.integers(0, 39),
    st.lists(st.integers(0, 6), max_size=80),
)
def test_whatever_the_order_one_bad_request_costs_two_crashes_and_nobody_else_an_answer(
    lengths: list[int], bad: int, fatal_at: int, actions: list[int]
) -> None:
    async def scenario() -> None:
        names = [f"r{n}" for n in range(len(lengths))]
        poison = names[bad % len(names)]
        model = Model(dict(zip(names, lengths, strict=True)), {poison: fatal_at})
        coming = iter(names)

        def arrive() -> None:
            if (name := next(coming, None)) is not None:
                model.open(name)

        def admit() -> None:
            if model.cell.up:
                model.ward.admit()

        def step_cell() -> None:
            if model.cell.up:
                model.step(model.cell)

        def leave() -> None:
            for name, stream in list(model.streams.items())[-1:]:
                if name != poison and not stream.ended:
                    model.gone.add(name)
                    stream.close()

        acts: list[Callable[[], object]] = [
            arrive,
            lambda: model.step(model.main),
            step_cell,
            model.open_cell,
            admit,
            model.close_cell,
            leave,
        ]
        for action in actions:
            acts[action]()
            model.check()
        for _ in names:
            arrive()
        model.finish()
        strikes = fatal_at < model.lengths[poison]
        assert model.crashes == 2 * strikes
        assert len(model.convicted) == strikes
        for name, stream in model.streams.items():
            if name == poison and strikes:
                assert stream.failed
            elif name not in model.gone:
                assert await text_of(stream) == counted(model.lengths[name])

    asyncio.run(scenario())
