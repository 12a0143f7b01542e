"""Runs requests on a backend: tokens in a slot become text, within limits.

Requests wait for one of the backend's slots in the order of ``worker.queue``, those
with a constraint after it was compiled. Nothing here blocks for long or knows the wire;
``worker.session`` calls ``step`` in a loop.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from protocol.chat import join_extras
from protocol.errors import CodedError, ErrorCode
from protocol.messages import (
    Accepted,
    Delta,
    Embed,
    Embedded,
    FinishReason,
    Generate,
    Inquiry,
    InquiryAnswer,
    Job,
    Loaded,
    Phase,
    Prefilled,
    Rejected,
    Started,
)
from worker.answer import Answer
from worker.backends.base import Backend, SequenceSpec, TokenMask
from worker.compiler import ConstraintCompiler
from worker.kinds import wrong_kind
from worker.prompt import Prepared, PromptBuilder
from worker.queue import RequestQueue
from worker.stops import StopMatcher
from worker.vitals import Vitals

#: Seconds that a step waits for a constraint when there is nothing else to do: so long
#: may a message have to wait.
COMPILE_WAIT_S = 0.02
#: Seconds between two times that it is told how far the prompts are.
TELL_PREFILL_S = 1.0


class Progress(NamedTuple):
    """What one step brought: requests that began with it, and what was added to which.

    There is at most one delta per request. ``settled``: what became of requests for
    which ``submit`` had no answer; it comes before the rest. ``embedded``: of a model that
    makes vectors, what there is instead of deltas. ``prefilled``: how far prompts are,
    now and then.
    """

    started: list[Started]
    deltas: list[Delta]
    settled: Sequence[Accepted | Rejected] = ()
    embedded: Sequence[Embedded] = ()
    prefilled: Sequence[Prefilled] = ()


class Engine:
    """All requests of one loaded model. ``vitals`` is kept up to date for the I/O thread.

    Of an answer that is taken up again, ``exact_tokens`` at most are computed one a step, which
    takes as long as it took to make them, and makes sure that the rest is what it would have
    been. Of a longer one all are computed at once: nobody waits for minutes for a last digit.
    """

    def __init__(
        self,
        backend: Backend,
        model: Loaded,
        vitals: Vitals,
        prompts: PromptBuilder | None = None,
        *,
        exact_tokens: int = 1024,
    ) -> None:
        self._backend = backend
        self._prompts = prompts or PromptBuilder(backend, model)
        self._model = model
        self._exact_tokens = exact_tokens
        self._vitals = vitals
        self._prefilled = backend.prefilled
        self._prefill_told_at = float("-inf")
        self._queue = RequestQueue()
        self._waiting: dict[int, Answer] = {}
        self._running: dict[int, Answer] = {}
        self._compiler = ConstraintCompiler(backend.vocabulary, model.vocab_size)
        self._compiling: dict[int, tuple[Generate, Prepared]] = {}

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting and not self._compiling

    def prepare(self) -> None:
        """Do what may be done once and takes a moment, now that there is one."""
        self._compiler.prepare()

    def submit(self, request: Job) -> Accepted | Rejected | None:
        """Check and enqueue a request; a refusal leaves no trace.

        None: the constraint is being compiled, and a later ``step`` has the answer.
        """
        if isinstance(request, Embed):
            return _rejected(request, wrong_kind(self._model.kind))
        # Templates and tokenisers can hang as well: this is work in hand.
        self._vitals.phase = Phase.PREFILL
        self._vitals.in_hand += 1
        try:
            prepared = self._prompts.prepare(request)
        except CodedError as error:
            self._update_vitals()
            return _rejected(request, error)
        if prepared.constraint is None:
            return self._enqueue(request, prepared)
        self._compiling[request.request_id] = (request, prepared)
        self._compiler.start(
            request.request_id, prepared.constraint, param=prepared.constraint_param
        )
        self._update_vitals()
        return None

    def _enqueue(
        self, request: Generate, prepared: Prepared, mask: TokenMask | None = None
    ) -> Accepted | Rejected:
        resumed = request.resume_tokens
        spec = SequenceSpec(
            sequence_id=request.request_id,
            prompt=prepared.tokens + resumed,
            max_tokens=self._budget(len(prepared.tokens), request.max_tokens) - len(resumed),
            sampling=request.sampling,
            ignore_eos=request.ignore_eos,
            validate_logits=request.validate_logits,
            top_logprobs=request.top_logprobs,
            cache_prompt=request.cache_prompt,
            mask=mask,
            sampled=len(resumed),
            stepwise=len(resumed) if len(resumed) <= self._exact_tokens else 0,
        )
        answer = Answer(
            spec,
            self._backend.new_detokenizer(prepared.markers),
            StopMatcher(request.stop),
            self._backend.token_bytes,
            prepared.parser,
            prepared.echo,
        )
        try:
            goes_on = spec.max_tokens >= 1 and answer.replay(resumed)
        except Exception as error:
            self._update_vitals()
            return _unreadable(request.request_id, error)
        if not goes_on:
            self._update_vitals()
            return _rejected(request, _no_resume())
        if mask is not None:
            for token in resumed:
                mask.accept(token)
        self._waiting[request.request_id] = answer
        self._queue.enter(request.request_id, request.client, request.priority)
        self._update_vitals()
        return Accepted(request.request_id, len(prepared.tokens))

    def answer(self, inquiry: Inquiry) -> InquiryAnswer | Rejected:
        """Answer at once, whatever is running: no sequence comes of it."""
        self._vitals.phase = Phase.PREFILL
        self._vitals.in_hand += 1
        self._vitals.advance()
        try:
            return self._prompts.answer(inquiry)
        except CodedError as error:
            return Rejected(inquiry.request_id, error.code, error.message, error.param)
        finally:
            self._update_vitals()

    def cancel(self, request_id: int) -> Delta | None:
        """Drop a request; None if it is unknown, as when it has just ended."""
        if self._running.pop(request_id, None) is not None:
            self._backend.cancel(request_id)
        elif self._compiling.pop(request_id, None) is not None:
            self._compiler.cancel(request_id)
        elif self._waiting.pop(request_id, None) is None:
            # As nothing will be said of it, this tells that the message was taken up.
            self._vitals.advance()
            return None
        self._queue.leave(request_id)
        self._update_vitals()
        return Delta(request_id, "", [], FinishReason.CANCELLED)

    def step(self) -> Progress:
        """Fill free slots, move every running sequence on, and return what came of it.

        Raises whatever the backend raises; the engine is unusable afterwards.
        """
        settled = self._settle() if self._compiling else []
        self._fill_slots()
        self._update_vitals()
        if not self._running:
            return Progress([], [], settled)
        started: list[Started] = []
        deltas: dict[int, Delta] = {}
        tokens = self._backend.step()
        for produced in tokens:
            sequence_id = produced.sequence_id
            before = deltas.get(sequence_id)
            answer = self._running.get(sequence_id)
            if answer is None:
                # Made ahead, as it turned out past the end: nobody's.
                continue
            if not answer.begun:
                started.append(Started(sequence_id, produced.cached_tokens))
            try:
                delta = answer.add(produced)
            except Exception as error:
                # The model has done nothing wrong: the other answers go on.
                self.cancel(sequence_id)
                deltas.pop(sequence_id, None)
                settled.append(_unreadable(sequence_id, error))
                continue
            if delta.finish is not None:
                if answer.stops.stopped and answer.sampled < answer.limit:
                    self._backend.cancel(sequence_id)
                del self._running[sequence_id]
                self._queue.leave(sequence_id)
            deltas[sequence_id] = delta if before is None else _join(before, delta)
        if tokens or self._has_prefilled():
            self._vitals.advance()
        # As of before the step: while all answers are under way, there is nothing to tell.
        prefilled = self._tell_prefill() if self._vitals.phase is Phase.PREFILL else ()
        self._update_vitals()
        return Progress(started, list(deltas.values()), settled, prefilled=prefilled)

    def close(self) -> None:
        """Leave the backend alone from now on, on other threads too."""
        self._compiler.close()

    def _settle(self) -> list[Accepted | Rejected]:
        """What became of the constraints by now, or within a moment if nothing else is to do."""
        busy = self._running or self._waiting
        settled: list[Accepted | Rejected] = []
        for request_id, mask in self._compiler.finished(0.0 if busy else COMPILE_WAIT_S):
            request, prepared = self._compiling.pop(request_id)
            if isinstance(mask, CodedError):
                settled.append(_rejected(request, mask))
            else:
                gated = prepared.gate(mask) if prepared.gate is not None else mask
                settled.append(self._enqueue(request, prepared, gated))
            self._vitals.advance()
        return settled

    def _tell_prefill(self) -> Sequence[Prefilled]:
        now = time.monotonic()
        if now < self._prefill_told_at + TELL_PREFILL_S:
            return ()
        told = [
            Prefilled(request_id, self._backend.computed(request_id), len(answer.spec.prompt))
            for request_id, answer in self._running.items()
            if not answer.begun
        ]
        if told:
            self._prefill_told_at = now
        return told

    def _has_prefilled(self) -> bool:
        """Whether a step without tokens computed something: one that did not moves nothing."""
        before, self._prefilled = self._prefilled, self._backend.prefilled
        return self._prefilled != before

    def _fill_slots(self) -> None:
        while len(self._running) < self._model.max_sequences:
            request_id = self._queue.take()
            if request_id is None:
                return
            answer = self._running[request_id] = self._waiting.pop(request_id)
            # A backend may begin with the prompt, or look it up, right here.
            self._update_vitals()
            self._backend.admit(answer.spec)

    def _budget(self, prompt_tokens: int, max_tokens: int | None) -> int:
        room = self._model.context_length - prompt_tokens
        return room if max_tokens is None else min(max_tokens, room)

    def _update_vitals(self) -> None:
        vitals = self._vitals
        vitals.in_hand = len(self._running) + len(self._waiting) + len(self._compiling)
        if not vitals.in_hand:
            vitals.phase = Phase.IDLE
        elif self._running and all(answer.begun for answer in self._running.values()):
            vitals.phase = Phase.DECODE
        else:
            vitals.phase = Phase.PREFILL


def _rejected(request: Job, error: CodedError) -> Rejected:
    return Rejected(request.request_id, error.code, error.message, error.param)


def _unreadable(request_id: int, error: Exception) -> Rejected:
    """What becomes of an answer that a parser fails at."""
    traceback.print_exception(error)
    reason = f"the answer cannot be read: {type(error).__name__}: {error}"
    return Rejected(request_id, ErrorCode.INTERNAL_ERROR, reason)


def _no_resume() -> CodedError:
    # Whoever made the tokens would have ended the answer with them.
    return CodedError(ErrorCode.INTERNAL_ERROR, "the answer does not go on behind its tokens")


def _join(first: Delta, second: Delta) -> Delta:
    return Delta(
        first.request_id,
        first.text + second.text,
        first.tokens + second.tokens,
        second.finish,
        join_extras([each for each in (first.extras, second.extras) if each is not None]),
    )
