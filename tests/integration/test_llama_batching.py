"""Sequences on llama.cpp share one KV cache: nobody's answer shows it."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.messages import Load, Sampling
from tests.support.tiny_gemma import write_tiny_gemma
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_hybrid import write_tiny_hybrid
from tests.support.tiny_mamba import write_tiny_mamba
from tests.support.tiny_vocab import TURN_END, tiny_vocab
from worker.backends.base import Backend, SequenceSpec, StepToken

llama_cpp = pytest.importorskip("llama_cpp")
from worker.backends import llama_keep, llama_pool  # noqa: E402
from worker.backends.llama import LlamaBackend  # noqa: E402
from worker.backends.prefixes import token_array  # noqa: E402

SEQUENCES = 4
CONTEXT = 512
VOCAB = len(tiny_vocab())
END = tiny_vocab().id_of(TURN_END)
GREEDY = Sampling(temperature=0)
SEEDED = Sampling(temperature=2.0, seed=11)
PENALISED = Sampling(
    temperature=1.5, seed=3, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.3
)

Tokens = list[int]


@contextmanager
def loaded(path: Path, **options: Any) -> Iterator[Backend]:
    backend = LlamaBackend()
    wanted = {"context_length": CONTEXT, "max_sequences": SEQUENCES, "threads": 1} | options
    backend.load(Load(str(path), **wanted), lambda _fraction: None)
    yield backend
    backend.close()


@pytest.fixture
def backend(tiny_gguf: Path) -> Iterator[Backend]:
    with loaded(tiny_gguf) as fresh:
        yield fresh


@pytest.fixture(scope="module")
def alone(tiny_gguf: Path) -> Iterator[Backend]:
    """One sequence at a time, and nothing of it is kept."""
    with loaded(tiny_gguf, max_sequences=1, prompt_cache_bytes=0) as reference:
        yield reference


class Case(NamedTuple):
    """A model, how it is sampled, and a backend that runs one sequence at a time."""

    path: Path
    sampling: Sampling
    alone: Backend


@pytest.fixture(scope="module")
def cases(
    tiny_gguf: Path, alone: Backend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Case]]:
    """Greedy on a model whose answers show what is in the cache.

    Draws and penalties on one without preferences: in another batch the logits
    differ in the last bits, which is enough to turn a draw now and then.
    """
    path = write_tiny_gguf(tmp_path_factory.mktemp("level") / "stuck.gguf", flaw="stuck")
    with loaded(path, max_sequences=1, prompt_cache_bytes=0) as level:
        yield {
            "greedy": Case(tiny_gguf, GREEDY, alone),
            "seeded": Case(path, SEEDED, level),
            "penalised": Case(path, PENALISED, level),
        }


KINDS = ["greedy", "seeded", "penalised"]


def text(length: int, seed: int) -> Tokens:
    """A prompt that has its very first token from its seed."""
    dice = random.Random(seed)
    return [50 + seed % 200, *(dice.randrange(50, 250) for _ in range(length - 1))]


def spec(prompt: Tokens, *, max_tokens: int = 8, **options: Any) -> SequenceSpec:
    values: dict[str, Any] = {"sequence_id": 1, "sampling": GREEDY, "ignore_eos": True} | options
    return SequenceSpec(prompt=prompt, max_tokens=max_tokens, **values)


def run(backend: Backend, *specs: SequenceSpec) -> dict[int, list[StepToken]]:
    """Admit all at once and step until all are gone."""
    for each in specs:
        backend.admit(each)
    return drain(backend, specs)


def drain(backend: Backend, specs: Iterable[SequenceSpec]) -> dict[int, list[StepToken]]:
    answers: dict[int, list[StepToken]] = {each.sequence_id: [] for each in specs}
    left = {each.sequence_id: each.max_tokens for each in specs}
    while left:
        for token in backend.step():
            answers[token.sequence_id].append(token)
            left[token.sequence_id] -= 1
            if token.is_end or not left[token.sequence_id]:
                del left[token.sequence_id]
    assert backend.step() == []
    return answers


def tokens(answer: Iterable[StepToken]) -> Tokens:
    return [token.token for token in answer]


def answer(backend: Backend, each: SequenceSpec) -> Tokens:
    return tokens(run(backend, each)[each.sequence_id])


def assert_as_alone(made: Tokens, alone: Backend, each: SequenceSpec) -> None:
    """``made`` is what ``each`` begins with when nothing else runs.

    A greedy answer may part from that where two tokens are as good as equally
    likely: in another batch the logits differ in their last bits, and the cells are half
    floats: by 0.015 for one of the tiny models, without anything shared.
    """
    expected = run(alone, replace(each, max_tokens=len(made), top_logprobs=2))[each.sequence_id]
    for token, known in zip(made, expected, strict=True):
        if token != known.token:
            assert each.sampling == GREEDY
            assert known.logprobs is not None
            (first, best), (second, next_best) = known.logprobs.top
            assert {token, known.token} == {first, second}
            assert best - next_best < 0.04
            return


def cached(backend: Backend, each: SequenceSpec) -> int:
    """How much of the prompt was found; told once, with the first token."""
    first, *rest = run(backend, each)[each.sequence_id]
    assert not any(token.cached_tokens for token in rest)
    return first.cached_tokens


# --- one pool for all ---------------------------------------------------------


@pytest.mark.parametrize("prompt_cache_bytes", [None, 0], ids=["restored", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_who_has_to_give_up_its_cells_answers_as_alone(
    cases: dict[str, Case], kind: str, prompt_cache_bytes: int | None
) -> None:
    path, sampling, alone = cases[kind]
    specs = [
        spec(text(40 + 9 * i, i), sequence_id=i, max_tokens=180 - 7 * i, sampling=sampling)
        for i in range(SEQUENCES)
    ]
    with loaded(path, prompt_cache_bytes=prompt_cache_bytes) as backend:
        assert sum(len(each.prompt) + each.max_tokens for each in specs) > CONTEXT
        answers = run(backend, *specs)
    for each in specs:
        assert len(answers[each.sequence_id]) == each.max_tokens
        assert_as_alone(tokens(answers[each.sequence_id]), alone, each)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_that_are_laid_in_rows_are_the_same_cells(
    cases: dict[str, Case], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sampling, alone = cases[kind]
    monkeypatch.setattr(llama_pool, "_ROW", 7)
    specs = [
        spec(text(20, 1) + text(9, i), sequence_id=i, max_tokens=60 + 9 * i, sampling=sampling)
        for i in range(SEQUENCES)
    ]
    with loaded(path) as backend:
        moved = 0
        pool = backend._scheduler._pool  # type: ignore[attr-defined]
        line_up = pool._line_up

        def spy(sequences: list[Any], count: int) -> None:
            nonlocal moved
            moved += count
            line_up(sequences, count)

        monkeypatch.setattr(pool, "_line_up", spy)
        answers = run(backend, *specs)
    assert moved > 200
    for each in specs:
        assert_as_alone(tokens(answers[each.sequence_id]), alone, each)


def test_the_oldest_goes_on_while_the_youngest_waits(backend: Backend) -> None:
    specs = [spec(text(50, i), sequence_id=i, max_tokens=300) for i in range(SEQUENCES)]
    for each in specs:
        backend.admit(each)
    order: Tokens = []
    left = {each.sequence_id: each.max_tokens for each in specs}
    preempted = set()
    while left:
        oldest = min(left)
        seen = {token.sequence_id for token in backend.step()}
        assert not seen or oldest in seen
        for i in seen:
            left[i] -= 1
            if not left[i]:
                del left[i]
                order.append(i)
        begun = {i for i, count in left.items() if count < 300}
        preempted |= begun - seen
    assert order == sorted(order)
    assert preempted == {1, 2, 3}


def test_the_pool_is_no_larger_than_one_context(tiny_gguf: Path, alone: Backend) -> None:
    with loaded(tiny_gguf, max_sequences=2) as backend:
        whole = [spec(text(CONTEXT - 2, i), sequence_id=i, max_tokens=2) for i in range(2)]
        answers = run(backend, *whole)
    for each in whole:
        assert_as_alone(tokens(answers[each.sequence_id]), alone, each)


def test_cancel_of_one_that_waits_for_room(backend: Backend, alone: Backend) -> None:
    specs = [spec(text(150, i), sequence_id=i, max_tokens=100) for i in range(SEQUENCES)]
    for each in specs:
        backend.admit(each)
    answers: dict[int, Tokens] = {i: [] for i in range(SEQUENCES)}
    for _ in range(60):
        for token in backend.step():
            answers[token.sequence_id].append(token.token)
    backend.cancel(3)
    backend.cancel(1)
    left = [replace(specs[i], max_tokens=100 - len(answers[i])) for i in (0, 2)]
    rest = drain(backend, left)
    for i in (0, 2):
        assert_as_alone(answers[i] + tokens(rest[i]), alone, specs[i])


def test_what_has_ended_makes_room_for_what_runs(backend: Backend) -> None:
    long = spec(text(100, 1), sequence_id=1, max_tokens=400)
    answers = run(backend, long, spec(text(250, 2), sequence_id=2, max_tokens=3))
    assert [len(answers[i]) for i in (1, 2)] == [400, 3]


def test_a_prompt_starts_as_soon_as_there_is_room(backend: Backend) -> None:
    specs = [
        spec(text(100, 0), sequence_id=0, max_tokens=300),
        spec(text(250, 1), sequence_id=1, max_tokens=20),
        spec(text(200, 2), sequence_id=2, max_tokens=5),
    ]
    for each in specs:
        backend.admit(each)
    order = [token.sequence_id for _ in range(60) for token in backend.step()]
    assert order.count(1) == 20
    assert order.count(2) == 5
    assert order.index(2) > len(order) - order[::-1].index(1) - 1


def test_states_without_cells_run_side_by_side(tmp_path: Path) -> None:
    """Four prompts that would not have room as cells; a state is as large after any of them."""
    specs = [spec(text(300, i), sequence_id=i, max_tokens=20) for i in range(SEQUENCES)]
    with loaded(write_tiny_mamba(tmp_path / "mamba.gguf")) as backend:
        for each in specs:
            backend.admit(each)
        assert max(len(backend.step()) for _ in range(12)) == SEQUENCES


# --- draws --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [1, 2, 17, 29])
def test_an_answer_taken_up_again_goes_on_the_same(
    cases: dict[str, Case], kind: str, done: int
) -> None:
    _, sampling, backend = cases[kind]
    prompt = text(20, 5)
    whole = answer(backend, spec(prompt, max_tokens=30, sampling=sampling))
    rest = spec(prompt + whole[:done], max_tokens=30 - done, sampling=sampling, sampled=done)
    assert answer(backend, rest) == whole[done:]


def test_a_repetition_penalty_is_told_each_token_of_a_prompt_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is all that it depends on."""
    told: Tokens = []
    accept = llama_cpp.llama_sampler_accept

    def spy(sampler: Any, token: int) -> None:
        told.append(token)
        accept(sampler, token)

    prompt = text(12, 1) * 30
    each = spec(prompt, max_tokens=40, sampling=Sampling(temperature=0, repetition_penalty=1.7))
    monkeypatch.setattr(llama_cpp, "llama_sampler_accept", spy)
    made = answer(backend, each)
    assert sorted(told) == sorted(set(prompt))
    monkeypatch.setattr("worker.backends.llama_sampling.set", list, raising=False)
    told.clear()
    assert answer(backend, each) == made
    assert told == prompt


