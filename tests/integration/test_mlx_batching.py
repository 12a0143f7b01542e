"""What the mlx backend makes of many sequences: shared prefixes, draws, masks, logprobs."""

import json
import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import generation_stream  # noqa: E402

from protocol.messages import Load, Sampling  # noqa: E402
from tests.support.tiny_mlx import write_tiny_mlx  # noqa: E402
from tests.support.tiny_vocab import TURN_END, tiny_vocab  # noqa: E402
from worker.backends.base import Backend, SequenceSpec, StepToken  # noqa: E402
from worker.backends.mlx import MlxBackend  # noqa: E402
from worker.backends.mlx_batch import (  # noqa: E402
    PREFILL_CHUNK,
    SHARED_PREFILL,
    WORTH_SHARING,
    SequenceBatch,
)
from worker.backends.prefill_pace import FEWEST_TOKENS, PrefillPace  # noqa: E402

Tokens = list[int]
Answers = dict[int, list[StepToken]]

SEQUENCES = 4
GREEDY = Sampling(temperature=0)
VOCABULARY = len(tiny_vocab())
ORDINARY = tiny_vocab().printable_ids()
END = tiny_vocab().id_of(TURN_END)
WINDOW = 96
#: Of the tiny model: keys and values of 4 layers with 2 heads of 32 float32.
BYTES_PER_TOKEN = 2 * 4 * 2 * 32 * 4
PLENTY = 1 << 30


def text(length: int, seed: int = 0) -> Tokens:
    """Tokens that no text of another seed begins with."""
    return random.Random(seed).choices(ORDINARY, k=length)


def spec(prompt: Tokens, sequence_id: int = 1, max_tokens: int = 8, **options: Any) -> SequenceSpec:
    defaults: dict[str, Any] = {"sampling": GREEDY, "ignore_eos": True}
    return SequenceSpec(sequence_id, prompt, max_tokens, **(defaults | options))


@contextmanager
def loaded(path: Path, prompt_cache_bytes: int | None = PLENTY) -> Iterator[Backend]:
    backend = MlxBackend()
    options = Load(str(path), max_sequences=SEQUENCES, prompt_cache_bytes=prompt_cache_bytes)
    backend.load(options, lambda _: None)
    yield backend
    backend.close()


