"""Downloads that wait for somebody's yes: each has a token that is good once, for a while."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from protocol.errors import CodedError, ErrorCode
from supervisor.downloads.messages import Plan
from supervisor.gate import LoadSpec

LIFETIME_S = 600
#: The oldest is forgotten for one more.
_MAX_QUESTIONS = 256


class Question(NamedTuple):
    """What a yes would begin."""

    plan: Plan
    spec: LoadSpec


class Questions:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: In the order of their ends.
        self._asked: dict[str, tuple[float, Question]] = {}

    def ask(self, question: Question) -> str:
        """The token that says yes to it."""
        self._forget()
        token = secrets.token_urlsafe(24)
        self._asked[token] = (self._clock() + LIFETIME_S, question)
        return token

    def take(self, token: str) -> Question:
        """Raises ``invalid_confirmation_token`` for one that is unknown, used or too old."""
        self._forget()
        if (found := self._asked.pop(token, None)) is None:
            raise CodedError(
                ErrorCode.INVALID_CONFIRMATION,
                "the confirmation token is unknown, used already, or older than "
                f"{LIFETIME_S / 60:g} minutes; ask for the load again to get another",
                param="confirmation_token",
            )
        return found[1]

    def _forget(self) -> None:
        now = self._clock()
        for token, (ends_at, _) in list(self._asked.items()):
            if ends_at > now and len(self._asked) < _MAX_QUESTIONS:
                return
            del self._asked[token]
