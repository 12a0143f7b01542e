"""``Sampling`` as a chain of libllama's native samplers, keyed by seed and position."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import llama_cpp

from protocol.messages import Sampling
from worker.backends.base import SequenceSpec
from worker.backends.draws import LOWEST_TEMPERATURE, position_seed
from worker.backends.llama_vocab import Vocabulary

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: means "choose one"
_GREEDY = -1


def draw_seed(seed: int, position: int) -> int:
    """The library's seed, of 32 bits, for the draw at ``position`` of an answer."""
    mixed = position_seed(seed, position)
    folded = (mixed ^ (mixed >> 32)) & 0xFFFFFFFF
    return folded if folded != _RANDOM_SEED else 0


class Sampler:
    """Samples one sequence; each draw is keyed by the seed and its position alone.

    ``banned`` is what is never sampled. Owns native memory until ``free``.
    """

    __slots__ = ("_chain", "_draw_index", "_position", "_seed", "banned")

    def __init__(self, spec: SequenceSpec, vocabulary: Vocabulary, context_length: int) -> None:
        sampling = spec.sampling
        self.banned = vocabulary.suppressed_tokens
        if spec.ignore_eos:
            self.banned |= vocabulary.end_tokens
        self._seed = random.getrandbits(64) if sampling.seed is None else sampling.seed
        self._position = spec.sampled
        params = llama_cpp.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = llama_cpp.llama_sampler_chain_init(params)
        bias = dict(sampling.logit_bias) | dict.fromkeys(self.banned, -math.inf)
        if bias:
            self._add(_logit_bias(bias, vocabulary.size))
        for penalty in _penalties(spec, vocabulary.size, context_length):
            self._add(penalty)
        if sampling.temperature < LOWEST_TEMPERATURE:
            self._draw_index = _GREEDY
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        for each in _filters(sampling, vocabulary.size):
            self._add(each)
        self._draw_index = llama_cpp.llama_sampler_chain_n(self._chain)
        self._add(llama_cpp.llama_sampler_init_dist(0))

    def sample(self, context: Any, row: int) -> int:
        """The next token, from a row of the last batch."""
        chain, index = self._chain, self._draw_index
        if index != _GREEDY:
            # The library's generator has a state that can be set by a new one only.
            llama_cpp.llama_sampler_free(llama_cpp.llama_sampler_chain_remove(chain, index))
            seed = draw_seed(self._seed, self._position)
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
            self._position += 1
        token: int = llama_cpp.llama_sampler_sample(chain, context, row)
        return token

    def free(self) -> None:
        """Release the native samplers; called once."""
        llama_cpp.llama_sampler_free(self._chain)

    def _add(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)


def _logit_bias(bias: dict[int, float], vocab_size: int) -> Any:
    entry = llama_cpp.llama_logit_bias
    entries = (entry * len(bias))(*(entry(token, value) for token, value in bias.items()))
    return llama_cpp.llama_sampler_init_logit_bias(vocab_size, len(bias), entries)


def _penalties(spec: SequenceSpec, vocab_size: int, context_length: int) -> Iterator[Any]:
    """The penalties in use, told what there is of the prompt and of the answer."""
    sampling, prompt = spec.sampling, spec.prompt
    create, accept = llama_cpp.llama_sampler_init_penalties, llama_cpp.llama_sampler_accept
    if sampling.repetition_penalty != 1.0:
        penalty = create(vocab_size, context_length, sampling.repetition_penalty, 0.0, 0.0)
        # How often a token was there does not count, and none is forgotten, as prompt and
        # answer are no longer than the context: once for each is enough (22 ms, not
        # 460, for 128k tokens with 8k different ones).
        for token in set(prompt):
            accept(penalty, token)
        yield penalty
    if sampling.presence_penalty or sampling.frequency_penalty:
        # Apart from the repetition penalty, because these see the answer only.
        frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
        penalty = create(vocab_size, context_length, 1.0, frequency, presence)
        for token in prompt[len(prompt) - spec.sampled :]:
            accept(penalty, token)
        yield penalty


def _filters(sampling: Sampling, vocab_size: int) -> Iterator[Any]:
    if 0 < sampling.top_k < vocab_size:
        yield llama_cpp.llama_sampler_init_top_k(sampling.top_k)
    if sampling.top_p < 1:
        yield llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1)
    if sampling.min_p > 0:
        yield llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1)
    if sampling.temperature != 1:
        yield llama_cpp.llama_sampler_init_temp(sampling.temperature)
