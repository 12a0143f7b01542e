"""``Sampling`` as the samplers and logits processors of mlx-lm's batch generator."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

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
from worker.backends.base import NonFiniteLogits, SequenceSpec, TokenLogprobs
from worker.backends.draws import LOWEST_TEMPERATURE, position_seed
from worker.backends.mlx_mask import MaskProcessor

#: Log probabilities of one step, (1, vocabulary), to the token sampled.
Sampler = Callable[[mx.array], mx.array]
#: The same, for any position of the answer.
Draw = Callable[[mx.array, int], mx.array]
#: Tokens so far (prompt and answer) and logits to changed logits.
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

#: Below it the library's top-p would drop every token.
_SMALLEST_TOP_P = 1e-6


def create_draw(spec: SequenceSpec, vocab_size: int) -> Draw:
    """How one sequence draws: each draw is keyed by seed and position alone."""
    sampling = spec.sampling
    if sampling.temperature < LOWEST_TEMPERATURE:
        return lambda logprobs, _position: greedy_sampler(logprobs)
    filters = _filters(sampling, vocab_size)
    scale = 1.0 / sampling.temperature
    seed = random.getrandbits(64) if sampling.seed is None else sampling.seed

    def draw(logprobs: mx.array, position: int) -> mx.array:
        logprobs = logprobs.astype(mx.float32)
        for apply in filters:
            logprobs = apply(logprobs)
        key = mx.random.key(position_seed(seed, position))
        return mx.random.categorical(logprobs * scale, key=key)

    return draw


def create_sampler(spec: SequenceSpec, vocab_size: int) -> Sampler:
    """A sampler for one sequence, called once per token in order.

    Greedy sequences share one function: the generator then samples them in one call.
    What ``spec.steps`` are is known, and comes first.
    """
    if spec.sampling.temperature < LOWEST_TEMPERATURE and not spec.stepwise:
        return greedy_sampler
    draw = create_draw(spec, vocab_size)
    position = spec.sampled
    ahead = iter(spec.steps)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal position
        if (known := next(ahead, None)) is not None:
            return mx.array([known], mx.uint32)
        position += 1
        return draw(logprobs, position - 1)

    return sample


def idle_for(calls: int, process: LogitsProcessor) -> LogitsProcessor:
    """Leaves the logits of so many steps alone; nothing is sampled from them."""

    def wait(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal calls
        if calls:
            calls -= 1
            return logits
        return process(tokens, logits)

    return wait


def create_logits_processors(
    spec: SequenceSpec, end_tokens: Collection[int], context_length: int
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
    prompt_length = len(spec.prompt) - spec.sampled
    if sampling.presence_penalty:
        penalty = make_presence_penalty(sampling.presence_penalty, context_length)
        processors.append(_answer_only(penalty, prompt_length))
    if sampling.frequency_penalty:
        penalty = make_frequency_penalty(sampling.frequency_penalty, context_length)
        processors.append(_answer_only(penalty, prompt_length))
    if spec.mask is not None:
        processors.append(MaskProcessor(spec.mask, spec, end_tokens))
    return processors


class LogprobsTap:
    """Takes down what the model itself makes of each token; to be the first processor.

    The generator runs a step ahead: rows wait here until their token is told.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._rows: deque[mx.array] = deque()

    def __call__(self, _tokens: mx.array, logits: mx.array) -> mx.array:
        values = logits.astype(mx.float32)
        row = values - mx.logsumexp(values, axis=-1, keepdims=True)
        evaluate: Any = mx.async_eval  # untyped
        evaluate(row)
        self._rows.append(row)
        return logits

    def take(self, token: int) -> TokenLogprobs:
        """For the next token in order, which is ``token``: its own, and the likeliest."""
        # On the GPU this would wait for the step that runs ahead.
        with mx.stream(mx.cpu):
            logprobs = self._rows.popleft()[0]
            own = float(logprobs[token].item())  # type: ignore[arg-type]
            count = min(self._count, logprobs.size)
            if not count:
                return TokenLogprobs(own, [])
            likeliest = mx.argpartition(-logprobs, kth=count - 1)[:count]
            tokens: Any = likeliest.tolist()
            values: Any = logprobs[likeliest].tolist()
        top: list[tuple[int, float]] = list(zip(tokens, values, strict=True))
        return TokenLogprobs(own, sorted(top, key=lambda each: -each[1]))


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
