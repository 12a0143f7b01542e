"""A sequence that is taken up again with its tokens goes on as if nothing had been."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.messages import Load, Sampling
from tests.support.tiny_hybrid import write_tiny_hybrid
from tests.support.tiny_mamba import write_tiny_mamba
from tests.support.tiny_vocab import tiny_vocab
from worker.backends import create_backend
from worker.backends.base import Backend, SequenceSpec, StepToken

PROMPT = tiny_vocab().printable_ids()[:40] * 2
LENGTH = 60
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "seeded": Sampling(temperature=1.0, seed=5),
    "penalised": Sampling(
        temperature=0.8, seed=5, repetition_penalty=1.1, presence_penalty=0.3, top_p=0.9
    ),
}


@pytest.fixture(
    scope="module",
    params=["llama", "llama-guessing", "llama-hybrid", "llama-mamba", "mlx", "mlx-guessing"],
)
def backend(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path
) -> Iterator[Backend]:
    kind, _, more = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    options: dict[str, Any] = {"max_sequences": 4, "threads": 1, "prompt_cache_bytes": 0}
    path = tiny_gguf
    if kind == "mlx":
        path = request.getfixturevalue("tiny_mlx")
    if more == "guessing":
        options["draft_tokens"] = 3
        if kind == "mlx":
            options["draft_path"] = str(path)
    if more == "hybrid":
        path = write_tiny_hybrid(folder / "hybrid.gguf", window=16)
    if more == "mamba":
        path = write_tiny_mamba(folder / "mamba.gguf")
    backend = create_backend(kind)
    backend.load(Load(str(path), **options), lambda _: None)
    yield backend
    backend.close()


def run(backend: Backend, *specs: SequenceSpec) -> dict[int, list[StepToken]]:
    answers: dict[int, list[StepToken]] = {spec.sequence_id: [] for spec in specs}
    for spec in specs:
        backend.admit(spec)
    left = {spec.sequence_id: spec.max_tokens for spec in specs}
    while left:
        before = backend.prefilled
        step = backend.step()
        # Each token that is computed again is progress: such a worker does not hang.
        assert step or backend.prefilled > before
        for token in step:
            answers[token.sequence_id].append(token)
            left[token.sequence_id] -= 1
            if token.is_end or not left[token.sequence_id]:
                del left[token.sequence_id]
    return answers


def first_run(number: int, sampling: Sampling, **options: Any) -> SequenceSpec:
    return SequenceSpec(number, PROMPT[number:], LENGTH, sampling, ignore_eos=True, **options)


def next_run(first: SequenceSpec, made: list[int], *, stepwise: bool = True) -> SequenceSpec:
    return SequenceSpec(
        **{name: getattr(first, name) for name in ("sequence_id", "sampling", "top_logprobs")},
        prompt=[*first.prompt, *made],
        max_tokens=first.max_tokens - len(made),
        ignore_eos=True,
        sampled=len(made),
        stepwise=len(made) if stepwise else 0,
    )


def tokens_of(answer: list[StepToken]) -> list[int]:
    return [each.token for each in answer]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("made", [1, 38])
def test_one_alone_goes_on(backend: Backend, sampling: str, made: int) -> None:
    first = first_run(1, SAMPLINGS[sampling])
    whole = tokens_of(run(backend, first)[1])
    assert len(whole) == LENGTH
    again = run(backend, next_run(first, whole[:made]))[1]
    assert tokens_of(again) == whole[made:]


def test_log_probabilities_go_on_to_the_last_digit(backend: Backend) -> None:
    first = first_run(1, SAMPLINGS["seeded"], top_logprobs=2)
    whole = run(backend, first)[1]
    again = run(backend, next_run(first, tokens_of(whole)[:20]))[1]
    assert [each.logprobs for each in again] == [each.logprobs for each in whole[20:]]


def test_several_go_on_beside_each_other(backend: Backend) -> None:
    firsts = [first_run(1 + n, sampling) for n, sampling in enumerate(SAMPLINGS.values())]
    whole = {number: tokens_of(answer) for number, answer in run(backend, *firsts).items()}
    rest = run(backend, *(next_run(each, whole[each.sequence_id][:50]) for each in firsts))
    assert {number: tokens_of(answer) for number, answer in rest.items()} == {
        number: answer[50:] for number, answer in whole.items()
    }


def test_what_is_cancelled_while_its_tokens_are_computed_leaves_no_trace(backend: Backend) -> None:
    first = first_run(1, SAMPLINGS["greedy"])
    whole = tokens_of(run(backend, first)[1])
    backend.admit(next_run(first, whole[:50]))
    for _ in range(20):
        assert not backend.step()
    backend.cancel(1)
    assert tokens_of(run(backend, first)[1]) == whole


def test_tokens_that_are_computed_at_once_are_gone_on_from_as_well(backend: Backend) -> None:
    first = first_run(1, SAMPLINGS["greedy"])
    whole = tokens_of(run(backend, first)[1])
    again = run(backend, next_run(first, whole[:40], stepwise=False))[1]
    # Where it is close, the last digits of a larger batch may turn a token, not at once.
    assert len(again) == LENGTH - 40
    assert tokens_of(again)[:3] == whole[40:43]
