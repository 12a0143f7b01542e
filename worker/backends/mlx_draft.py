"""Speculative decoding: a small model guesses tokens, the model checks them in one pass.

What is sampled is what the model alone would sample: each token is drawn from its own
logits, by the sampler of its position, and counts for as long as the guesses before it
were what had been drawn. The small model guesses with the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from worker.backends.base import SequenceSpec
from worker.backends.mlx_prompts import KVCaches, Snapshot
from worker.backends.mlx_sampling import Draw, LogitsProcessor, create_draw
from worker.backends.prefixes import Tokens, common_length, token_array

#: Prompt tokens that a draft model computes in a step that a stream waits for.
CATCH_UP = 256
#: Tokens guessed at once where the settings do not say.
DEFAULT_DRAFT_TOKENS = 3

#: Logits of a position, (1, vocabulary), and the position of the answer to a token.
Choose: TypeAlias = Callable[[mx.array, int], mx.array]


def can_guess_for(spec: SequenceSpec) -> bool:
    """Whether each token of a sequence depends on logits and position alone."""
    sampling = spec.sampling
    return (
        spec.mask is None
        and spec.top_logprobs is None
        and sampling.repetition_penalty == 1.0
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
    )


class DraftModel:
    """A small model with the same tokens, and its KV cache of one sequence.

    Its embedding has ``rows`` rows; what it guesses is among the first ``vocab_size``.
    """

    def __init__(self, model: Any, rows: int, vocab_size: int) -> None:
        self.model = model
        self._last_token = rows - 1
        self._vocab_size = vocab_size
        self._cache: KVCaches = make_prompt_cache(model)
        self._tokens = token_array(())  # in the cache

    def catch_up(self, tokens: Tokens) -> bool:
        """Compute a part of what is missing of a sequence; whether it was the last one."""
        self._go_back(tokens)
        missing = tokens[len(self._tokens) : -1]
        if missing:
            self._compute(missing[:CATCH_UP])
            mx.eval([cache.state for cache in self._cache])
        return len(missing) <= CATCH_UP

    def guess(self, tokens: Tokens, count: int, position: int, choose: Choose) -> mx.array:
        """How ``tokens`` goes on, from ``position`` of the answer on; not evaluated yet."""
        self._go_back(tokens)
        logits = self._compute(tokens[len(self._tokens) :])
        guesses: list[mx.array] = []
        for ahead in range(count):
            if guesses:
                logits = self.model(guesses[-1][None], cache=self._cache)
            last = logits[:, -1, : self._vocab_size]
            guesses.append(choose(last, position + ahead))
        return mx.concatenate(guesses)

    def guessed(self, guesses: list[int]) -> None:
        """What ``guess`` returned last; the last of them is not in the cache."""
        self._tokens.extend(guesses[:-1])

    def _compute(self, tokens: Tokens) -> mx.array:
        self._tokens.extend(tokens)
        # Without an embedding of its own is only what no tokenizer knows.
        known = [min(token, self._last_token) for token in tokens]
        logits: mx.array = self.model(mx.array(known)[None], cache=self._cache)
        return logits

    def _go_back(self, tokens: Tokens) -> None:
        """Cut the cache to what it has in common with a sequence, less its last token."""
        common = min(common_length(self._tokens, tokens), len(tokens) - 1)
        if common < len(self._tokens):
            trim_prompt_cache(self._cache, len(self._tokens) - common)
            del self._tokens[common:]


class Speculation:
    """One sequence that has the model for itself.

    ``tokens`` are its prompt and the ``made`` tokens of its answer so far; ``caches``
    hold all of them but the last. The ``processors`` must not depend on tokens.
    """

    def __init__(
        self,
        model: Any,
        spec: SequenceSpec,
        tokens: Tokens,
        made: int,
        caches: KVCaches,
        processors: list[LogitsProcessor],
        vocab_size: int,
    ) -> None:
        self.caches = caches
        self.tokens = tokens
        self.remaining = spec.max_tokens - made
        #: Of the token to come, in the answer.
        self.position = spec.sampled + made
        self._model = model
        self._processors = processors
        self._draw: Draw = create_draw(spec, vocab_size)

    def step(self, draft: DraftModel, count: int, end_tokens: frozenset[int]) -> list[int]:
        """The next tokens, one at least, and ``count`` more than that at most."""
        # The last token of an answer need not be guessed.
        count = min(count, self.remaining - 1)
        guesses = mx.array([], mx.int32)
        if count:
            guesses = draft.guess(self.tokens, count, self.position, self._choose)
        last = mx.array([self.tokens[-1]], guesses.dtype)
        logits = self._model(mx.concatenate([last, guesses])[None], cache=self.caches)
        drawn = [
            self._choose(logits[:, row, :], self.position + row).astype(guesses.dtype)
            for row in range(count + 1)
        ]
        both: Any = mx.concatenate([guesses, *drawn]).tolist()
        guessed, sampled = both[:count], both[count:]
        if count:
            draft.guessed(guessed)
        tokens: list[int] = []
        for row, token in enumerate(sampled):
            tokens.append(token)
            if token in end_tokens or (row < count and guessed[row] != token):
                break
        trim_prompt_cache(self.caches, count + 1 - len(tokens))
        self.tokens.extend(tokens)
        self.position += len(tokens)
        self.remaining -= len(tokens)
        return tokens

    def snapshot(self) -> Snapshot:
        """What is computed; the sequence is over."""
        return Snapshot.of(self.tokens[:-1].tolist(), self.caches)

    def _choose(self, logits: mx.array, position: int) -> mx.array:
        for processor in self._processors:
            logits = processor(mx.array([], mx.int32), logits)
        return self._draw(logits - mx.logsumexp(logits, axis=-1, keepdims=True), position)
