"""An answer is taken up again: what was told of its tokens is not told again, all else is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.chat import Extras
from protocol.errors import ErrorCode
from protocol.messages import Accepted, Delta, FinishReason, Generate, Load, Rejected, Started
from tests.unit.worker.test_answer import END, answer
from worker.answer import Answer
from worker.backends.base import SequenceSpec, StepToken
from worker.backends.simulated import BYTE_TOKENS, SimulatedBackend
from worker.engine import Engine
from worker.vitals import Vitals

PARTS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": '),
    *('{"a": "é"}', "}", '{"name": "f"', "\n", "stop", "sto", "st", "€uro", "x", " ", "</to"),
)
TEXTS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


#: Of an answer of more tokens, all are computed at once.
EXACT = 20


def resumed(made: Sequence[int], *, max_tokens: int, **options: object) -> Answer:
    """As another worker has it, which was told what there is already."""
    again: Answer = answer(**options)  # type: ignore[arg-type]
    again.spec = SequenceSpec(1, [1, *made], max_tokens - len(made), sampled=len(made))
    assert again.replay(made)
    return again


def told(deltas: Sequence[Delta]) -> list[Delta]:
    """But for the names of calls, which are drawn."""
    return [
        msgspec.structs.replace(delta, extras=_nameless(delta.extras))
        if delta.extras is not None
        else delta
        for delta in deltas
    ]


def _nameless(extras: Extras) -> Extras:
    pieces = [
        msgspec.structs.replace(piece, id=None if piece.id is None else "call")
        for piece in extras.tool_calls
    ]
    return msgspec.structs.replace(extras, tool_calls=pieces)


@given(
    text=TEXTS,
    stops=st.sampled_from([(), ("stop",), ("stop", "€"), ("}",)]),
    tools=st.booleans(),
    think=st.sampled_from(["", "<think>"]),
    limit=st.integers(1, 120),
)
def test_an_answer_taken_up_anywhere_is_told_as_the_undisturbed_one(
    text: str, stops: tuple[str, ...], tools: bool, think: str, limit: int
) -> None:
    tokens = [*text.encode(), END]
    whole = answer(max_tokens=limit, stops=stops, tools=tools, think=think)
    deltas: list[Delta] = []
    for token in tokens:
        deltas.append(whole.add(StepToken(1, token, token == END)))
        if deltas[-1].finish is not None:
            break
    for made in range(1, len(deltas)):
        again = resumed(tokens[:made], max_tokens=limit, stops=stops, tools=tools, think=think)
        rest = [
            again.add(StepToken(1, token, token == END)) for token in tokens[made : len(deltas)]
        ]
        assert told(rest) == told(deltas[made:])


def test_tokens_that_end_an_answer_cannot_be_gone_on_from() -> None:
    again = answer(stops=("b",))
    assert not again.replay(b"ab")


# --- by the engine -----------------------------------------------------------------


def make_engine(folder: Path, *, exact_tokens: int = 1024, **script: object) -> Engine:
    path = folder / "model.sim.json"
    path.write_text(json.dumps({"tokens": ["one", " two", " three", " four"], **script}))
    backend = SimulatedBackend()
    model = backend.load(Load(path=str(path), max_sequences=2), lambda fraction: None)
    return Engine(backend, model, Vitals(), exact_tokens=exact_tokens)


def run(engine: Engine) -> tuple[list[Started], list[Delta]]:
    started: list[Started] = []
    deltas: list[Delta] = []
    while not engine.idle:
        progress = engine.step()
        started += progress.started
        deltas += progress.deltas
    return started, deltas


def scripted(count: int) -> list[int]:
    return [BYTE_TOKENS + position for position in range(count)]


@pytest.mark.parametrize("made", [1, 2, 3, 4])
def test_an_answer_goes_on_behind_its_tokens(tmp_path: Path, made: int) -> None:
    engine = make_engine(tmp_path)
    request = Generate(1, prompt="xyz", resume_tokens=scripted(made))
    assert engine.submit(request) == Accepted(1, 3)
    started, deltas = run(engine)
    assert len(started) == 1
    assert "".join(delta.text for delta in deltas) == "".join(
        ["one", " two", " three", " four"][made:]
    )
    assert sum(len(delta.tokens) for delta in deltas) == 5 - made
    assert deltas[-1].finish is FinishReason.STOP


def test_the_tokens_before_count_in_max_tokens(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, repeat=True)
    engine.submit(Generate(1, prompt="x", max_tokens=4, resume_tokens=scripted(3)))
    _, deltas = run(engine)
    assert [(delta.text, delta.finish) for delta in deltas] == [(" four", FinishReason.LENGTH)]


def test_what_was_held_back_at_the_crash_is_told_in_its_time(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    request = Generate(1, prompt="x", stop=["e two or"], resume_tokens=scripted(1))
    engine.submit(request)
    _, deltas = run(engine)
    assert "".join(delta.text for delta in deltas) == "e two three four"


def test_an_echo_is_not_told_twice(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    engine.submit(Generate(1, prompt="x", echo=True, resume_tokens=scripted(1)))
    _, deltas = run(engine)
    assert "".join(delta.text for delta in deltas) == " two three four"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Generate(1, prompt="x", max_tokens=2, resume_tokens=scripted(2)), "internal_error"),
        (Generate(1, prompt="x", stop=["two"], resume_tokens=scripted(2)), "internal_error"),
        (Generate(1, prompt="x", resume_tokens=[99_999]), "invalid_value"),
    ],
)
def test_an_answer_that_cannot_go_on_is_refused_and_leaves_no_trace(
    tmp_path: Path, request_: Generate, code: str
) -> None:
    engine = make_engine(tmp_path)
    refused = engine.submit(request_)
    assert isinstance(refused, Rejected)
    assert refused.code is ErrorCode(code)
    assert engine.idle


def test_of_a_long_answer_the_tokens_are_computed_at_once(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, repeat=True, context_length=10_000, exact_tokens=EXACT)
    admitted: list[SequenceSpec] = []
    backend = engine._backend
    admit = backend.admit

    def look(spec: SequenceSpec) -> None:
        admitted.append(spec)
        admit(spec)

    backend.admit = look  # type: ignore[method-assign]
    for number, made in enumerate((EXACT, EXACT + 1), 1):
        tokens = [BYTE_TOKENS + position % 4 for position in range(made)]
        engine.submit(Generate(number, prompt="x", max_tokens=made + 2, resume_tokens=tokens))
    _, deltas = run(engine)
    short, long = admitted
    assert (len(short.head), len(short.steps)) == (1, EXACT)
    assert (len(long.head), len(long.steps)) == (EXACT + 2, 0)
    assert [spec.sampled for spec in admitted] == [EXACT, EXACT + 1]
    assert {delta.finish for delta in deltas if delta.finish} == {FinishReason.LENGTH}
