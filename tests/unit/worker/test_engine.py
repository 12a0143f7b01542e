"""The engine on the simulated backend: limits, stops, cancellation, slots."""

import json
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.chat import ChatMessage, Constraint, ConstraintKind
from protocol.errors import ErrorCode
from protocol.messages import (
    Accepted,
    Delta,
    FinishReason,
    Generate,
    Load,
    Phase,
    Prefilled,
    Priority,
    Rejected,
    Sampling,
    Started,
)
from worker.backends.base import Detokenizer, SequenceSpec, StepToken, TokenMask, TokenTable
from worker.backends.simulated import BYTE_TOKENS, SimulatedBackend
from worker.engine import TELL_PREFILL_S, Engine
from worker.vitals import Vitals


class Rig:
    """An engine, its vitals, and a way to run it dry."""

    def __init__(
        self,
        path: Path,
        backend: SimulatedBackend | None = None,
        *,
        max_sequences: int = 1,
        **script: object,
    ) -> None:
        file = path / "model.sim.json"
        file.write_text(json.dumps(script))
        backend = SimulatedBackend() if backend is None else backend
        model = backend.load(
            Load(path=str(file), max_sequences=max_sequences), lambda fraction: None
        )
        self.vitals = Vitals()
        self.engine = Engine(backend, model, self.vitals)

    def run(self) -> dict[int, list[Delta]]:
        answers: dict[int, list[Delta]] = {}
        while not self.engine.idle:
            for delta in self.engine.step().deltas:
                answers.setdefault(delta.request_id, []).append(delta)
        return answers

    def answer(self, request: Generate) -> tuple[str, FinishReason | None, int]:
        """Text, finish reason and number of tokens of one request."""
        assert isinstance(self.engine.submit(request), Accepted)
        deltas = self.run()[request.request_id]
        tokens = sum(len(delta.tokens) for delta in deltas)
        return "".join(delta.text for delta in deltas), deltas[-1].finish, tokens


def test_an_answer_ends_with_the_models_own_stop(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["one", " two"])
    assert rig.answer(Generate(1, prompt="x")) == ("one two", FinishReason.STOP, 3)