@pytest.fixture(autouse=True)
def pace(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine that is known to be fast enough for the largest chunks; undo it for another."""
    with monkeypatch.context() as fast:
        fast.setattr(PrefillPace, "fitting", lambda *_: 1_000_000)
        yield fast


@pytest.fixture
def backend(tiny_mlx: Path) -> Iterator[Backend]:
    with loaded(tiny_mlx) as backend:
        yield backend


@pytest.fixture(scope="module")
def plain(tiny_mlx: Path) -> Iterator[Backend]:
    """The same model, which keeps nothing."""
    with loaded(tiny_mlx, prompt_cache_bytes=0) as backend:
        yield backend


@pytest.fixture(scope="module")
def windowed_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers, but one, see the last 96 tokens only: what they forgot is gone."""
    path = write_tiny_mlx(tmp_path_factory.mktemp("models") / "windowed")
    config = json.loads((path / "config.json").read_text())
    config["sliding_window"] = WINDOW
    config["layer_types"] = ["sliding_attention"] * 3 + ["full_attention"]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def windowed(windowed_path: Path) -> Iterator[Backend]:
    with loaded(windowed_path) as backend:
        yield backend


@pytest.fixture(scope="module")
def windowed_plain(windowed_path: Path) -> Iterator[Backend]:
    with loaded(windowed_path, prompt_cache_bytes=0) as backend:
        yield backend


def run(backend: Backend, *specs: SequenceSpec) -> Answers:
    for each in specs:
        backend.admit(each)
    return drain(backend, [each.sequence_id for each in specs], specs)


def drain(backend: Backend, running: Iterable[int], specs: Iterable[SequenceSpec]) -> Answers:
    lengths = {each.sequence_id: each.max_tokens for each in specs}
    answers: Answers = {sequence_id: [] for sequence_id in running}
    left = set(answers)
    while left:
        for token in backend.step():
            answer = answers[token.sequence_id]
            answer.append(token)
            if token.is_end or len(answer) == lengths[token.sequence_id]:
                left.remove(token.sequence_id)
    assert backend.step() == []
    return answers


def tokens_of(answer: Iterable[StepToken]) -> Tokens:
    return [token.token for token in answer]


def answer(backend: Backend, each: SequenceSpec) -> Tokens:
    return tokens_of(run(backend, each)[each.sequence_id])


def cached(backend: Backend, prompt: Tokens, reference: Backend) -> int:
    """Tokens found of a prompt, whose answer must be that of a backend which keeps nothing."""
    each = spec(prompt)
    (steps,) = run(backend, each).values()
    assert tokens_of(steps) == answer(reference, each)
    assert [step.cached_tokens for step in steps[1:]] == [0] * (len(steps) - 1)
    return steps[0].cached_tokens


# --- prefixes: one after the other -----------------------------------------------


def test_first_prompt_finds_nothing(backend: Backend, plain: Backend) -> None:
    assert cached(backend, text(300), plain) == 0


def test_next_turn_computes_only_what_is_new(backend: Backend, plain: Backend) -> None:
    conversation = text(300)
    for turn in range(1, 4):
        conversation += answer(backend, spec(conversation))
        following = conversation + text(20, seed=turn)
        assert cached(backend, following, plain) == len(conversation)
        conversation = following


def test_same_prompt_again_computes_its_last_token(backend: Backend, plain: Backend) -> None:
    cached(backend, text(300), plain)
    assert cached(backend, text(300), plain) == 299
    assert cached(backend, text(300)[:100], plain) == 99


def test_shared_beginning_is_cut_out_of_a_longer_one(backend: Backend, plain: Backend) -> None:
    system = text(200)
    assert cached(backend, system + text(50, 1), plain) == 0
    assert cached(backend, system + text(50, 2), plain) == 200
    assert cached(backend, system + text(50, 3), plain) == 200
    # The one that was cut is still whole.
    assert cached(backend, system + text(50, 1) + text(9, 4), plain) == 250


def test_interleaved_conversations_keep_their_hits(backend: Backend, plain: Backend) -> None:
    conversations = [text(100 + 10 * i, seed=i) for i in range(4)]
    for turn in range(3):
        for i, conversation in enumerate(conversations):
            found = cached(backend, conversation, plain)
            # Of the last answer, the reference's too, only the end token was not kept.
            assert found == (0 if turn == 0 else len(conversation) - 20)
            following = conversation + answer(plain, spec(conversation))
            conversations[i] = following + text(20, seed=100 * turn + i + 50)


def test_nothing_is_kept_when_told_so(plain: Backend) -> None:
    for _ in range(2):
        assert cached(plain, text(300), plain) == 0
    together = run(plain, *(spec(text(300), i) for i in range(3)))
    assert [steps[0].cached_tokens for steps in together.values()] == [0] * 3


def test_default_keeps_some(tiny_mlx: Path, plain: Backend) -> None:
    with loaded(tiny_mlx, prompt_cache_bytes=None) as backend:
        cached(backend, text(300), plain)
        assert cached(backend, text(300), plain) == 299


def test_what_was_used_last_stays_within_the_bound(tiny_mlx: Path, plain: Backend) -> None:
    prompts = [text(200, seed=i) for i in range(4)]
    with loaded(tiny_mlx, prompt_cache_bytes=3 * 210 * BYTES_PER_TOKEN) as backend:
        for prompt in prompts[:3]:
            assert cached(backend, prompt, plain) == 0
        assert cached(backend, prompts[0], plain) == 199
        assert cached(backend, prompts[3], plain) == 0  # drives out the second
        assert [cached(backend, prompts[i], plain) for i in (0, 2, 3)] == [199] * 3
        assert cached(backend, prompts[1], plain) == 0


def test_one_that_exceeds_the_bound_drives_nothing_out(tiny_mlx: Path, plain: Backend) -> None:
    with loaded(tiny_mlx, prompt_cache_bytes=300 * BYTES_PER_TOKEN) as backend:
        cached(backend, text(200), plain)
        cached(backend, text(400, seed=1), plain)
        assert cached(backend, text(400, seed=1), plain) == 0
        assert cached(backend, text(200), plain) == 199


def memory_in_use() -> int:
    mx.synchronize(generation_stream)  # the step that runs ahead holds some
    return int(mx.get_active_memory())


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_memory_in_use_stays_within_the_bound(tiny_mlx: Path, kept: int) -> None:
    bound = kept * 310 * BYTES_PER_TOKEN
    with loaded(tiny_mlx, prompt_cache_bytes=bound) as backend:
        answer(backend, spec(text(5)))
        before = memory_in_use()
        for i in range(kept + 3):
            answer(backend, spec(text(300, seed=i)))
        grown = memory_in_use() - before
    slack = 60 * BYTES_PER_TOKEN
    assert kept * 300 * BYTES_PER_TOKEN - slack < grown < bound + slack


# --- prefixes: at the same time ----------------------------------------------------


def test_prompts_that_arrive_together_compute_what_they_share_once(
    backend: Backend, plain: Backend
) -> None:
    system = text(600)
    specs = [spec(system + text(30 + i, seed=i), i) for i in range(1, SEQUENCES + 1)]
    alone = {each.sequence_id: answer(plain, each) for each in specs}
    together = run(backend, *specs)
    assert {i: tokens_of(steps) for i, steps in together.items()} == alone
    assert [steps[0].cached_tokens for steps in together.values()] == [0, 600, 600, 600]


def test_prompt_shares_with_a_running_sequence(backend: Backend, plain: Backend) -> None:
    early = spec(text(400), 1, max_tokens=40)
    late = spec(text(400)[:300] + text(10, 1), 2)
    alone = [answer(plain, each) for each in (early, late)]
    backend.admit(early)
    begun: list[StepToken] = []
    while len(begun) < 5:
        begun += backend.step()
    backend.admit(late)
    rest = drain(backend, (1, 2), (replace(early, max_tokens=35), late))
    assert tokens_of(begun + rest[1]) == alone[0]
    assert tokens_of(rest[2]) == alone[1]
    assert rest[2][0].cached_tokens == 300


def test_little_in_common_is_not_waited_for(backend: Backend) -> None:
    system = text(WORTH_SHARING - 1)
    specs = [spec(system + text(20, seed=i), i) for i in (1, 2)]
    for each in specs:
        backend.admit(each)
    first: list[StepToken] = []
    while not first:
        first = backend.step()
    assert {token.sequence_id: token.cached_tokens for token in first} == {1: 0, 2: 0}
    drain(backend, (1, 2), [replace(each, max_tokens=7) for each in specs])


def test_the_one_waited_for_may_be_cancelled(backend: Backend, plain: Backend) -> None:
    system = text(700)
    leader, follower = spec(system + text(10, 1), 1), spec(system + text(10, 2), 2)
    backend.admit(leader)
    backend.admit(follower)
    backend.step()
    backend.cancel(1)
    steps = drain(backend, [2], [follower])[2]
    assert tokens_of(steps) == answer(plain, follower)
    assert steps[0].cached_tokens == PREFILL_CHUNK


def test_cancel_of_one_that_waits(backend: Backend, plain: Backend) -> None:
    leader, follower = spec(text(600), 1), spec(text(600), 2)
    backend.admit(leader)
    backend.admit(follower)
    backend.step()
    backend.cancel(2)
    assert tokens_of(drain(backend, [1], [leader])[1]) == answer(plain, leader)


def test_cancelled_prompt_leaves_what_was_computed(backend: Backend, plain: Backend) -> None:
    backend.admit(spec(text(700)))
    assert backend.step() == []
    backend.cancel(1)
    assert cached(backend, text(700), plain) == PREFILL_CHUNK


def test_cancelled_answer_leaves_what_was_computed(backend: Backend, plain: Backend) -> None:
    each = spec(text(300), max_tokens=50)
    backend.admit(each)
    begun: list[StepToken] = []
    while len(begun) < 5:
        begun += backend.step()
    backend.cancel(1)
    assert cached(backend, text(300) + tokens_of(begun) + text(5, 1), plain) == 305


def test_running_sequences_get_a_token_in_every_step_of_a_prefill(backend: Backend) -> None:
    running = {i: spec(text(5, seed=i), i, max_tokens=60) for i in (1, 2, 3)}
    for each in running.values():
        backend.admit(each)
    while len(backend.step()) < 3:
        pass
    backend.admit(spec(text(PREFILL_CHUNK + 1), 4))
    steps = 0
    while 4 not in (got := [token.sequence_id for token in backend.step()]):
        assert got == [1, 2, 3]
        steps += 1
    # The last step samples the first token, of which the next one tells.
    assert steps == PREFILL_CHUNK // SHARED_PREFILL + 1
    for i in (1, 2, 3, 4):
        backend.cancel(i)


@pytest.mark.parametrize(("seconds", "chunk"), [(1.0, 32), (3600.0, FEWEST_TOKENS)])
def test_a_chunk_takes_seconds_at_most_also_on_a_slow_machine(
    backend: Backend, pace: pytest.MonkeyPatch, seconds: float, chunk: int
) -> None:
    """On a clock that moves on by so much for every 16 tokens."""
    pace.undo()
    pace.setattr(
        "worker.backends.mlx_batch.time.perf_counter",
        lambda: backend.prefilled / FEWEST_TOKENS * seconds,
    )
    backend.admit(spec(text(FEWEST_TOKENS + 10 * chunk + 1)))
    chunks = []
    while not backend.step():
        chunks.append(backend.prefilled)
    sizes = [after - before for before, after in pairwise([0, *chunks])]
    assert sizes[:11] == [FEWEST_TOKENS, *[chunk] * 10]


def test_how_much_of_a_prompt_is_computed_is_known(backend: Backend) -> None:
    backend.admit(spec(text(PREFILL_CHUNK + 100, 1)))
    assert backend.computed(1) == 0
    assert backend.step() == []
    assert backend.computed(1) == backend.prefilled > 0
    while not backend.step():
        pass
    backend.cancel(1)


def test_prompts_share_a_chunk_while_others_run(backend: Backend) -> None:
    backend.admit(spec(text(5), 0, max_tokens=60))
    while not backend.step():
        pass
    for i in (1, 2):
        backend.admit(spec(text(SHARED_PREFILL + 1, seed=i), i))
    steps = 0
    while len(backend.step()) == 1:
        steps += 1
    assert steps == 2 + 1
    for i in (0, 1, 2):
        backend.cancel(i)


# --- prefixes: caches that cannot be cut back ---------------------------------------


def test_window_serves_the_next_turn(windowed: Backend, windowed_plain: Backend) -> None:
    conversation = text(300)
    conversation += answer(windowed, spec(conversation))
    assert cached(windowed, conversation + text(20, 1), windowed_plain) == 308


def test_window_serves_another_answer_to_the_same_prompt(
    windowed: Backend, windowed_plain: Backend
) -> None:
    assert cached(windowed, text(300), windowed_plain) == 0
    assert cached(windowed, text(300), windowed_plain) == 299
    # The prompt, without its answer, is what the next turn begins with.
    assert cached(windowed, text(300) + text(9, 1), windowed_plain) == 299


def test_window_serves_the_third_of_a_kind(windowed: Backend, windowed_plain: Backend) -> None:
    system = text(250)
    found = [cached(windowed, system + text(40, seed=i), windowed_plain) for i in range(1, 5)]
    assert found == [0, 0, 250, 250]


def test_window_serves_prompts_that_arrive_together(
    windowed: Backend, windowed_plain: Backend
) -> None:
    system = text(300)
    specs = [spec(system + text(30 + i, seed=i), i) for i in range(1, SEQUENCES + 1)]
    alone = {each.sequence_id: answer(windowed_plain, each) for each in specs}
    together = run(windowed, *specs)
    assert {i: tokens_of(steps) for i, steps in together.items()} == alone
    assert [steps[0].cached_tokens for steps in together.values()] == [0, 300, 300, 300]


def test_short_window_cache_is_cut_back(windowed: Backend, windowed_plain: Backend) -> None:
    cached(windowed, text(60), windowed_plain)
    assert cached(windowed, text(60)[:40] + text(20, 1), windowed_plain) == 40


@pytest.fixture(scope="module")
def recurrent() -> Any:
    """A model with recurrent states in every other layer."""
    from mlx_lm.models import qwen3_next

    mx.random.seed(0)
    config = {
        "model_type": "qwen3_next",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    }
    arguments: Any = qwen3_next.ModelArgs  # untyped
    model = qwen3_next.Model(arguments.from_dict(config))
    mx.eval(model.eval().parameters())
    return model


def sequence_batch(model: Any, prompt_cache_bytes: int) -> Any:
    return SequenceBatch(
        model,
        end_tokens=frozenset([END]),
        vocab_size=VOCABULARY,
        context_length=2048,
        max_sequences=SEQUENCES,
        prompt_cache_bytes=prompt_cache_bytes,
    )


def test_recurrent_states_are_reused(recurrent: Any) -> None:
    batch, plain = sequence_batch(recurrent, PLENTY), sequence_batch(recurrent, 0)
    system = text(150)
    assert [cached(batch, system + text(20, seed=i), plain) for i in (1, 2, 3, 3)] == [
        0,
        0,
        150,
        169,
    ]
    conversation = system + text(20, seed=4)
    conversation += answer(batch, spec(conversation))
    assert cached(batch, conversation + text(20, seed=5), plain) == len(conversation)
    specs = [spec(text(150, seed=9) + text(10, seed=i), i) for i in range(SEQUENCES)]
    alone = {each.sequence_id: answer(plain, each) for each in specs}
    together = run(batch, *specs)
    assert {i: tokens_of(steps) for i, steps in together.items()} == alone
    assert [steps[0].cached_tokens for steps in together.values()] == [0, 150, 150, 150]


def test_kept_states_are_no_views_of_the_batch(recurrent: Any) -> None:
    batch = sequence_batch(recurrent, PLENTY)
    run(batch, *(spec(text(30, seed=i), i) for i in range(SEQUENCES)))
    snapshot, _ = batch._kept.find(array("i", text(30, seed=0)))
    leaves: Any = tree_flatten([part.state for part in snapshot.caches])
    arrays = [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]
    assert mx.get_array_buffer_size(arrays) < 1.3 * snapshot.nbytes


# --- draws ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=2.0, seed=11),
        Sampling(temperature=1.5, seed=12, top_p=0.9, top_k=50),
        Sampling(temperature=0, presence_penalty=1.5, frequency_penalty=1.0),
        Sampling(temperature=2.0, seed=13, repetition_penalty=1.3, frequency_penalty=0.5),
    ],
    ids=["greedy", "seeded", "filtered", "penalised", "seeded-penalised"],
)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "anew"])
def test_answer_taken_up_again_is_that_of_an_undisturbed_run(
    backend: Backend, plain: Backend, sampling: Sampling, reuse: bool
) -> None:
    prompt = text(30)
    whole = answer(plain, spec(prompt, max_tokens=16, sampling=sampling))
    for done in (1, 2, 7, 15):
        rest = spec(prompt + whole[:done], max_tokens=16 - done, sampling=sampling, sampled=done)
        assert answer(backend if reuse else plain, rest) == whole[done:]


