"""gpt-oss: messages with a header that names a channel and, for a call, a recipient.

``analysis`` is reasoning, ``final`` and ``commentary`` are content, and a recipient
``functions.name`` makes a message a call. The answer begins in a header, because the
prompt ends with ``<|start|>assistant``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from worker.chat.answer import Answer, Call
from worker.chat.json_text import pass_object
from worker.chat.parsing import Malformed, Steps, other_than

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN, END, RETURN, CALL = "<|constrain|>", "<|end|>", "<|return|>", "<|call|>"
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, RETURN, CALL)

_HEADER_TEXT = other_than("<")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_ENDS = (END, RETURN, CALL)


def read_harmony(answer: Answer) -> Steps[None]:
    source, out = answer.source, answer.out
    prompted = answer.prompt_tail.rpartition(START)[2]
    if prompted.endswith(MESSAGE):
        yield from _read_body(answer, prompted)
    elif not (yield from source.ahead(" to=", "to=", CHANNEL)):
        # It does not keep to the format.
        yield from _say_until_header(answer)
    while (yield from source.peek()):
        try:
            header = yield from _read_header(answer)
            yield from _read_body(answer, header)
        except Malformed:
            answer.accepted = False
            out.say(source.release())
        yield from _say_until_header(answer)


def _say_until_header(answer: Answer) -> Steps[None]:
    """Text between messages should not be there; it is content all the same."""
    source = answer.source
    plain = other_than("<")
    while (yield from source.peek()):
        if not source.some(plain):
            if (yield from source.ahead(START, CHANNEL)):
                return
            source.take()
        answer.out.say(source.release())


def _read_header(answer: Answer) -> Steps[str]:
    """Up to ``<|message|>``, which is taken; the text stays held."""
    source = answer.source
    parts: list[str] = []
    while True:
        parts.append((yield from source.all(_HEADER_TEXT)))
        marker = yield from source.expect(START, CHANNEL, CONSTRAIN, MESSAGE)
        if marker == MESSAGE:
            return "".join(parts)
        parts.append(marker)


def _read_body(answer: Answer, header: str) -> Steps[None]:
    source, out = answer.source, answer.out
    recipient = _RECIPIENT.search(header)
    channel = _CHANNEL.search(header)
    if recipient and recipient[1] != "assistant":
        yield from answer.attempt(partial(_read_call, name=recipient[1]))
        return
    source.settle()
    if channel and channel[1] == "analysis":
        out.in_reasoning = True
        ended = yield from _pass_body(answer, out.think)
        out.in_reasoning = False
    else:
        ended = yield from _pass_body(answer, out.say)
    if ended:
        source.settle()


def _pass_body(answer: Answer, write: Callable[[str], None]) -> Steps[str]:
    """Text to the message's end, which is taken, or to where the next one begins."""
    source = answer.source
    plain = other_than("<")
    while (yield from source.peek()):
        if not source.some(plain):
            if (yield from source.ahead(START, CHANNEL)):
                return ""
            if found := (yield from source.accept(*_ENDS)):
                return found
            source.take()
        write(source.release())
    return ""


def _read_call(answer: Answer, call: Call, name: str) -> Steps[None]:
    source = answer.source
    call.begin(name if name in answer.tools else name.removeprefix("functions."))
    yield from source.space()
    yield from pass_object(source, call.write, call.closers)
    yield from source.space()
    yield from source.accept(*_ENDS)