def test_max_tokens_ends_an_answer(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a", "b"], repeat=True)
    assert rig.answer(Generate(1, prompt="x", max_tokens=3)) == ("aba", FinishReason.LENGTH, 3)


def test_the_context_ends_an_answer(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a"], repeat=True, context_length=10)
    text, finish, tokens = rig.answer(Generate(1, prompt="123456", max_tokens=100))
    assert (text, finish, tokens) == ("aaaa", FinishReason.LENGTH, 4)


def test_a_stop_string_ends_an_answer_and_frees_the_slot(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["go", " on", " and", " on"], repeat=True)
    request = Generate(1, prompt="x", stop=["n an"])
    assert rig.answer(request) == ("go o", FinishReason.STOP, 3)
    assert rig.answer(Generate(2, prompt="x", max_tokens=1))[0] == "go"


def test_a_stop_string_completed_by_the_last_token_is_a_stop(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a", "b"], repeat=True)
    request = Generate(1, prompt="x", stop=["ab"], max_tokens=2)
    assert rig.answer(request) == ("", FinishReason.STOP, 2)


def test_what_was_held_back_for_a_stop_string_is_not_lost(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a", "b"])
    assert rig.answer(Generate(1, prompt="x", stop=["bc"]))[0] == "ab"


def test_requests_wait_for_a_slot_in_order(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a", "b"])
    for request_id in (1, 2):
        rig.engine.submit(Generate(request_id, prompt="x"))
    order = []
    while not rig.engine.idle:
        order += [delta.request_id for delta in rig.engine.step().deltas]
    assert order == [1, 1, 1, 2, 2, 2]


def test_a_free_slot_goes_to_the_client_that_has_none(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a"])
    for request_id in range(1, 6):
        rig.engine.submit(Generate(request_id, prompt="x", client="busy"))
    rig.engine.step()
    rig.engine.submit(Generate(6, prompt="x", client="other"))
    assert list(rig.run()) == [1, 6, 2, 3, 4, 5]


@pytest.mark.parametrize("ends", ["finish", "cancel"])
def test_what_has_ended_does_not_count_against_its_client(tmp_path: Path, ends: str) -> None:
    rig = Rig(tmp_path, tokens=["a"])
    for request_id, client in enumerate(("a", "a", "b"), 1):
        rig.engine.submit(Generate(request_id, prompt="x", client=client))
        rig.engine.step()
        if ends == "cancel":
            rig.engine.cancel(request_id)
        else:
            rig.run()
    for request_id, client in enumerate(("b", "a"), 4):
        rig.engine.submit(Generate(request_id, prompt="x", client=client))
    assert list(rig.run()) == [5, 4]


def test_a_free_slot_goes_to_the_higher_lane(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a"])
    for request_id, priority in enumerate((Priority.LOW, Priority.NORMAL, Priority.HIGH), 1):
        rig.engine.submit(Generate(request_id, prompt="x", priority=priority))
    assert list(rig.run()) == [3, 2, 1]


def test_a_request_starts_once_with_its_first_token(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a", "b"])
    rig.engine.submit(Generate(1, prompt="x"))
    started = [rig.engine.step().started for _ in range(3)]
    assert started == [[Started(1, 0)], [], []]


class Ahead(SimulatedBackend):
    """Makes several tokens for a sequence in one step, as speculative decoding does."""

    def step(self) -> list[StepToken]:
        steps = [super(Ahead, self).step() for _ in range(3)]
        first = [token._replace(cached_tokens=7) for token in steps[0]]
        return first + steps[1] + steps[2]


def test_what_was_in_the_cache_is_told_at_the_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Ahead(), tokens=["a", "b"])
    rig.engine.submit(Generate(1, prompt="x"))
    assert rig.engine.step().started == [Started(1, 7)]


def test_several_tokens_of_one_step_are_one_delta(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Ahead(), max_sequences=2, tokens=["a", "b"], repeat=True)
    for request_id in (1, 2):
        rig.engine.submit(Generate(request_id, prompt="x", max_tokens=5))
    deltas = [rig.engine.step().deltas for _ in range(2)]
    assert [[(d.request_id, d.text, len(d.tokens)) for d in step] for step in deltas] == [
        [(1, "aba", 3), (2, "aba", 3)],
        [(1, "ba", 2), (2, "ba", 2)],
    ]
    assert [delta.finish for delta in deltas[1]] == [FinishReason.LENGTH] * 2
    assert rig.engine.idle


@pytest.mark.parametrize(
    ("limits", "text", "tokens", "finish"),
    [
        ({"stop": ["b"]}, "a", 2, FinishReason.STOP),
        ({"max_tokens": 2}, "ab", 2, FinishReason.LENGTH),
        ({"stop": ["ab"], "max_tokens": 2}, "", 2, FinishReason.STOP),
    ],
)
def test_tokens_after_the_end_are_dropped(
    tmp_path: Path, limits: dict[str, Any], text: str, tokens: int, finish: FinishReason
) -> None:
    rig = Rig(tmp_path, Ahead(), tokens=["a", "b", "c"], repeat=True)
    rig.engine.submit(Generate(1, prompt="x", **limits))
    [delta] = rig.engine.step().deltas
    assert (delta.text, len(delta.tokens), delta.finish) == (text, tokens, finish)
    assert rig.engine.idle
    assert rig.answer(Generate(2, prompt="x", max_tokens=1))[0] == "a"


def test_a_token_after_the_models_own_end_is_dropped(tmp_path: Path) -> None:
    class Babbling(SimulatedBackend):
        def step(self) -> list[StepToken]:
            tokens = super().step()
            return [*tokens, *(t._replace(is_end=False, token=97) for t in tokens if t.is_end)]

    rig = Rig(tmp_path, Babbling(), tokens=["a"])
    assert rig.answer(Generate(1, prompt="x")) == ("a", FinishReason.STOP, 2)


def test_one_step_moves_every_running_sequence(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_sequences=2, tokens=["a", "b"])
    for request_id in (1, 2):
        rig.engine.submit(Generate(request_id, prompt="x"))
    assert [delta.request_id for delta in rig.engine.step().deltas] == [1, 2]


def test_cancelling_a_running_request_lets_the_next_one_in(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a"], repeat=True)
    rig.engine.submit(Generate(1, prompt="x"))
    rig.engine.submit(Generate(2, prompt="x", max_tokens=2))
    rig.engine.step()
    assert rig.engine.cancel(1) == Delta(1, "", [], FinishReason.CANCELLED)
    assert list(rig.run()) == [2]


def test_cancelling_a_waiting_request(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a"])
    rig.engine.submit(Generate(1, prompt="x"))
    rig.engine.submit(Generate(2, prompt="x"))
    assert rig.engine.cancel(2) is not None
    assert list(rig.run()) == [1]


def test_cancelling_an_unknown_request_is_nothing(tmp_path: Path) -> None:
    assert Rig(tmp_path).engine.cancel(9) is None


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (Generate(1, prompt=""), ErrorCode.INVALID_VALUE, "prompt"),
        (Generate(1, prompt=[]), ErrorCode.INVALID_VALUE, "prompt"),
        (Generate(1, prompt=[100_000]), ErrorCode.INVALID_VALUE, "prompt"),
        (Generate(1, prompt=[-1]), ErrorCode.INVALID_VALUE, "prompt"),
        (
            Generate(1, prompt="x", sampling=Sampling(logit_bias={100_000: 1.0})),
            ErrorCode.INVALID_VALUE,
            "logit_bias",
        ),
        (Generate(1, prompt="x" * 16), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "prompt"),
        (
            Generate(1, messages=[ChatMessage("user", "x" * 16)]),
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            "messages",
        ),
    ],
)
def test_a_bad_request_is_rejected_and_leaves_no_trace(
    tmp_path: Path, request_: Generate, code: ErrorCode, param: str
) -> None:
    rig = Rig(tmp_path, context_length=16)
    answer = rig.engine.submit(request_)
    assert isinstance(answer, Rejected)
    assert (answer.code, answer.param) == (code, param)
    assert rig.engine.idle


def test_vitals_tell_phase_and_progress(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a", "b"])
    rig.engine.submit(Generate(1, prompt="x"))
    rig.engine.submit(Generate(2, prompt="x"))
    assert (rig.vitals.phase, rig.vitals.in_hand) == (Phase.PREFILL, 2)
    before = rig.vitals.progress
    rig.engine.step()
    assert (rig.vitals.phase, rig.vitals.progress) == (Phase.DECODE, before + 1)
    rig.run()
    assert (rig.vitals.phase, rig.vitals.in_hand) == (Phase.IDLE, 0)


def test_each_chunk_of_a_prompt_is_progress(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tokens=["a"], prefill_chunk=2)
    rig.engine.submit(Generate(1, prompt="12345"))
    seen = []
    for _ in range(3):
        rig.engine.step()
        seen.append((rig.vitals.phase, rig.vitals.progress))
    assert seen == [(Phase.PREFILL, 1), (Phase.PREFILL, 2), (Phase.DECODE, 3)]


def test_how_far_prompts_are_is_told_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("worker.engine.time.monotonic", lambda: now)
    rig = Rig(tmp_path, tokens=["a"], repeat=True, prefill_chunk=2, max_sequences=2)
    rig.engine.submit(Generate(1, prompt="12345678"))
    told = [rig.engine.step().prefilled for _ in range(2)]
    assert told == [[Prefilled(1, 2, 8)], ()]
    now += TELL_PREFILL_S
    assert rig.engine.step().prefilled == [Prefilled(1, 6, 8)]
    now += TELL_PREFILL_S
    # Its first token says it all.
    assert not rig.engine.step().prefilled
    # What decodes is not told, while another one is.
    rig.engine.submit(Generate(2, prompt="1234"))
    assert rig.engine.step().prefilled == [Prefilled(2, 2, 4)]


def test_an_answer_under_way_takes_no_look_at_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, tokens=["a"], repeat=True)
    rig.engine.submit(Generate(1, prompt="x"))
    rig.engine.step()
    monkeypatch.delattr("worker.engine.time.monotonic")
    for _ in range(3):
        assert rig.engine.step().deltas


def test_steps_that_bring_nothing_are_no_progress_whoever_comes_and_goes(tmp_path: Path) -> None:
    class Stuck(SimulatedBackend):
        def step(self) -> list[StepToken]:
            return []

    rig = Rig(tmp_path, Stuck(), tokens=["a"])
    for request_id in range(5):
        rig.engine.submit(Generate(request_id, prompt="x"))
        rig.engine.step()
        rig.engine.cancel(request_id)
    assert rig.vitals.progress == 0


def test_taking_up_a_prompt_is_prefill_while_others_decode(tmp_path: Path) -> None:
    seen: list[Phase] = []

    class Watched(SimulatedBackend):
        def admit(self, spec: SequenceSpec) -> None:
            seen.append(rig.vitals.phase)
            super().admit(spec)

    rig = Rig(tmp_path, Watched(), max_sequences=2, tokens=["a"], repeat=True)
    rig.engine.submit(Generate(1, prompt="x"))
    rig.engine.step()
    rig.engine.submit(Generate(2, prompt="x"))
    rig.vitals.phase = Phase.DECODE
    rig.engine.step()
    assert seen == [Phase.PREFILL, Phase.PREFILL]
    assert rig.vitals.phase is Phase.DECODE


def test_a_prompt_that_is_being_encoded_is_work_in_hand(tmp_path: Path) -> None:
    seen: list[tuple[Phase, int]] = []

    class Watched(SimulatedBackend):
        def encode_text(self, text: str, *, add_special: bool = True) -> list[int]:
            seen.append((rig.vitals.phase, rig.vitals.in_hand))
            return super().encode_text(text, add_special=add_special)

    rig = Rig(tmp_path, Watched())
    rig.engine.submit(Generate(1, prompt=""))
    assert seen == [(Phase.PREFILL, 1)]
    assert (rig.vitals.phase, rig.vitals.in_hand) == (Phase.IDLE, 0)


def test_a_character_split_over_tokens_is_emitted_whole(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    snowman = list("☃".encode())
    backend = rig.engine._backend
    detokenizer = backend.new_detokenizer()
    assert [detokenizer.add(byte) for byte in snowman] == ["", "", "☃"]
    assert detokenizer.add(snowman[0]) == ""
    assert detokenizer.finish() == "\ufffd"


# --- constraints --------------------------------------------------------------

OBJECT = Constraint(ConstraintKind.JSON)


class Slow(SimulatedBackend):
    """Whose vocabulary is read when ``go`` is set, and none of whose constraints is before."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.masks: list[TokenMask | None] = []

    def vocabulary(self) -> TokenTable | None:
        assert self.go.wait(10)
        return super().vocabulary()

    def admit(self, spec: SequenceSpec) -> None:
        self.masks.append(spec.mask)
        super().admit(spec)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[Rig, Slow]]:
    pytest.importorskip("llguidance")
    backend = Slow()
    rig = Rig(tmp_path, backend, max_sequences=2, tokens=["{", "}"])
    yield rig, backend
    backend.go.set()
    rig.engine.close()


def test_a_constraint_is_compiled_while_others_are_answered(slow: tuple[Rig, Slow]) -> None:
    rig, backend = slow
    assert rig.engine.submit(Generate(1, prompt="xyz", constraint=OBJECT)) is None
    assert rig.engine.submit(Generate(2, prompt="x")) == Accepted(2, 1)
    steps = [rig.engine.step() for _ in range(3)]
    assert [[delta.request_id for delta in step.deltas] for step in steps] == [[2]] * 3
    assert not any(step.settled for step in steps)
    assert not rig.engine.idle
    backend.go.set()
    while not (step := rig.engine.step()).settled:
        assert not step.deltas
    assert list(step.settled) == [Accepted(1, 3)]
    assert step.started == [Started(1, 0)]
    assert list(rig.run()) == [1]
    assert [mask is not None for mask in backend.masks] == [False, True]


def test_work_is_in_hand_while_a_constraint_is_compiled(slow: tuple[Rig, Slow]) -> None:
    rig, backend = slow
    rig.engine.submit(Generate(1, prompt="x", constraint=OBJECT))
    assert (rig.vitals.in_hand, rig.vitals.phase) == (1, Phase.PREFILL)
    before = rig.vitals.progress
    rig.engine.step()
    assert (rig.vitals.in_hand, rig.vitals.phase) == (1, Phase.PREFILL)
    # It would be taken for stuck if it were.
    assert rig.vitals.progress == before
    backend.go.set()
    rig.run()
    assert (rig.vitals.in_hand, rig.vitals.phase) == (0, Phase.IDLE)


def test_a_constraint_that_cannot_be_enforced_is_a_refusal(slow: tuple[Rig, Slow]) -> None:
    rig, backend = slow
    backend.go.set()
    schema = Constraint(ConstraintKind.SCHEMA, '{"uniqueItems": true}')
    assert rig.engine.submit(Generate(1, prompt="x", constraint=schema)) is None
    settled: list[Accepted | Rejected] = []
    while not rig.engine.idle:
        settled += rig.engine.step().settled
    [refusal] = settled
    assert isinstance(refusal, Rejected)
    assert (refusal.code, refusal.param) == (ErrorCode.INVALID_VALUE, "response_format")
    assert "uniqueItems" in refusal.message
    assert rig.vitals.in_hand == 0


def test_cancel_while_a_constraint_is_compiled(slow: tuple[Rig, Slow]) -> None:
    rig, backend = slow
    rig.engine.submit(Generate(1, prompt="x", constraint=OBJECT))
    assert rig.engine.cancel(1) == Delta(1, "", [], FinishReason.CANCELLED)
    assert rig.engine.cancel(1) is None
    assert rig.engine.idle
    assert rig.vitals.in_hand == 0
    backend.go.set()
    assert rig.engine.submit(Generate(2, prompt="x", constraint=OBJECT)) is None
    assert list(rig.run()) == [2]


def test_the_prompt_is_looked_at_before_the_constraint(slow: tuple[Rig, Slow]) -> None:
    rig, _ = slow
    answer = rig.engine.submit(Generate(1, prompt="", constraint=OBJECT))
    assert isinstance(answer, Rejected)
    assert answer.param == "prompt"
    assert rig.engine.idle


def test_a_cancellation_in_vain_is_progress_all_the_same(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    before = rig.vitals.beat().progress
    assert rig.engine.cancel(7) is None
    assert rig.vitals.beat().progress > before


class Stumbling(SimulatedBackend):
    """Its detokenisers fail at ``at``."""

    at = "bad"

    def new_detokenizer(self, markers: Collection[str] = ()) -> Detokenizer:
        inner = super().new_detokenizer(markers)
        add = inner.add

        def stumble(token: int) -> str:
            if (text := add(token)) == self.at:
                raise RecursionError("too deep")
            return text

        inner.add = stumble  # type: ignore[method-assign]
        return inner


def test_an_answer_that_cannot_be_read_ends_alone(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Stumbling(), max_sequences=2, tokens=["a", "bad", "c"])
    for number, tokens in ((1, 5), (2, 1)):
        assert isinstance(
            rig.engine.submit(Generate(number, prompt="x", max_tokens=tokens)), Accepted
        )
    settled: list[Accepted | Rejected] = []
    finishes: dict[int, FinishReason | None] = {}
    while not rig.engine.idle:
        progress = rig.engine.step()
        settled += progress.settled
        finishes |= {delta.request_id: delta.finish for delta in progress.deltas}
    [rejected] = settled
    assert isinstance(rejected, Rejected)
    assert (rejected.request_id, rejected.code) == (1, ErrorCode.INTERNAL_ERROR)
    assert "too deep" in rejected.message
    assert finishes == {1: None, 2: FinishReason.LENGTH}
    assert rig.vitals.in_hand == 0
    # Nor does it take the worker down when it is taken up again.
    again = rig.engine.submit(Generate(3, prompt="x", resume_tokens=[BYTE_TOKENS, BYTE_TOKENS + 1]))
    assert isinstance(again, Rejected)
    assert rig.engine.idle
