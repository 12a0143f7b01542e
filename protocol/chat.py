"""What a chat consists of on the wire: turns, tools, constraints, and parts of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import groupby
from typing import Any

from protocol.records import Record


class ToolCall(Record, frozen=True):
    """A call that the assistant made in an earlier turn; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


class ChatMessage(Record, frozen=True):
    """One turn of a conversation; ``content`` is plain text.

    ``reasoning`` is what an assistant thought before its answer. ``tool_call_id``, in
    the role ``tool``, is the call that ``content`` is the result of; ``name`` is then
    the tool's, if the client said it.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    reasoning: str | None = None


class Tool(Record, frozen=True):
    """A function that the model may call; ``parameters`` is a JSON schema.

    ``strict``: the arguments must fit the schema.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool = False


class ToolChoice(StrEnum):
    """Whether the answer calls tools. ``named``: the one that ``Generate.named_tool`` names."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


class ConstraintKind(StrEnum):
    """In which language a constraint's ``text`` is: ``json`` (any object; no text), a
    JSON schema, a regular expression (Rust's syntax), or llguidance's Lark grammar."""

    JSON = "json"
    SCHEMA = "schema"
    REGEX = "regex"
    LARK = "lark"


class Constraint(Record, frozen=True):
    """What the whole text of an answer has to match."""

    kind: ConstraintKind
    text: str = ""


class ToolCallPiece(Record, frozen=True):
    """Part of a tool call in an answer. The first of a call has ``id`` and ``name``;
    ``arguments`` are the next characters of the JSON text. ``index`` counts the calls."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class TokenLogprob(Record, frozen=True):
    """A token's natural log probability, before temperature and filters.

    ``text`` is the token's bytes, which may be part of a character. ``top`` are the
    likeliest tokens at this place, the likeliest first.
    """

    token: int
    text: bytes
    logprob: float
    top: list[TokenLogprob] = []


class Extras(Record, frozen=True):
    """What a step added to an answer besides its text.

    ``reasoning_tokens``: how many of the step's tokens are of the reasoning.
    ``stop``: the stop string that ended the answer.
    """

    reasoning: str = ""
    reasoning_tokens: int = 0
    tool_calls: list[ToolCallPiece] = []
    logprobs: list[TokenLogprob] = []
    stop: str | None = None


def join_extras(parts: Sequence[Extras]) -> Extras | None:
    """What several deltas in a row added, as of one; None of none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    stops = [part.stop for part in parts if part.stop is not None]
    return Extras(
        "".join(part.reasoning for part in parts),
        sum(part.reasoning_tokens for part in parts),
        _join_pieces([piece for part in parts for piece in part.tool_calls]),
        [each for part in parts for each in part.logprobs],
        stops[0] if stops else None,
    )


def _join_pieces(pieces: list[ToolCallPiece]) -> list[ToolCallPiece]:
    """One for each run of pieces of the same call."""
    joined = []
    for index, run in groupby(pieces, key=lambda piece: piece.index):
        first, *rest = run
        arguments = "".join([first.arguments, *(piece.arguments for piece in rest)])
        joined.append(ToolCallPiece(index, first.id, first.name, arguments))
    return joined
