"""A draft model changes how many steps an answer takes, and nothing else."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core")

from protocol.errors import ErrorCode
from protocol.messages import Load, Sampling
from tests.support.tiny_mlx import write_tiny_mlx
from tests.support.tiny_vocab import TURN_END, tiny_vocab
from worker.backends.base import Backend, LoadRefused, SequenceSpec, StepToken
from worker.backends.mlx import MlxBackend

GREEDY = Sampling(temperature=0)
SEEDED = Sampling(temperature=0.8, seed=7)
FILTERED = Sampling(temperature=0.9, seed=3, top_p=0.9, top_k=20, logit_bias={60: 2.0})
PENALISED = Sampling(temperature=0.8, seed=7, frequency_penalty=0.5)
ORDINARY = tiny_vocab().printable_ids()
END = tiny_vocab().id_of(TURN_END)
GUESSED = 4

Tokens = list[int]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same vocabulary: most of what it guesses is wrong."""
    path = tmp_path_factory.mktemp("drafts") / "small"
    return write_tiny_mlx(path, seed=1, hidden=64, layers=2, extra_embedding_rows=16)


@contextmanager
def loaded(path: Path, draft: Path | None = None, **options: Any) -> Iterator[Backend]:
    backend = MlxBackend()
    wanted = {"max_sequences": 4, "draft_tokens": GUESSED} | options
    if draft is not None:
        wanted["draft_path"] = str(draft)
    backend.load(Load(str(path), **wanted), lambda _: None)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def plain(tiny_mlx: Path) -> Iterator[Backend]:
    with loaded(tiny_mlx, prompt_cache_bytes=0) as backend:
        yield backend


@pytest.fixture(params=["itself", "another"])
def drafting(request: pytest.FixtureRequest, tiny_mlx: Path, small: Path) -> Iterator[Backend]:
    with loaded(tiny_mlx, tiny_mlx if request.param == "itself" else small) as backend:
        yield backend


def text(length: int, seed: int) -> Tokens:
    return random.Random(seed).choices(ORDINARY, k=length)


def spec(prompt: Tokens, max_tokens: int = 40, number: int = 1, **options: Any) -> SequenceSpec:
    values: dict[str, Any] = {"sampling": GREEDY, "ignore_eos": True} | options
    return SequenceSpec(number, prompt, max_tokens, **values)


def answer(backend: Backend, wanted: SequenceSpec) -> tuple[Tokens, int]:
    """The tokens of an answer, and how many steps had some."""
    backend.admit(wanted)
    return drain(backend, wanted.max_tokens)


def drain(backend: Backend, max_tokens: int) -> tuple[Tokens, int]:
    tokens: Tokens = []
    steps = 0
    while len(tokens) < max_tokens and END not in tokens:
        made = backend.step()
        tokens += [token.token for token in made]
        steps += bool(made)
    assert backend.step() == []
    return tokens, steps


def collect(answers: dict[int, Tokens], made: list[StepToken]) -> None:
    for token in made:
        answers[token.sequence_id].append(token.token)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, FILTERED], ids=["greedy", "seeded", "cut"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 40])
def test_an_answer_is_the_same(
    plain: Backend, drafting: Backend, sampling: Sampling, max_tokens: int
) -> None:
    for seed in range(3):
        wanted = spec(text(30, seed), max_tokens, sampling=sampling)
        assert answer(drafting, wanted)[0] == answer(plain, wanted)[0]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_right_guesses_save_steps(tiny_mlx: Path, sampling: Sampling) -> None:
    with loaded(tiny_mlx, tiny_mlx) as backend:
        _, steps = answer(backend, spec(text(30, 1), 101, sampling=sampling))
    # The first is made in the generator; all the others are guessed, or one follows 4 guesses.
    assert steps <= 1 + 20 + 2


def test_an_answer_ends_where_it_would_have(
    plain: Backend, drafting: Backend, tiny_mlx: Path
) -> None:
    """With a bias the end comes soon, amid what was guessed."""
    for seed in range(5):
        sampling = Sampling(temperature=1.0, seed=seed, logit_bias={END: 6.0})
        wanted = spec(text(20, seed), 60, sampling=sampling, ignore_eos=False)
        made, _ = answer(drafting, wanted)
        assert made == answer(plain, wanted)[0]
        assert END not in made[:-1]


def test_the_next_turn_finds_what_was_computed(plain: Backend, drafting: Backend) -> None:
    prompt = text(80, 1)
    for turn in range(3):
        wanted = spec(prompt, 20)
        drafting.admit(wanted)
        made: list[StepToken] = []
        while len(made) < 20:
            made += drafting.step()
        tokens = [token.token for token in made]
        assert tokens == answer(plain, wanted)[0]
        known = len(prompt) - 5 - 1 if turn else 0
        assert made[0].cached_tokens >= known
        assert not any(token.cached_tokens for token in made[1:])
        prompt = prompt + tokens + text(5, turn)


def test_a_long_prompt_reaches_the_draft_model_in_parts(plain: Backend, drafting: Backend) -> None:
    wanted = spec(text(900, 1), 30)
    assert answer(drafting, wanted)[0] == answer(plain, wanted)[0]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "another prompt"])
