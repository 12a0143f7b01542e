"""The contract of ``worker.backends.base.Backend``, kept by every real backend."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.chat import ChatMessage
from protocol.errors import ErrorCode
from protocol.messages import Load, Sampling
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_vocab import CONTROL_TOKENS, MARKER_TOKENS, TURN_END, tiny_vocab
from worker.backends import create_backend
from worker.backends.base import (
    Backend,
    LoadRefused,
    NonFiniteLogits,
    PromptRefused,
    SequenceSpec,
)
from worker.chat.conversation import Conversation

SEQUENCES = 4
GREEDY = Sampling(temperature=0)
END = tiny_vocab().id_of(TURN_END)
# Two ordinary tokens for tests that weigh one against the other.
A, B = tiny_vocab().printable_ids()[:2]

Tokens = list[int]


def ignore_progress(_fraction: float) -> None:
    pass


def write_model(backend: str, path: Path, **flaws: Any) -> Path:
    """A tiny model in the backend's format."""
    if backend == "llama":
        return write_tiny_gguf(path.with_suffix(".gguf"), **flaws)
    from tests.support.tiny_mlx import write_tiny_mlx

    return write_tiny_mlx(path, **flaws)


def load(name: str, path: Path, **options: Any) -> Backend:
    backend = create_backend(name)
    backend.load(Load(str(path), max_sequences=SEQUENCES, threads=1, **options), ignore_progress)
    return backend


