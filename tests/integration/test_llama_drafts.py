"""Guessed tokens change how many steps an answer takes, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.messages import Load, Sampling
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_mamba import write_tiny_mamba
from worker.backends.base import Backend, SequenceSpec

pytest.importorskip("llama_cpp")
from worker.backends.llama import LlamaBackend

GREEDY = Sampling(temperature=0)
#: It draws the same few tokens again and again.
BIASED = Sampling(temperature=1.0, seed=5, logit_bias={60: 9.0, 61: 9.0})
PENALISED = Sampling(
    temperature=1.0, seed=5, logit_bias={60: 12.0, 61: 12.0}, frequency_penalty=0.2
)
PROMPT = [60, 61, 60, 61, 60, 61, 70, 60, 61]


@contextmanager
def loaded(path: Path, draft_tokens: int) -> Iterator[Backend]:
    backend = LlamaBackend()
    options = Load(
        str(path), context_length=512, max_sequences=2, threads=1, draft_tokens=draft_tokens
    )
    backend.load(options, lambda _fraction: None)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def stuck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without preferences: what comes is up to bias, seed and penalties, exactly."""
    return write_tiny_gguf(tmp_path_factory.mktemp("drafts") / "stuck.gguf", flaw="stuck")


def spec(sampling: Sampling, max_tokens: int = 60, number: int = 1) -> SequenceSpec:
    return SequenceSpec(number, PROMPT, max_tokens, sampling, ignore_eos=True)


def answer(backend: Backend, wanted: SequenceSpec) -> tuple[list[int], int]:
    """The tokens of an answer, and how many steps they took."""
    backend.admit(wanted)
    tokens: list[int] = []
    steps = 0
    while len(tokens) < wanted.max_tokens:
        tokens += [made.token for made in backend.step()]
        steps += 1
    return tokens, steps


@pytest.mark.parametrize("sampling", [BIASED, PENALISED], ids=["biased", "penalised"])
@pytest.mark.parametrize("max_tokens", [1, 2, 59, 60])
def test_draws_are_the_same_in_fewer_steps(
    stuck: Path, sampling: Sampling, max_tokens: int
) -> None:
    with loaded(stuck, 0) as plain, loaded(stuck, 4) as drafting:
        wanted, usual = answer(plain, spec(sampling, max_tokens))
        for _ in range(3):  # also from what is kept of the first
            tokens, steps = answer(drafting, spec(sampling, max_tokens))
            assert tokens == wanted
            assert steps < usual or max_tokens < 3


def test_a_greedy_answer_is_the_same(tiny_gguf: Path) -> None:
    with loaded(tiny_gguf, 0) as plain, loaded(tiny_gguf, 6) as drafting:
        wanted, usual = answer(plain, spec(GREEDY, 200))
        tokens, steps = answer(drafting, spec(GREEDY, 200))
        assert tokens == wanted
        assert steps < usual


def test_a_second_sequence_stops_the_guessing_and_cancelling_leaves_no_trace(
    stuck: Path,
) -> None:
    with loaded(stuck, 0) as plain, loaded(stuck, 4) as drafting:
        first, second = spec(BIASED, 80, 1), spec(PENALISED, 40, 2)
        wanted = {1: answer(plain, first)[0], 2: answer(plain, second)[0]}
        tokens: dict[int, list[int]] = {1: [], 2: [], 3: []}
        drafting.admit(spec(BIASED, 100, 3))
        for _ in range(5):
            drafting.step()
        drafting.cancel(3)
        drafting.admit(first)
        for _ in range(5):
            for made in drafting.step():
                tokens[made.sequence_id].append(made.token)
        drafting.admit(second)
        while len(tokens[1]) < 80 or len(tokens[2]) < 40:
            for made in drafting.step():
                tokens[made.sequence_id].append(made.token)
        assert {1: tokens[1], 2: tokens[2]} == wanted
        assert answer(drafting, replace(first, sequence_id=4))[0] == wanted[1]


def test_a_model_whose_state_cannot_be_cut_back_does_not_guess(tmp_path: Path) -> None:
    path = write_tiny_mamba(tmp_path / "mamba.gguf")
    with loaded(path, 0) as plain, loaded(path, 4) as drafting:
        assert answer(drafting, spec(GREEDY, 40)) == answer(plain, spec(GREEDY, 40))