def test_draws_at_different_positions_differ(cases: dict[str, Case]) -> None:
    hot = Sampling(temperature=9, seed=1)
    drawn = answer(cases["seeded"].alone, spec([5], max_tokens=60, sampling=hot))
    assert len(set(drawn)) > 40


# --- prefixes -----------------------------------------------------------------


def test_the_next_turn_computes_the_new_turn_only(backend: Backend, alone: Backend) -> None:
    conversation = text(60, 1)
    for turn in range(4):
        each = spec(conversation, max_tokens=10)
        first, *rest = run(backend, each)[1]
        # All but the last token of the answer before, which nobody has computed.
        assert first.cached_tokens == (len(conversation) - 5 - 1 if turn else 0)
        made = [first.token, *tokens(rest)]
        assert_as_alone(made, alone, each)
        conversation += made + text(5, turn)


def test_conversations_in_turns_keep_their_hits(backend: Backend) -> None:
    conversations = [text(50 + 10 * i, i) for i in range(5)]
    for turn in range(3):
        for conversation in conversations:
            each = spec(conversation, max_tokens=6)
            first, *rest = run(backend, each)[1]
            assert first.cached_tokens == (len(conversation) - 4 - 1 if turn else 0)
            conversation += [first.token, *tokens(rest), *text(4, turn)]


