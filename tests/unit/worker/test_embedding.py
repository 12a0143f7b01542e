"""Vectors for many requests at once: batches, turns, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import pytest

from protocol.errors import ErrorCode
from protocol.messages import (
    Accepted,
    Embed,
    Embedded,
    FinishReason,
    Generate,
    Job,
    Loaded,
    ModelKind,
    Phase,
    Rejected,
)
from worker.backends.base import EmbedInput
from worker.backends.simulated import SimulatedBackend
from worker.embedding import TOKENISING_BUDGET_S, EmbeddingEngine
from worker.engine import Engine
from worker.vitals import Vitals

CONTEXT = 20


class Embedder:
    """A vector is the text itself; one with an exclamation mark is not finite."""

    dimensions = 4
    batch_tokens = 10
    batch_sequences = 4

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode_input(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_pair(self, query: str, document: str) -> list[int]:
        return self.encode_input(f"{query}|{document}")

    def embed(
        self, inputs: Sequence[EmbedInput], advance: Callable[[], None]
    ) -> list[bytes | None]:
        advance()
        texts = [bytes(each.tokens) for each in inputs]
        self.batches.append([text.decode() for text in texts])
        return [
            None if b"!" in text else text[: each.dimensions]
            for text, each in zip(texts, inputs, strict=True)
        ]


def model_of(kind: ModelKind, max_sequences: int = 2) -> Loaded:
    return Loaded("x", CONTEXT, max_sequences, 256, False, 0, kind=kind)


@pytest.fixture
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture
def vitals() -> Vitals:
    return Vitals()


@pytest.fixture
def engine(embedder: Embedder, vitals: Vitals) -> EmbeddingEngine:
    return EmbeddingEngine(embedder, model_of(ModelKind.EMBED), vitals, clock=lambda: 0.0)


def submit(engine: EmbeddingEngine, request: Job) -> None:
    assert isinstance(engine.submit(request), Accepted)


def run(engine: EmbeddingEngine) -> dict[int, list[bytes]]:
    """Step until all is done; the vectors by request."""
    vectors: dict[int, list[bytes]] = {}
    ended: list[int] = []
    while not engine.idle:
        for message in engine.step().embedded:
            assert message.request_id not in ended
            vectors.setdefault(message.request_id, []).extend(message.vectors)
            if message.last:
                ended.append(message.request_id)
    assert sorted(ended) == sorted(vectors)
    return vectors


def test_vectors_come_in_the_order_of_the_inputs(
    engine: EmbeddingEngine, embedder: Embedder
) -> None:
    texts = ["abcdef", "b", "abcdefg", "cd", "e", "f", "g", "h"]
    submit(engine, Embed(1, [*texts, [65, 66]]))
    assert run(engine) == {1: [*(text.encode() for text in texts), b"AB"]}
    assert all(len(batch) <= embedder.batch_sequences for batch in embedder.batches)
    assert all(sum(map(len, batch)) <= embedder.batch_tokens for batch in embedder.batches)
    assert len(embedder.batches) < len(texts)


def test_one_input_may_be_longer_than_a_batch(engine: EmbeddingEngine, embedder: Embedder) -> None:
    submit(engine, Embed(1, ["a" * CONTEXT, "b", "c" * 9]))
    assert run(engine) == {1: [b"a" * CONTEXT, b"b", b"c" * 9]}
    assert embedder.batches[0] == ["a" * CONTEXT]


def test_a_few_texts_do_not_wait_for_thousands(engine: EmbeddingEngine) -> None:
    submit(engine, Embed(1, ["many"] * 1000, client="one"))
    engine.step()
    submit(engine, Embed(2, ["few"], client="two"))
    progress = engine.step()
    assert Embedded(2, [b"few"], last=True) in progress.embedded
    assert [started.request_id for started in progress.started] == [2]


def test_a_long_input_gets_its_turn(engine: EmbeddingEngine) -> None:
    submit(engine, Embed(1, ["ab"] * 1000))
    submit(engine, Embed(2, ["a" * CONTEXT]))
    assert any(message.request_id == 2 for _ in range(3) for message in engine.step().embedded)


def test_no_more_requests_at_once_than_the_model_has_slots(
    engine: EmbeddingEngine, embedder: Embedder
) -> None:
    for number in range(3):
        submit(engine, Embed(number, [f"r{number}"] * 3))
    engine.step()
    assert set(embedder.batches[0]) == {"r0", "r1"}


def test_the_tokens_are_told_before_any_is_computed(engine: EmbeddingEngine) -> None:
    assert engine.submit(Embed(7, ["abc", "de", [1]])) == Accepted(7, 6)


def test_dimensions(engine: EmbeddingEngine) -> None:
    submit(engine, Embed(1, ["abcdef"], dimensions=2))
    submit(engine, Embed(2, ["abcdef"]))
    assert run(engine) == {1: [b"ab"], 2: [b"abcdef"]}


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (Embed(1, ["a" * 21]), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "input"),
        (Embed(1, ["a", "a" * 21]), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "input[1]"),
        (Embed(1, [[256]]), ErrorCode.INVALID_VALUE, "input"),
        (Embed(1, [[1], [-1]]), ErrorCode.INVALID_VALUE, "input[1]"),
        (Embed(1, [""]), ErrorCode.INVALID_VALUE, "input"),
        (Embed(1, ["a"], dimensions=5), ErrorCode.INVALID_VALUE, "dimensions"),
        (Embed(1, ["a"], dimensions=0), ErrorCode.INVALID_VALUE, "dimensions"),
        (Embed(1, ["a"], query="b"), ErrorCode.INVALID_VALUE, "model"),
        (Generate(1, prompt="a"), ErrorCode.INVALID_VALUE, "model"),
    ],
)
def test_refusals_leave_no_trace(
    engine: EmbeddingEngine, vitals: Vitals, request_: Job, code: ErrorCode, param: str
) -> None:
    answer = engine.submit(request_)
    assert isinstance(answer, Rejected)
    assert (answer.code, answer.param) == (code, param)
    assert engine.idle
    assert (vitals.in_hand, vitals.phase) == (0, Phase.IDLE)


def test_a_reranker_sees_the_query_with_every_document(embedder: Embedder) -> None:
    engine = EmbeddingEngine(embedder, model_of(ModelKind.RERANK), Vitals())
    submit(engine, Embed(1, ["a", ""], query="q"))
    assert run(engine) == {1: [b"q|a", b"q|"]}
    for other in (Embed(2, ["a"]), Generate(3, prompt="a")):
        assert isinstance(engine.submit(other), Rejected)


def test_a_vector_that_is_not_finite_ends_its_request_only(engine: EmbeddingEngine) -> None:
    submit(engine, Embed(1, ["a", "!", "b", "c"]))
    submit(engine, Embed(2, ["d", "e"]))
    settled: list[Accepted | Rejected] = []
    vectors: list[bytes] = []
    while not engine.idle:
        progress = engine.step()
        settled += progress.settled
        assert all(message.request_id == 2 for message in progress.embedded if message.last)
        vectors += [v for m in progress.embedded if m.request_id == 2 for v in m.vectors]
    (rejected,) = settled
    assert isinstance(rejected, Rejected)
    assert (rejected.request_id, rejected.code) == (1, ErrorCode.INTERNAL_ERROR)
    assert vectors == [b"d", b"e"]


@pytest.mark.parametrize("steps", [0, 1])
def test_a_cancelled_request_is_gone(engine: EmbeddingEngine, vitals: Vitals, steps: int) -> None:
    submit(engine, Embed(1, ["ab"] * 100))
    submit(engine, Embed(2, ["cd"]))
    for _ in range(steps):
        engine.step()
    delta = engine.cancel(1)
    assert delta is not None
    assert delta.finish is FinishReason.CANCELLED
    assert engine.cancel(1) is None
    run(engine)
    assert (vitals.in_hand, vitals.phase) == (0, Phase.IDLE)


def test_progress_is_seen_with_every_input_and_every_batch(
    engine: EmbeddingEngine, vitals: Vitals
) -> None:
    submit(engine, Embed(1, ["a"] * 8))
    tokenised = vitals.progress
    assert tokenised >= 8
    assert (vitals.in_hand, vitals.phase) == (1, Phase.PREFILL)
    engine.step()
    assert vitals.progress > tokenised


def test_thousands_of_texts_are_tokenised_between_batches(
    embedder: Embedder, vitals: Vitals
) -> None:
    """A long request holds nobody up, is refused late if need be, and can be cancelled."""
    ticks = count()

    def clock() -> float:
        return next(ticks) * TOKENISING_BUDGET_S / 10

    engine = EmbeddingEngine(embedder, model_of(ModelKind.EMBED), vitals, clock=clock)
    submit(engine, Embed(1, ["ab"] * 8))
    assert engine.submit(Embed(2, ["many"] * 100)) is None
    assert engine.submit(Embed(3, [*["bad"] * 40, "a" * 21])) is None
    assert engine.submit(Embed(4, ["gone"] * 40)) is None
    assert vitals.in_hand == 4
    assert [m.request_id for m in engine.step().embedded] == [1]
    assert engine.cancel(4) is not None
    settled: list[Accepted | Rejected] = []
    vectors = 0
    while not engine.idle:
        progress = engine.step()
        settled += progress.settled
        vectors += sum(len(m.vectors) for m in progress.embedded if m.request_id == 2)
    refused, accepted = settled
    assert isinstance(refused, Rejected)
    assert (refused.request_id, refused.param) == (3, "input[40]")
    assert accepted == Accepted(2, 400)
    assert vectors == 100
    assert (vitals.in_hand, vitals.phase) == (0, Phase.IDLE)


def test_a_generator_says_that_it_is_one() -> None:
    engine = Engine(SimulatedBackend(), model_of(ModelKind.GENERATE), Vitals())
    answer = engine.submit(Embed(1, ["a"]))
    assert isinstance(answer, Rejected)
    assert (answer.code, answer.param) == (ErrorCode.INVALID_VALUE, "model")
    assert engine.idle
