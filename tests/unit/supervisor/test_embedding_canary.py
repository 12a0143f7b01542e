"""Which vectors prove a model, and which do not."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import pytest

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Embed, ModelKind
from supervisor.canary import CanaryFailed, CanaryImpossible, CanaryReport
from supervisor.embedding_canary import checked, run_embedding_canary
from supervisor.stream import RequestStream

#: The vector of an input, given how many were asked for before.
Answer = Callable[[str, int], list[float]]


def vector_of(text: str, _asked: int = 0) -> list[float]:
    angle = sum(text.encode()) % 100 / 50
    return [math.cos(angle), math.sin(angle), 0.0]


def score_of(text: str, _asked: int = 0) -> list[float]:
    return [sum(text.encode()) % 100 / 100]


async def run(
    answer: Answer,
    *,
    kind: ModelKind = ModelKind.EMBED,
    dimensions: int = 3,
    longest: int = 1000,
    strict: bool = False,
) -> tuple[list[Embed], CanaryReport]:
    asked: list[Embed] = []

    def submit(request: Embed) -> RequestStream:
        stream = RequestStream(max_buffer_bytes=None, on_close=lambda: None)
        texts = [str(text) for text in request.inputs]
        if max(map(len, texts)) > longest:
            stream.fail(CodedError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long"))
            return stream
        stream.accept(sum(map(len, texts)))
        vectors = [answer(text, len(asked)) for text in texts]
        asked.append(request)
        stream.add_vectors([struct.pack(f"<{len(v)}f", *v) for v in vectors], last=True)
        return stream

    report = await run_embedding_canary(submit, dimensions=dimensions, kind=kind, strict=strict)
    return asked, report


async def test_a_working_model_passes() -> None:
    asked, report = await run(vector_of)
    assert [len(request.inputs) for request in asked] == [2, 2, 2, 1]
    assert all(request.query is None for request in asked)
    assert report.prompt_tokens > 100
    assert report.tokens_per_s > 0
    assert report.completion_tokens == 0


async def test_a_working_reranker_passes() -> None:
    asked, _ = await run(score_of, kind=ModelKind.RERANK, dimensions=1)
    assert all(request.query for request in asked)


async def test_on_probation_more_is_asked() -> None:
    asked, _ = await run(vector_of, strict=True)
    assert len(asked) > 4


async def test_the_digest_is_of_what_the_vectors_say() -> None:
    def nearly(text: str, asked: int) -> list[float]:
        return [number * (1 + 1e-5) for number in vector_of(text)]

    def turned(text: str, asked: int) -> list[float]:
        return [-number for number in vector_of(text)]

    digests = [(await run(each))[1].output_digest for each in (vector_of, nearly, turned)]
    assert digests[0] == digests[1] != digests[2]


async def test_shorter_texts_for_a_short_context_make_another_canary() -> None:
    whole, short = (await run(vector_of))[1], (await run(vector_of, longest=10))[1]
    assert whole.canary != short.canary
    with pytest.raises(CanaryImpossible):
        await run(vector_of, longest=2)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda text, asked: [math.nan, 1.0, 0.0], "not finite"),
        (lambda text, asked: [math.inf, 1.0, 0.0], "not finite"),
        (lambda text, asked: [0.0, 0.0, 0.0], "zeros"),
        (lambda text, asked: [1.0, 0.0], "2 numbers instead of 3"),
        (lambda text, asked: [3.0, 0.0, 0.0], "length 3.000"),
        (lambda text, asked: [1.0, 0.0, 0.0], "the same for two"),
        (lambda text, asked: vector_of(text * (1 + asked)), "another vector"),
    ],
)
async def test_what_no_working_model_answers(answer: Answer, reason: str) -> None:
    with pytest.raises(CanaryFailed, match=reason):
        await run(answer)


@pytest.mark.parametrize("score", [-0.1, 1.1, math.nan])
async def test_what_no_working_reranker_answers(score: float) -> None:
    with pytest.raises(CanaryFailed):
        await run(lambda text, asked: [score], kind=ModelKind.RERANK, dimensions=1)


async def test_vectors_are_missing() -> None:
    def submit(request: Embed) -> RequestStream:
        stream = RequestStream(max_buffer_bytes=None, on_close=lambda: None)
        stream.accept(1)
        stream.add_vectors([], last=True)
        return stream

    with pytest.raises(CanaryFailed, match="0 vectors for 2 texts"):
        await run_embedding_canary(submit, dimensions=3, kind=ModelKind.EMBED, strict=False)


def test_numbers_are_little_endian() -> None:
    packed = struct.pack("<2f", 0.6, -0.8)
    assert checked(packed, 2, None).tolist() == pytest.approx([0.6, -0.8])


@pytest.mark.parametrize("packed", [b"", b"1234567", b"123456789"])
def test_half_a_number_is_no_vector(packed: bytes) -> None:
    with pytest.raises(CanaryFailed, match="instead of 2"):
        checked(packed, 2, None)
