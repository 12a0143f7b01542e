"""What is read from, and done to, a row of logits before it is sampled.

Only for sequences that ask: each of these is a pass over the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import llama_cpp
import numpy
from numpy.typing import NDArray

from worker.backends.base import NonFiniteLogits, TokenLogprobs, TokenMask

Logits = NDArray[numpy.float32]

#: What eight bits of a mask add to the logits of their tokens. To look it up takes 20 µs
#: for 49,000 tokens, whatever the bits; to copy where they say so up to ten times that.
_ADDENDS = numpy.where(
    numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1, bitorder="little"),
    numpy.float32(0),
    numpy.float32(-math.inf),
)


def logits_row(context: Any, row: int, vocab_size: int) -> Logits:
    """The library's own logits for one row of the last batch; changes reach the sampler."""
    pointer = llama_cpp.llama_get_logits_ith(context, row)
    return numpy.ctypeslib.as_array(pointer, shape=(vocab_size,))


def check_finite(logits: Logits) -> None:
    """Raise ``NonFiniteLogits`` if there is a NaN or an infinity."""
    if not numpy.isfinite(logits).all():
        raise NonFiniteLogits("the model produced logits that are NaN or infinite")


def apply_mask(logits: Logits, mask: TokenMask, banned: Collection[int]) -> bool:
    """Rule out what the mask does not allow, and ``banned``; False if nothing is left."""
    told = numpy.frombuffer(mask.allowed(), numpy.uint8)[: (logits.size + 7) // 8]
    # Tokens beyond what the mask tells are not allowed; bits beyond the tokens say nothing.
    bits = numpy.zeros((logits.size + 7) // 8, numpy.uint8)
    bits[: told.size] = told
    if logits.size % 8:
        bits[-1] &= (1 << logits.size % 8) - 1
    for token in banned:
        bits[token // 8] &= 0xFF ^ 1 << token % 8
    logits += _ADDENDS.take(bits, axis=0).reshape(-1)[: logits.size]
    return bool(bits.any())


class LogProbabilities:
    """The log probabilities of one row, before anything is done to it."""

    def __init__(self, logits: Logits, count: int) -> None:
        shifted = logits - logits.max()
        self._values = shifted - numpy.log(numpy.exp(shifted).sum(dtype=numpy.float64))
        self._count = min(count, logits.size)

    def of(self, token: int) -> TokenLogprobs:
        """That of ``token``, and the likeliest ones."""
        values, count = self._values, self._count
        best = numpy.argpartition(values, -count)[-count:] if count else numpy.arange(0)
        best = best[numpy.argsort(-values[best], kind="stable")]
        top = [(int(token), float(values[token])) for token in best]
        return TokenLogprobs(float(values[token]), top)
