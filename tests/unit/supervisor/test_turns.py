"""Whose turn it is on a worker, which is played here."""

from __future__ import annotations

import pytest

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Cancel, Generate, ToWorker
from supervisor.entries import Entry
from supervisor.line import Delivery
from supervisor.stream import RequestStream
from supervisor.turns import Turns, new_id


class Worker:
    """Has what it was sent and not told to give up."""

    def __init__(self) -> None:
        self.prompts: dict[int, str] = {}
        self.reads = True

    def __call__(self, message: ToWorker) -> Delivery:
        if not self.reads:
            return Delivery.BLOCKED
        if isinstance(message, Cancel):
            del self.prompts[message.request_id]
        else:
            assert isinstance(message, Generate)
            assert isinstance(message.prompt, str)
            self.prompts[message.request_id] = message.prompt
        return Delivery.SENT

    @property
    def has(self) -> list[str]:
        return list(self.prompts.values())


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def turns(worker: Worker) -> Turns:
    turns = Turns(max_inquiries=1)
    turns.connect(worker)
    return turns


def entry(prompt: str, at: float, *, canary: bool = False, suspect: bool = False) -> Entry:
    request = Generate(new_id(), prompt=prompt)
    stream = RequestStream(max_buffer_bytes=1000, on_close=lambda: None, keeps_tokens=True)
    number = request.request_id
    made = Entry(number, request, request, stream, canary, at, lambda entry: None)
    made.suspect = suspect
    return made


def add(turns: Turns, *entries: Entry) -> None:
    for each in entries:
        assert turns.run(each)
        turns.entries[each.id] = each


def test_only_canaries_have_a_new_worker_until_it_is_open(turns: Turns, worker: Worker) -> None:
    add(turns, entry("asked", 1), entry("canary", 2, canary=True))
    assert worker.has == ["canary"]
    turns.call_next()
    assert worker.has == ["canary", "asked"]
    turns.halt()
    add(turns, entry("late", 3))
    assert worker.has == ["canary", "asked"]


def test_suspects_have_it_alone_oldest_first_and_then_everybody(
    turns: Turns, worker: Worker
) -> None:
    younger, older = entry("younger", 2, suspect=True), entry("older", 1, suspect=True)
    add(turns, younger, older, entry("innocent", 0))
    turns.call_next()
    for turn in (older, younger):
        assert turns.current is turn
        assert turns.is_blocked
        assert worker.has == [turn.asked.prompt]  # type: ignore[union-attr]
        del turns.entries[turn.id], worker.prompts[turn.id]
        turns.ended(turn)
    assert worker.has == ["innocent"]
    assert (turns.current, turns.is_blocked, turns.flows) == (None, False, True)


def test_the_end_of_another_is_nobodys_turn(turns: Turns, worker: Worker) -> None:
    first, second = entry("first", 1, suspect=True), entry("second", 2, suspect=True)
    add(turns, first, second)
    turns.call_next()
    del turns.entries[second.id]
    turns.ended(second)
    assert (turns.current, worker.has) == (first, ["first"])


def test_one_that_is_put_aside_runs_as_another(turns: Turns, worker: Worker) -> None:
    turns.call_next()
    aside = entry("aside", 1)
    add(turns, aside)
    before = aside.id
    assert turns.put_aside(aside, anew=True)
    assert (worker.has, turns.sent(), list(turns.entries)) == ([], [], [aside.id])
    assert before != aside.id
    turns.call_next()
    assert worker.prompts == {aside.id: "aside"}


def test_suspects_who_join_go_before_those_who_run(turns: Turns, worker: Worker) -> None:
    turns.call_next()
    add(turns, entry("runs", 1))
    turns.join([entry("suspect", 2, suspect=True)])
    assert worker.has == ["suspect"]
    assert not turns.flows


async def test_whom_the_worker_does_not_take_is_refused_and_the_next_is_called(
    turns: Turns, worker: Worker
) -> None:
    suspect, other = entry("suspect", 1, suspect=True), entry("other", 2)
    add(turns, suspect, other)
    worker.reads = False
    turns.call_next()
    assert turns.entries == {}
    for each in (suspect, other):
        with pytest.raises(CodedError) as caught:
            await each.stream.next()
        assert caught.value.code is ErrorCode.RATE_LIMIT_EXCEEDED


def test_a_clear_forgets_whom_was_suspected(turns: Turns, worker: Worker) -> None:
    suspect = entry("suspect", 1, suspect=True)
    add(turns, suspect)
    turns.call_next()
    assert turns.clear() == [suspect]
    assert (turns.current, turns.entries, turns.suspects) == (None, {}, 0)
