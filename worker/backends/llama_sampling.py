"""``Sampling`` as a chain of libllama's native samplers."""

from __future__ import annotations

import math
import random
from typing import Any

import llama_cpp

from worker.backends.base import SequenceSpec
from worker.backends.llama_vocab import Vocabulary

_SEED_BITS = 32
_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: means "choose one"


def native_seed(seed: int | None) -> int:
    """Fold a seed of any size into the library's 32 bits; None draws one."""
    if seed is None:
        seed = random.getrandbits(_SEED_BITS)
    folded = (seed ^ (seed >> _SEED_BITS)) & 0xFFFFFFFF
    return folded if folded != _RANDOM_SEED else 0


def create_sampler(spec: SequenceSpec, vocabulary: Vocabulary, context_length: int) -> Any:
    """A sampler chain for one sequence; the caller frees it with ``llama_sampler_free``."""
    sampling = spec.sampling
    params = llama_cpp.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = llama_cpp.llama_sampler_chain_init(params)

    def add(sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(chain, sampler)

    bias = dict(sampling.logit_bias)
    banned = vocabulary.suppressed_tokens
    if spec.ignore_eos:
        banned |= vocabulary.end_tokens
    bias.update(dict.fromkeys(banned, -math.inf))
    if bias:
        add(_logit_bias(bias, vocabulary.size))
    if sampling.repetition_penalty != 1.0:
        penalty = llama_cpp.llama_sampler_init_penalties(
            vocabulary.size, context_length, sampling.repetition_penalty, 0.0, 0.0
        )
        accept = llama_cpp.llama_sampler_accept
        for token in spec.prompt:
            accept(penalty, token)
        add(penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        # Apart from the repetition penalty, because this one sees the answer only.
        add(
            llama_cpp.llama_sampler_init_penalties(
                vocabulary.size,
                context_length,
                1.0,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        )
    if sampling.temperature <= 0:
        add(llama_cpp.llama_sampler_init_greedy())
        return chain
    if 0 < sampling.top_k < vocabulary.size:
        add(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        add(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        add(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
    if sampling.temperature != 1:
        add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
    add(llama_cpp.llama_sampler_init_dist(native_seed(sampling.seed)))
    return chain


def _logit_bias(bias: dict[int, float], vocab_size: int) -> Any:
    entry = llama_cpp.llama_logit_bias
    entries = (entry * len(bias))(*(entry(token, value) for token, value in bias.items()))
    return llama_cpp.llama_sampler_init_logit_bias(vocab_size, len(bias), entries)