def test_requests_that_arrive_together_share_their_system_prompt(
    backend: Backend, alone: Backend
) -> None:
    system = text(200, 1)
    specs = [spec(system + text(10, 20 + i), sequence_id=i) for i in range(SEQUENCES)]
    answers = run(backend, *specs)
    assert [answers[i][0].cached_tokens for i in range(SEQUENCES)] == [0, 200, 200, 200]
    for each in specs:
        assert_as_alone(tokens(answers[each.sequence_id]), alone, each)


def test_shared_cells_are_counted_once(backend: Backend) -> None:
    """Four of 300 + 30 tokens have room at once in 512 cells."""
    system = text(300, 1)
    specs = [spec(system + text(10, 20 + i), sequence_id=i, max_tokens=20) for i in range(4)]
    for each in specs:
        backend.admit(each)
    together = max(len(backend.step()) for _ in range(10))
    assert together == SEQUENCES


def test_a_branch_leaves_the_longer_conversation_in_place(backend: Backend) -> None:
    system, long = text(40, 1), text(100, 2)
    assert cached(backend, spec(system + long)) == 0
    assert cached(backend, spec(system + text(50, 3))) == 40
    assert cached(backend, spec(system + long + [60])) == 140


def test_at_least_one_token_is_computed(backend: Backend) -> None:
    each = spec(text(30, 1), max_tokens=5)
    first = answer(backend, each)
    assert cached(backend, each) == 29
    assert answer(backend, each) == first


