"""Values written in a notation other than JSON, turned into JSON text as they arrive."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from worker.chat.json_text import MAX_DEPTH, parse
from worker.chat.parsing import Malformed, Source, Steps, Write, other_than

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_CONSTANTS = {"True": "true", "False": "false", "None": "null"} | {
    name: name for name in ("true", "false", "null")
}
_ESCAPES = (
    {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v"}
    | {char: char for char in "\\'\"/"}
    | {"\n": ""}
)
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_HEX = re.compile(r"[0-9a-fA-F]")
_CLOSERS = {"[": "]", "(": ")", "{": "}"}


@dataclass(frozen=True)
class Notation:
    """``quotes``: what strings begin and end with. ``escapes``: Python's are known in
    them. ``bare``: the run of characters of which anything else consists; with
    ``bare_strings`` that may be a string, and keys are written so.
    """

    quotes: tuple[str, ...]
    escapes: bool
    bare: re.Pattern[str]
    bare_strings: bool


PYTHON = Notation(('"', "'"), True, re.compile(r"[-+.\w]+"), False)
FUNCTION_GEMMA = Notation(("<escape>",), False, other_than(":,[]{}<"), True)
GEMMA4 = Notation(('<|"|>',), False, other_than(":,[]{}<"), True)


def pass_literal(
    source: Source,
    write: Write,
    closers: list[str],
    notation: Notation,
    before: str = "",
    depth: int = 0,
) -> Steps[None]:
    """One value, as JSON; ``before`` is written with its first part.

    What has been written can be closed with ``closers`` at any time. Raises
    ``Malformed`` where the text is no value.
    """
    if depth > MAX_DEPTH // 2:  # every level is a generator in a generator
        raise Malformed
    yield from source.space()
    if quote := (yield from source.accept(*notation.quotes)):
        closers.append('"')
        write(before + '"')
        yield from pass_quoted(source, lambda text: write(_in_json(text)), write, quote, notation)
        write(closers.pop())
        return
    opener = yield from source.peek()
    if opener not in _CLOSERS or (opener == "(" and notation.bare_strings):
        write(before + (yield from read_scalar(source, notation)))
        return
    source.take()
    closer = _CLOSERS[opener]
    closers.append("}" if opener == "{" else "]")
    write(before + ("{" if opener == "{" else "["))
    before = ""
    while True:
        yield from source.space()
        if (yield from source.accept(closer)):
            break
        if opener == "{":
            before += (yield from _read_key(source, notation)) + ": "
            yield from source.space()
            yield from source.expect(":")
        yield from pass_literal(source, write, closers, notation, before, depth + 1)
        yield from source.space()
        if (yield from source.expect(",", closer)) == closer:
            break
        before = ", "
    write(closers.pop())


def pass_quoted(
    source: Source, write: Write, write_json: Write, quote: str, notation: Notation
) -> Steps[None]:
    """What is in a string, the closing quote taken: its text to ``write``, but what is
    best said with a JSON escape to ``write_json``."""
    if not notation.escapes:
        if not (yield from source.until(write, quote)):
            raise Malformed
        return
    while (found := (yield from source.until(write, quote, "\\"))) == "\\":
        yield from _pass_escape(source, write, write_json)
    if not found:
        raise Malformed


def _pass_escape(source: Source, write: Write, write_json: Write) -> Steps[None]:
    char = yield from source.peek()
    if char in _ESCAPES:
        source.take()
        write(_ESCAPES[char])
    elif char in _HEX_ESCAPES:
        digits = source.take()
        while len(digits) <= _HEX_ESCAPES[char]:
            digit = yield from source.peek()
            if not _HEX.match(digit):
                raise Malformed
            digits += source.take()
        code = int(digits[1:], 16)
        if code > 0x10FFFF:
            raise Malformed
        # As an escape, half a surrogate pair can be joined by its other half.
        write_json(f"\\u{code:04x}" if code < 0x10000 else chr(code))
    elif char:
        write("\\")
    else:
        raise Malformed


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _read_key(source: Source, notation: Notation) -> Steps[str]:
    if quote := (yield from source.accept(*notation.quotes)):
        parts: list[str] = []
        yield from pass_quoted(
            source, lambda text: parts.append(_in_json(text)), parts.append, quote, notation
        )
        return f'"{"".join(parts)}"'
    key = yield from source.all(notation.bare)
    if not key or not notation.bare_strings:
        raise Malformed
    return json.dumps(key.strip(), ensure_ascii=False)


def read_scalar(source: Source, notation: Notation) -> Steps[str]:
    """A number or constant, or what else stands there bare, as JSON."""
    text = (yield from source.all(notation.bare)).strip()
    # At the end of the answer it is not known whether it is whole.
    if not text or source.exhausted:
        raise Malformed
    return scalar_to_json(text, notation)


def scalar_to_json(text: str, notation: Notation) -> str:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _NUMBER.fullmatch(text):
        if parse(text) is not Malformed:
            return text
        try:
            return json.dumps(float(text), allow_nan=False)
        except (ValueError, OverflowError):
            pass
    if not notation.bare_strings:
        raise Malformed
    return json.dumps(text, ensure_ascii=False)


def literal_to_json(text: str, notation: Notation) -> str:
    """The JSON text of a whole literal; empty if it is none."""
    source = Source()
    source.feed(text)
    source.ended = True
    parts: list[str] = []
    try:
        for _ in pass_literal(source, parts.append, [], notation):
            pass
    except Malformed:
        return ""
    return "".join(parts) if source.exhausted else ""
