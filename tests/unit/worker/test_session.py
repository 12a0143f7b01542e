"""Between two steps: cancellations at once, new requests within a budget."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.chat import Constraint, ConstraintKind
from protocol.messages import (
    Accepted,
    Cancel,
    Delta,
    Detokenize,
    Detokenized,
    FinishReason,
    FromWorker,
    Generate,
    Load,
    Rejected,
    Shutdown,
    Started,
    Step,
    Tokenize,
    Tokenized,
    ToWorker,
)
from worker.backends.simulated import BYTE_TOKENS, SimulatedBackend
from worker.engine import Engine
from worker.session import QUIET_S, Service
from worker.vitals import Vitals


class ScriptedLink:
    """Hands out one batch of messages between two steps, then a shutdown; keeps what is sent."""

    def __init__(self, *batches: list[ToWorker]) -> None:
        self.batches = list(batches)
        self.sent: list[FromWorker] = []
        #: How long it was listened to for news, and whether there were none.
        self.waits: list[float] = []
        self.is_quiet = False

    def send(self, message: FromWorker) -> None:
        self.sent.append(message)

    def send_frame(self, frame: bytes) -> None:
        raise NotImplementedError

    def wait(self) -> ToWorker:
        while self.batches:
            if batch := self.batches[0]:
                return batch.pop(0)
            self.batches.pop(0)
        return Shutdown()

    def has_news(self, wait_s: float) -> bool:
        self.waits.append(wait_s)
        return not self.is_quiet

    def pending(self) -> Iterator[ToWorker]:
        yield from self.batches.pop(0) if self.batches else [Shutdown()]

    def about(self, request_id: int) -> list[str]:
        """What was said about one request, in order."""
        said = []
        for message in self.sent:
            if isinstance(message, Step):
                said += [
                    "delta" if delta.finish is None else delta.finish.value
                    for delta in message.deltas
                    if delta.request_id == request_id
                ]
            elif getattr(message, "request_id", None) == request_id:
                said.append(type(message).__name__)
        return said


class Tokeniser(SimulatedBackend):
    """Takes ``cost_s`` on a clock of its own for every prompt."""

    def __init__(self, cost_s: float = 0.0) -> None:
        super().__init__()
        self.cost_s = cost_s
        self.now = 0.0

    def encode_text(self, text: str, *, add_special: bool = True) -> list[int]:
        self.now += self.cost_s
        return super().encode_text(text, add_special=add_special)


def serve(path: Path, link: ScriptedLink, cost_s: float = 0.0, max_sequences: int = 1) -> None:
    file = path / "model.sim.json"
    file.write_text(json.dumps({"tokens": ["a"], "repeat": True}))
    backend = Tokeniser(cost_s)
    load = Load(path=str(file), max_sequences=max_sequences)
    engine = Engine(backend, backend.load(load, lambda fraction: None), Vitals())
    Service(engine, link, clock=lambda: backend.now).run()


def steps_before(link: ScriptedLink, kind: type[FromWorker], request_id: int) -> int:
    """How many steps went out before the first message of a kind about a request."""
    steps = 0
    for message in link.sent:
        if isinstance(message, kind) and getattr(message, "request_id", 0) == request_id:
            return steps
        steps += isinstance(message, Step)
    raise AssertionError(f"no {kind.__name__} for request {request_id}: {link.sent}")


def test_a_request_is_accepted_then_started_then_answered(tmp_path: Path) -> None:
    link = ScriptedLink([Generate(1, prompt="xyz", max_tokens=2)], [], [])
    serve(tmp_path, link)
    assert link.sent[:2] == [Accepted(1, 3), Started(1, 0)]
    assert link.about(1) == ["Accepted", "Started", "delta", "length"]


@pytest.mark.parametrize(("is_quiet", "waits", "prepared"), [(True, 1, 1), (False, 2, 0)])
def test_what_only_may_be_needed_is_made_ready_in_a_quiet_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_quiet: bool, waits: int, prepared: int
) -> None:
    made: list[Engine] = []
    monkeypatch.setattr(Engine, "prepare", lambda engine: made.append(engine))
    first, second = (Generate(number, prompt="x", max_tokens=1) for number in (1, 2))
    link = ScriptedLink([first], [], [second], [])
    link.is_quiet = is_quiet
    serve(tmp_path, link)
    # Not before the first answer, and once.
    assert (link.waits, len(made)) == (waits * [QUIET_S], prepared)


def test_a_refusal_is_sent_and_nothing_else(tmp_path: Path) -> None:
    link = ScriptedLink([Generate(1, prompt="")], [Generate(2, prompt="x", max_tokens=1)])
    serve(tmp_path, link)
    assert isinstance(link.sent[0], Rejected)
    assert link.about(1) == ["Rejected"]
    assert link.about(2) == ["Accepted", "Started", "length"]


def test_many_that_arrive_at_once_do_not_hold_up_the_running_ones(tmp_path: Path) -> None:
    first = [Generate(1, prompt="x", client="a")]
    burst: list[ToWorker] = [Generate(2 + number, prompt="x", client="b") for number in range(5)]
    link = ScriptedLink([*first], burst, *([] for _ in range(6)))
    serve(tmp_path, link, cost_s=0.05)
    # Each takes more than the budget: one between two steps.
    assert [steps_before(link, Accepted, number) for number in range(2, 7)] == [1, 2, 3, 4, 5]


def test_cheap_ones_are_all_taken_between_two_steps(tmp_path: Path) -> None:
    burst: list[ToWorker] = [Generate(1 + number, prompt="x") for number in range(20)]
    link = ScriptedLink(burst, [])
    serve(tmp_path, link, cost_s=0.0001)
    assert {steps_before(link, Accepted, 1 + number) for number in range(20)} == {0}


def test_what_has_arrived_is_taken_in_turns_of_its_clients(tmp_path: Path) -> None:
    burst: list[ToWorker] = [Generate(1 + number, prompt="x", client="a") for number in range(4)]
    burst.append(Generate(5, prompt="x", client="b"))
    link = ScriptedLink(burst, *([] for _ in range(6)))
    serve(tmp_path, link, cost_s=0.05)
    accepted = [message.request_id for message in link.sent if isinstance(message, Accepted)]
    assert accepted == [1, 5, 2, 3, 4]


@pytest.mark.parametrize("target", [1, 2, 3])
def test_a_cancellation_holds_before_the_next_step(tmp_path: Path, target: int) -> None:
    # One runs, one waits for the slot, one is not even looked at.
    burst: list[ToWorker] = [Generate(1 + number, prompt="x") for number in range(2)]
    late: list[ToWorker] = [Generate(3, prompt="x"), Cancel(target)]
    link = ScriptedLink(burst, [], late, [], [])
    serve(tmp_path, link, cost_s=0.05)
    cancelled = Step([Delta(target, "", [], FinishReason.CANCELLED)])
    assert link.sent.count(cancelled) == 1
    at = link.sent.index(cancelled)
    assert link.about(target)[-1] == "cancelled"
    if target == 1:
        assert Started(2, 0) in link.sent[at : at + 3], "the slot is free in the next step"
    if target == 3:
        assert link.about(3) == ["cancelled"]


def test_cancelling_what_is_unknown_is_nothing(tmp_path: Path) -> None:
    link = ScriptedLink([Generate(1, prompt="x", max_tokens=1), Cancel(9)])
    serve(tmp_path, link)
    assert link.about(9) == []


def test_a_second_load_is_no_message_for_a_worker(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="one model only"):
        serve(tmp_path, ScriptedLink([Load(path="x")]))


def test_a_constraint_is_accepted_before_its_answer_starts(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    constraint = Constraint(ConstraintKind.JSON)
    request = Generate(1, prompt="xyz", max_tokens=2, constraint=constraint)
    link = ScriptedLink([request], *([] for _ in range(400)))
    serve(tmp_path, link)
    assert link.about(1) == ["Accepted", "Started", "delta", "length"]


def test_a_cancellation_reaches_a_request_whose_constraint_is_compiled(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    constraint = Constraint(ConstraintKind.REGEX, "(" * 100)
    link = ScriptedLink([Generate(1, prompt="x", constraint=constraint), Cancel(1)], [], [])
    serve(tmp_path, link)
    assert link.about(1) == ["cancelled"]


# --- inquiries ---


def test_inquiries_are_answered_beside_a_running_request(tmp_path: Path) -> None:
    asked: list[ToWorker] = [
        Tokenize(2, Generate(0, prompt="ab")),
        Tokenize(3, Generate(0, prompt="abc"), count_only=True),
        Detokenize(4, list(b"de")),
    ]
    link = ScriptedLink([Generate(1, prompt="x")], [], asked, [], [])
    serve(tmp_path, link)
    answers = [Tokenized(2, 2, [97, 98]), Tokenized(3, 3), Detokenized(4, "de")]
    assert [message for message in link.sent if message in answers] == answers
    assert link.about(1).count("delta") > 2, "it went on"


def test_an_inquiry_alone_is_answered(tmp_path: Path) -> None:
    link = ScriptedLink([Tokenize(1, Generate(0, prompt="a"))])
    serve(tmp_path, link)
    assert link.sent == [Tokenized(1, 1, [97])]


def test_inquiries_keep_to_the_budget_and_to_turns(tmp_path: Path) -> None:
    burst: list[ToWorker] = [
        Tokenize(2 + number, Generate(0, prompt="x", client="a")) for number in range(3)
    ]
    burst.append(Generate(5, prompt="x", client="b"))
    link = ScriptedLink([Generate(1, prompt="x", client="c")], [], burst, *([] for _ in range(6)))
    serve(tmp_path, link, cost_s=0.05)
    order = [
        message.request_id for message in link.sent if isinstance(message, Tokenized | Accepted)
    ]
    assert order == [1, 2, 5, 3, 4]
    assert steps_before(link, Tokenized, 4) - steps_before(link, Tokenized, 2) == 3


def test_an_inquiry_that_waits_can_be_called_off(tmp_path: Path) -> None:
    late: list[ToWorker] = [Tokenize(2, Generate(0, prompt="x")), Cancel(2)]
    link = ScriptedLink([Generate(1, prompt="x")], [], late, [])
    serve(tmp_path, link)
    assert link.about(2) == ["cancelled"]


def test_a_refused_inquiry_leaves_no_trace(tmp_path: Path) -> None:
    link = ScriptedLink([Detokenize(1, [999])], [Generate(2, prompt="x", max_tokens=1)])
    serve(tmp_path, link)
    assert link.about(1) == ["Rejected"]
    assert link.about(2) == ["Accepted", "Started", "length"]


# --- answers that go on ---


def test_answers_that_were_interrupted_together_begin_together(tmp_path: Path) -> None:
    first, *others = (
        Generate(1 + number, prompt="x", resume_tokens=[BYTE_TOKENS]) for number in range(4)
    )
    # The others come while the first is looked at, each of which takes more than the budget.
    link = ScriptedLink([first], list(others), [], [])
    serve(tmp_path, link, cost_s=0.05, max_sequences=4)
    assert {steps_before(link, Accepted, 1 + number) for number in range(4)} == {0}
    step = next(message for message in link.sent if isinstance(message, Step))
    assert [delta.request_id for delta in step.deltas] == [1, 2, 3, 4]