def test_nothing_is_kept_within_no_bytes(tiny_gguf: Path) -> None:
    with loaded(tiny_gguf, prompt_cache_bytes=0) as backend:
        assert [cached(backend, spec(text(100, 1))) for _ in range(2)] == [0, 0]


def test_the_least_recently_used_goes_first(tiny_gguf: Path) -> None:
    # 4 layers, 2 heads of keys and 2 of values, 32 half floats each: 1 KiB a token.
    with loaded(tiny_gguf, prompt_cache_bytes=150 * 1024) as backend:
        a, b, c = (spec(text(100, i), max_tokens=4) for i in range(3))
        assert [cached(backend, each) for each in (a, b)] == [0, 0]
        assert cached(backend, a) == 99  # a is the more recent one again
        assert cached(backend, c) == 0  # b makes room when c starts
        assert cached(backend, a) == 99
        assert cached(backend, b) == 0


def test_a_cancelled_prompt_leaves_what_was_computed(backend: Backend, alone: Backend) -> None:
    running, long = spec(text(9, 1), sequence_id=1, max_tokens=40), spec(text(400, 2))
    backend.admit(running)
    while not backend.step():
        pass
    backend.admit(replace(long, sequence_id=2))
    backend.step()
    backend.cancel(2)
    drain(backend, [replace(running, max_tokens=38)])
    first, *rest = run(backend, long)[1]
    assert 0 < first.cached_tokens < 399
    assert_as_alone([first.token, *tokens(rest)], alone, long)


def test_how_much_of_a_prompt_is_computed_is_known(backend: Backend) -> None:
    # So short that the speed is not known yet: the first part is a small one.
    running = spec(text(3, 1), sequence_id=1, max_tokens=40)
    backend.admit(running)
    while not backend.step():
        pass
    backend.admit(spec(text(400, 2), sequence_id=2))
    backend.admit(spec(text(400, 3), sequence_id=3))
    assert (backend.computed(2), backend.computed(3)) == (0, 0)
    seen, before = [], backend.prefilled
    while not any(token.sequence_id == 2 for token in backend.step()):
        seen.append(backend.computed(2))
        assert backend.computed(2) + backend.computed(3) == backend.prefilled - before
    assert seen == sorted(set(seen))
    assert 0 < seen[0] < seen[-1] < 400
    backend.cancel(3)