# --- masks ----------------------------------------------------------------------


class ScriptedMask:
    """Allows what ``rule`` says of the tokens accepted so far."""

    def __init__(self, rule: Callable[[Tokens], Iterable[int]]) -> None:
        self.rule = rule
        self.accepted: Tokens = []
        self.asked = 0

    def allowed(self) -> bytes:
        self.asked += 1
        bits = 0
        for token in self.rule(self.accepted):
            bits |= 1 << token
        return bits.to_bytes((VOCABULARY + 7) // 8, "little")

    def accept(self, token: int) -> None:
        self.accepted.append(token)


SUCCESSOR = dict(zip(ORDINARY, ORDINARY[1:] + ORDINARY[:1], strict=True))


def chain(start: int) -> ScriptedMask:
    """Allows exactly the token that follows the last one in ``ORDINARY``."""
    return ScriptedMask(lambda accepted: [SUCCESSOR[accepted[-1]] if accepted else start])


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=2.0, seed=1)])
def test_mask_follows_every_token(backend: Backend, sampling: Sampling) -> None:
    mask = chain(ORDINARY[3])
    got = answer(backend, spec(text(10), max_tokens=6, sampling=sampling, mask=mask))
    assert got == ORDINARY[3:9]
    assert mask.accepted == got
    assert mask.asked == len(got)


