"""What is said to a worker, and again if it did not read."""

from __future__ import annotations

from protocol.messages import Cancel, ToWorker
from supervisor.line import MAX_GIVEN_UP, Delivery, Line


class Worker:
    def __init__(self) -> None:
        self.delivery = Delivery.SENT
        self.heard: list[ToWorker] = []

    def __call__(self, message: ToWorker) -> Delivery:
        if self.delivery is Delivery.SENT:
            self.heard.append(message)
        return self.delivery


def test_without_a_worker_everything_is_lost() -> None:
    line = Line()
    assert (line.is_up, line.send(Cancel(1))) == (False, Delivery.LOST)
    line.give_up(1)
    line.hear_of(1)
    assert not line.is_clogged


def test_what_it_could_not_be_told_it_is_told_when_it_speaks_of_it() -> None:
    line, worker = Line(), Worker()
    line.connect(worker)
    worker.delivery = Delivery.BLOCKED
    line.give_up(7)
    worker.delivery = Delivery.SENT
    line.hear_of(8)
    assert worker.heard == []
    line.hear_of(7)
    line.hear_of(7)
    assert worker.heard == [Cancel(7)]


def test_one_that_ends_nothing_gets_no_more_until_it_does_or_another_comes() -> None:
    line, worker = Line(), Worker()
    line.connect(worker)
    for number in range(MAX_GIVEN_UP):
        assert not line.is_clogged
        line.give_up(number)
    clogged = [line.is_clogged]
    line.hear_of(0, ended=True)
    clogged.append(line.is_clogged)
    line.give_up(0)
    line.connect(Worker())
    assert [*clogged, line.is_clogged] == [True, False, False]
