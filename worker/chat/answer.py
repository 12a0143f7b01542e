"""Where the parts of an answer go: content, reasoning, and the pieces of tool calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from protocol.chat import Tool, ToolCallPiece
from worker.chat.parsing import SPACE, Malformed, Refused, Source, Steps, other_than


class Parsed(NamedTuple):
    """What a piece of text turned into."""

    content: str
    reasoning: str
    calls: list[ToolCallPiece]


class Output:
    """Collects what is to be emitted."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._pieces: list[ToolCallPiece] = []
        self._arguments: list[str] = []
        self.calls = 0
        self.spoke = False
        self.in_reasoning = False

    def say(self, text: str) -> None:
        if text:
            self.spoke = True
            self._content.append(text)

    def think(self, text: str) -> None:
        self._reasoning.append(text)

    def begin_call(self, name: str) -> None:
        self._close_piece()
        identifier = f"call_{secrets.token_hex(12)}"
        self._pieces.append(ToolCallPiece(index=self.calls, id=identifier, name=name))
        self.calls += 1

    def add_arguments(self, text: str) -> None:
        """Of the call that was begun last: calls never overlap."""
        self._arguments.append(text)

    def _close_piece(self) -> None:
        if text := "".join(self._arguments):
            self._pieces.append(ToolCallPiece(index=self.calls - 1, arguments=text))
        self._arguments.clear()

    def drain(self) -> Parsed:
        self._close_piece()
        parsed = Parsed("".join(self._content), "".join(self._reasoning), self._pieces)
        self._content, self._reasoning, self._pieces = [], [], []
        return parsed


class Call:
    """One tool call while it is read.

    It is *open* from when its first piece has been emitted: once its name is known
    and turns out to be that of a tool that may be called. What is written before is
    kept, and what is written to a call that may not be made goes nowhere: its text is
    still held by the source. ``closers`` is what would make valid JSON of the
    arguments written so far, innermost last.
    """

    def __init__(self, answer: Answer, hesitant: bool) -> None:
        self._answer = answer
        self._hesitant = hesitant
        self._kept: list[str] = []
        self._named = False
        self.tool: Tool | None = None
        self.open = False
        self.written = False
        self.closers: list[str] = []

    def begin(self, name: str) -> None:
        """A ``hesitant`` call opens with its arguments only, and tolerates no other name."""
        if self._named:
            raise Malformed
        self._named = True
        self.tool = self._answer.callable_tool(name)
        if self.tool is None and self._hesitant:
            raise Malformed
        if self.tool is not None and (self._kept or not self._hesitant):
            self._open(self.tool)

    def _open(self, tool: Tool) -> None:
        self.open = True
        self._answer.out.begin_call(tool.name)
        self._answer.source.settle()
        kept, self._kept = self._kept, []
        for text in kept:
            self.write(text)

    def write(self, text: str) -> None:
        """The next characters of the arguments' JSON text."""
        self.written = True
        if not self._named:
            self._kept.append(text)
        elif self.tool is not None:
            if not self.open:
                self._open(self.tool)
            self._answer.out.add_arguments(text)
            self._answer.source.settle()

    def member(self, key: str, value: str) -> None:
        """A whole member of the arguments; ``value`` is JSON text."""
        self.write(self.before(key) + value)

    def open_string(self, key: str) -> None:
        """Begins a member whose value comes with ``write_string``."""
        self.write(self.before(key) + '"')
        self.closers.append('"')

    def write_string(self, text: str) -> None:
        self.write(json.dumps(text, ensure_ascii=False)[1:-1])

    def close_string(self) -> None:
        self.write(self.closers.pop())

    def before(self, key: str) -> str:
        """What stands before a member's value; to be written with the value's beginning."""
        separator = ", " if self.written else "{"
        if not self.written:
            self.closers.append("}")
        return f"{separator}{json.dumps(key, ensure_ascii=False)}: "

    def close(self) -> None:
        """Writes what makes the arguments valid JSON."""
        if not self.written:
            self.closers.clear()
            self.write("{}")
        while self.closers:
            self.write(self.closers.pop())

    def end(self) -> None:
        if not self._named or (self._hesitant and not self.written):
            raise Malformed
        if self.tool is None:
            raise Refused
        self.close()


@dataclass
class Answer:
    """One answer while it is parsed.

    ``accepted``: the last that was read, white space aside, is a call that was emitted.
    """

    tools: Mapping[str, Tool]
    parallel: bool
    prompt_tail: str
    source: Source = field(default_factory=Source)
    out: Output = field(default_factory=Output)
    accepted: bool = False

    def callable_tool(self, name: str) -> Tool | None:
        if self.out.calls and not self.parallel:
            return None
        return self.tools.get(name)

    def attempt(
        self, read: Callable[[Answer, Call], Steps[None]], hesitant: bool = False
    ) -> Steps[None]:
        """Reads one call; a call that may not be made becomes content as it stands.

        Raises ``Malformed`` where the text is no call. If one has been emitted by
        then it stays, with what had been written of its arguments made valid JSON;
        the text from the break on is handed back. At the very end of the answer
        there is no more to come that could make sense of that rest, a part of a key
        or number, and it is left out.
        """
        call = Call(self, hesitant)
        self.accepted = False
        try:
            yield from read(self, call)
            call.end()
        except Refused:
            self.out.say(self.source.release())
        except Malformed:
            if call.open:
                # Closing settles: what is held so far has to survive it.
                held = self.source.release()
                call.close()
                if not self.source.exhausted:
                    self.out.say(held)
            raise
        else:
            self.accepted = True
            self.source.settle()


#: Reads on after the opener that it was found by.
Handler: TypeAlias = Callable[[Answer], Steps[object]]


def read_calls(
    answer: Answer, openers: Mapping[str, Handler], bare: Mapping[str, Handler], found: str = ""
) -> Steps[None]:
    """Content with calls in it, to the end of the answer.

    A call begins with one of ``openers``, at the answer's beginning also with one of
    ``bare``. ``found`` is an opener that has been taken already.
    """
    source = answer.source
    handlers = {**bare, **openers}
    if bare and not found:
        yield from source.space()
        found = yield from source.accept(*bare)
    while found or (found := (yield from _content(answer, openers))):
        try:
            yield from handlers[found](answer)
        except Malformed:
            answer.accepted = False
        if answer.accepted:
            source.settle()
        else:
            answer.out.say(source.release())
        found = ""


def _content(answer: Answer, openers: Mapping[str, Handler]) -> Steps[str]:
    """Emits content up to an opener, which is taken; empty at the end of the answer.

    White space before the opener stays held with it, and is dropped if a call comes
    of it; so is that between a call and the end.
    """
    source, out = answer.source, answer.out
    plain = other_than("".join(opener[0] for opener in openers), space=True)

    def say(text: str) -> None:
        held = source.release()
        out.say(text if answer.accepted and not out.spoke else held)
        answer.accepted = False

    while True:
        if text := source.some(plain):
            say(text)
        elif not (yield from source.peek()):
            if not answer.accepted:
                say("")
            return ""
        elif source.some(SPACE):
            continue
        elif openers and (found := (yield from source.accept(*openers))):
            return found
        else:
            say(source.take())
