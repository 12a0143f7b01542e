"""A ``TokenMask`` as a logits processor of mlx-lm's batch generator."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlx.core as mx

from worker.backends.base import SequenceSpec, TokenMask

_start: Any = mx.async_eval  # untyped


class MaskProcessor:
    """Lets through what the mask of one sequence allows; to be the last processor.

    Where the mask allows nothing, the answer cannot go on: an end-of-generation
    token is forced, even with ``ignore_eos``, and not told to the mask. A model without
    such a token goes on unmasked.
    """

    def __init__(self, mask: TokenMask, spec: SequenceSpec, end_tokens: Collection[int]) -> None:
        self._mask = mask
        self._end_tokens = sorted(end_tokens)
        self._max_tokens = spec.max_tokens
        self._ignore_eos = spec.ignore_eos
        self._left: int | None = None  # tokens to come; None: not called yet

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """``tokens``: prompt and answer so far; ``logits``: (1, vocabulary)."""
        if self._left == 0:
            return logits
        if self._left is None:
            self._left = self._max_tokens
            _start(logits)
        else:
            # The generator has only asked for the token of the step before; this
            # waits for it. Then the GPU may run this step while the mask is made.
            token = int(tokens[-1].item())  # type: ignore[arg-type]
            _start(logits)
            self._mask.accept(token)
            self._left -= 1
            if not self._left or token in self._end_tokens:
                self._left = 0  # what is sampled from now on, nobody sees
                return logits
        allowed = bytearray(self._mask.allowed())
        if self._ignore_eos:
            for token in self._end_tokens:
                if token // 8 < len(allowed):
                    allowed[token // 8] &= ~(1 << token % 8)
        if allowed.count(0) == len(allowed):
            return self._end(logits)
        return mx.where(_unpacked(allowed, logits.shape[-1]), logits, -mx.inf)

    def _end(self, logits: mx.array) -> mx.array:
        self._left = 0
        if not self._end_tokens:
            return logits
        forced = mx.full(logits.shape, -mx.inf, dtype=logits.dtype)
        forced[:, mx.array(self._end_tokens)] = 0
        return forced


def _unpacked(bits: bytearray, size: int) -> mx.array:
    """One boolean per token; tokens beyond the bits are not allowed."""
    missing = (size + 7) // 8 - len(bits)
    buffer: Any = memoryview(bits + bytes(max(missing, 0)))
    packed = mx.array(buffer)
    flags = (packed[:, None] >> mx.arange(8, dtype=mx.uint8)) & 1
    return flags.reshape(-1)[:size].astype(mx.bool_)
