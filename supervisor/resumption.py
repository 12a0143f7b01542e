"""How a request goes on whose worker has died: from its beginning, from where it was, or not."""

from __future__ import annotations

from array import array
from enum import StrEnum
from typing import NamedTuple

#: How often a request of which nothing has come may be given to a worker. The second
#: crash under it may well be its own doing.
MAX_RUNS = 2
#: How often an answer may go on after a crash.
MAX_RESUMES = 2
#: Tokens that are kept of an answer, at four bytes each. A longer one cannot go on.
MAX_KEPT_TOKENS = 256 * 1024
_PUT_BY = 256


class KeptTokens:
    """The tokens of an answer, for as long as there is no reason against keeping them."""

    __slots__ = ("_fresh", "_tokens")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._tokens: array[int] | None = array("i")
        #: Those that came last: to put them by one at a time would cost more.
        self._fresh: list[int] = []

    def add(self, tokens: list[int]) -> None:
        self._fresh += tokens
        if len(self._fresh) >= _PUT_BY:
            self._put_by()

    @property
    def whole(self) -> list[int]:
        """All of them; empty when there are none, or too many."""
        self._put_by()
        return [] if self._tokens is None else self._tokens.tolist()

    def _put_by(self) -> None:
        fresh, self._fresh = self._fresh, []
        if self._tokens is None:
            return
        try:
            self._tokens.extend(fresh)
        except OverflowError:
            # No token of any model; the worker that said so is another's business.
            self._tokens = None
            return
        if len(self._tokens) > MAX_KEPT_TOKENS:
            self._tokens = None


class NextRun(StrEnum):
    #: From its beginning, as if nothing had been.
    AGAIN = "again"
    #: From the token at which it was interrupted.
    RESUMED = "resumed"
    #: Its client is told that the model crashed.
    NONE = "none"


def is_guilty(runs: int, gained: int) -> bool:
    """Whether a request that was alone in flight when its worker died is to blame for that:
    it was in flight at an earlier death as well, and has come no token further since."""
    return runs > 1 and not gained


class Lost(NamedTuple):
    """A request whose worker has died. ``made`` tokens of its answer are known, ``gained``
    of them by its last run; ``kept``: which they are, too. ``alone``: no other request was
    in flight."""

    runs: int
    made: int
    gained: int
    kept: bool
    delivered: bool
    alone: bool


def next_run(lost: Lost) -> NextRun:
    """What becomes of a request.

    A resumed one that was alone and has not come a token further kills wherever it runs.
    """
    if lost.made and lost.kept:
        hopeless = lost.alone and is_guilty(lost.runs, lost.gained)
        return NextRun.NONE if hopeless or lost.runs > MAX_RESUMES else NextRun.RESUMED
    return NextRun.AGAIN if lost.runs < MAX_RUNS and not lost.delivered else NextRun.NONE
