"""``Sampling`` as the samplers and logits processors of mlx-lm's batch generator."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import mlx.core as mx
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    greedy_sampler,
    make_frequency_penalty,
    make_logits_processors,
    make_presence_penalty,
    make_repetition_penalty,
)

from protocol.messages import Sampling
from worker.backends.base import NonFiniteLogits, SequenceSpec

#: Log probabilities of one step, (1, vocabulary), to the token sampled.
Sampler = Callable[[mx.array], mx.array]
#: Tokens so far (prompt and answer) and logits to changed logits.
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

_MASK64 = (1 << 64) - 1
#: Below it the library's top-p would drop every token.
_SMALLEST_TOP_P = 1e-6


def position_seed(seed: int, position: int) -> int:
    """A 64-bit seed for the token at ``position`` of an answer (splitmix64)."""
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
    return mixed ^ (mixed >> 31)


def create_sampler(sampling: Sampling, vocab_size: int) -> Sampler:
    """A sampler for one sequence, called once per token in order.

    Each draw is keyed by seed and position alone. Greedy sequences share one
    function: the generator then samples them in one call.
    """
    if sampling.temperature <= 0:
        return greedy_sampler
    filters = _filters(sampling, vocab_size)
    scale = 1.0 / sampling.temperature
    seed = random.getrandbits(64) if sampling.seed is None else sampling.seed
    position = 0

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal position
        logprobs = logprobs.astype(mx.float32)
        for apply in filters:
            logprobs = apply(logprobs)
        key = mx.random.key(position_seed(seed, position))
        position += 1
        return mx.random.categorical(logprobs * scale, key=key)

    return sample


def create_logits_processors(
    spec: SequenceSpec, end_tokens: Iterable[int], context_length: int
) -> list[LogitsProcessor]:
    """The changes to one sequence's logits, in the order they apply."""
    sampling = spec.sampling
    processors: list[LogitsProcessor] = []
    if spec.validate_logits:
        processors.append(_check_finite)
    bias = dict(sampling.logit_bias)
    if spec.ignore_eos:
        bias.update(dict.fromkeys(end_tokens, -math.inf))
    if bias:
        processors += make_logits_processors(logit_bias=bias)
    if sampling.repetition_penalty != 1.0:
        processors.append(make_repetition_penalty(sampling.repetition_penalty, context_length))
    prompt_length = len(spec.prompt)
    if sampling.presence_penalty:
        penalty = make_presence_penalty(sampling.presence_penalty, context_length)
        processors.append(_answer_only(penalty, prompt_length))
    if sampling.frequency_penalty:
        penalty = make_frequency_penalty(sampling.frequency_penalty, context_length)
        processors.append(_answer_only(penalty, prompt_length))
    return processors


def _filters(sampling: Sampling, vocab_size: int) -> list[Callable[[mx.array], mx.array]]:
    # The library's filters raise on values that would switch them off.
    filters: list[Callable[[mx.array], mx.array]] = []
    if 0 < sampling.top_k < vocab_size:
        filters.append(lambda logprobs: apply_top_k(logprobs, sampling.top_k))
    if sampling.top_p < 1:
        top_p = max(sampling.top_p, _SMALLEST_TOP_P)
        filters.append(lambda logprobs: apply_top_p(logprobs, top_p))
    if sampling.min_p > 0:
        filters.append(lambda logprobs: apply_min_p(logprobs, sampling.min_p))
    return filters


def _answer_only(processor: LogitsProcessor, prompt_length: int) -> LogitsProcessor:
    return lambda tokens, logits: processor(tokens[prompt_length:], logits)


def _check_finite(_tokens: mx.array, logits: mx.array) -> mx.array:
    if not mx.isfinite(logits).all().item():
        raise NonFiniteLogits("the model produced logits that are NaN or infinite")
    return logits
