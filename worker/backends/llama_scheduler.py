"""Continuous batching: which tokens of which sequences the next batch computes.

A batch decodes one token of every running sequence and, with what room is left,
a chunk of the prompts that wait, in the order they came. The sequences share the
cells of one KV cache. When those run out, the youngest gives up its own and waits
at the front until another one ends: its answer goes on as if nothing had happened.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import llama_cpp

from worker.backends.base import SequenceSpec, StepToken, TokenLogprobs
from worker.backends.llama_batch import DecodeBatch
from worker.backends.llama_cells import CachedSequence
from worker.backends.llama_library import LOG
from worker.backends.llama_logits import LogProbabilities, apply_mask, check_finite, logits_row
from worker.backends.llama_pool import KvPool, Match
from worker.backends.llama_sampling import Sampler
from worker.backends.llama_vocab import Vocabulary
from worker.backends.lookup import guess
from worker.backends.prefill_pace import PrefillPace
from worker.backends.prefixes import Tokens, common_length, token_array

#: Prompt tokens of a batch that also decodes are as many as take so many seconds,
#: within bounds: a stream pauses no longer, unless the machine is very slow. A CPU gains
#: nothing from more, and loses with less (64 tokens run as fast as 512, 32 at 75 % of that).
_PAUSE_SECONDS = 0.2
_SMALLEST_CHUNK = 64
_LARGEST_CHUNK = 256
#: Tokens that each running sequence is left room for when another one starts.
_RESERVE = 32
#: A prompt waits a step for one that begins alike if that saves so many tokens.
_WORTH_WAITING = 32
_NO_ROOM = 1  # of llama_decode: the state is as before the call


class DecodeFailed(Exception):
    """``llama_decode`` returned an error; nothing can be said about the state."""


#: Where a sequence is that has no cells.
_NOWHERE = CachedSequence(-1, token_array(()), -1)


@dataclass(slots=True, eq=False)
class _Sequence:
    """One admitted sequence. ``tokens``: prompt and answer so far.

    ``cached`` is nowhere until its prefill starts, and again after a preemption.
    It decodes while all tokens but the last are in the cache. ``found``: tokens that
    were there already, until that is told. ``drafted``: there may be cells behind its
    cached length, of guesses. ``forks``: how much of it others have that waited with it.
    ``ahead``: how the answer goes on, as far as an earlier run of it had come.
    """

    spec: SequenceSpec
    tokens: Tokens
    sampler: Sampler
    remaining: int
    inspects: bool
    cached: CachedSequence = _NOWHERE
    found: int = 0
    answered: bool = False
    drafted: bool = False
    forks: set[int] = field(default_factory=set)
    ahead: deque[int] = field(default_factory=deque)


class _Chunk(NamedTuple):
    """Part of a prompt in a batch, up to ``end``; its ``row`` if the prompt ends there."""

    sequence: _Sequence
    end: int
    row: int | None


class Scheduler:
    """All sequences of one context; the methods are those of ``Backend``."""

    def __init__(
        self,
        context: Any,
        pool: KvPool,
        vocabulary: Vocabulary,
        context_length: int,
        draft_tokens: int,
    ) -> None:
        self._context = context
        self._pool = pool
        self._vocabulary = vocabulary
        self._context_length = context_length
        self._draft_tokens = draft_tokens if pool.traits.divisible else 0
        # Elsewhere than on a CPU nothing was measured, and cells would go through the host.
        gpu = llama_cpp.llama_supports_gpu_offload()
        self._lines_up = not (pool.traits.has_state or gpu)
        self._batch_size = llama_cpp.llama_n_batch(context)
        self._batch = DecodeBatch(self._batch_size)
        # In the order of admission, here and there, and all of the first before the second.
        self._decoding: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._pace = PrefillPace()
        self.prefilled = 0  # see base.Backend
        # The first of the waiting has no room until some sequence ends.
        self._blocked = False

    def admit(self, spec: SequenceSpec) -> None:
        sequence = _Sequence(
            spec=spec,
            tokens=token_array(spec.head),
            sampler=Sampler(spec, self._vocabulary, self._context_length),
            remaining=spec.max_tokens,
            inspects=bool(
                spec.validate_logits or spec.mask is not None or spec.top_logprobs is not None
            ),
            ahead=deque(spec.steps),
        )
        if self._pool.traits.has_state:
            self._note_forks(sequence)
        self._waiting.append(sequence)

    def step(self) -> list[StepToken]:
        batch, decoding = self._batch, self._decoding
        begun = time.perf_counter()
        self._pool.settle()
        if self._lines_up:
            self._pool.line_up()
        draft = self._guess()
        while True:
            batch.clear()
            for sequence in decoding:
                cached = sequence.cached
                batch.add(sequence.tokens[-1], cached.length, cached.slot)
            for ahead, token in enumerate(draft, 1):
                batch.add(token, cached.length + ahead, cached.slot)
            chunks = self._add_prompts() if self._waiting else []
            if not batch.size:
                return []
            batch.native.n_tokens = batch.size
            status = llama_cpp.llama_decode(self._context, batch.native)
            if status == 0:
                break
            if status == _NO_ROOM and draft:
                draft = token_array(())
            elif status != _NO_ROOM or not self._make_room():
                raise DecodeFailed(_failure(status))
        # Row i of the batch belongs to the i-th decoding sequence.
        rows = list(enumerate(decoding))
        for sequence in decoding:
            sequence.cached.length += 1
        for sequence, end, row in chunks:
            self.prefilled += end - sequence.cached.length
            self._pool.computed(sequence.cached, end)
            if row is not None:
                rows.append((row, sequence))
                decoding.append(self._waiting.popleft())
        # On a GPU the call only queues the work; progress means it is done.
        llama_cpp.llama_synchronize(self._context)
        if chunks:
            self._pace.measured(batch.size, time.perf_counter() - begun)
        return self._check_guesses(draft) if draft else self._sample(rows)

    def cancel(self, sequence_id: int) -> None:
        for sequences in (self._decoding, self._waiting):
            for sequence in sequences:
                if sequence.spec.sequence_id == sequence_id:
                    sequences.remove(sequence)
                    self._end(sequence)
                    return

    def computed(self, sequence_id: int) -> int:
        for sequence in self._waiting:
            if sequence.spec.sequence_id == sequence_id:
                return int(sequence.cached.length)
        return 0

    def close(self) -> None:
        """Release what belongs to the sequences; the context is the caller's."""
        for sequence in (*self._decoding, *self._waiting):
            sequence.sampler.free()
        self._decoding.clear()
        self._waiting.clear()

    def _guess(self) -> Tokens:
        """How the answer may go on, where one sequence has the machine for itself."""
        if not self._draft_tokens or self._waiting or len(self._decoding) != 1:
            return token_array(())
        sequence = self._decoding[0]
        if sequence.inspects or sequence.ahead:
            return token_array(())
        # The last token of an answer is never computed.
        return guess(sequence.tokens, min(self._draft_tokens, sequence.remaining - 1))

    def _check_guesses(self, draft: Tokens) -> list[StepToken]:
        """Sample row by row for as long as the guesses were what is sampled."""
        sequence = self._decoding[0]
        sequence.drafted = True
        result = self._sample([(0, sequence)])
        for row, token in enumerate(draft, 1):
            if result[-1].token != token or not self._decoding:
                break
            sequence.cached.length += 1
            result += self._sample([(row, sequence)])
        if self._decoding:
            self._pool.cut(sequence.cached)
            sequence.drafted = False
        return result

    def _add_prompts(self) -> list[_Chunk]:
        """Fill the batch with prompt tokens, in the order of the prompts."""
        batch = self._batch
        room = min(self._batch_size - batch.size, self._pace.fitting())
        # Who was preempted still counts as decoding, with that phase's shorter deadline.
        if self._decoding or self._waiting[0].answered:
            affordable = self._pace.fitting(_PAUSE_SECONDS)
            room = min(room, max(_SMALLEST_CHUNK, min(affordable, _LARGEST_CHUNK)))
        chunks: list[_Chunk] = []
        complete = True
        for sequence in self._waiting:
            if not room or (sequence.cached is _NOWHERE and not self._start(sequence)):
                break
            tokens, start = sequence.tokens, sequence.cached.length
            # None is complete before those that came earlier.
            last = len(tokens) if complete else len(tokens) - 1
            end = min(start + room, last, *sequence.cached.stops[:1])
            if end == start:
                break
            part = tokens[start:end]
            complete = end == len(tokens)
            batch.add_prompt(part, start, sequence.cached.slot, complete=complete)
            room -= len(part)
            chunks.append(_Chunk(sequence, end, batch.size - 1 if complete else None))
        return chunks

    def _note_forks(self, sequence: _Sequence) -> None:
        """Where a new prompt parts from those that have not been computed yet."""
        for other in self._waiting:
            common = common_length(sequence.tokens, other.tokens)
            sequence.forks.add(common)
            if other.cached is _NOWHERE:
                other.forks.add(common)
            else:
                self._pool.fork(other.cached, common)

    def _start(self, sequence: _Sequence) -> bool:
        """Find a place in the cache for a prompt, if there is one now."""
        alone = not self._batch.size
        if self._blocked and not alone:
            return False
        match = self._pool.find(sequence.tokens) if sequence.spec.cache_prompt else Match()
        if not alone:
            if match.promised - match.length >= _WORTH_WAITING:
                return False  # what it shares is in this very batch
            reserve = sum(min(s.remaining, _RESERVE) for s in (*self._decoding, sequence))
            if not self._pool.fits(sequence.tokens, match, reserve):
                self._blocked = True
                return False
        sequence.cached = self._pool.start(sequence.tokens, match, sequence.forks)
        if not sequence.answered:
            sequence.found = sequence.cached.length
        return True

    def _make_room(self) -> bool:
        """Free cells for the batch; False if it is a sequence alone that has no room."""
        if self._pool.clear_out():
            LOG.start()
            return True
        started = [s for s in self._waiting if s.cached is not _NOWHERE]
        if len(self._decoding) + len(started) < 2:
            return False
        if started:
            sequence = started[-1]
        else:
            sequence = self._decoding.pop()
            self._waiting.appendleft(sequence)
        self._pool.end(sequence.cached)
        self._pool.clear_out()
        sequence.cached = _NOWHERE
        # Or it would come back for the cells it has just given up.
        self._blocked = True
        LOG.start()  # the library's warning explains no later failure
        return True

    def _sample(self, rows: list[tuple[int, _Sequence]]) -> list[StepToken]:
        context, end_tokens = self._context, self._vocabulary.end_tokens
        result = []
        ended = []
        for row, sequence in rows:
            if sequence.ahead:
                sequence.tokens.append(sequence.ahead.popleft())
                self.prefilled += 1
                continue
            logprobs = None
            if sequence.inspects:
                token, is_end, logprobs = self._inspect(row, sequence)
            else:
                token = sequence.sampler.sample(context, row)
                is_end = token in end_tokens
            result.append(
                StepToken(sequence.spec.sequence_id, token, is_end, sequence.found, logprobs)
            )
            sequence.found = 0
            sequence.answered = True
            sequence.tokens.append(token)
            sequence.remaining -= 1
            if is_end or not sequence.remaining:
                ended.append(sequence)
        for sequence in ended:
            self._decoding.remove(sequence)
            self._end(sequence)
        return result

    def _inspect(self, row: int, sequence: _Sequence) -> tuple[int, bool, TokenLogprobs | None]:
        """Sample for a sequence that asks for more than the sampler can do."""
        spec, sampler = sequence.spec, sequence.sampler
        logits = logits_row(self._context, row, self._vocabulary.size)
        if spec.validate_logits:
            check_finite(logits)
        before = None if spec.top_logprobs is None else LogProbabilities(logits, spec.top_logprobs)
        if spec.mask is None or apply_mask(logits, spec.mask, sampler.banned):
            token = sampler.sample(self._context, row)
            is_end = token in self._vocabulary.end_tokens
            if spec.mask is not None:
                spec.mask.accept(token)
        else:
            # Nothing is allowed: the answer is over, also for one that ignores the end.
            token, is_end = self._vocabulary.end_token, True
        return token, is_end, before.of(token) if before else None

    def _end(self, sequence: _Sequence) -> None:
        sequence.sampler.free()
        if sequence.cached is not _NOWHERE:
            if sequence.drafted:
                self._pool.cut(sequence.cached)
            self._pool.end(sequence.cached, keep=sequence.spec.cache_prompt)
        self._blocked = False


def _failure(status: int) -> str:
    meaning = {
        1: "no room in the KV cache",
        2: "aborted",
        -1: "invalid batch",
        -2: "out of memory",
        -3: "computation failed",
    }.get(status, "unknown error")
    return f"llama_decode returned {status} ({meaning}): {LOG.reason}"
