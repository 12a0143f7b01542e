"""All sequences of a model in mlx-lm's batch generator, sharing what begins alike.

A sequence starts from the KV cache of what its prompt has in common with an earlier
one or with one that runs. If it would soon have more in common with one whose prompt
is just being computed, it waits for that: prompts that arrive together compute what
they share once.

With a draft model, a sequence that is alone leaves the generator: see ``mlx_draft``. It
comes back as soon as another one is there.

The generator works one step ahead: the tokens of a step were sampled by the previous
one, while the GPU already computes the next. A sequence's KV cache holds its prompt
and all tokens that it has returned, the last one included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import trim_prompt_cache

from worker.backends.base import SequenceSpec, StepToken
from worker.backends.mlx_draft import DraftModel, Speculation, can_guess_for
from worker.backends.mlx_prompts import (
    KVCaches,
    PromptCache,
    Snapshot,
    can_always_trim,
)
from worker.backends.mlx_sampling import (
    LogitsProcessor,
    LogprobsTap,
    create_logits_processors,
    create_sampler,
    idle_for,
)
from worker.backends.prefill_pace import PrefillPace
from worker.backends.prefixes import Tokens, common_length, token_array

#: Prompt tokens of one sequence in one step, on a machine that is fast enough.
PREFILL_CHUNK = 512
#: Prompt tokens in a step that other sequences wait for, there: more would hold up their
#: streams, and a chunk of this size is computed at nearly the speed of a longer one.
SHARED_PREFILL = 128
#: Prompts that are prefilled together.
PREFILL_SEQUENCES = 4
#: Tokens that must be saved for a sequence to wait, or for a running one to be copied.
WORTH_SHARING = 64


@dataclass(slots=True)
class _Sequence:
    spec: SequenceSpec
    prompt: Tokens
    cached: int = 0  # tokens of the prompt that were found
    computed: int = 0  # tokens of the prompt in the KV cache, with those found
    stops: list[int] = field(default_factory=list)  # where a snapshot will be taken
    logprobs: LogprobsTap | None = None
    ahead: int = 0  # tokens of the prompt's end that are still computed one a step
    answer: Tokens = field(default_factory=lambda: token_array(()))  # the tokens told so far

    @property
    def begun(self) -> bool:
        return bool(self.answer)


class SequenceBatch:
    """The sequences of one model. The methods are those of ``base.Backend``."""

    def __init__(
        self,
        model: Any,
        *,
        end_tokens: frozenset[int],
        vocab_size: int,
        context_length: int,
        max_sequences: int,
        prompt_cache_bytes: int,
        draft: DraftModel | None = None,
        draft_tokens: int = 0,
    ) -> None:
        self._model = model
        self._end_tokens = end_tokens
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._kept = PromptCache(prompt_cache_bytes) if prompt_cache_bytes > 0 else None
        self._trims = can_always_trim(model, context_length)
        self._waiting: dict[int, _Sequence] = {}  # by sequence id
        self._running: dict[int, _Sequence] = {}  # by the generator's uid
        self._draft = draft
        self._draft_tokens = draft_tokens
        self._alone: Speculation | None = None  # the only one that runs, out of the generator
        self._pace = PrefillPace()
        self.prefilled = 0  # see base.Backend
        self._generator: Any = BatchGenerator(
            model,
            stop_tokens=[[token] for token in sorted(end_tokens)],
            completion_batch_size=max_sequences,
            prefill_batch_size=min(max_sequences, PREFILL_SEQUENCES),
            prefill_step_size=PREFILL_CHUNK,
        )

    def admit(self, spec: SequenceSpec) -> None:
        # Only the next step knows what arrived together.
        prompt = token_array(spec.head)
        self._waiting[spec.sequence_id] = _Sequence(spec, prompt, ahead=spec.stepwise)

    def step(self) -> list[StepToken]:
        if self._alone is not None and not self._waiting:
            return self._speculate(self._alone)
        if self._waiting:
            self._come_back()
            self._place_waiting()
        if not self._running:
            return []
        self._generator.prefill_step_size = self._chunk()
        begun, before = time.perf_counter(), self.prefilled
        prompts, responses = self._generator.next()
        for response in prompts:
            self._count(response.uid, response.progress[0])
        if prompts:
            self._pace.measured(self.prefilled - before, time.perf_counter() - begun)
        sampled = [token for each in responses if (token := self._sampled(each)) is not None]
        if self._draft is not None:
            self._leave(self._draft)
        return sampled

    def cancel(self, sequence_id: int) -> None:
        if self._waiting.pop(sequence_id, None) is not None:
            return
        for uid, sequence in self._running.items():
            if sequence.spec.sequence_id == sequence_id:
                self._keep(sequence, partial(self._snapshot, uid))
                self._generator.remove([uid])
                self._alone = None
                del self._running[uid]
                return

    def computed(self, sequence_id: int) -> int:
        for sequence in self._running.values():
            if sequence.spec.sequence_id == sequence_id:
                return sequence.computed
        return 0

    def close(self) -> None:
        self._generator.close()
        self._waiting.clear()
        self._running.clear()
        if self._kept is not None:
            self._kept.clear()

    # --- into the generator -------------------------------------------------------

    def _place_waiting(self) -> None:
        for sequence_id, sequence in list(self._waiting.items()):
            if self._kept is None or not sequence.spec.cache_prompt:
                found, caches = 0, None
            else:
                best, found = self._kept.find(sequence.prompt)
                uid, running, soon = self._running_alike(sequence.prompt)
                if soon >= max(found, running) + WORTH_SHARING:
                    continue
                if running >= found + WORTH_SHARING:
                    best, found = self._snapshot(uid), running
                    self._kept.keep(best)
                caches = None if best is None else best.beginning(found)
            del self._waiting[sequence_id]
            self._place(sequence, found, caches)

    def _running_alike(self, prompt: Tokens) -> tuple[int, int, int]:
        """What running sequences have of a prompt: whose has most, how much, and how much soon."""
        uid, most, soon = -1, 0, 0
        for each, other in self._running.items():
            common = min(common_length(other.prompt, prompt), len(prompt) - 1)
            if self._trims:
                soon = max(soon, common)
                if min(common, other.computed) > most:
                    uid, most = each, min(common, other.computed)
            else:
                soon = max([soon, *(stop for stop in other.stops if stop <= common)])
        return uid, most, soon

    def _place(self, sequence: _Sequence, found: int, caches: KVCaches | None) -> None:
        spec, prompt = sequence.spec, sequence.prompt.tolist()
        sequence.cached = sequence.computed = found
        if self._kept is not None and spec.cache_prompt and not self._trims:
            sequence.stops = self._stops(sequence, found)
        cuts = [found, *(stop for stop in sequence.stops if stop < len(prompt) - 1), len(prompt)]
        processors = create_logits_processors(spec, self._end_tokens, self._context_length)
        if spec.top_logprobs is not None:
            sequence.logprobs = LogprobsTap(spec.top_logprobs)
            processors.insert(0, sequence.logprobs)
        if sequence.ahead:
            processors = [idle_for(sequence.ahead, each) for each in processors]
        segments = [prompt[start:end] for start, end in pairwise(cuts)]
        uid = self._insert(spec, segments, prompt[:found], caches, processors)
        self._running[uid] = sequence

    def _insert(
        self,
        spec: SequenceSpec,
        segments: list[list[int]],
        known: list[int],
        caches: KVCaches | None,
        processors: list[LogitsProcessor],
    ) -> int:
        (uid,) = self._generator.insert_segments(
            [segments],
            max_tokens=[spec.stepwise + spec.max_tokens],
            caches=[caches],
            all_tokens=[known],
            samplers=[create_sampler(spec, self._vocab_size)],
            logits_processors=[processors],
        )
        return int(uid)

    def _stops(self, sequence: _Sequence, found: int) -> list[int]:
        """Where to take snapshots of a prompt whose cache cannot be cut back later.

        At its end, for the next turn of a conversation and for the same prompt again,
        and where it parts from another prompt: a third may begin as both do.
        """
        assert self._kept is not None
        others = [*self._running.values(), *self._waiting.values()]
        shared = [common_length(other.prompt, sequence.prompt) for other in others]
        fork = max([self._kept.common(sequence.prompt), *shared])
        end = len(sequence.prompt) - 1
        stops = [fork] if found + WORTH_SHARING <= fork < end else []
        return [*stops, end] if end > found else stops

    def _chunk(self) -> int:
        """Tokens of each prompt in the next step."""
        prefilling = sum(each.computed < len(each.prompt) for each in self._running.values())
        together = min(max(prefilling, 1), PREFILL_SEQUENCES)
        fitting = max(1, self._pace.fitting() // together)
        if prefilling == len(self._running):
            return min(PREFILL_CHUNK, fitting)
        return min(SHARED_PREFILL // together, fitting)

    # --- beside it ----------------------------------------------------------------

    def _leave(self, draft: DraftModel) -> None:
        """Let a sequence that is alone go on with guesses, once the draft model knows it."""
        if self._waiting or len(self._running) != 1:
            return
        ((uid, sequence),) = self._running.items()
        spec, made = sequence.spec, len(sequence.answer)
        if not (made and spec.max_tokens - made > 1 and can_guess_for(spec)):
            return
        tokens = sequence.prompt + sequence.answer
        with mx.stream(self._generator.stream):
            if not draft.catch_up(tokens):
                return
            caches, _ = self._generator.extract_cache([uid])[uid]
            # The token sampled ahead is sampled again: it may be guessed as well.
            trim_prompt_cache(caches, 1)
            mx.eval([cache.state for cache in caches])
        self._generator.remove([uid])
        processors = create_logits_processors(spec, self._end_tokens, self._context_length)
        self._alone = Speculation(
            self._model, spec, tokens, made, caches, processors, self._vocab_size
        )

    def _come_back(self) -> None:
        """Let the sequence that was alone go on in the generator."""
        alone, self._alone = self._alone, None
        if alone is None:
            return
        (sequence,) = self._running.values()
        spec = replace(
            sequence.spec, max_tokens=alone.remaining, sampled=alone.position, stepwise=0
        )
        *known, last = alone.tokens.tolist()
        processors = create_logits_processors(spec, self._end_tokens, self._context_length)
        uid = self._insert(spec, [[last]], known, alone.caches, processors)
        self._running = {uid: sequence}

    def _speculate(self, alone: Speculation) -> list[StepToken]:
        assert self._draft is not None
        (sequence,) = self._running.values()
        with mx.stream(self._generator.stream):
            tokens = alone.step(self._draft, self._draft_tokens, self._end_tokens)
        sequence.answer.extend(tokens)
        if not alone.remaining or tokens[-1] in self._end_tokens:
            self._alone = None
            self._running.clear()
            self._keep(sequence, alone.snapshot)
        number = sequence.spec.sequence_id
        return [StepToken(number, token, token in self._end_tokens) for token in tokens]

    # --- out of it ----------------------------------------------------------------

    def _count(self, uid: int, computed: int) -> None:
        """``computed`` tokens of the part of the prompt that was not found are in the cache."""
        sequence = self._running[uid]
        if sequence.begun:
            return  # it has come back
        self.prefilled += sequence.cached + computed - sequence.computed
        sequence.computed = sequence.cached + computed
        if sequence.computed in sequence.stops:
            sequence.stops.remove(sequence.computed)
            self._keep(sequence, partial(self._snapshot, uid))

    def _sampled(self, response: Any) -> StepToken | None:
        """What there is to tell; None: the token was known."""
        uid, token = response.uid, response.token
        sequence = self._running[uid]
        if sequence.ahead:
            sequence.ahead -= 1
            sequence.prompt.append(token)
            sequence.computed += 1
            self.prefilled += 1
            return None
        sampled = StepToken(
            sequence.spec.sequence_id,
            token,
            token in self._end_tokens,
            0 if sequence.begun else sequence.cached,
            None if sequence.logprobs is None else sequence.logprobs.take(token),
        )
        sequence.answer.append(token)
        if response.finish_reason is not None:
            del self._running[uid]
            self._keep(sequence, lambda: Snapshot.of(response.all_tokens, response.prompt_cache))
        return sampled

    def _keep(self, sequence: _Sequence, snapshot: Callable[[], Snapshot]) -> None:
        """Keep what is computed of a sequence for others that begin as it does, if it may be."""
        if self._kept is not None and sequence.spec.cache_prompt:
            self._kept.keep(snapshot())

    def _snapshot(self, uid: int) -> Snapshot:
        if self._alone is not None:
            return self._alone.snapshot()
        with mx.stream(self._generator.stream):
            caches, tokens = self._generator.extract_cache([uid])[uid]
        return Snapshot.of(tokens, caches)
