"""The engine on the simulated backend: limits, stops, cancellation, slots."""

import json
from pathlib import Path

import pytest

from protocol.errors import ErrorCode
from protocol.messages import (
    Accepted,
    ChatMessage,
    Delta,
    FinishReason,
    Generate,
    Load,
    Phase,
    Rejected,
    Sampling,
)
from worker.backends.simulated import SimulatedBackend
from worker.engine import Engine
from worker.vitals import Vitals


class Rig:
    """An engine, its vitals, and a way to run it dry."""

    def __init__(self, path: Path, *, max_sequences: int = 1, **script: object) -> None:
        file = path / "model.sim.json"
        file.write_text(json.dumps(script))
        backend = SimulatedBackend()
        model = backend.load(
            Load(path=str(file), max_sequences=max_sequences), lambda fraction: None
        )
        self.vitals = Vitals()
        self.engine = Engine(backend, model, self.vitals)

    def run(self) -> dict[int, list[Delta]]:
        answers: dict[int, list[Delta]] = {}
        while not self.engine.idle:
            for delta in self.engine.step():
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
        order += [delta.request_id for delta in rig.engine.step()]
    assert order == [1, 1, 1, 2, 2, 2]


def test_one_step_moves_every_running_sequence(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_sequences=2, tokens=["a", "b"])
    for request_id in (1, 2):
        rig.engine.submit(Generate(request_id, prompt="x"))
    assert [delta.request_id for delta in rig.engine.step()] == [1, 2]


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


def test_a_prompt_that_is_being_encoded_is_work_in_hand(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    seen: list[tuple[Phase, int]] = []

    class Watched(SimulatedBackend):
        def encode_text(self, text: str) -> list[int]:
            seen.append((rig.vitals.phase, rig.vitals.in_hand))
            return super().encode_text(text)

    rig.engine._backend = Watched()
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
