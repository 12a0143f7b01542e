"""Real vectors before any traffic: finite, of the right size, and telling texts apart.

For a reranker, whose vectors have one number, the texts are documents for one query.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from array import array
from collections.abc import Callable, Sequence

import msgspec

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Embed, ModelKind
from supervisor.canary import CanaryFailed, CanaryImpossible, CanaryReport
from supervisor.stream import RequestStream

#: How often the same is asked again; on probation it is the larger number.
REPEATS = 1
STRICT_REPEATS = 4

#: By how much a number may differ when the same is computed again, or in another batch.
TOLERANCE = 0.01
#: By how much some number must differ between two texts.
LEAST_DIFFERENCE = 1e-6

_QUERY = "What is the capital of France?"
_SENTENCES = (
    "Paris, on the river Seine, is the capital of France and its largest city. ",
    "The quick brown fox jumps over the lazy dog while it rains in the hills. ",
)
#: The long texts first, for a speed that means something.
_TEXTS = (
    [sentence * 4 for sentence in _SENTENCES],
    list(_SENTENCES),
    ["Paris", "dog"],
)

#: Starts a request on the worker under test.
Submit = Callable[[Embed], RequestStream]


async def run_embedding_canary(
    submit: Submit, *, dimensions: int, kind: ModelKind, strict: bool
) -> CanaryReport:
    """Raise ``CanaryFailed`` unless the model passes. The caller sets the deadline.

    Raises ``CanaryImpossible`` when not even two words fit the context.
    """
    query = _QUERY if kind is ModelKind.RERANK else None
    try:
        for texts in _TEXTS:
            request = Embed(0, list(texts), query)
            try:
                first, _ = await _embed(submit, request, dimensions)
            except CodedError as error:
                if error.code is not ErrorCode.CONTEXT_LENGTH_EXCEEDED:
                    raise
                refusal = error
                continue
            check_apart(first, kind)
            submit(request).close()
            for _ in range(STRICT_REPEATS if strict else REPEATS):
                again, report = await _embed(submit, request, dimensions)
                check_same(first, again)
            single = msgspec.structs.replace(request, inputs=texts[:1])
            alone, _ = await _embed(submit, single, dimensions)
            check_same(first[:1], alone)
            return report
    except CodedError as error:
        raise CanaryFailed(error.message) from error
    raise CanaryImpossible(f"no text could be tried: {refusal.message}")


async def _embed(
    submit: Submit, request: Embed, dimensions: int
) -> tuple[list[array[float]], CanaryReport]:
    started = time.monotonic()
    stream = submit(request)
    try:
        await stream.collect()
    finally:
        stream.close()
    took = time.monotonic() - started
    if len(stream.vectors) != len(request.inputs):
        raise CanaryFailed(f"{len(stream.vectors)} vectors for {len(request.inputs)} texts")
    vectors = [checked(vector, dimensions, request.query) for vector in stream.vectors]
    asked = msgspec.json.encode((request.inputs, request.query))
    return vectors, CanaryReport(
        canary=hashlib.sha256(asked).hexdigest()[:16],
        time_to_first_token_s=took,
        tokens_per_s=stream.prompt_tokens / took if took > 0 else 0.0,
        output_digest=digest(vectors),
        prompt_tokens=stream.prompt_tokens,
        completion_tokens=0,
    )


def checked(packed: bytes, dimensions: int, query: str | None) -> array[float]:
    """The numbers of a vector. Raise ``CanaryFailed`` for one that no working model makes."""
    if len(packed) != 4 * dimensions:
        raise CanaryFailed(f"a vector of {len(packed) // 4} numbers instead of {dimensions}")
    vector = array("f", packed)
    if sys.byteorder != "little":
        vector.byteswap()
    if not all(map(math.isfinite, vector)):
        raise CanaryFailed("a vector with numbers that are not finite")
    if query is not None:
        if not 0 <= vector[0] <= 1:
            raise CanaryFailed(f"a score of {vector[0]}, which is not from 0 to 1")
    elif not any(vector):
        raise CanaryFailed("a vector of nothing but zeros")
    elif abs(math.hypot(*vector) - 1) > TOLERANCE:
        raise CanaryFailed(f"a vector of length {math.hypot(*vector):.3f} instead of 1")
    return vector


def digest(vectors: Sequence[array[float]]) -> str:
    """Of what the vectors say, not of their last bits, which are not the same everywhere."""
    if all(len(vector) == 1 for vector in vectors):
        said = bytes(round(vector[0] * 100) & 0xFF for vector in vectors)
    else:
        said = bytes(number > 0 for vector in vectors for number in vector)
    return hashlib.sha256(said).hexdigest()


def check_apart(vectors: Sequence[array[float]], kind: ModelKind) -> None:
    """Raise ``CanaryFailed`` if two texts have the same vector."""
    # Scores of both may be next to nothing.
    least = LEAST_DIFFERENCE if kind is ModelKind.EMBED else 0.0
    if _difference(vectors[0], vectors[1]) <= least:
        raise CanaryFailed("the same for two different texts")


def check_same(first: Sequence[array[float]], again: Sequence[array[float]]) -> None:
    """Raise ``CanaryFailed`` unless both are of the same texts."""
    for before, after in zip(first, again, strict=True):
        if len(before) != len(after) or not _difference(before, after) <= TOLERANCE:
            raise CanaryFailed("another vector for the same text")


def _difference(one: array[float], other: array[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
