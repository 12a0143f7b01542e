"""From what a model writes to what a client gets: content, reasoning, tool calls.

The rules, whatever the format:

- Any split of the text gives the same result.
- A call's first piece has its id and name and no arguments, and comes as soon as the
  name is known; the arguments of the pieces after it add up to the JSON text of an
  object.
- What is no well-formed call to one of the tools is content, exactly as it was written.
  So is, where calls are not parallel, any call after the first.
- A call whose first piece has been emitted stays a call. If it breaks off, its
  arguments are closed to valid JSON, and the text from the break on is content. If the
  answer ends within it, a string is closed where it ends, and a key, a number or a
  typed value that may not be whole is left out.
- White space between calls, and between a call and the text before it or the answer's
  end, is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from protocol.chat import Tool, ToolCallPiece
from worker.chat.answer import Answer, Handler, Parsed, read_calls
from worker.chat.formats import FORMATS, Format, choose_format
from worker.chat.parsing import Steps
from worker.chat.reasoning import Reasoning, choose_reasoning, read_reasoning

__all__ = [
    "FORMATS",
    "Format",
    "OutputParser",
    "Parsed",
    "Reasoning",
    "ToolCallPiece",
    "choose_format",
    "choose_reasoning",
    "create_parser",
    "markers",
]

_ANYTHING = re.compile("(?s:.+)")


class OutputParser(Protocol):
    """Parses one answer."""

    def feed(self, text: str) -> Parsed:
        """What can be emitted now; what may be the beginning of more is held back."""
        ...

    def finish(self) -> Parsed:
        """What was held back: no more text will come."""
        ...

    @property
    def in_reasoning(self) -> bool:
        """Whether what was fed last ended inside the reasoning."""
        ...

    @property
    def called(self) -> bool:
        """Whether a tool call has been emitted."""
        ...


def markers(format: Format, reasoning: Reasoning | None) -> tuple[str, ...]:
    """Texts of special tokens that the detokeniser has to show; others stay hidden."""
    return (*format.markers, *(reasoning.markers if reasoning else ()))


def create_parser(
    format: Format,
    reasoning: Reasoning | None,
    tools: Sequence[Tool],
    *,
    prompt_tail: str,
    parallel: bool,
) -> OutputParser:
    """A parser for one answer.

    ``prompt_tail`` is the end of the rendered prompt, which may have opened the
    reasoning. Without ``tools`` there are no calls: all that is not reasoning is content.
    """
    answer = Answer({tool.name: tool for tool in tools}, parallel, prompt_tail)
    read = format.whole(answer) if format.whole else _read_answer(answer, format, reasoning)
    return _Parser(answer, read)


class _Parser:
    def __init__(self, answer: Answer, read: Steps[object]) -> None:
        self._answer = answer
        self._read = read
        next(read)

    def feed(self, text: str) -> Parsed:
        self._answer.source.feed(text)
        next(self._read)
        return self._answer.out.drain()

    def finish(self) -> Parsed:
        self._answer.source.ended = True
        next(self._read, None)
        return self._answer.out.drain()

    @property
    def in_reasoning(self) -> bool:
        return self._answer.out.in_reasoning

    @property
    def called(self) -> bool:
        return self._answer.out.calls > 0


def _read_answer(answer: Answer, format: Format, reasoning: Reasoning | None) -> Steps[None]:
    openers: dict[str, Handler] = dict(format.openers) if answer.tools else {}
    interrupts = tuple(openers) if format.interrupts else ()
    found = ""
    if reasoning:
        opened = reasoning.opened_by(answer.prompt_tail)
        if reasoning.anywhere:
            openers[reasoning.open] = partial(read_reasoning, reasoning=reasoning)
        elif not opened:
            yield from answer.source.space()
            opened = bool((yield from answer.source.accept(reasoning.open)))
        if opened:
            found = yield from read_reasoning(answer, reasoning, interrupts)
    if openers:
        yield from read_calls(answer, openers, format.bare if answer.tools else {}, found)
    else:
        yield from _pass_on(answer)


def _pass_on(answer: Answer) -> Steps[None]:
    while answer.source.some(_ANYTHING) or (yield from answer.source.peek()):
        answer.out.say(answer.source.release())
