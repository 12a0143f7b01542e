"""Blame for a worker's death where something was only asked of it."""

from __future__ import annotations

import asyncio

import pytest

from protocol.errors import CodedError, ErrorCode
from protocol.messages import (
    Delta,
    FinishReason,
    Generate,
    Inquiry,
    InquiryAnswer,
    Tokenize,
    Tokenized,
    ToWorker,
)
from supervisor.line import Delivery
from supervisor.requests import RequestTable

CRASHED = CodedError(ErrorCode.MODEL_CRASHED, "killed by SIGABRT", details={"incident_id": "i"})
POISON = Tokenize(0, Generate(0, prompt="poison"))
GOOD = Tokenize(0, Generate(0, prompt="good"))


class Model:
    """A worker that keeps what it is sent; ``die`` has the next one in its place."""

    def __init__(self) -> None:
        self.table = RequestTable(max_stream_buffer_bytes=1000)
        self.sent: list[ToWorker] = []
        self.table.connect(self)
        self.table.resume()

    def __call__(self, message: ToWorker) -> Delivery:
        self.sent.append(message)
        return Delivery.SENT

    def die(self, *, accuse: bool = True, for_good: bool = False) -> object:
        """Whom the death is to blame on."""
        convicted = self.table.convict() if accuse else None
        self.table.disconnect()
        self.sent = []
        if for_good:
            self.table.fail_all(CRASHED)
        else:
            self.table.park(CRASHED, accuse=accuse)
            self.table.connect(self)
            self.table.resume()
        return convicted

    @property
    def asked(self) -> list[object]:
        """The prompts of what it has been sent, oldest first."""
        return [
            message.generate.prompt if isinstance(message, Tokenize) else message.prompt
            for message in self.sent
            if isinstance(message, Tokenize | Generate)
        ]

    async def ask(self, inquiry: Inquiry) -> asyncio.Task[InquiryAnswer]:
        task = asyncio.create_task(self.table.ask(inquiry))
        await asyncio.sleep(0)
        return task

    def answer(self, index: int = -1) -> None:
        message = self.sent[index]
        assert isinstance(message, Tokenize)
        self.table.answer(Tokenized(message.request_id, 1))


@pytest.mark.parametrize("for_good", [False, True])
async def test_who_kills_twice_the_second_time_alone_is_convicted(for_good: bool) -> None:
    model = Model()
    task = await model.ask(POISON)
    assert model.die() is None
    assert model.die(for_good=for_good) == POISON.generate
    with pytest.raises(CodedError, match="twice") as error:
        await task
    assert error.value.code is ErrorCode.REQUEST_POISONED
    assert error.value.details == {"incident_id": "i"}


async def test_those_that_were_in_flight_are_asked_one_at_a_time_before_others() -> None:
    model = Model()
    first, second = await model.ask(GOOD), await model.ask(POISON)
    assert model.die() is None
    stream = model.table.open(Generate(0, prompt="request"), streaming=True)
    third = await model.ask(GOOD)
    assert model.asked == ["good"]
    model.answer()
    assert model.asked == ["good", "poison"]
    assert model.die() == POISON.generate
    assert isinstance(await first, Tokenized)
    with pytest.raises(CodedError, match="twice"):
        await second
    # Who came later waits for neither any more.
    assert model.asked == ["request", "good"]
    model.answer()
    assert isinstance(await third, Tokenized)
    number = model.sent[0].request_id  # type: ignore[union-attr]
    model.table.deliver([Delta(number, "a", [1], FinishReason.STOP)])
    assert (await stream.collect()).text == "a"


async def test_one_that_leaves_while_it_has_the_worker_alone_makes_way() -> None:
    model = Model()
    task, other = await model.ask(POISON), await model.ask(GOOD)
    model.die()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert model.asked == ["poison", "good"]
    model.answer()
    assert isinstance(await other, Tokenized)


async def test_nobody_is_blamed_for_a_kill_from_outside() -> None:
    model = Model()
    first, second = await model.ask(POISON), await model.ask(GOOD)
    model.die(accuse=False)
    assert model.asked == ["poison", "good"]
    model.answer(0)
    assert isinstance(await first, Tokenized)
    assert model.die() is None
    with pytest.raises(CodedError) as error:
        await second
    assert error.value.code is ErrorCode.MODEL_CRASHED


async def test_a_request_is_not_blamed_with_an_inquiry_beside_it() -> None:
    model = Model()
    model.table.open(Generate(0, prompt="request"), streaming=True)
    task = await model.ask(POISON)
    assert model.die() is None
    assert model.asked == ["request"]
    # It has died alone, and is to blame; the inquiry is not.
    assert model.die() == Generate(0, prompt="request")
    assert model.asked == ["poison"]
    model.answer()
    assert isinstance(await task, Tokenized)
