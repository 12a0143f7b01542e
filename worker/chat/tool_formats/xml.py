"""Calls as tags: what ``<tool_call>`` holds in its several dialects, and MiniMax's and
DeepSeek V3.2's ``invoke`` blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from worker.chat.answer import Answer, Call
from worker.chat.arguments import NOT_STRING, STRING, declared_types, read_argument
from worker.chat.json_text import pass_object
from worker.chat.parsing import NAME, Malformed, Steps, other_than
from worker.chat.tool_formats.json_calls import read_object
from worker.chat.tool_formats.sections import read_section

_HEAD = other_than("<>\n")


@dataclass(frozen=True)
class Tags:
    """A section of calls with one tag per argument.

    Tags that carry a name have it after the text given here, and end with ``>``.
    ``trim`` is what stands on either side of a value.
    """

    section: str
    section_end: str
    call: str
    call_end: str
    argument: str
    argument_end: str
    trim: str = ""


QWEN3_CODER = Tags(
    "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>", "\n"
)
SEED = Tags(
    "<seed:tool_call>",
    "</seed:tool_call>",
    "<function=",
    "</function>",
    "<parameter=",
    "</parameter>",
)
MINIMAX = Tags(
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<invoke name=",
    "</invoke>",
    "<parameter name=",
    "</parameter>",
)
DSML = Tags(
    "<｜DSML｜function_calls>",
    "</｜DSML｜function_calls>",
    "<｜DSML｜invoke name=",
    "</｜DSML｜invoke>",
    "<｜DSML｜parameter name=",
    "</｜DSML｜parameter>",
)
#: DeepSeek V4 calls the section otherwise.
DSML_V4 = replace(DSML, section="<｜DSML｜tool_calls>", section_end="</｜DSML｜tool_calls>")

#: Within ``<tool_call>name``, one pair for each argument.
ARG_KEY, ARG_KEY_END = "<arg_key>", "</arg_key>"
ARG_VALUE, ARG_VALUE_END = "<arg_value>", "</arg_value>"
GLM_MARKERS = (ARG_KEY, ARG_KEY_END, ARG_VALUE, ARG_VALUE_END)


def tool_call_tag(answer: Answer) -> Steps[None]:
    """What stands in ``<tool_call>``: Hermes' JSON, Qwen3-Coder's tags, or GLM's.

    They cannot be mistaken for each other, and models stray from their templates.
    """
    source = answer.source
    while True:
        yield from source.space()
        if (yield from source.accept(QWEN3_CODER.section_end)) or source.exhausted:
            return
        if (yield from source.accept("{")):
            yield from answer.attempt(read_object)
        elif (yield from source.accept(QWEN3_CODER.call)):
            yield from answer.attempt(partial(read_tags, tags=QWEN3_CODER))
        else:
            yield from answer.attempt(_read_glm_call)


def tagged_calls(answer: Answer, tags: Tags, inside: bool = False) -> Steps[None]:
    read = partial(read_tags, tags=tags)
    yield from read_section(answer, tags.call, tags.section_end, read, inside)


def read_tags(answer: Answer, call: Call, tags: Tags) -> Steps[None]:
    """One call, its opener taken up to the name."""
    source = answer.source
    call.begin((yield from _read_name(answer))[0])
    yield from source.space()
    if (yield from source.peek()) == "{":  # Llama 3's <function=name>{...}</function>
        yield from pass_object(source, call.write, call.closers)
        yield from source.space()
        yield from source.expect(tags.call_end)
        return
    while True:
        yield from source.space()
        if (yield from source.ahead(tags.section_end)):
            return
        if (yield from source.expect(tags.argument, tags.call_end)) == tags.call_end:
            return
        key, attributes = yield from _read_name(answer)
        types = declared_types(call.tool, key)
        if 'string="true"' in attributes:
            types = STRING
        elif 'string="false"' in attributes:
            types = types - STRING or NOT_STRING
        yield from read_argument(answer, call, key, types, tags.argument_end, tags.trim)


def _read_name(answer: Answer) -> Steps[tuple[str, str]]:
    """A name, in quotes or not, and other attributes; to the end of the tag."""
    text = (yield from answer.source.all(_HEAD)).strip()
    yield from answer.source.expect(">")
    if text[:1] in ('"', "'"):
        name, _, attributes = text[1:].partition(text[0])
        return name, attributes
    return text, ""


def _read_glm_call(answer: Answer, call: Call) -> Steps[None]:
    source = answer.source
    name = yield from source.all(NAME)
    yield from source.space()
    end = QWEN3_CODER.section_end
    if not name or not (yield from source.ahead(ARG_KEY, end)):
        raise Malformed
    call.begin(name)
    while (yield from source.accept(ARG_KEY)):
        parts: list[str] = []
        yield from source.until(parts.append, ARG_KEY_END)
        yield from source.space()
        yield from source.expect(ARG_VALUE)
        key = "".join(parts).strip()
        types = declared_types(call.tool, key)
        yield from read_argument(answer, call, key, types, ARG_VALUE_END)
        yield from source.space()
    if not (yield from source.ahead(end)):
        raise Malformed