def test_a_second_request_joins_and_nothing_is_lost(
    plain: Backend, drafting: Backend, sampling: Sampling, alike: bool
) -> None:
    prompt = text(100, 1)
    first = spec(prompt, 90, 1, sampling=sampling)
    second = spec((prompt if alike else text(100, 2)) + text(9, 3), 30, 2, sampling=sampling)
    third = spec(text(12, 4), 20, 3, sampling=PENALISED)
    wanted = {each.sequence_id: answer(plain, each)[0] for each in (first, second, third)}
    for before in (0, 2, 6):
        made: dict[int, Tokens] = {1: [], 2: [], 3: []}
        drafting.admit(first)
        for _ in range(before):
            collect(made, drafting.step())
        drafting.admit(second)
        while len(made[2]) < 30:
            collect(made, drafting.step())
        # It is alone again for a while, and then it is not.
        for _ in range(3):
            collect(made, drafting.step())
        drafting.admit(third)
        while len(made[1]) < 90 or len(made[3]) < 20:
            collect(made, drafting.step())
        assert made == wanted
        assert drafting.step() == []


def test_who_is_cancelled_amid_guesses_leaves_no_trace(plain: Backend, drafting: Backend) -> None:
    prompt = text(50, 1)
    for steps in (1, 3, 6):
        drafting.admit(spec(prompt, 100, 1))
        for _ in range(steps):
            drafting.step()
        drafting.cancel(1)
        assert drafting.step() == []
        wanted = spec(prompt, 60, 2)
        assert answer(drafting, wanted)[0] == answer(plain, wanted)[0]


def test_a_request_may_arrive_and_go_before_the_next_step(
    plain: Backend, drafting: Backend
) -> None:
    wanted = spec(text(40, 1), 60)
    made: dict[int, Tokens] = {1: []}
    drafting.admit(wanted)
    for number in range(2, 7):
        collect(made, drafting.step())
        drafting.admit(spec(text(9, number), 60, number))
        drafting.cancel(number)
    assert made[1] + drain(drafting, 60 - len(made[1]))[0] == answer(plain, wanted)[0]


class _NoGuess:
    """Lets everything through, and counts."""

    def __init__(self) -> None:
        self.accepted: Tokens = []

    def allowed(self) -> bytes:
        return b"\xff" * ((len(tiny_vocab()) + 7) // 8)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize(
    "options",
    [{"sampling": PENALISED}, {"top_logprobs": 2}, {"mask": None}],
    ids=["penalties", "logprobs", "mask"],
)
def test_what_depends_on_earlier_tokens_is_not_guessed(
    tiny_mlx: Path, plain: Backend, options: dict[str, Any]
) -> None:
    masks = "mask" in options
    wanted = spec(text(30, 1), 30, **options)
    with loaded(tiny_mlx, tiny_mlx) as backend:
        expected, _ = answer(plain, replace(wanted, mask=_NoGuess() if masks else None))
        mask = _NoGuess() if masks else None
        tokens, steps = answer(backend, replace(wanted, mask=mask))
        assert (tokens, steps) == (expected, 30)
        if mask is not None:
            assert mask.accepted == tokens


def test_resumed_draws_go_on(plain: Backend, drafting: Backend) -> None:
    prompt = text(30, 1)
    whole, _ = answer(plain, spec(prompt, 40, sampling=SEEDED))
    rest = spec(prompt + whole[:15], 25, sampling=SEEDED, sampled=15)
    assert answer(drafting, rest)[0] == whole[15:]


def refused(path: Path, draft: Path) -> str:
    with pytest.raises(LoadRefused) as refusal, loaded(path, draft):
        pass
    assert (refusal.value.code, refusal.value.param) == (ErrorCode.INVALID_VALUE, "draft_model")
    return str(refusal.value)


def test_a_draft_model_that_cannot_guess_is_refused(tiny_mlx: Path, tmp_path: Path) -> None:
    other = write_tiny_mlx(tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    first, second = list(tokens)[100:102]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "vocabulary" in refused(tiny_mlx, other)

    windowed = write_tiny_mlx(tmp_path / "windowed")
    config = json.loads((windowed / "config.json").read_text())
    config |= {"sliding_window": 64, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}
    (windowed / "config.json").write_text(json.dumps(config))
    assert "cannot be cut back" in refused(tiny_mlx, windowed)
    assert "cannot be cut back" in refused(windowed, tiny_mlx)

    assert "does not exist" in refused(tiny_mlx, tmp_path / "nothing")
    (other / "model.safetensors").unlink()
    assert "no weights" in refused(tiny_mlx, other)


def test_the_draft_model_counts_in_the_weights(tiny_mlx: Path, small: Path) -> None:
    def weights(draft: Path | None) -> int:
        backend = MlxBackend()
        path = None if draft is None else str(draft)
        fractions: list[float] = []
        done = backend.load(Load(str(tiny_mlx), draft_path=path), fractions.append)
        backend.close()
        assert fractions == sorted(fractions)
        return done.weights_bytes or 0

    assert weights(small) > weights(None)
