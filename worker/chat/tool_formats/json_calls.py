"""Calls as JSON objects with a name: Hermes and Qwen, Llama 3, Mistral."""

from __future__ import annotations

from functools import partial

from worker.chat.answer import Answer, Call
from worker.chat.json_text import pass_object, pass_object_in_string, pass_value, read_string
from worker.chat.parsing import NAME, Malformed, Steps

ARGUMENTS = ("arguments", "parameters")
#: What a bare object may have besides; any other key, and it is just JSON.
_METADATA = ("id", "type")


def read_object(answer: Answer, call: Call, bare: bool = False) -> Steps[None]:
    """``{"name": ..., "arguments": {...}}`` in any order; the opening brace is taken.

    ``bare``: nothing but the object itself says that it is a call, so it has to be one
    unmistakably.
    """
    source = answer.source
    has_arguments = False
    yield from source.space()
    while True:
        yield from source.expect('"')
        key = yield from read_string(source)
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        if key == "name":
            yield from source.expect('"')
            call.begin((yield from read_string(source)))
        elif key in ARGUMENTS and not has_arguments:
            has_arguments = True
            yield from _read_arguments(answer, call)
        elif key in ARGUMENTS or (bare and key not in _METADATA):
            raise Malformed
        else:
            yield from pass_value(source, lambda _: None, [])
        yield from source.space()
        if (yield from source.expect(",", "}")) == "}":
            return
        yield from source.space()


def _read_arguments(answer: Answer, call: Call) -> Steps[None]:
    """An object, the same as text in a string, or null for none."""
    source = answer.source
    if (yield from source.accept('"')):
        yield from pass_object_in_string(source, call.write, call.closers)
        if not call.written:
            call.write("{}")
    elif (yield from source.accept("null")):
        call.write("{}")
    else:
        yield from pass_object(source, call.write, call.closers)


def bare_objects(answer: Answer) -> Steps[None]:
    """Llama 3: objects, with semicolons between them; the first brace is taken."""
    source = answer.source
    while True:
        yield from answer.attempt(partial(read_object, bare=True), hesitant=True)
        yield from source.space()
        if (yield from source.accept(";")):
            yield from source.space()
            yield from source.expect("{")
        elif not (yield from source.accept("{")):
            return


def mistral(answer: Answer) -> Steps[None]:
    """After ``[TOOL_CALLS]``: an array of objects, or a name and the arguments."""
    source = answer.source
    yield from source.space()
    if (yield from source.accept("[")):
        while True:
            yield from source.space()
            yield from source.expect("{")
            yield from answer.attempt(read_object)
            yield from source.space()
            if (yield from source.expect(",", "]")) == "]":
                return
    elif (yield from source.accept("{")):
        yield from answer.attempt(read_object)
    else:
        yield from answer.attempt(_read_name_and_object)


def _read_name_and_object(answer: Answer, call: Call) -> Steps[None]:
    """``name[ARGS]{...}``, in some versions with ``[CALL_ID]...`` in between."""
    source = answer.source
    name = yield from source.all(NAME)
    yield from source.space()
    if (yield from source.accept("[CALL_ID]")):
        yield from source.all(NAME)
    if not (yield from source.accept("[ARGS]")) and (yield from source.peek()) != "{":
        raise Malformed
    call.begin(name)
    yield from source.space()
    yield from pass_object(source, call.write, call.closers)
