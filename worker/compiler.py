"""Compiles constraints on a thread of its own, while the engine goes on."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from protocol.chat import Constraint
from protocol.errors import CodedError, ErrorCode
from worker.backends.base import TokenMask, TokenTable

if TYPE_CHECKING:
    from worker.constraints import Grammars

#: Seconds that a constraint may wait and compile, before its request is refused.
TIME_LIMIT_S = 10.0
#: Of the thread. The library recurses as deep as a grammar's rules refer to each other:
#: 3 kB for every few bytes of its text. It is address space, not memory, until used.
STACK_BYTES = 256 * 1024 * 1024
#: Seconds that ``close`` waits for what is being compiled.
_CLOSE_S = 2.0


#: A constraint, or what makes one once the model's special tokens are known, by their
#: texts; that may raise ``CodedError``.
Source = Constraint | Callable[[Mapping[str, int]], Constraint]


class _Job(NamedTuple):
    request_id: int
    constraint: Source
    param: str


class Compiled(NamedTuple):
    """What came of a request's constraint: a mask, or why there is none."""

    request_id: int
    mask: TokenMask | CodedError


class ConstraintCompiler:
    """One constraint after the other. All methods are for one thread, the engine's.

    ``read_vocabulary``, which takes a moment as well, is called on the compiler's thread,
    before the first constraint; None says that the model's tokens allow none.
    """

    def __init__(
        self,
        read_vocabulary: Callable[[], TokenTable | None],
        vocab_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_vocabulary = read_vocabulary
        self._vocab_size = vocab_size
        self._clock = clock
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._outcomes: SimpleQueue[Compiled] = SimpleQueue()
        # By request: what is in hand, with the field at fault if it takes too long.
        self._deadlines: dict[int, tuple[float, str]] = {}
        self._thread: threading.Thread | None = None

    def prepare(self) -> None:
        """Have the vocabulary read now, so that no request has to wait for that."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="constraints", daemon=True)
        default = threading.stack_size(STACK_BYTES)
        try:
            self._thread.start()
        finally:
            threading.stack_size(default)

    def start(self, request_id: int, constraint: Source, *, param: str) -> None:
        """Compile for a request; ``finished`` will tell what came of it."""
        self.prepare()
        self._deadlines[request_id] = (self._clock() + TIME_LIMIT_S, param)
        self._jobs.put(_Job(request_id, constraint, param))

    def cancel(self, request_id: int) -> None:
        """Forget a request; unknown ids are ignored."""
        self._deadlines.pop(request_id, None)

    def finished(self, wait_s: float = 0.0) -> list[Compiled]:
        """What is there by now, of requests not cancelled; each is told once.

        Waits for so many seconds if there is nothing yet.
        """
        outcomes = []
        try:
            outcome = self._outcomes.get(timeout=wait_s) if wait_s else self._outcomes.get_nowait()
            while True:
                if self._deadlines.pop(outcome.request_id, None) is not None:
                    outcomes.append(outcome)
                outcome = self._outcomes.get_nowait()
        except Empty:
            pass
        now = self._clock()
        for request_id, (deadline, param) in list(self._deadlines.items()):
            if now >= deadline:
                del self._deadlines[request_id]
                outcomes.append(Compiled(request_id, _too_slow(param)))
        return outcomes

    def close(self) -> None:
        """Compile nothing more, and wait a little for what is under way."""
        self._deadlines.clear()
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    # --- on the thread ------------------------------------------------------------

    def _run(self) -> None:
        grammars: Grammars | str
        try:
            grammars = self._create_grammars()
        except Exception as error:
            traceback.print_exc()
            grammars = str(error)
        while (job := self._jobs.get()) is not None:
            if job.request_id in self._deadlines:
                self._outcomes.put(Compiled(job.request_id, _compile(grammars, job)))

    def _create_grammars(self) -> Grammars | str:
        """Or the reason why there can be none."""
        try:
            from worker.constraints import Grammars
        except ImportError as error:
            return f"llguidance is not installed: {error}"
        table = self._read_vocabulary()
        if table is None:
            return "what its tokens stand for is not known"
        return Grammars(table, self._vocab_size)


def _compile(grammars: Grammars | str, job: _Job) -> TokenMask | CodedError:
    if isinstance(grammars, str):
        return CodedError(
            ErrorCode.UNSUPPORTED_PARAMETER,
            f"this model's answers cannot be constrained: {grammars}",
            param=job.param,
        )
    try:
        constraint = job.constraint
        if not isinstance(constraint, Constraint):
            constraint = constraint(grammars.special)
        return grammars.create_mask(constraint, param=job.param)
    except CodedError as error:
        return error
    except BaseException as error:  # a panic of the library is no Exception
        traceback.print_exc()
        return CodedError(
            ErrorCode.INVALID_VALUE,
            f"the constraint cannot be compiled: {type(error).__name__}: {error}",
            param=job.param,
        )


def _too_slow(param: str) -> CodedError:
    return CodedError(
        ErrorCode.INVALID_VALUE,
        f"the constraint could not be compiled within {TIME_LIMIT_S:g} seconds",
        param=param,
    )
