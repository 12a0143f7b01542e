"""From the pieces of an answer to the output items of a response, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from protocol.chat import Extras, TokenLogprob, ToolCallPiece
from protocol.messages import FinishReason
from supervisor.gateway.openai.logprobs import ContentLogprob, chat_logprobs
from supervisor.gateway.openai.responses_items import (
    FunctionCall,
    Message,
    OutputItem,
    OutputText,
    Reasoning,
    ReasoningText,
    Status,
    SummaryText,
    new_item_id,
    seal,
)

_NOTHING = Extras()


class Opened(NamedTuple):
    """An item begins; ``item`` is empty and in progress."""

    place: int
    item: OutputItem


class Grew(NamedTuple):
    """The item that was opened last has more text, or arguments."""

    text: str
    logprobs: list[ContentLogprob]


class Closed(NamedTuple):
    """An item is whole, or cut off."""

    place: int
    item: OutputItem


Change = Opened | Grew | Closed


class OutputBuilder:
    """One answer. At most one item is open, the last; a piece of another kind closes it.

    ``sealed``: reasoning has its text also as ``encrypted_content``. ``summarised``: it is
    in the summary, not the content. ``namespaced``: namespace and name of functions, by what
    the model calls them. ``items`` are those that are closed.
    """

    def __init__(
        self,
        *,
        sealed: bool = False,
        summarised: bool = False,
        logprobs: bool = False,
        namespaced: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.items: list[OutputItem] = []
        self._sealed = sealed
        self._summarised = summarised
        self._with_logprobs = logprobs
        self._namespaced: Mapping[str, tuple[str | UnsetType, str]] = namespaced or {}
        self._open: OutputItem | None = None
        self._texts: list[str] = []
        self._logprobs: list[ContentLogprob] = []
        #: Of tokens whose text has not come out yet.
        self._pending: list[TokenLogprob] = []
        self._calls = 0
        self._changes: list[Change] = []

    def goes_on(self, text: str) -> bool:
        """Take the next text of the message that is open; False: there is more to do.

        What most tokens bring, so they shall not cost more than this.
        """
        if type(self._open) is not Message or self._pending or not text:
            return False
        self._texts.append(text)
        return True

    def feed(self, text: str, extras: Extras | None) -> list[Change]:
        """What came at once has no order of its own, but what is open goes on first."""
        extras = extras or _NOTHING
        if self._with_logprobs:
            self._pending += extras.logprobs
        calls: Sequence[ToolCallPiece] = extras.tool_calls
        if isinstance(self._open, FunctionCall):
            for piece in calls:
                if piece.index == self._calls - 1:
                    self._grow(piece.arguments)
            calls = [piece for piece in calls if piece.index >= self._calls]
        if isinstance(self._open, Message):
            self._say(text)
            self._think(extras.reasoning)
        else:
            self._think(extras.reasoning)
            self._say(text)
        for piece in calls:
            if piece.index >= self._calls:
                self._calls = piece.index + 1
                call_id = piece.id or new_item_id("call")
                status: Status = "in_progress"
                namespace, name = self._namespaced.get(piece.name or "", (UNSET, piece.name or ""))
                self._enter(FunctionCall(new_item_id("fc"), call_id, name, "", status, namespace))
            self._grow(piece.arguments)
        return self._drain()

    def finish(self, finish: FinishReason) -> list[Change]:
        """The answer's proper end: the item that is open is whole, unless it is cut off."""
        whole = finish is not FinishReason.LENGTH
        answered = any(
            not isinstance(item, Reasoning) for item in (*self.items, self._open) if item
        )
        if whole and not answered:
            # No text is an answer, too.
            self._enter(Message(new_item_id("msg"), "assistant", [], "in_progress"))
        self._close("completed" if whole else "incomplete")
        return self._drain()

    def break_off(self) -> list[OutputItem]:
        """What there is of an answer that failed."""
        self._close("incomplete")
        return self.items

    def _think(self, text: str) -> None:
        if text:
            if not isinstance(self._open, Reasoning):
                self._enter(Reasoning(new_item_id("rs"), status="in_progress"))
            self._grow(text)
            if self._pending and (found := split_at_text(self._pending, text)):
                self._pending = found[1]

    def _say(self, text: str) -> None:
        if text:
            if not isinstance(self._open, Message):
                self._enter(Message(new_item_id("msg"), "assistant", [], "in_progress"))
            self._grow(text, self._logprobs_of(text))

    def _logprobs_of(self, text: str) -> list[ContentLogprob]:
        if not self._pending:
            return []
        # If they do not fit together, rather too many than none.
        mine, self._pending = split_at_text(self._pending, text) or (self._pending, [])
        written = chat_logprobs(mine).content
        self._logprobs += written
        return written

    def _enter(self, item: OutputItem) -> None:
        self._close("completed")
        self._open = item
        self._changes.append(Opened(len(self.items), item))

    def _grow(self, text: str, logprobs: list[ContentLogprob] | None = None) -> None:
        if text:
            self._texts.append(text)
            self._changes.append(Grew(text, logprobs or []))

    def _close(self, status: Status) -> None:
        if self._open is None:
            return
        item = self._closed(self._open, "".join(self._texts), status)
        self._changes.append(Closed(len(self.items), item))
        self.items.append(item)
        self._open = None
        self._texts, self._logprobs = [], []

    def _closed(self, item: OutputItem, text: str, status: Status) -> OutputItem:
        match item:
            case Message():
                part = OutputText(text, [], self._logprobs)
                return msgspec.structs.replace(item, content=[part], status=status)
            case Reasoning():
                return msgspec.structs.replace(
                    item,
                    summary=[SummaryText(text)] if self._summarised else [],
                    content=[] if self._summarised else [ReasoningText(text)],
                    encrypted_content=seal(text) if self._sealed else UNSET,
                    status=status,
                )
        return msgspec.structs.replace(item, arguments=text, status=status)

    def _drain(self) -> list[Change]:
        changes, self._changes = self._changes, []
        return changes


def split_at_text(
    tokens: list[TokenLogprob], text: str
) -> tuple[list[TokenLogprob], list[TokenLogprob]] | None:
    """The tokens that ``text`` was written with, and those after it; None: not with these.

    Those before it wrote something else, such as the tags around reasoning.
    """
    data = text.encode(errors="replace")
    start = b"".join(token.text for token in tokens).find(data)
    if start < 0:
        return None
    end, at = start + len(data), 0
    mine, after = [], []
    for token in tokens:
        if at >= end:
            after.append(token)
        elif at + len(token.text) > start:
            mine.append(token)
        at += len(token.text)
    return mine, after
