"""Calls that look like code: Python's syntax (Llama 3.2 and 4, LFM2) and Gemma's own."""

from __future__ import annotations

import re
from functools import partial

from worker.chat.answer import Answer, Call
from worker.chat.arguments import coerce, declared_types
from worker.chat.json_text import parse
from worker.chat.literals import PYTHON, Notation, pass_literal, pass_quoted, scalar_to_json
from worker.chat.parsing import NAME, Malformed, Steps
from worker.chat.tool_formats.json_calls import bare_objects

_KEYWORD = re.compile(r"\w+")


def python_list(answer: Answer, bare: bool = False) -> Steps[None]:
    """``[f(a=1), g()]``; the opening bracket is taken.

    ``bare``: nothing else says that calls follow, so any other name ends the reading.
    """
    source = answer.source
    while True:
        yield from source.space()
        yield from answer.attempt(partial(_read_python_call, bare=bare))
        yield from source.space()
        if (yield from source.expect(",", "]")) == "]":
            return


def python_list_in_tags(answer: Answer, closer: str) -> Steps[None]:
    source = answer.source
    yield from source.space()
    yield from source.expect("[")
    yield from python_list(answer)
    yield from source.space()
    yield from source.accept(closer)


def python_tag(answer: Answer) -> Steps[None]:
    """After Llama 3's ``<|python_tag|>``: JSON, or a built-in tool's ``name.call(...)``.

    Any other code was meant for an interpreter, and is content.
    """
    source = answer.source
    yield from source.space()
    if (yield from source.accept("{")):
        yield from bare_objects(answer)
    else:
        yield from answer.attempt(partial(_read_python_call, bare=True))


def _read_python_call(answer: Answer, call: Call, bare: bool) -> Steps[None]:
    source = answer.source
    name = yield from source.all(NAME)
    if name not in answer.tools:
        name = name.removesuffix(".call")
    yield from source.expect("(")
    if not name or (bare and answer.callable_tool(name) is None):
        raise Malformed
    call.begin(name)
    yield from source.space()
    if (yield from source.accept(")")):
        return
    while True:
        yield from source.space()
        key = yield from source.all(_KEYWORD)
        yield from source.space()
        yield from source.expect("=")
        if not key:
            raise Malformed
        yield from pass_literal(source, call.write, call.closers, PYTHON, call.before(key))
        yield from source.space()
        if (yield from source.expect(",", ")")) == ")":
            return


def gemma_call(answer: Answer, notation: Notation, closer: str) -> Steps[None]:
    """``call:name{key:value,...}``, after the opening tag."""
    source = answer.source
    yield from source.space()
    yield from source.expect("call:")
    yield from answer.attempt(partial(_read_gemma_call, notation=notation))
    yield from source.space()
    yield from source.accept(closer)


def _read_gemma_call(answer: Answer, call: Call, notation: Notation) -> Steps[None]:
    source = answer.source
    name = yield from source.all(NAME)
    yield from source.expect("{")
    call.begin(name)
    yield from source.space()
    if (yield from source.accept("}")):
        return
    while True:
        key = (yield from source.all(notation.bare)).strip()
        if not key:
            raise Malformed
        yield from source.expect(":")
        yield from _read_gemma_value(answer, call, key, notation)
        yield from source.space()
        if (yield from source.expect(",", "}")) == "}":
            return


def _read_gemma_value(answer: Answer, call: Call, key: str, notation: Notation) -> Steps[None]:
    """A value says its type itself, unless the schema knows better."""
    source = answer.source
    types = declared_types(call.tool, key)
    yield from source.space()
    quoted = yield from source.ahead(*notation.quotes)
    if (yield from source.peek()) in ("{", "[") or (quoted and (not types or "string" in types)):
        before = call.before(key)
        yield from pass_literal(source, call.write, call.closers, notation, before)
        return
    parts: list[str] = []
    if quoted:
        source.take(len(quoted))
        yield from pass_quoted(source, parts.append, parts.append, quoted, notation)
        call.member(key, coerce("".join(parts), types))
        return
    text = (yield from source.all(notation.bare)).strip()
    if not text or source.exhausted:
        raise Malformed
    value = coerce(text, types)
    if types != {"string"} and isinstance(parse(value), str):
        value = scalar_to_json(text, notation)
    call.member(key, value)
