"""What a model will take: weights, KV cache, compute buffers, the process itself.

Pure. Sizes are bytes. ``scripts/memory_plan.py`` compares plans with what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from protocol.messages import ModelKind
from supervisor.geometry import Geometry
from supervisor.modelfiles import ModelFiles

#: A worker without a model: interpreter, libraries, their threads.
OVERHEAD_BYTES: Mapping[str, int] = {
    "llama": 64 * 1024 * 1024,
    "mlx": 96 * 1024 * 1024,
    "simulated": 40 * 1024 * 1024,
}
_UNKNOWN_OVERHEAD = 96 * 1024 * 1024
#: Backends that have their whole KV cache from the start.
_TAKES_KV_AT_ONCE = frozenset({"llama"})
#: Tokens that are computed together while a prompt is prefilled.
PREFILL_TOKENS = 512
#: Bound of the context length where nobody names one, as the backends have it.
DEFAULT_CONTEXT_LENGTH = 8192
#: Copies of a recurrent state that are kept for later requests.
_KEPT_STATES = 8
#: A context that is offered instead is a multiple of this, and worth having.
CONTEXT_STEP = 256
_LEAST_CONTEXT = 512


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """``correction``: what this model took more (or less) than planned when it was loaded
    before. ``prompt_cache`` is what may be kept of ended requests; it can be less than the
    backend would like, but is promised all the same; ``prompt_cache_set``: an operator said so."""

    context_length: int
    sequences: int
    weights: int
    kv: int
    compute: int
    overhead: int
    correction: int = 0
    prompt_cache: int = 0
    kv_at_once: bool = True
    prompt_cache_set: bool = False

    @property
    def required(self) -> int:
        """Without which it cannot run."""
        parts = self.weights + self.kv + self.compute + self.overhead + self.correction
        return max(parts, self.certain + self.compute)

    @property
    def certain(self) -> int:
        """What it has from its load on, however little the process itself takes."""
        return self.weights + self.kv * self.kv_at_once

    @property
    def total(self) -> int:
        return self.required + self.prompt_cache

    @property
    def prompt_cache_bytes(self) -> int | None:
        """The bound to give to the backend; None where nothing is known to go by."""
        return self.prompt_cache if self.kv or self.prompt_cache_set else None

    @property
    def at_load(self) -> int:
        """What is expected to be taken when it has just been loaded, without a correction."""
        return self.weights + self.overhead + self.kv * self.kv_at_once

    @property
    def growth(self) -> int:
        """What may come on top of that while it is used."""
        return self.compute + self.prompt_cache + self.kv * (not self.kv_at_once)


@dataclass(frozen=True, slots=True)
class Terms:
    """What decides a plan beside the model. ``prompt_cache``: as an operator has set it."""

    backend: str
    context_length: int | None
    sequences: int
    draft_bytes: int = 0
    prompt_cache: int | None = None


def overhead_bytes(backend: str) -> int:
    """What a worker takes before it has a model."""
    return OVERHEAD_BYTES.get(backend, _UNKNOWN_OVERHEAD)


def plan_memory(files: ModelFiles, terms: Terms, correction: int = 0) -> MemoryPlan:
    """The plan of a model on these terms, with all the prompt cache it would like."""
    traits = files.traits
    context = context_length(files, terms)
    kv = _kv_bytes(files, terms, context)
    prompt_cache = terms.prompt_cache
    if prompt_cache is None:
        prompt_cache = kv + _KEPT_STATES * _state_bytes(traits.geometry, terms.sequences)
    return MemoryPlan(
        context_length=context,
        sequences=terms.sequences,
        weights=files.size_bytes + terms.draft_bytes,
        kv=kv,
        compute=_compute_bytes(traits.geometry, traits.kind, terms.backend, context),
        overhead=overhead_bytes(terms.backend),
        correction=correction,
        prompt_cache=prompt_cache if traits.kind is ModelKind.GENERATE else 0,
        kv_at_once=terms.backend in _TAKES_KV_AT_ONCE,
        prompt_cache_set=terms.prompt_cache is not None,
    )


def largest_context(files: ModelFiles, terms: Terms, correction: int, available: int) -> int | None:
    """The largest shorter context with which the model would fit, if it is worth having."""
    steps = (context_length(files, terms) - 1) // CONTEXT_STEP
    low, high = 0, steps  # what fits for sure, what may fit
    while low < high:
        middle = (low + high + 1) // 2
        shorter = Terms(terms.backend, middle * CONTEXT_STEP, terms.sequences, terms.draft_bytes, 0)
        if plan_memory(files, shorter, correction).required <= available:
            low = middle
        else:
            high = middle - 1
    found = low * CONTEXT_STEP
    return found if found >= _LEAST_CONTEXT else None


def context_length(files: ModelFiles, terms: Terms) -> int:
    """Tokens of a request, as the backend will choose them."""
    wanted = terms.context_length or DEFAULT_CONTEXT_LENGTH
    # What asks for more is refused by the backend, whatever the memory.
    return min(files.traits.context_length or wanted, wanted)


def _kv_bytes(files: ModelFiles, terms: Terms, context: int) -> int:
    geometry = files.traits.geometry
    state = _state_bytes(geometry, terms.sequences)
    if terms.backend == "llama":
        # The sequences share the cells; two bytes for each number, whatever the weights are.
        return (geometry.kv + geometry.windowed_kv) * context * 2 + state
    windowed = geometry.windowed_kv * min(context, geometry.window)
    of_a_sequence = (geometry.kv * context + windowed) * files.traits.float_bytes
    return of_a_sequence * terms.sequences + state


def _state_bytes(geometry: Geometry, sequences: int) -> int:
    return geometry.state * 4 * sequences


def _compute_bytes(geometry: Geometry, kind: ModelKind, backend: str, context: int) -> int:
    """The largest step: a part of a prompt through the widest layer, or to the logits."""
    tokens = PREFILL_TOKENS if kind is ModelKind.GENERATE else max(PREFILL_TOKENS, context)
    logits = geometry.vocabulary if backend == "llama" and kind is ModelKind.GENERATE else 0
    widest = max(logits, 3 * geometry.feed_forward + 4 * geometry.embedding)
    # The mask of what each token sees, with four bytes and with two; or all the scores.
    scores = 3 * context // 2 if backend == "llama" else geometry.heads * context
    return 4 * tokens * (widest + scores)