def test_mask_chooses_among_the_allowed(backend: Backend) -> None:
    free = answer(backend, spec(text(10), max_tokens=20))
    mask = ScriptedMask(lambda _: [token for token in ORDINARY if token not in free])
    got = answer(backend, spec(text(10), max_tokens=20, mask=mask))
    assert not set(free) & set(got)
    assert len(set(got)) > 1


def test_masks_leave_the_neighbours_alone(backend: Backend, plain: Backend) -> None:
    free = [spec(text(10, seed=i), i) for i in (1, 2)]
    alone = {each.sequence_id: answer(plain, each) for each in free}
    masks = {3: chain(ORDINARY[0]), 4: chain(ORDINARY[50])}
    masked = [spec(text(10, seed=i), i, mask=mask) for i, mask in masks.items()]
    together = {
        i: tokens_of(steps)
        for i, steps in run(backend, masked[0], free[0], masked[1], free[1]).items()
    }
    assert together == alone | {3: ORDINARY[:8], 4: ORDINARY[50:58]}


def test_mask_is_not_asked_after_the_end(backend: Backend) -> None:
    mask = ScriptedMask(lambda accepted: [ORDINARY[0]] if len(accepted) < 3 else [END])
    steps = run(backend, spec(text(10), mask=mask, ignore_eos=False))[1]
    assert [step.is_end for step in steps] == [False] * 3 + [True]
    assert mask.accepted == tokens_of(steps)
    assert mask.asked == 4


