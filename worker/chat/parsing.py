"""What output parsers are made of: a cursor over text that is still arriving.

A parser is a generator that asks a ``Source`` for characters and is suspended
while there are none. It sees characters, never the pieces they came in, so any
split of a stream gives the result of the whole, and a format can be written down
as it is read, from left to right. Every character is looked at a bounded number of
times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeAlias, TypeVar

T = TypeVar("T")

#: A parser, or a part of one. It yields whenever it needs text that is not there yet.
Steps: TypeAlias = Generator[None, None, T]
Write: TypeAlias = Callable[[str], None]

#: Patterns for ``Source.some`` are runs of one class of characters, so that where
#: they are cut makes no difference.
SPACE = re.compile(r"[ \t\r\n]+")
NAME = re.compile(r"[\w.:/-]+")


class Malformed(Exception):
    """The text is not a tool call after all, or stopped being one."""


class Refused(Malformed):
    """A whole, well-formed call, but none that may be made."""


class Source:
    """Text that arrives piece by piece, and how much of it has been taken.

    Whatever is taken is also *held*, until the parser says that it has come out as
    something (``settle``) or asks for it back because it did not (``release``).
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._held: list[str] = []
        self.ended = False

    def feed(self, text: str) -> None:
        # Parsers take all there is but for a few characters of lookahead.
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def exhausted(self) -> bool:
        return self.ended and self._at >= len(self._text)

    def settle(self) -> None:
        self._held.clear()

    def release(self) -> str:
        held = "".join(self._held)
        self._held.clear()
        return held

    def peek(self) -> Steps[str]:
        """The next character; empty at the end of the text."""
        while self._at >= len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def take(self, count: int = 1) -> str:
        """``count`` characters that are known to be there."""
        taken = self._text[self._at : self._at + count]
        self._at += count
        self._held.append(taken)
        return taken

    def some(self, run: re.Pattern[str]) -> str:
        """What has arrived of a run of characters; empty if none of it."""
        match = run.match(self._text, self._at)
        return self.take(match.end() - self._at) if match else ""

    def all(self, run: re.Pattern[str]) -> Steps[str]:
        """A whole run of characters; it may be empty."""
        parts = []
        while (yield from self.peek()) and (part := self.some(run)):
            parts.append(part)
        return "".join(parts)

    def space(self) -> Steps[str]:
        return self.all(SPACE)

    def ahead(self, *literals: str) -> Steps[str]:
        """Which of ``literals`` comes next, empty if none. No one may begin another."""
        longest = max(map(len, literals))
        while True:
            for literal in literals:
                if self._text.startswith(literal, self._at):
                    return literal
            rest = self._text[self._at : self._at + longest]
            if self.ended or not any(literal.startswith(rest) for literal in literals):
                return ""
            yield

    def accept(self, *literals: str) -> Steps[str]:
        """Takes one of ``literals`` if it comes next, or nothing."""
        if found := (yield from self.ahead(*literals)):
            self.take(len(found))
        return found

    def expect(self, *literals: str) -> Steps[str]:
        if not (found := (yield from self.accept(*literals))):
            raise Malformed
        return found

    def until(self, write: Write, *stops: str) -> Steps[str]:
        """Passes text on up to the first of ``stops``, which is taken and returned.

        Empty if the text ends first. Only what may begin a stop is held back.
        """
        plain = other_than("".join(stop[0] for stop in stops))
        while True:
            if part := self.some(plain):
                write(part)
            elif not (yield from self.peek()):
                return ""
            elif found := (yield from self.accept(*stops)):
                return found
            else:
                write(self.take())


@lru_cache(maxsize=64)
def other_than(characters: str, space: bool = False) -> re.Pattern[str]:
    """A run of none of these characters, nor, with ``space``, of white space."""
    white = r" \t\r\n" if space else ""
    return re.compile(f"[^{re.escape(characters)}{white}]+")
