"""Runs requests on a backend: tokens in a slot become text, within limits.

Requests wait for one of the backend's slots in the order of ``worker.queue``.
Nothing here blocks or knows the wire; ``worker.session`` calls ``step`` in a loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from protocol.errors import CodedError, ErrorCode
from protocol.messages import (
    Accepted,
    Delta,
    FinishReason,
    Generate,
    Loaded,
    Phase,
    Rejected,
    Started,
)
from worker.backends.base import Backend, Detokenizer, SequenceSpec
from worker.queue import RequestQueue
from worker.stops import StopMatcher
from worker.vitals import Vitals


@dataclass(slots=True)
class _Answer:
    """The output side of one request."""

    spec: SequenceSpec
    detokenizer: Detokenizer
    stops: StopMatcher
    sampled: int = 0


class Progress(NamedTuple):
    """What one step brought: requests that began with it, and what was added to which.

    There is at most one delta per request.
    """

    started: list[Started]
    deltas: list[Delta]


class Engine:
    """All requests of one loaded model. ``vitals`` is kept up to date for the I/O thread."""

    def __init__(self, backend: Backend, model: Loaded, vitals: Vitals) -> None:
        self._backend = backend
        self._model = model
        self._vitals = vitals
        self._queue = RequestQueue()
        self._waiting: dict[int, _Answer] = {}
        self._running: dict[int, _Answer] = {}

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def submit(self, request: Generate) -> Accepted | Rejected:
        """Check and enqueue a request; a refusal leaves no trace."""
        # Templates and tokenisers can hang as well: this is work in hand.
        self._vitals.phase = Phase.PREFILL
        self._vitals.in_hand += 1
        self._vitals.advance()
        try:
            prompt = self._encode(request)
            max_tokens = self._budget(len(prompt), request.max_tokens)
        except CodedError as error:
            self._update_vitals()
            return Rejected(request.request_id, error.code, error.message, error.param)
        spec = SequenceSpec(
            sequence_id=request.request_id,
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=request.sampling,
            ignore_eos=request.ignore_eos,
            validate_logits=request.validate_logits,
        )
        self._waiting[request.request_id] = _Answer(
            spec, self._backend.new_detokenizer(), StopMatcher(request.stop)
        )
        self._queue.enter(request.request_id, request.client, request.priority)
        self._update_vitals()
        return Accepted(request.request_id, len(prompt))

    def cancel(self, request_id: int) -> Delta | None:
        """Drop a request; None if it is unknown, as when it has just ended."""
        if self._running.pop(request_id, None) is not None:
            self._backend.cancel(request_id)
        elif self._waiting.pop(request_id, None) is None:
            return None
        self._queue.leave(request_id)
        self._update_vitals()
        return Delta(request_id, "", [], FinishReason.CANCELLED)

    def step(self) -> Progress:
        """Fill free slots, move every running sequence on, and return what came of it.

        Raises whatever the backend raises; the engine is unusable afterwards.
        """
        self._fill_slots()
        self._update_vitals()
        started: list[Started] = []
        deltas: dict[int, Delta] = {}
        for produced in self._backend.step():
            sequence_id = produced.sequence_id
            before = deltas.get(sequence_id)
            if before is not None and before.finish is not None:
                # Made ahead, as it turned out past the end: nobody's.
                continue
            answer = self._running[sequence_id]
            if not answer.sampled:
                started.append(Started(sequence_id, produced.cached_tokens))
            delta = self._extend(answer, produced.token, produced.is_end)
            if delta.finish is not None:
                del self._running[sequence_id]
                self._queue.leave(sequence_id)
            deltas[sequence_id] = delta if before is None else _join(before, delta)
        self._vitals.advance()
        self._update_vitals()
        return Progress(started, list(deltas.values()))

    def _fill_slots(self) -> None:
        while len(self._running) < self._model.max_sequences:
            request_id = self._queue.take()
            if request_id is None:
                return
            answer = self._running[request_id] = self._waiting.pop(request_id)
            # A backend may begin with the prompt, or look it up, right here.
            self._update_vitals()
            self._backend.admit(answer.spec)
            self._vitals.advance()

    def _extend(self, answer: _Answer, token: int, is_end: bool) -> Delta:
        answer.sampled += 1
        sequence_id = answer.spec.sequence_id
        if is_end:
            text, _ = self._end(answer)
            return Delta(sequence_id, text, [token], FinishReason.STOP)
        text = answer.stops.feed(answer.detokenizer.add(token))
        exhausted = answer.sampled >= answer.spec.max_tokens
        if answer.stops.stopped:
            if not exhausted:
                self._backend.cancel(sequence_id)
            return Delta(sequence_id, text, [token], FinishReason.STOP)
        if exhausted:
            rest, stopped = self._end(answer)
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            return Delta(sequence_id, text + rest, [token], reason)
        return Delta(sequence_id, text, [token])

    def _end(self, answer: _Answer) -> tuple[str, bool]:
        """The text that was held back, and whether a stop string was in it."""
        text = answer.stops.feed(answer.detokenizer.finish()) + answer.stops.flush()
        return text, answer.stops.stopped

    def _encode(self, request: Generate) -> list[int]:
        if request.messages is not None:
            prompt, param = self._backend.encode_chat(request.messages), "messages"
        elif isinstance(request.prompt, str):
            prompt, param = self._backend.encode_text(request.prompt), "prompt"
        else:
            prompt, param = request.prompt or [], "prompt"
            self._check_tokens(prompt, param)
        if not prompt:
            raise CodedError(ErrorCode.INVALID_VALUE, "the prompt has no tokens", param=param)
        self._check_tokens(request.sampling.logit_bias, "logit_bias")
        room = self._model.context_length - len(prompt)
        if room < 1:
            raise CodedError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"this model's context length is {self._model.context_length} tokens, "
                f"but the prompt has {len(prompt)} and the answer needs at least one",
                param=param,
            )
        return prompt

    def _check_tokens(self, tokens: Iterable[int], param: str) -> None:
        size = self._model.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise CodedError(
                    ErrorCode.INVALID_VALUE,
                    f"token id {token} is outside the vocabulary of {size} tokens",
                    param=param,
                )

    def _budget(self, prompt_tokens: int, max_tokens: int | None) -> int:
        room = self._model.context_length - prompt_tokens
        return room if max_tokens is None else min(max_tokens, room)

    def _update_vitals(self) -> None:
        vitals = self._vitals
        vitals.in_hand = len(self._running) + len(self._waiting)
        if not vitals.in_hand:
            vitals.phase = Phase.IDLE
        elif self._running and all(answer.sampled for answer in self._running.values()):
            vitals.phase = Phase.DECODE
        else:
            vitals.phase = Phase.PREFILL


def _join(first: Delta, second: Delta) -> Delta:
    return Delta(
        first.request_id, first.text + second.text, first.tokens + second.tokens, second.finish
    )
