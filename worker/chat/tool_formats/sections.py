"""Calls in a section, each with its own opener: the frame, and two formats of it.

Kimi K2 and DeepSeek write a name and JSON between special tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from worker.chat.answer import Answer, Call
from worker.chat.json_text import pass_object
from worker.chat.parsing import Malformed, Steps, other_than

KIMI_SECTION = "<|tool_calls_section_begin|>"
KIMI_SECTION_END = "<|tool_calls_section_end|>"
KIMI_CALL = "<|tool_call_begin|>"
KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
KIMI_CALL_END = "<|tool_call_end|>"

DEEPSEEK_SECTION = "<｜tool▁calls▁begin｜>"
DEEPSEEK_SECTION_END = "<｜tool▁calls▁end｜>"
DEEPSEEK_CALL = "<｜tool▁call▁begin｜>"
DEEPSEEK_ARGUMENTS = "<｜tool▁sep｜>"
DEEPSEEK_CALL_END = "<｜tool▁call▁end｜>"

_TAG_FREE = other_than("<")
_LINE = other_than("<\n")


def read_section(
    answer: Answer,
    opener: str,
    closer: str,
    read: Callable[[Answer, Call], Steps[None]],
    inside: bool = False,
) -> Steps[None]:
    """Calls that begin with ``opener``, up to ``closer``, which may be missing.

    The section's own opener has been taken; with ``inside``, a first call's instead.
    """
    source = answer.source
    while True:
        if not inside:
            yield from source.space()
            found = yield from source.accept(opener, closer)
            if found == closer or source.exhausted:
                return
            if not found:
                raise Malformed
        inside = False
        yield from answer.attempt(read)


def read_kimi_call(answer: Answer, call: Call) -> Steps[None]:
    """``functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>``"""
    source = answer.source
    head = (yield from source.all(_TAG_FREE)).strip()
    yield from source.expect(KIMI_ARGUMENTS)
    name, _, number = head.rpartition(":")
    if not number.isdecimal():
        name = head
    call.begin(name if name in answer.tools else name.removeprefix("functions."))
    yield from source.space()
    yield from pass_object(source, call.write, call.closers)
    yield from source.space()
    yield from source.accept(KIMI_CALL_END)


def read_deepseek_call(answer: Answer, call: Call) -> Steps[None]:
    """V3.1's ``name<sep>{...}<end>``, or, with a type and a code fence, V3's and R1's."""
    source = answer.source
    head = (yield from source.all(_LINE)).strip()
    yield from source.expect(DEEPSEEK_ARGUMENTS)
    fenced = (yield from source.peek()) != "{"
    if fenced:
        head = (yield from source.all(_LINE)).strip()
        yield from source.space()
        yield from source.expect("```json")
    call.begin(head)
    yield from source.space()
    yield from pass_object(source, call.write, call.closers)
    yield from source.space()
    if fenced:
        yield from source.accept("```")
        yield from source.space()
    yield from source.accept(DEEPSEEK_CALL_END)