def test_mask_that_allows_nothing_more_ends_the_answer(backend: Backend) -> None:
    mask = ScriptedMask(lambda accepted: [ORDINARY[0]] if len(accepted) < 3 else [])
    assert answer(backend, spec(text(10), mask=mask)) == [ORDINARY[0]] * 3 + [END]
    assert mask.accepted == [ORDINARY[0]] * 3


def test_mask_does_not_allow_an_ignored_end(backend: Backend) -> None:
    mask = ScriptedMask(lambda _: [ORDINARY[0], END])
    eager = Sampling(temperature=0, logit_bias={END: 100.0})
    assert answer(backend, spec(text(10), mask=mask, sampling=eager)) == [ORDINARY[0]] * 8


def test_tokens_beyond_the_mask_are_not_allowed(backend: Backend) -> None:
    class Short(ScriptedMask):
        def allowed(self) -> bytes:
            return super().allowed()[:20]

    got = answer(backend, spec(text(10), max_tokens=20, mask=Short(lambda _: range(VOCABULARY))))
    assert max(got) < 160


# --- log probabilities --------------------------------------------------------------


def logprobs(backend: Backend, count: int | None, **options: Any) -> list[StepToken]:
    return run(backend, spec(text(10), top_logprobs=count, **options))[1]


def test_logprobs_only_for_who_asks(backend: Backend) -> None:
    assert [step.logprobs for step in logprobs(backend, None)] == [None] * 8
    together = run(backend, spec(text(10), 1), spec(text(9), 2, top_logprobs=2))
    assert {step.logprobs for step in together[1]} == {None}
    assert all(step.logprobs and len(step.logprobs.top) == 2 for step in together[2])


