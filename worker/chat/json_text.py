"""JSON text, passed on while it is being written.

Checked character by character, so that what was passed on is at any time a
beginning of valid JSON, and ``closers`` says what is missing. Parts that could not
be closed are held back until they are whole: keys, numbers, commas, escapes. Two
slips that models often make inside strings are mended: raw control characters, and
backslashes that escape nothing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from worker.chat.parsing import Malformed, Source, Steps, Write

#: Deeper nesting is no tool call, and more than clients' decoders stand.
MAX_DEPTH = 128

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_HEX = re.compile(r"[0-9a-fA-F]")
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


def pass_value(source: Source, write: Write, closers: list[str]) -> Steps[None]:
    """One JSON value. Raises ``Malformed`` where it stops being one."""
    base = len(closers)
    pending = ""
    while True:
        pending += yield from source.space()
        char = yield from source.peek()
        opened = char in ("{", "[")
        if opened:
            if len(closers) - base >= MAX_DEPTH:
                raise Malformed
            closers.append("}" if char == "{" else "]")
            write(pending + source.take())
        elif char == '"':
            closers.append(source.take())
            write(pending + char)
            yield from pass_string(source, write)
            write(closers.pop())
        else:
            write(pending + (yield from _scalar(source)))
        pending = ""
        while True:  # what may follow it: ends of objects and arrays, then a comma
            if len(closers) == base:
                return
            pending += yield from source.space()
            char = yield from source.peek()
            if char != closers[-1]:
                break
            closers.pop()
            write(pending + source.take())
            pending, opened = "", False
        if not opened:
            pending += yield from source.expect(",")
            pending += yield from source.space()
        if closers[-1] == "}":
            pending += yield from _key(source)


def pass_object(source: Source, write: Write, closers: list[str]) -> Steps[None]:
    if (yield from source.peek()) != "{":
        raise Malformed
    yield from pass_value(source, write, closers)


def pass_string(source: Source, write: Write) -> Steps[None]:
    """What is in a string, as JSON text; the closing quote is taken, not written."""
    while True:
        if part := source.some(_PLAIN):
            write(part)
            continue
        char = yield from source.peek()
        if not char:
            raise Malformed
        if char == '"':
            source.take()
            return
        if char == "\\":
            write((yield from _escape(source)))
        elif char < " ":
            write(json.dumps(source.take())[1:-1])


def read_string(source: Source) -> Steps[str]:
    """The value of a string whose opening quote has been taken."""
    parts: list[str] = []
    yield from pass_string(source, parts.append)
    return decode(parts)


def decode(parts: list[str]) -> str:
    """What the text inside a JSON string stands for; lone surrogates are replaced."""
    text: str = json.loads(f'"{"".join(parts)}"')
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pass_object_in_string(source: Source, write: Write, closers: list[str]) -> Steps[None]:
    """An object that is written as the text of a string; the opening quote is taken."""
    inner = Source()
    reader = _object_or_nothing(inner, write, closers)
    first_half: list[str] = []

    def pass_on(part: str) -> None:
        # An escape arrives whole, but a character may take two of them.
        if not first_half and _is_high_surrogate(part):
            first_half.append(part)
            return
        inner.feed(decode([*first_half, part]))
        first_half.clear()
        next(reader, None)

    yield from pass_string(source, pass_on)
    inner.feed(decode(first_half))
    inner.ended = True
    next(reader, None)
    if not inner.exhausted:
        raise Malformed


def _object_or_nothing(source: Source, write: Write, closers: list[str]) -> Steps[None]:
    yield from source.space()
    if (yield from source.peek()):
        yield from pass_object(source, write, closers)
        yield from source.space()


def _is_high_surrogate(part: str) -> bool:
    return part[:2] == "\\u" and part[2:4].lower() in ("d8", "d9", "da", "db")


def _key(source: Source) -> Steps[str]:
    """A member's name and colon, as text."""
    parts = [(yield from source.expect('"'))]
    yield from pass_string(source, parts.append)
    parts.append('"')
    parts.append((yield from source.space()))
    parts.append((yield from source.expect(":")))
    return "".join(parts)


def _scalar(source: Source) -> Steps[str]:
    text = yield from source.all(_SCALAR)
    # At the end of the answer it is not known whether it is whole.
    if source.exhausted or not (text in ("true", "false", "null") or _NUMBER.fullmatch(text)):
        raise Malformed
    return text


def _escape(source: Source) -> Steps[str]:
    source.take()
    char = yield from source.peek()
    if not char:
        raise Malformed
    if char in '"\\/bfnrt':
        return "\\" + source.take()
    if char != "u":
        return "\\\\"
    digits = source.take()
    while len(digits) < 5:
        if not (char := (yield from source.peek())):
            raise Malformed
        if not _HEX.match(char):
            return "\\\\" + digits
        digits += source.take()
    return "\\" + digits


def parse(text: str) -> Any:
    """The value of a whole JSON text; ``Malformed`` itself if it is none."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return Malformed


def _no_constant(name: str) -> Any:
    raise ValueError(name)