@pytest.fixture(scope="module", params=["llama", "mlx"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "mlx":
        pytest.importorskip("mlx.core")
    return str(request.param)


@pytest.fixture(scope="module")
def path(name: str, request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue({"llama": "tiny_gguf", "mlx": "tiny_mlx"}[name])
    return found


@pytest.fixture(scope="module")
def backend(name: str, path: Path) -> Iterator[Backend]:
    loaded = load(name, path)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def level(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A model without preferences: what is sampled is up to the sampling alone."""
    path = write_model(name, tmp_path_factory.mktemp(name) / "stuck", flaw="stuck")
    loaded = load(name, path)
    yield loaded
    loaded.close()


def spec(
    prompt: Tokens | None = None,
    *,
    sequence_id: int = 1,
    max_tokens: int = 12,
    sampling: Sampling = GREEDY,
    **options: Any,
) -> SequenceSpec:
    return SequenceSpec(sequence_id, prompt or [5, 6, 7], max_tokens, sampling, **options)


def run(backend: Backend, *specs: SequenceSpec) -> dict[int, Tokens]:
    """Admit all at once and step until all are gone."""
    for each in specs:
        backend.admit(each)
    return drain(backend, {each.sequence_id: each for each in specs})


def drain(backend: Backend, running: dict[int, SequenceSpec]) -> dict[int, Tokens]:
    answers: dict[int, Tokens] = {sequence_id: [] for sequence_id in running}
    running = dict(running)
    while running:
        step = backend.step()
        seen = [token.sequence_id for token in step]
        assert len(seen) == len(set(seen)), "two tokens for a sequence in one step"
        for sequence_id, token, is_end, *_ in step:
            answers[sequence_id].append(token)
            assert is_end or token != END
            if is_end or len(answers[sequence_id]) == running[sequence_id].max_tokens:
                del running[sequence_id]
    assert backend.step() == []
    return answers


def answer(backend: Backend, each: SequenceSpec) -> Tokens:
    return run(backend, each)[each.sequence_id]


def sampled(
    backend: Backend, prompt: Tokens | None = None, count: int = 12, **values: Any
) -> Tokens:
    return answer(backend, spec(prompt, max_tokens=count, sampling=Sampling(**values)))


# --- loading ------------------------------------------------------------------


def test_load_tells_about_the_model(name: str, path: Path) -> None:
    backend = create_backend(name)
    progress: list[float] = []
    loaded = backend.load(Load(str(path), max_sequences=2), progress.append)
    backend.close()
    assert loaded.architecture == "llama"
    assert loaded.context_length == 2048
    assert loaded.max_sequences == 2
    assert loaded.vocab_size == len(tiny_vocab())
    assert loaded.has_chat_template
    assert 3e6 < loaded.weights_bytes < 8e6
    assert progress == sorted(progress)
    assert progress[-1] == pytest.approx(1.0)


def test_context_length_is_the_one_asked_for(name: str, path: Path) -> None:
    backend = create_backend(name)
    loaded = backend.load(Load(str(path), context_length=256), ignore_progress)
    backend.close()
    assert loaded.context_length == 256


@pytest.mark.parametrize("context_length", [0, -1, 2049])
def test_context_length_beyond_the_training_is_refused(
    name: str, path: Path, context_length: int
) -> None:
    backend = create_backend(name)
    with pytest.raises(LoadRefused) as caught:
        backend.load(Load(str(path), context_length=context_length), ignore_progress)
    backend.close()
    assert caught.value.code == ErrorCode.INVALID_VALUE
    assert caught.value.param == "context_length"


def test_identity(name: str) -> None:
    backend = create_backend(name)
    assert backend.name == name
    assert backend.version[0].isdigit()
    backend.close()


# --- sequences ----------------------------------------------------------------


def test_greedy_is_deterministic(backend: Backend) -> None:
    first = answer(backend, spec())
    assert len(first) == 12
    assert answer(backend, spec()) == first
    assert answer(backend, spec([8, 9, 10])) != first


def test_max_tokens_bounds_an_answer(backend: Backend) -> None:
    assert len(answer(backend, spec(max_tokens=1))) == 1
    assert answer(backend, spec(max_tokens=3)) == answer(backend, spec(max_tokens=12))[:3]


def test_prompt_of_one_token(backend: Backend) -> None:
    assert len(answer(backend, spec([5], max_tokens=4))) == 4


def test_sequences_at_once_answer_as_alone(backend: Backend) -> None:
    specs = [
        spec([5 + i] * (3 + 40 * i), sequence_id=i, max_tokens=8 + i) for i in range(SEQUENCES)
    ]
    alone = {each.sequence_id: answer(backend, each) for each in specs}
    assert run(backend, *specs) == alone


def test_late_sequence_joins_the_running(backend: Backend) -> None:
    early, late = spec(sequence_id=1, max_tokens=20), spec([9, 8], sequence_id=2)
    alone = {each.sequence_id: answer(backend, each) for each in (early, late)}
    backend.admit(early)
    begun = [token.token for _ in range(8) for token in backend.step()]
    assert begun
    backend.admit(late)
    rest = drain(backend, {1: replace(early, max_tokens=20 - len(begun)), 2: late})
    assert {1: begun + rest[1], 2: rest[2]} == alone


def test_cancel_leaves_the_others_alone(backend: Backend) -> None:
    specs = {i: spec([5 + i, 3], sequence_id=i, max_tokens=20) for i in range(SEQUENCES)}
    alone = {i: answer(backend, each) for i, each in specs.items()}
    for each in specs.values():
        backend.admit(each)
    answers: dict[int, Tokens] = {i: [] for i in specs}
    while len(answers[3]) < 5:
        for sequence_id, token, *_ in backend.step():
            answers[sequence_id].append(token)
    backend.cancel(1)
    successor = spec([9, 8], sequence_id=77)
    backend.admit(successor)
    left = {i: replace(specs[i], max_tokens=20 - len(answers[i])) for i in (0, 2, 3)}
    rest = drain(backend, left | {77: successor})
    assert {i: answers[i] + rest[i] for i in left} == {i: alone[i] for i in left}
    assert rest[77] == answer(backend, successor)


def test_cancel_before_and_during_the_prompt(backend: Backend) -> None:
    long = spec([7] * 1500, max_tokens=4)
    backend.admit(long)
    backend.cancel(1)
    assert backend.step() == []
    backend.admit(long)
    assert backend.step() == []
    backend.cancel(1)
    assert backend.step() == []
    assert len(answer(backend, long)) == 4


def test_cancel_of_an_unknown_sequence_is_ignored(backend: Backend) -> None:
    backend.cancel(12345)
    answer(backend, spec())
    backend.cancel(1)


def test_long_prompt_comes_in_chunks_between_the_steps_of_others(backend: Backend) -> None:
    running, long = spec(sequence_id=1, max_tokens=60), spec([11] * 1500, sequence_id=2)
    backend.admit(running)
    while not backend.step():
        pass
    backend.admit(long)
    steps = [[token.sequence_id for token in backend.step()]]
    while 2 not in steps[-1]:
        steps.append([token.sequence_id for token in backend.step()])
    assert len(steps) > 3
    assert steps[:-1] == [[1]] * (len(steps) - 1)
    backend.cancel(1)
    backend.cancel(2)


def test_every_sequence_has_a_whole_context(name: str, path: Path) -> None:
    backend = load(name, path, context_length=256)
    specs = [spec([5 + i] * 200, sequence_id=i, max_tokens=56) for i in range(SEQUENCES)]
    answers = run(backend, *specs)
    backend.close()
    assert [len(answers[i]) for i in range(SEQUENCES)] == [56] * SEQUENCES


def test_nan_logits_are_found_when_asked(name: str, tmp_path: Path) -> None:
    backend = load(name, write_model(name, tmp_path / "nan", flaw="nan"))
    assert answer(backend, spec())
    with pytest.raises(NonFiniteLogits):
        answer(backend, spec(validate_logits=True))
    backend.close()


def test_finite_logits_pass_the_check(backend: Backend) -> None:
    checked = spec(validate_logits=True, ignore_eos=True)
    assert answer(backend, checked) == answer(backend, spec(ignore_eos=True))


# --- sampling -----------------------------------------------------------------


def test_seed_decides(backend: Backend) -> None:
    first = sampled(backend, temperature=2.0, seed=1)
    assert sampled(backend, temperature=2.0, seed=1) == first
    assert sampled(backend, temperature=2.0, seed=2) != first


@pytest.mark.parametrize("seed", [0, -1, 2**32 - 1, 2**40, 2**63 - 1])
def test_any_integer_is_a_seed(backend: Backend, seed: int) -> None:
    assert sampled(backend, temperature=2.0, seed=seed) == sampled(
        backend, temperature=2.0, seed=seed
    )


@pytest.mark.parametrize("temperature", [1e-310, 1e-45, 1e-40, 1e-38, 1e-8])
def test_next_to_no_temperature_is_greedy(backend: Backend, temperature: float) -> None:
    assert sampled(backend, temperature=temperature) == sampled(backend, temperature=0)


def test_no_seed_is_random(backend: Backend) -> None:
    assert sampled(backend, temperature=2.0) != sampled(backend, temperature=2.0)


def test_seeded_answer_does_not_depend_on_neighbours(backend: Backend) -> None:
    seeded = spec(sequence_id=1, sampling=Sampling(temperature=2.0, seed=5))
    alone = answer(backend, seeded)
    others = [spec(sequence_id=i, sampling=Sampling(temperature=2.0)) for i in (2, 3)]
    assert run(backend, others[0], seeded, others[1])[1] == alone


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-4}, {"top_p": 0.0}])
def test_narrow_filters_make_any_temperature_greedy(
    backend: Backend, narrow: dict[str, Any]
) -> None:
    assert sampled(backend, temperature=50.0, seed=3, **narrow) == answer(backend, spec())


def test_filters_as_wide_as_the_vocabulary_change_nothing(backend: Backend) -> None:
    wide = sampled(backend, temperature=2.0, seed=3, top_k=10**6, top_p=1.0, min_p=0.0)
    assert wide == sampled(backend, temperature=2.0, seed=3)


def test_temperature_scales_the_odds(level: Backend) -> None:
    bias = {A: 20.0 + math.log(3), B: 20.0}
    for temperature, share in ((1.0, 0.75), (0.5, 0.9)):
        drawn = sampled(level, count=400, temperature=temperature, seed=7, logit_bias=bias)
        assert set(drawn) == {A, B}
        assert drawn.count(A) / len(drawn) == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"min_p": 0.5}, {A}),
        ({"min_p": 0.2}, {A, B}),
        ({"top_p": 0.7}, {A}),
        ({"top_p": 0.8}, {A, B}),
        ({"top_k": 2}, {A, B}),
    ],
)
def test_filters_run_before_the_temperature(
    level: Backend, filters: dict[str, Any], kept: set[int]
) -> None:
    bias = {A: 20.0 + math.log(3), B: 20.0}
    drawn = sampled(level, count=40, temperature=4.0, seed=7, logit_bias=bias, **filters)
    assert set(drawn) == kept


def test_logit_bias_forces_and_forbids(backend: Backend) -> None:
    assert sampled(backend, temperature=0, logit_bias={A: 100.0}) == [A] * 12
    free = answer(backend, spec())
    forbidden = sampled(backend, temperature=0, logit_bias=dict.fromkeys(free, -100.0))
    assert not set(free) & set(forbidden)


def test_repetition_penalty_sees_prompt_and_answer(level: Backend) -> None:
    odds = {"temperature": 0, "logit_bias": {A: 5.0, B: 4.5}}
    assert sampled(level, [7, 8], 4, **odds) == [A, A, A, A]
    assert sampled(level, [7, 8], 4, repetition_penalty=2.0, **odds) == [A, B, A, A]
    assert sampled(level, [A, 8], 4, repetition_penalty=2.0, **odds) == [B, A, A, A]
    assert sampled(level, [8, A], 4, repetition_penalty=2.0, **odds) == [B, A, A, A]


def test_repetition_penalty_pushes_negative_logits_down(level: Backend) -> None:
    below = dict.fromkeys(range(len(tiny_vocab())), -50.0) | {A: -1.0, B: -1.5}
    drawn = sampled(level, [7], 3, temperature=0, logit_bias=below, repetition_penalty=2.0)
    assert drawn == [A, B, A]


def test_presence_penalty_counts_once_and_sees_the_answer_only(level: Backend) -> None:
    drawn = sampled(
        level, [A, A], 5, temperature=0, logit_bias={A: 5.0, B: 4.5}, presence_penalty=1.0
    )
    assert drawn == [A, B, A, A, A]


def test_frequency_penalty_counts_every_time_and_sees_the_answer_only(level: Backend) -> None:
    drawn = sampled(
        level, [A, A], 6, temperature=0, logit_bias={A: 5.0, B: 4.5}, frequency_penalty=1.0
    )
    assert drawn == [A, B, A, B, A, B]


def test_penalties_add_up(level: Backend) -> None:
    drawn = sampled(
        level,
        [7],
        5,
        temperature=0,
        logit_bias={A: 6.0, B: 2.5},
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
    )
    # A: 6, then 6/2 - 0.25 - 0.5n; B: 2.5, then 1.25 - 0.25 - 0.5n.
    assert drawn == [A, B, A, A, A]


def test_end_token_ends_an_answer(backend: Backend) -> None:
    ended = answer(backend, spec(sampling=Sampling(temperature=0, logit_bias={END: 100.0})))
    assert ended == [END]


def test_ignored_end_token_is_never_sampled(backend: Backend) -> None:
    eager = Sampling(temperature=1.0, seed=1, logit_bias={END: 100.0})
    drawn = answer(backend, spec(sampling=eager, ignore_eos=True, max_tokens=30))
    assert len(drawn) == 30
    assert END not in drawn


# --- text ---------------------------------------------------------------------

reserved = (*CONTROL_TOKENS, *MARKER_TOKENS)
plain_text = st.text().filter(lambda text: not any(token in text for token in reserved))


def detokenize(backend: Backend, tokens: Tokens) -> str:
    detokenizer = backend.new_detokenizer()
    return "".join([*map(detokenizer.add, tokens), detokenizer.finish()])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=plain_text)
def test_text_survives_the_tokens(backend: Backend, text: str) -> None:
    assert detokenize(backend, backend.encode_text(text)) == text


@pytest.mark.parametrize(
    "text", [" leading", "日本語のテキスト", "👩‍👩‍👧‍👦 family", "a\n\n b\t", "né́e"]
)
def test_text_comes_in_whole_characters(backend: Backend, text: str) -> None:
    detokenizer = backend.new_detokenizer()
    parts = [detokenizer.add(token) for token in backend.encode_text(text)]
    assert "".join(parts) == text
    assert detokenizer.finish() == ""


def test_cut_character_is_replaced_at_the_end(backend: Backend) -> None:
    tokens = backend.encode_text("x👩")
    assert detokenize(backend, tokens[:-1]) == "x\ufffd"


def test_special_tokens_have_no_text_and_markers_have(backend: Backend) -> None:
    tokens = backend.encode_text("<|im_start|>a<think>b<|im_end|>")
    assert detokenize(backend, tokens) == "a<think>b"


def test_chat_is_rendered_with_special_tokens_and_once(backend: Backend) -> None:
    chat = Conversation([ChatMessage("user", "Hello world")])
    tokens = backend.encode_rendered(backend.render_chat(chat))
    text = "<|im_start|>user\nHello world<|im_end|>\n<|im_start|>assistant\n"
    assert tokens == backend.encode_text(text)
    assert tokens.count(tiny_vocab().id_of("<|im_start|>")) == 2


def test_template_errors_are_the_requests_fault(name: str, tmp_path: Path) -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    backend = load(name, write_model(name, tmp_path / "strict", chat_template=source))
    with pytest.raises(PromptRefused, match="user first") as caught:
        backend.render_chat(Conversation([ChatMessage("system", "x")]))
    backend.close()
    assert caught.value.param == "messages"


def test_hostile_template_runs_no_code(name: str, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    source = f"{{{{ lipsum.__globals__['os'].mkdir('{target}') }}}}"
    backend = load(name, write_model(name, tmp_path / "hostile", chat_template=source))
    with pytest.raises(PromptRefused):
        backend.render_chat(Conversation([ChatMessage("user", "x")]))
    backend.close()
    assert not target.exists()


def test_broken_template_leaves_plain_prompts(name: str, tmp_path: Path) -> None:
    backend = load(name, write_model(name, tmp_path / "broken", chat_template="{% if %}"))
    with pytest.raises(PromptRefused):
        backend.render_chat(Conversation([ChatMessage("user", "x")]))
    assert backend.encode_text("x")
    backend.close()


def test_model_without_a_template_takes_plain_prompts_only(name: str, tmp_path: Path) -> None:
    path = write_model(name, tmp_path / "plain", chat_template=None)
    backend = create_backend(name)
    loaded = backend.load(Load(str(path)), ignore_progress)
    assert not loaded.has_chat_template
    with pytest.raises(PromptRefused, match="no chat template") as caught:
        backend.render_chat(Conversation([ChatMessage("user", "x")]))
    assert caught.value.param == "messages"
    assert backend.encode_text("x")
    backend.close()