def test_logprobs_are_those_of_the_whole_distribution(backend: Backend) -> None:
    for step in logprobs(backend, VOCABULARY):
        assert step.logprobs is not None
        top = step.logprobs.top
        assert {token for token, _ in top} == set(range(VOCABULARY))
        assert math.fsum(math.exp(value) for _, value in top) == pytest.approx(1, abs=1e-4)
        assert [value for _, value in top] == sorted((v for _, v in top), reverse=True)
        assert step.logprobs.logprob == dict(top)[step.token]
        assert next(token for token, _ in top if token != END) == step.token  # greedy


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": Sampling(temperature=3.0, seed=4, top_k=20)},
        {"sampling": Sampling(temperature=0, logit_bias={ORDINARY[0]: 50.0})},
        {"sampling": Sampling(temperature=0, repetition_penalty=3.0)},
        {"mask": ScriptedMask(lambda _: ORDINARY[:2])},
    ],
    ids=["filters", "bias", "penalty", "mask"],
)
def test_logprobs_are_the_models_own(backend: Backend, options: dict[str, Any]) -> None:
    plainly = logprobs(backend, VOCABULARY)[0].logprobs
    changed = logprobs(backend, VOCABULARY, **options)[0]
    assert plainly is not None
    assert changed.logprobs is not None
    assert dict(changed.logprobs.top) == pytest.approx(dict(plainly.top), abs=1e-4)
    assert changed.logprobs.logprob == dict(changed.logprobs.top)[changed.token]


def test_logprob_of_the_token_alone(backend: Backend) -> None:
    for alone, both in zip(logprobs(backend, 0), logprobs(backend, 1), strict=True):
        assert alone.logprobs is not None
        assert both.logprobs is not None
        assert alone.logprobs.top == []
        assert alone.logprobs.logprob == pytest.approx(both.logprobs.top[0][1], abs=1e-4)


