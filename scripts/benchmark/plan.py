"""What is asked of a contender and what came back, in the same words for all of them."""

from __future__ import annotations

from typing import Any

import msgspec


class Request(msgspec.Struct, frozen=True):
    """One streamed chat request; ``body`` is OpenAI's.

    With ``after_reads`` it is not sent at once but when the plan's first request
    has got so many pieces of its answer.
    """

    body: dict[str, Any]
    after_reads: int | None = None
    headers: dict[str, str] = {}


class Plan(msgspec.Struct, frozen=True):
    """Requests that run together.

    The plan is over when all have ended, or with ``until`` when that one has: the
    others are then cut off. ``want_text`` asks for the answers' text.
    """

    requests: list[Request]
    timeout_s: float
    port: int = 0
    until: int | None = None
    want_text: bool = False


class Answer(msgspec.Struct):
    """One request's answer. Times in seconds since the plan began.

    ``pieces`` are the times at which text arrived: a piece is a token, or several
    where the server sent them together. ``tokens`` and ``prompt_tokens`` are the
    server's count; without one ``tokens`` is what was asked for if the answer
    went on to its limit, else the number of pieces.
    """

    sent: float = 0.0
    pieces: list[float] = msgspec.field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int | None = None
    text: str = ""
    error: str = ""


class Reply(msgspec.Struct, frozen=True):
    """What a child process answers a plan with."""

    answers: list[Answer]


class Failed(Exception):
    """A contender could not be started or measured; the message is for the report."""
