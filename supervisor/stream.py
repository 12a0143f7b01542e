"""One request's answer on its way from a worker to whoever asked for it.

The channel's reader pushes, one consumer pulls. Everything that arrives while
the consumer is busy is handed over in one piece, so a slow client costs fewer,
larger writes, and at a bound it loses its request instead of everyone's memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from sys import getsizeof
from typing import NamedTuple

from protocol.chat import Extras, join_extras
from protocol.errors import CodedError, ErrorCode
from protocol.messages import Delta, FinishReason
from supervisor.resumption import KeptTokens


class Chunk(NamedTuple):
    """Text that became available, and why the answer ended, if it did."""

    text: str
    finish: FinishReason | None
    extras: Extras | None = None


class Prefill(NamedTuple):
    """How much of a prompt is computed, in tokens."""

    computed: int
    total: int


#: Takes a piece of the answer at once, or says False: its client is behind.
Sink = Callable[[str, Extras | None], bool]

#: What holding a piece takes besides its text, in bytes: its place in a list; an
#: ``Extras`` with its lists; part of a tool call; the log probability of a token.
_SLOT, _EXTRAS, _CALL, _LOGPROB = 8, 250, 150, 200


class RequestStream:
    """A running request. One consumer; every method runs on the event loop.

    ``on_close`` is called when the consumer lets go (``close``) before the end,
    or has fallen behind by more than ``max_buffer_bytes`` (None: no bound, for an
    answer that is collected whole): the owner then cancels the work. With ``keeps_tokens``
    the answer can go on when its worker dies.
    """

    def __init__(
        self,
        *,
        max_buffer_bytes: int | None,
        on_close: Callable[[], None],
        keeps_tokens: bool = False,
    ) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        #: Those of the completion tokens that are of the reasoning.
        self.reasoning_tokens = 0
        #: While the prompt is being computed, what was last heard of that.
        self.prefill: Prefill | None = None
        #: Seconds from the submission to the start of the answer; None: not started.
        self.started_after_s: float | None = None
        #: Seconds from the start of the answer to its end; 0 until then.
        self.generated_s = 0.0
        #: Of an ``Embed``: the vectors so far. All are there when ``collect`` returns.
        self.vectors: list[bytes] = []
        #: The tokens of the answer, where they are kept.
        self.kept = KeptTokens() if keeps_tokens else None
        #: How often the answer has gone on, or is about to, on another worker.
        self.resumes = 0
        self._started_at = 0.0
        self._max_buffer_bytes = max_buffer_bytes
        self._on_close = on_close
        self._accepted = False
        self._texts: list[str] = []
        self._extras: list[Extras] = []
        self._buffered = 0
        self._finish: FinishReason | None = None
        self._error: CodedError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._delivered = False
        self._closed = False
        self._when_over: Callable[[], None] | None = None

    # --- producer ---

    def accept(self, prompt_tokens: int) -> None:
        """The worker took the request; of what runs again elsewhere that is nothing new."""
        if not self._accepted:
            self.prompt_tokens = prompt_tokens
            self._accepted = True
            self._wake()

    def start(self, cached_tokens: int, after_s: float) -> None:
        """The worker has the prompt in its KV cache, ``cached_tokens`` of it from before.

        A resumed answer has started long ago.
        """
        if self.has_started:
            return
        self.cached_tokens = cached_tokens
        self.prefill = None
        self.started_after_s = after_s
        self._started_at = time.monotonic()

    def push(self, delta: Delta) -> None:
        """Add what one step brought; past the buffer's bound the request fails."""
        if self._finish is not None or self._error is not None:
            return
        self.completion_tokens += len(delta.tokens)
        if (kept := self.kept) is not None:
            kept.add(delta.tokens)
        text, extras = delta.text, delta.extras
        if extras is not None:
            self.reasoning_tokens += extras.reasoning_tokens
        if text or extras is not None:
            if (
                self._sink is not None
                and delta.finish is None
                # Otherwise the consumer is at work on what came before.
                and self._waiter is not None
                and not self._texts
                and not self._extras
                and self._take(self._sink, text, extras)
            ):
                return
            if text:
                self._texts.append(text)
                self._buffered += _SLOT + getsizeof(text)
            if extras is not None:
                self._extras.append(extras)
                self._buffered += _size(extras)
            if self._max_buffer_bytes is not None and self._buffered > self._max_buffer_bytes:
                self.fail(
                    CodedError(
                        ErrorCode.STREAM_OVERFLOW,
                        "the client reads more slowly than the model writes; the answer is cut off",
                    )
                )
                self._on_close()
                return
        self._finish = delta.finish
        if delta.finish is not None and self.has_started:
            self.generated_s = time.monotonic() - self._started_at
        if text or extras is not None or delta.finish is not None:
            self._wake()
        if delta.finish is not None:
            self._tell_over()

    def add_vectors(self, vectors: Sequence[bytes], *, last: bool) -> None:
        """Add to what an ``Embed`` has brought, which is only ever collected whole."""
        if self.ended:
            return
        self.vectors += vectors
        if last:
            self._finish = FinishReason.STOP
            self.generated_s = time.monotonic() - self._started_at if self.has_started else 0.0
            self._wake()
            self._tell_over()

    def fail(self, error: CodedError) -> None:
        """End the request with an error; what is buffered is still delivered first."""
        if not self.ended:
            self._error = error
            self._wake()
            self._tell_over()

    def restart(self) -> None:
        """Forget an unfinished run, none of which was delivered, before it runs again."""
        assert not self._delivered
        self._texts.clear()
        self._extras.clear()
        self.vectors.clear()
        self._buffered = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.prefill = None
        self.started_after_s = None
        if self.kept is not None:
            self.kept.clear()

    @property
    def ended(self) -> bool:
        return self._finish is not None or self._error is not None

    @property
    def completed(self) -> bool:
        """Whether it has ended, and well."""
        return self._finish is not None and self._error is None

    @property
    def failed(self) -> bool:
        return self._error is not None

    @property
    def has_started(self) -> bool:
        return self.started_after_s is not None

    @property
    def delivered(self) -> bool:
        """Whether any of the answer has reached the consumer."""
        return self._delivered

    # --- consumer ---

    async def accepted(self) -> int:
        """Wait until the worker has validated the request; return its prompt tokens.

        Raises ``CodedError`` when the request was refused or its model failed.
        """
        while not self._accepted:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self.prompt_tokens

    async def next(self) -> Chunk:
        """Return what arrived since the last call, waiting until there is something.

        Raises ``CodedError`` when the request ended in an error.
        """
        while not self._texts and not self._extras and self._finish is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        text = self._texts[0] if len(self._texts) == 1 else "".join(self._texts)
        extras = join_extras(self._extras)
        self._texts.clear()
        self._extras.clear()
        self._buffered = 0
        self._delivered = True
        return Chunk(text, self._finish, extras)

    def drain_into(self, sink: Sink) -> None:
        """From now on, while the consumer waits in ``next``, text goes straight to ``sink``.

        Called from within the channel's reader: no task has to wake up for a token.
        ``next`` then returns only with what the sink did not take, and with the end.
        Only after ``next`` has returned once.
        """
        assert self._delivered
        self._sink = sink

    def when_over(self, call: Callable[[], None]) -> None:
        """Call ``call`` when the request has ended, well or not; at once if it has.

        The consumer may be held up with what came before the end.
        """
        self._when_over = call
        if self.ended:
            self._tell_over()

    async def collect(self) -> Chunk:
        """Wait for the whole answer; nothing counts as delivered before it is complete.

        Raises ``CodedError`` when the request ended in an error.
        """
        while self._finish is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        return await self.next()

    def close(self) -> None:
        """Let go of the request; cancels it unless it has ended. Idempotent."""
        if not self._closed:
            self._closed = True
            if not self.ended:
                self._on_close()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _take(self, sink: Sink, text: str, extras: Extras | None) -> bool:
        try:
            return sink(text, extras)
        except Exception:
            # We are in the reader of a worker that has done nothing wrong: let the
            # consumer meet it in its own time, with the text that is still there.
            self._sink = None
            return False

    def _tell_over(self) -> None:
        call, self._when_over = self._when_over, None
        if call is not None:
            call()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _size(extras: Extras) -> int:
    """Bytes of memory, roughly."""
    calls = sum(_CALL + getsizeof(piece.arguments) for piece in extras.tool_calls)
    logprobs = sum(1 + len(each.top) for each in extras.logprobs)
    return _EXTRAS + getsizeof(extras.reasoning) + calls + logprobs * _LOGPROB