# --- any schedule -------------------------------------------------------------------

#: Prompts that begin alike here and there, as conversations with two system prompts do.
PROMPTS = [
    text(system, seed=system) + text(length, seed=length)
    for system in (150, 540)
    for length in (1, 20, 90)
] + [text(150, seed=150)[:100], text(540, seed=540)[:520], text(3), text(1, seed=9)]
SAMPLINGS = [
    GREEDY,
    Sampling(temperature=2.0, seed=3),
    Sampling(temperature=1.0, seed=4, frequency_penalty=0.7, top_p=0.95),
]

admission = st.builds(
    lambda prompt, sampling, max_tokens: ("admit", prompt, sampling, max_tokens),
    st.sampled_from(range(len(PROMPTS))),
    st.sampled_from(range(len(SAMPLINGS))),
    st.sampled_from([1, 4, 9]),
)
cancellation = st.tuples(st.just("cancel"), st.integers(0, SEQUENCES - 1))
schedules = st.lists(
    st.one_of(admission, admission, cancellation, st.just(("step",)), st.just(("step",))),
    max_size=25,
)


class Scheduled:
    """Runs schedules on one backend, over and over, so that its cache fills up."""

    def __init__(self, backend: Backend, reference: Backend) -> None:
        self.backend = backend
        self.reference = reference
        self.alone: dict[tuple[int, int], Tokens] = {}
        self.count = 0

    def expected(self, prompt: int, sampling: int) -> Tokens:
        key = (prompt, sampling)
        if key not in self.alone:
            whole = spec(PROMPTS[prompt], max_tokens=9, sampling=SAMPLINGS[sampling])
            self.alone[key] = answer(self.reference, whole)
        return self.alone[key]

    def run(self, schedule: list[tuple[Any, ...]]) -> None:
        expected: dict[int, Tokens] = {}
        got: dict[int, Tokens] = {}
        running: list[int] = []

        def step() -> None:
            for token in self.backend.step():
                answer = got[token.sequence_id]
                if not answer:
                    assert token.cached_tokens < lengths[token.sequence_id]
                answer.append(token.token)
                if len(answer) == len(expected[token.sequence_id]):
                    running.remove(token.sequence_id)

        lengths: dict[int, int] = {}
        for action in schedule:
            if action[0] == "admit" and len(running) < SEQUENCES:
                _, prompt, sampling, max_tokens = action
                self.count += 1
                expected[self.count] = self.expected(prompt, sampling)[:max_tokens]
                got[self.count] = []
                lengths[self.count] = len(PROMPTS[prompt])
                running.append(self.count)
                self.backend.admit(
                    spec(PROMPTS[prompt], self.count, max_tokens, sampling=SAMPLINGS[sampling])
                )
            elif action[0] == "cancel" and action[1] < len(running):
                self.backend.cancel(running.pop(action[1]))
            elif action[0] == "step":
                step()
        while running:
            step()
        assert self.backend.step() == []
        for i, tokens in got.items():
            assert tokens == expected[i][: len(tokens)]


@pytest.fixture(scope="module")
def scheduled(tiny_mlx: Path, plain: Backend) -> Iterator[Scheduled]:
    # A bound that a handful of prompts fill.
    with loaded(tiny_mlx, prompt_cache_bytes=2000 * BYTES_PER_TOKEN) as backend:
        yield Scheduled(backend, plain)


@pytest.fixture(scope="module")
def scheduled_windowed(windowed_path: Path, windowed_plain: Backend) -> Iterator[Scheduled]:
    with loaded(windowed_path, prompt_cache_bytes=2000 * BYTES_PER_TOKEN) as backend:
        yield Scheduled(backend, windowed_plain)


any_schedule = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@any_schedule
@given(schedule=schedules)
def test_every_sequence_answers_as_alone(
    scheduled: Scheduled, schedule: list[tuple[Any, ...]]
) -> None:
    scheduled.run(schedule)


@any_schedule
@given(schedule=schedules)
def test_every_sequence_answers_as_alone_with_a_window(
    scheduled_windowed: Scheduled, schedule: list[tuple[Any, ...]]
) -> None:
    scheduled_windowed.run(schedule)