def test_cancel_before_anything_was_computed(backend: Backend, alone: Backend) -> None:
    each = spec(text(60, 1))
    backend.admit(each)
    backend.cancel(1)
    assert backend.step() == []
    assert cached(backend, each) == 0


def test_recurrent_state_is_taken_up_where_an_answer_ended(tmp_path: Path) -> None:
    path = write_tiny_mamba(tmp_path / "mamba.gguf")
    conversations = {i: text(20, i) for i in range(3)}
    with (
        loaded(path) as backend,
        loaded(path, max_sequences=1, prompt_cache_bytes=0) as alone,
    ):
        for turn in range(3):
            specs = [spec(each, sequence_id=i) for i, each in conversations.items()]
            for i, made in run(backend, *specs).items():
                known = len(conversations[i]) - 5 - 1
                assert made[0].cached_tokens == (known if turn else 0)
                assert_as_alone(tokens(made), alone, spec(conversations[i]))
                conversations[i] += tokens(made) + text(5, turn)
        # Not what is there of it, but what was taken down on the way.
        assert cached(backend, spec(conversations[0][:-8] + text(9, 7))) == 32


STATEFUL: dict[str, Callable[[Path], Path]] = {
    "recurrent": write_tiny_mamba,
    "hybrid": write_tiny_hybrid,
    "hybrid-window": partial(write_tiny_hybrid, window=32),
    "window": write_tiny_gemma,
}


class Stateful(NamedTuple):
    """A model whose sequences cannot be cut back, and a backend that keeps nothing."""

    path: Path
    alone: Backend


@pytest.fixture(scope="module", params=STATEFUL)
def stateful(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stateful]:
    path = STATEFUL[request.param](tmp_path_factory.mktemp("stateful") / "model.gguf")
    with loaded(path, max_sequences=1, prompt_cache_bytes=0) as alone:
        yield Stateful(path, alone)


def assert_found(backend: Backend, alone: Backend, prompt: Tokens, found: int) -> Tokens:
    """So much of a prompt is there, and the answer is as if nothing were."""
    first, *rest = run(backend, spec(prompt))[1]
    assert first.cached_tokens == found
    made = [first.token, *tokens(rest)]
    assert_as_alone(made, alone, spec(prompt))
    return made


def test_the_same_prompt_again_computes_its_last_token_only(stateful: Stateful) -> None:
    prompt, other = text(150, 1), text(90, 2)
    with loaded(stateful.path) as backend:
        for found in (0, 149, 149):
            assert_found(backend, stateful.alone, prompt, found)
        for found in (0, 89, 89):
            assert_found(backend, stateful.alone, other, found)
            assert_found(backend, stateful.alone, prompt, 149)


def test_a_system_prompt_is_computed_until_two_have_shown_where_it_ends(
    stateful: Stateful,
) -> None:
    system = text(120, 1)
    with loaded(stateful.path) as backend:
        assert_found(backend, stateful.alone, system + text(70, 10), 0)
        run(backend, spec(text(9, 3)))  # for which it leaves the cells
        assert_found(backend, stateful.alone, system + text(70, 11), 0)
        for number in range(12, 16):
            run(backend, spec(text(9, 3)))
            assert_found(backend, stateful.alone, system + text(70, number), 120)


def test_prompts_that_come_together_wait_for_where_they_part(stateful: Stateful) -> None:
    system = text(200, 1)
    # The first two have more in common than the others.
    endings = [[60, *text(40, 10)], [60, *text(40, 11)], text(40, 12), text(40, 13)]
    endings[1][1:30] = endings[0][1:30] = text(29, 9)
    specs = [spec(system + each, sequence_id=i) for i, each in enumerate(endings)]
    with loaded(stateful.path) as backend:
        answers = run(backend, *specs)
        assert [answers[i][0].cached_tokens for i in range(4)] == [0, 200, 200, 200]
        for each in specs:
            assert_as_alone(tokens(answers[each.sequence_id]), stateful.alone, each)


