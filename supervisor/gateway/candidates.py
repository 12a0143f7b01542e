"""The models that may serve a call which does not name one by its own id.

An alias, a preset or ``auto`` stands for several: they are tried in their order, and one
that is quarantined, cannot be loaded or dies before anything was sent makes room for the
next. What is wrong with the request itself, or a full queue, is nobody else's to solve.
A model that is asked for by its id has no other to go to.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from protocol.errors import CodedError, ErrorCode

log = logging.getLogger(__name__)

#: The request has crashed the model, or is known to.
_CRASHED = (ErrorCode.MODEL_CRASHED, ErrorCode.REQUEST_POISONED)

#: What says that a model cannot serve now, whatever the request is.
PASSED_ON = frozenset(
    {
        ErrorCode.MODEL_NOT_FOUND,
        ErrorCode.MODEL_NOT_READY,
        ErrorCode.MODEL_UNSTABLE,
        ErrorCode.MODEL_UNSUPPORTED_ARCH,
        ErrorCode.MODEL_UNSUPPORTED_BACKEND,
        ErrorCode.MODEL_INCOMPLETE,
        *_CRASHED,
        ErrorCode.MODEL_CANARY_FAILED,
        ErrorCode.MODEL_LOAD_TIMEOUT,
        ErrorCode.MODEL_LOADER_CRASHED,
        ErrorCode.MODEL_UNLOADED,
        ErrorCode.INSUFFICIENT_MEMORY,
    }
)
#: Fields at fault that no request has: a model cannot be loaded as it is set up.
LOAD_FIELDS = frozenset({"draft_model", "tool_format"})
#: Models that one call may have seen crash, each of which ran it twice: it may well be the
#: cause, and must not go through a whole list.
MAX_CRASHES = 2

T = TypeVar("T")

#: Tries one model, to be loaded with these options if it has to be; raises ``CodedError``.
Attempt = Callable[[str, Mapping[str, Any]], Awaitable[T]]
#: Which of those that are left is next.
Choose = Callable[[Sequence[str]], str]


class Candidates(Generic[T]):
    """The models that a call may still go to, and what those said that could not serve it."""

    def __init__(
        self,
        name: str,
        ids: Sequence[str],
        options: Mapping[str, Any],
        attempt: Attempt[T],
        choose: Choose,
    ) -> None:
        self._name = name
        self._left = list(ids)
        self._choose = choose
        self._options = options
        self._attempt = attempt
        self._trying = ""
        self._said: list[tuple[str, CodedError]] = []

    @property
    def left(self) -> Sequence[str]:
        """Those that were not tried yet."""
        return self._left

    @property
    def exhausted(self) -> bool:
        """Whether the one that has the call now is the last."""
        return not self._left

    async def first(self) -> T:
        """Try one after the other. Raises the first one's error when all have failed, or the one
        that no other model could change."""
        while True:
            self._trying = self._choose(self._left)
            self._left.remove(self._trying)
            try:
                return await self._attempt(self._trying, self._options)
            except CodedError as error:
                self._hear(error)

    async def after(self, error: CodedError) -> T:
        """The one that had it has failed before anything was sent: the next. Raises as ``first``,
        ``error`` itself if it is no reason to go on."""
        self._hear(error)
        return await self.first()

    def _hear(self, error: CodedError) -> None:
        """Raises unless there is another model to try."""
        if error.code not in PASSED_ON and error.param not in LOAD_FIELDS:
            raise error
        self._said.append((self._trying, error))
        crashes = sum(each.code in _CRASHED for _, each in self._said)
        if self._left and crashes < MAX_CRASHES:
            log.debug("%s: not served by %s (%s)", self._name, self._trying, error.code.value)
            return
        _, first = self._said[0]
        if len(self._said) == 1:
            raise first
        told = "; ".join(f"{model}: {each.message}" for model, each in self._said)
        raise CodedError(
            first.code,
            f"no model of {self._name!r} can serve this: {told}",
            param=first.param,
            retry_after_s=first.retry_after_s,
            details=first.details,
        ) from error
