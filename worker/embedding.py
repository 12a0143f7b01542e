"""Runs requests on a model that makes vectors: inputs in, in batches, and vectors out.

The counterpart of ``worker.engine`` for what generates nothing. Requests wait their turn
in the same queue; those that have it share the batches, an input of each at a time, so
that a few texts are not kept waiting by thousands.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

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
    ModelKind,
    Phase,
    Rejected,
    Started,
)
from worker.backends.base import Embedder, EmbedInput
from worker.engine import Progress
from worker.kinds import wrong_kind
from worker.prompt import PromptBuilder
from worker.queue import RequestQueue
from worker.vitals import Vitals

#: Seconds spent on the tokens of long requests between two batches.
TOKENISING_BUDGET_S = 0.02


@dataclass(slots=True, eq=False)
class _Arrived:
    """A request, as far as it is tokenised."""

    request: Embed
    inputs: list[EmbedInput] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Running:
    """A request and its inputs that are not computed yet."""

    request_id: int
    inputs: deque[EmbedInput]
    started: bool = False
    vectors: list[bytes] = field(default_factory=list)


class EmbeddingEngine:
    """All requests of one loaded model. ``vitals`` is kept up to date for the I/O thread."""

    def __init__(
        self,
        embedder: Embedder,
        model: Loaded,
        vitals: Vitals,
        prompts: PromptBuilder | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prompts = prompts
        self._embedder = embedder
        self._model = model
        self._vitals = vitals
        self._clock = clock
        #: Those that take longer to tokenise than there was time for; whose turn it is first.
        self._arrived: dict[int, _Arrived] = {}
        self._queue = RequestQueue()
        self._waiting: dict[int, _Running] = {}
        self._running: deque[_Running] = deque()

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting and not self._arrived

    def prepare(self) -> None:
        """There is nothing that could be done ahead."""

    def submit(self, request: Job) -> Accepted | Rejected | None:
        """Check and enqueue a request; a refusal leaves no trace.

        None: it has not been tokenised to the end, and a later ``step`` has the answer.
        """
        self._vitals.phase = Phase.PREFILL
        self._vitals.in_hand += 1
        self._vitals.advance()
        try:
            arrived = _Arrived(self._check(request))
        except CodedError as error:
            self._update_vitals()
            return Rejected(request.request_id, error.code, error.message, error.param)
        answer = self._tokenise(arrived, self._clock() + TOKENISING_BUDGET_S)
        if answer is None:
            self._arrived[request.request_id] = arrived
        self._update_vitals()
        return answer

    def answer(self, inquiry: Inquiry) -> InquiryAnswer | Rejected:
        """Tell tokens or text, at once."""
        self._vitals.advance()
        try:
            if self._prompts is None:
                raise wrong_kind(self._model.kind)
            return self._prompts.answer(inquiry)
        except CodedError as error:
            return Rejected(inquiry.request_id, error.code, error.message, error.param)

    def cancel(self, request_id: int) -> Delta | None:
        """Drop a request; None if it is unknown, as when it has just ended."""
        if self._arrived.pop(request_id, None) is not None:
            self._update_vitals()
            return Delta(request_id, "", [], FinishReason.CANCELLED)
        if self._waiting.pop(request_id, None) is None:
            running = next((each for each in self._running if each.request_id == request_id), None)
            if running is None:
                # As nothing will be said of it, this tells that the message was taken up.
                self._vitals.advance()
                return None
            self._running.remove(running)
        self._queue.leave(request_id)
        self._update_vitals()
        return Delta(request_id, "", [], FinishReason.CANCELLED)

    def step(self) -> Progress:
        """Compute one batch, and return what came of it.

        Raises whatever the backend raises; the engine is unusable afterwards.
        """
        settled = self._settle()
        while len(self._running) < self._model.max_sequences:
            request_id = self._queue.take()
            if request_id is None:
                break
            self._running.append(self._waiting.pop(request_id))
        self._update_vitals()
        batch = self._take_batch()
        if not batch:
            return Progress([], [], settled)
        started = []
        for owner, _ in batch:
            if not owner.started:
                owner.started = True
                started.append(Started(owner.request_id, 0))
        vectors = self._embedder.embed([each for _, each in batch], self._vitals.advance)
        broken: dict[int, Rejected] = {}
        for (owner, _), vector in zip(batch, vectors, strict=True):
            if vector is not None:
                owner.vectors.append(vector)
            elif owner.request_id not in broken:
                broken[owner.request_id] = _not_finite(owner.request_id)
        embedded = [
            self._hand_out(owner)
            for owner in dict.fromkeys(map(_owner, batch))
            if owner.request_id not in broken
        ]
        for owner in list(self._running):
            if owner.request_id in broken or not owner.inputs:
                self._running.remove(owner)
                self._queue.leave(owner.request_id)
        self._vitals.advance()
        self._update_vitals()
        return Progress(started, [], [*settled, *broken.values()], embedded)

    def close(self) -> None:
        """There is nothing else at work."""

    def _check(self, request: Job) -> Embed:
        """Raises ``CodedError`` for what can be seen before any tokens are."""
        kind = self._model.kind
        if isinstance(request, Generate):
            raise wrong_kind(kind)
        if (request.query is not None) != (kind is ModelKind.RERANK):
            raise wrong_kind(kind)
        size = self._embedder.dimensions
        if request.dimensions is not None and not 1 <= request.dimensions <= size:
            raise CodedError(
                ErrorCode.INVALID_VALUE,
                f"dimensions: this model's vectors have {size}; "
                f"{request.dimensions} of them there are not",
                param="dimensions",
            )
        return request

    def _settle(self) -> list[Accepted | Rejected]:
        """Go on with the tokens of long requests, in turns; what became of those at the end."""
        settled: list[Accepted | Rejected] = []
        until = self._clock() + TOKENISING_BUDGET_S
        for request_id, arrived in list(self._arrived.items()):
            answer = self._tokenise(arrived, until)
            del self._arrived[request_id]
            if answer is None:
                self._arrived[request_id] = arrived
                break
            settled.append(answer)
        return settled

    def _tokenise(self, arrived: _Arrived, until: float) -> Accepted | Rejected | None:
        """Tokenise inputs till then, one in any case; enqueue the request when all are."""
        request, inputs = arrived.request, arrived.inputs
        param = "input" if request.query is None else "documents"
        single = len(request.inputs) == 1
        while len(inputs) < len(request.inputs):
            index = len(inputs)
            at = param if single else f"{param}[{index}]"
            try:
                tokens = self._encode(request.inputs[index], request, at)
            except CodedError as error:
                return Rejected(request.request_id, error.code, error.message, error.param)
            inputs.append(EmbedInput(tokens, request.dimensions))
            self._vitals.advance()
            if self._clock() >= until and len(inputs) < len(request.inputs):
                return None
        self._waiting[request.request_id] = _Running(request.request_id, deque(inputs))
        self._queue.enter(request.request_id, request.client, request.priority)
        return Accepted(request.request_id, sum(len(each.tokens) for each in inputs))

    def _encode(self, text: str | list[int], request: Embed, param: str) -> list[int]:
        if isinstance(text, list):
            tokens = text
            self._check_tokens(tokens, param)
        elif request.query is not None:
            tokens = self._embedder.encode_pair(request.query, text)
        else:
            tokens = self._embedder.encode_input(text)
        if not tokens:
            raise CodedError(ErrorCode.INVALID_VALUE, f"{param}: has no tokens", param=param)
        if len(tokens) > self._model.context_length:
            what = "" if request.query is None else " with the query"
            raise CodedError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"{param}: this model's maximum context length is "
                f"{self._model.context_length} tokens, but the text has {len(tokens)}{what}",
                param=param,
            )
        return tokens

    def _check_tokens(self, tokens: list[int], param: str) -> None:
        size = self._model.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise CodedError(
                    ErrorCode.INVALID_VALUE,
                    f"{param}: token id {token} is outside the vocabulary of {size} tokens",
                    param=param,
                )

    def _take_batch(self) -> list[tuple[_Running, EmbedInput]]:
        """Inputs of the running requests in turn, as long as they fit; one in any case."""
        batch: list[tuple[_Running, EmbedInput]] = []
        room = self._embedder.batch_tokens
        hungry = deque(self._running)
        while hungry and len(batch) < self._embedder.batch_sequences:
            owner = hungry.popleft()
            count = len(owner.inputs[0].tokens)
            if batch and count > room:
                continue
            batch.append((owner, owner.inputs.popleft()))
            room -= count
            if owner.inputs:
                hungry.append(owner)
        # Who was first now is last next time: an input that did not fit gets its turn.
        self._running.rotate(-1)
        return batch

    def _hand_out(self, owner: _Running) -> Embedded:
        vectors, owner.vectors = owner.vectors, []
        return Embedded(owner.request_id, vectors, last=not owner.inputs)

    def _update_vitals(self) -> None:
        vitals = self._vitals
        vitals.in_hand = len(self._running) + len(self._waiting) + len(self._arrived)
        vitals.phase = Phase.PREFILL if vitals.in_hand else Phase.IDLE


def _owner(item: tuple[_Running, EmbedInput]) -> _Running:
    return item[0]


def _not_finite(request_id: int) -> Rejected:
    return Rejected(
        request_id, ErrorCode.INTERNAL_ERROR, "the model made a vector that is not finite"
    )