def test_a_prompt_that_comes_while_one_alike_is_computed_waits_for_it(
    stateful: Stateful,
) -> None:
    system = text(380, 1)
    first, second = (spec(system + text(9, 10 + i), sequence_id=i) for i in range(2))
    stream = spec(text(9, 5), sequence_id=2, max_tokens=60)
    with loaded(stateful.path) as backend:
        backend.admit(stream)  # so that prompts come in parts
        while not backend.step():
            pass
        backend.admit(first)
        backend.step()
        backend.admit(second)
        made: dict[int, list[StepToken]] = {0: [], 1: [], 2: []}
        while len(made[0]) < 8 or len(made[1]) < 8:
            for token in backend.step():
                made[token.sequence_id].append(token)
        assert [made[i][0].cached_tokens for i in range(2)] == [0, 380]
        for each in (first, second):
            assert_as_alone(tokens(made[each.sequence_id]), stateful.alone, each)
        backend.cancel(2)


def test_chats_in_turns_keep_their_states(stateful: Stateful) -> None:
    system = text(60, 1)
    chats = [system + text(40 + 5 * i, 10 + i) for i in range(4)]
    with loaded(stateful.path, context_length=1024) as backend:
        for turn in range(3):
            for number, chat in enumerate(chats):
                made = run(backend, spec(chat))[1]
                least = len(chat) - 41 if turn else 60 * (number > 1)
                assert made[0].cached_tokens >= least
                assert_as_alone(tokens(made), stateful.alone, spec(chat))
                chats[number] = chat + tokens(made) + text(40, turn)
        # The last message of the first one is written anew.
        edited = chats[0][:-80]
        assert cached(backend, spec(edited + text(50, 33))) >= len(edited) - 60


def test_states_are_bounded(stateful: Stateful) -> None:
    with loaded(stateful.path, prompt_cache_bytes=100_000) as backend:
        pool = backend._scheduler._pool  # type: ignore[attr-defined]
        for number in range(12):
            run(backend, *(spec(text(90, number % 5 + i), sequence_id=i) for i in range(3)))
            assert pool.nbytes <= 100_000


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("window") / "gemma.gguf")


def test_a_copy_has_no_more_than_the_window_and_is_not_cut(windowed: Path) -> None:
    early, other = text(100, 1), spec(text(9, 2))
    with (
        loaded(windowed) as backend,
        loaded(windowed, max_sequences=1, prompt_cache_bytes=0) as alone,
    ):
        kept = early + answer(backend, spec(early))
        run(backend, other)  # for which it leaves the cells
        for prompt, found in ((early[:60] + text(5, 3), 0), (kept + text(5, 4), len(kept) - 1)):
            first, *rest = run(backend, spec(prompt))[1]
            assert first.cached_tokens == found
            assert_as_alone([first.token, *tokens(rest)], alone, spec(prompt))
            run(backend, other)


def test_what_a_window_has_slid_past_is_not_waited_for(windowed: Path) -> None:
    shared = text(100, 1)
    with loaded(windowed, prompt_cache_bytes=0) as backend:
        backend.admit(spec(shared, sequence_id=1, max_tokens=400))
        for _ in range(200):
            backend.step()
        pool = backend._scheduler._pool  # type: ignore[attr-defined]
        alike = token_array([*shared, 50])
        for number in range(10):  # others take the cells that it no longer sees
            if not pool.find(alike).length:
                break
            backend.admit(spec(text(90, 5 + number), sequence_id=2, max_tokens=2))
            for _ in range(6):
                backend.step()
        assert not pool.find(alike).length
        backend.admit(spec([*shared, 50], sequence_id=3, max_tokens=1))
        assert {token.sequence_id for _ in range(3) for token in backend.step()} == {1, 3}


# --- how long a stream pauses -------------------------------------------------


def test_who_comes_back_computes_no_more_at_once_than_a_stream_may_pause(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine takes it for decoding, which has less time for a step than prefill has."""
    sizes: Tokens = []
    decode = llama_cpp.llama_decode

    def spy(context: Any, batch: Any) -> int:
        sizes.append(batch.n_tokens)
        return int(decode(context, batch))

    with loaded(tiny_gguf, context_length=1024, prompt_cache_bytes=0) as backend:
        specs = [spec(text(300, i), sequence_id=i, max_tokens=500) for i in range(2)]
        for each in specs:
            backend.admit(each)
        answers: dict[int, Tokens] = {0: [], 1: []}
        while not all(answers.values()):
            for token in backend.step():
                answers[token.sequence_id].append(token.token)
        monkeypatch.setattr(llama_cpp, "llama_decode", spy)
        left = [replace(each, max_tokens=500 - len(answers[each.sequence_id])) for each in specs]
        drain(backend, left)
    assert 64 <= max(sizes) <= 256


@pytest.mark.parametrize(
    ("seconds", "chunk"),
    [(0.0, 256), (0.25, 64), (3600.0, 16)],
    ids=["fast", "slow", "hardly moving"],
)
def test_prompts_come_in_chunks_that_fit_the_pause(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, seconds: float, chunk: int
) -> None:
    """On a clock that moves on by so much whenever somebody looks at it."""
    clock = count(0.0, seconds or 1e-9)
    monkeypatch.setattr("worker.backends.llama_scheduler.time.perf_counter", lambda: next(clock))
    for seed in (1, 2):  # the first is what it learns from
        running = spec(text(9, 9), sequence_id=1, max_tokens=40)
        backend.admit(running)
        while not backend.step():
            pass
        backend.admit(spec(text(450, seed), sequence_id=2))
        steps = 1
        while 2 not in {token.sequence_id for token in backend.step()}:
            steps += 1
        backend.cancel(1)
        backend.cancel(2)
    assert steps == math.ceil(450 / chunk)


# --- masks and log probabilities ----------------------------------------------


class Only:
    """Allows one set of tokens per position, then nothing."""

    def __init__(self, *steps: Sequence[int], size: int = VOCAB) -> None:
        self.steps = [set(step) for step in steps]
        self.size = size
        self.accepted: Tokens = []

    def allowed(self) -> bytes:
        bits = bytearray((self.size + 7) // 8)
        if len(self.accepted) < len(self.steps):
            for token in self.steps[len(self.accepted)]:
                bits[token // 8] |= 1 << token % 8
        return bytes(bits)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "pen"])
def test_a_mask_limits_every_token(backend: Backend, sampling: Sampling) -> None:
    steps = [[70 + i, 99, 130 + i] for i in range(12)]
    mask = Only(*steps)
    masked = spec(text(20, 1), sequence_id=1, max_tokens=12, sampling=sampling, mask=mask)
    # Greedy: in another batch the logits differ enough to turn a draw now and then.
    free = spec(text(20, 2), sequence_id=2, max_tokens=12)
    unmasked = answer(backend, free)
    answers = run(backend, masked, free)
    drawn = tokens(answers[1])
    assert all(token in step for token, step in zip(drawn, steps, strict=True))
    assert mask.accepted == drawn
    assert tokens(answers[2]) == unmasked


def test_a_mask_shorter_than_the_vocabulary_allows_nothing_beyond_it(backend: Backend) -> None:
    mask = Only([60, 61], size=64)
    assert answer(backend, spec([5, 6], max_tokens=1, mask=mask))[0] in {60, 61}


def test_a_mask_that_allows_nothing_ends_the_answer(backend: Backend) -> None:
    mask = Only([70], [71])
    made = run(backend, spec([5, 6], mask=mask))[1]
    assert [(token.token, token.is_end) for token in made] == [
        (70, False),
        (71, False),
        (END, True),
    ]
    assert mask.accepted == [70, 71]
    # The only way on is the one that the request rules out.
    assert answer(backend, spec([5, 6], mask=Only([70], [END]))) == [70, END]


def test_log_probabilities_are_those_of_the_whole_vocabulary(backend: Backend) -> None:
    made = run(backend, spec([5, 6], max_tokens=5, sampling=SEEDED, top_logprobs=VOCAB))[1]
    for token in made:
        assert token.logprobs is not None
        ids, values = zip(*token.logprobs.top, strict=True)
        assert sorted(ids) == list(range(VOCAB))
        assert list(values) == sorted(values, reverse=True)
        assert math.fsum(map(math.exp, values)) == pytest.approx(1, abs=1e-5)
        assert dict(token.logprobs.top)[token.token] == token.logprobs.logprob


def test_log_probabilities_know_nothing_of_the_sampling(backend: Backend) -> None:
    plain = run(backend, spec([5, 6], max_tokens=1, top_logprobs=3))[1][0]
    assert plain.logprobs is not None
    assert len(plain.logprobs.top) == 3
    assert plain.logprobs.top[0] == (plain.token, plain.logprobs.logprob)
    bent = Sampling(temperature=3.0, seed=1, top_k=5, logit_bias={70: 100.0})
    forced = run(backend, spec([5, 6], max_tokens=1, sampling=bent, top_logprobs=3))[1][0]
    assert forced.token == 70
    assert forced.logprobs is not None
    assert dict(forced.logprobs.top) == pytest.approx(dict(plain.logprobs.top))
    assert forced.logprobs.logprob < plain.logprobs.top[-1][1]


def test_no_likeliest_but_the_one_sampled(backend: Backend) -> None:
    made = run(backend, spec([5, 6], max_tokens=1, top_logprobs=0), spec([7], sequence_id=2))
    assert made[1][0].logprobs is not None
    assert made[1][0].logprobs.top == []
    assert made[1][0].logprobs.logprob < 0
    assert made[2][0].logprobs is None


# --- any order of things ------------------------------------------------------

BEGINNINGS = [text(100, 1), text(100, 1)[:60] + text(80, 2), text(30, 3)]
prompts = st.builds(
    lambda beginning, cut, ending: beginning[:cut] + ending,
    st.sampled_from(BEGINNINGS),
    st.integers(1, 140),
    st.lists(st.integers(50, 60), max_size=60),
)
requests = st.builds(
    lambda prompt, count: spec(prompt, max_tokens=count), prompts, st.integers(1, 120)
)
acts = st.one_of(requests, st.integers(1, 40), st.sampled_from(["cancel first", "cancel last"]))


any_order = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
schedules = st.lists(acts, max_size=20)
bounds = st.sampled_from([None, 0, 150 * 1024])
#: What is copied to host memory in one step.
sizes = st.sampled_from([llama_keep.PART_BYTES, 20 * 1024])


@any_order
@given(kind=st.sampled_from(KINDS), schedule=schedules, keep=bounds, part_bytes=sizes)
def test_in_any_schedule_each_answers_as_alone(
    cases: dict[str, Case], kind: str, schedule: list[Any], keep: int | None, part_bytes: int
) -> None:
    row = llama_pool._ROW if part_bytes == llama_keep.PART_BYTES else 5
    with (
        patch.object(llama_keep, "PART_BYTES", part_bytes),
        patch.object(llama_pool, "_ROW", row),
    ):
        assert_each_as_alone(cases[kind], schedule, keep)


@any_order
@given(schedule=schedules, keep=bounds)
def test_in_any_schedule_each_answers_as_alone_with_a_state(
    stateful: Stateful, schedule: list[Any], keep: int | None
) -> None:
    assert_each_as_alone(Case(stateful.path, GREEDY, stateful.alone), schedule, keep)


def assert_each_as_alone(case: Case, schedule: list[Any], keep: int | None) -> None:
    path, sampling, alone = case
    answers: dict[int, Tokens] = {}
    admitted: dict[int, SequenceSpec] = {}
    running: list[int] = []

    def collect(progress: list[StepToken]) -> None:
        for token in progress:
            made = answers[token.sequence_id]
            made.append(token.token)
            if len(made) == admitted[token.sequence_id].max_tokens:
                running.remove(token.sequence_id)

    with loaded(path, prompt_cache_bytes=keep) as backend:
        for number, act in enumerate(schedule):
            if isinstance(act, SequenceSpec):
                while len(running) == SEQUENCES:
                    collect(backend.step())
                admitted[number] = replace(act, sequence_id=number, sampling=sampling)
                answers[number] = []
                running.append(number)
                backend.admit(admitted[number])
            elif isinstance(act, int):
                for _ in range(act):
                    collect(backend.step())
            elif running:
                backend.cancel(running.pop(0 if act == "cancel first" else -1))
        steps = 0
        while running:
            collect(backend.step())
            steps += 1
            assert steps < 1000, "no progress"
    for number, each in admitted.items():
        made = answers[number]
        if made:
            assert_as_alone(made, alone, each)
