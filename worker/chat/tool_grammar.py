"""Grammars that make a model call a tool, in the format that its parser reads.

Every format has its own: no other one's would be read by its parser.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from protocol.chat import Tool
from worker.chat.arguments import STRING, declared_types
from worker.chat.code_grammar import (
    FUNCTION_GEMMA_CODE,
    GEMMA4_CODE,
    PYTHON_CODE,
    Code,
    code_arguments,
)
from worker.chat.formats import PYTHON_TAGS, Format
from worker.chat.grammar import Grammar, Specials, literal, properties_of
from worker.chat.tool_formats import harmony, sections, xml

_NAME = "\0"  # stands for the tool's name in the frames below
_IS_TEXT = "\1"  # stands for whether a value is text


@dataclass(frozen=True)
class _Frame:
    """What is around and between calls, and before and after their arguments.

    ``between`` is ``None`` where the format has one call to an answer.
    """

    before: str
    after: str
    between: str | None = ""
    open: str = ""
    close: str = ""


@dataclass(frozen=True)
class _TagFrame(_Frame):
    """Arguments one by one: ``key`` before a name, ``value`` before a value, ``end`` after
    it, and ``line`` after that. ``trim``: what a template puts before ``end``."""

    key: str = ""
    value: str = ""
    end: str = ""
    line: str = "\n"
    trim: str = ""


@dataclass(frozen=True)
class _CodeFrame(_Frame):
    """Arguments as code has them."""

    code: Code = PYTHON_CODE


def _tag_frame(tags: xml.Tags, quote: str = "") -> _TagFrame:
    return _TagFrame(
        before=f"{tags.call}{quote}{_NAME}{quote}>\n",
        after=f"{tags.call_end}\n",
        open=f"{tags.section}\n",
        close=tags.section_end,
        key=f"{tags.argument}{quote}",
        value=f"{quote}>",
        end=tags.argument_end,
    )


_JSON_FRAMES: Mapping[str, _Frame] = {
    "hermes": _Frame(
        f'<tool_call>\n{{"name": {_NAME}, "arguments": ', "}\n</tool_call>", between="\n"
    ),
    "llama3": _Frame(f'{{"name": {_NAME}, "parameters": ', "}", between=None),
    "mistral": _Frame(
        f'{{"name": {_NAME}, "arguments": ', "}", ", ", open="[TOOL_CALLS][", close="]"
    ),
}
_FRAMES: Mapping[str, _Frame] = {
    "mistral-args": _Frame(f"[TOOL_CALLS]{_NAME}[ARGS]", ""),
    # As V3.1 writes it; V3 and R1 have learnt another way.
    "deepseek": _Frame(
        f"{sections.DEEPSEEK_CALL}{_NAME}{sections.DEEPSEEK_ARGUMENTS}",
        sections.DEEPSEEK_CALL_END,
        open=sections.DEEPSEEK_SECTION,
        close=sections.DEEPSEEK_SECTION_END,
    ),
    # The number counts calls over the whole conversation; the parser does not mind.
    "kimi-k2": _Frame(
        f"{sections.KIMI_CALL}functions.{_NAME}:0{sections.KIMI_ARGUMENTS}",
        sections.KIMI_CALL_END,
        open=sections.KIMI_SECTION,
        close=sections.KIMI_SECTION_END,
    ),
    "harmony": _Frame(
        f"{harmony.CHANNEL}commentary to=functions.{_NAME} {harmony.CONSTRAIN}json"
        f"{harmony.MESSAGE}",
        "",
        between=None,
    ),
}
_TAG_FRAMES: Mapping[str, _TagFrame] = {
    # One section for each call, as its template renders them.
    "qwen3-coder": _TagFrame(
        before=f"<tool_call>\n<function={_NAME}>\n",
        after="</function>\n</tool_call>",
        between="\n",
        key="<parameter=",
        value=">\n",
        end="</parameter>",
        trim="\n",
    ),
    "glm": _TagFrame(
        before=f"<tool_call>{_NAME}\n",
        after="</tool_call>",
        between="\n",
        key=xml.ARG_KEY,
        value=f"{xml.ARG_KEY_END}\n{xml.ARG_VALUE}",
        end=xml.ARG_VALUE_END,
    ),
    "dsml": _TagFrame(
        before=f'{xml.DSML.call}"{_NAME}">\n',
        after=f"{xml.DSML.call_end}\n",
        open=f"{xml.DSML.section}\n",
        close=xml.DSML.section_end,
        key=f'{xml.DSML.argument}"',
        value=f'" string="{_IS_TEXT}">',
        end=xml.DSML.argument_end,
    ),
    "seed": _tag_frame(xml.SEED),
    "minimax": _tag_frame(xml.MINIMAX, '"'),
}
_CODE_FRAMES: Mapping[str, _CodeFrame] = {
    "pythonic": _CodeFrame(f"{_NAME}(", ")", ", ", open="[", close="]"),
    "function-gemma": _CodeFrame(
        f"<start_function_call>call:{_NAME}{{",
        "}<end_function_call>",
        code=FUNCTION_GEMMA_CODE,
    ),
    "gemma4": _CodeFrame(f"<|tool_call>call:{_NAME}{{", "}<tool_call|>", code=GEMMA4_CODE),
}


def call_grammar(
    format: Format, tools: Sequence[Tool], *, parallel: bool, special: Specials | None = None
) -> str:
    """A Lark grammar of one call to one of ``tools``, or, if ``parallel``, of one or more.

    There is no text before it: reasoning has to be over when the grammar begins, except
    Harmony's, which is part of it. ``special`` are those of the format's markers that
    are special tokens of the model's tokeniser; the others are written as text.

    Arguments fit the tool's schema. Where they are bare text, strings are only kept
    to their ``enum``, and members come in the schema's order. What llguidance cannot
    enforce of a schema is ignored, but for tools that are ``strict``. Raises ``CodedError``
    for a schema that Python's or Gemma's notation cannot be held to.
    """
    frame = _frame_of(format, special or {})
    grammar = Grammar(special or {})
    grammar.add("call", " | ".join(_calls(grammar, format, frame, tools)))
    more = (
        f"({grammar.text(frame.between)} call)*" if parallel and frame.between is not None else ""
    )
    lead = _analysis(grammar) if format.name == "harmony" else ""
    return grammar.written(lead, grammar.text(frame.open), "call", more, grammar.text(frame.close))


def text_with_calls_grammar(
    format: Format,
    tools: Sequence[Tool],
    *,
    special: Specials | None = None,
    free: Collection[str] = (),
) -> str | None:
    """A Lark grammar of any text, in which what begins as a call is one, as above.

    ``free`` are special tokens that the text may have. ``None`` also for formats whose
    calls begin like other text: Llama 3's and Harmony's.
    """
    frame = _frame_of(format, special or {})
    begin = frame.open or frame.before
    opener = next((each for each in format.openers if begin.startswith(each)), None)
    if opener is None:
        return None
    grammar = Grammar(special or {})
    calls = _calls(grammar, format, frame, tools, "" if frame.open else opener)
    grammar.add("call", " | ".join(calls))
    if frame.open:
        first = grammar.text(frame.open.removeprefix(opener))
        more = f"({grammar.text(frame.between or '')} call)*"
        grammar.add("section", "lead", first, "call", more, grammar.text(frame.close))
    else:
        grammar.add("section", "lead call")
    if opener in grammar.special:
        grammar.add("lead", f"TEXT {grammar.text(opener)}")
    else:
        grammar.add("lead[lazy]", f"TEXT {grammar.text(opener)}")
    # In the grammar of a lexeme, so without a rule of its own.
    grammar.add("TEXT", r"/(?s:.*)/")
    marks = [f"TEXT {grammar.text(each)}" for each in free if each in grammar.special]
    return grammar.written(f"({' | '.join(['section', *marks])})*", "TEXT")


def _frame_of(format: Format, special: Specials) -> _Frame:
    name = format.name
    if name == "pythonic":
        # With tags around the list where the model has such tokens.
        frame = _CODE_FRAMES[name]
        for opener, closer in PYTHON_TAGS.items():
            if opener in special:
                return replace(frame, open=f"{opener}[", close=f"]{closer}")
        return frame
    frames: tuple[Mapping[str, _Frame], ...] = (_JSON_FRAMES, _FRAMES, _TAG_FRAMES, _CODE_FRAMES)
    return next(each[name] for each in frames if name in each)


def _calls(
    grammar: Grammar, format: Format, frame: _Frame, tools: Sequence[Tool], opener: str = ""
) -> list[str]:
    """Adds a rule for a call to each tool, without ``opener``; their names."""
    names = []
    for number, tool in enumerate(tools):
        name = json.dumps(tool.name) if format.name in _JSON_FRAMES else tool.name
        if isinstance(frame, _TagFrame):
            arguments = _tagged(grammar, frame, tool, number)
        elif isinstance(frame, _CodeFrame):
            arguments = code_arguments(grammar, frame.code, tool, number)
        else:
            rule = f"arguments_{number}"
            arguments = grammar.json(rule, tool, tool.parameters, type="object")
        before = grammar.text(frame.before.removeprefix(opener).replace(_NAME, name))
        names.append(grammar.add(f"call_{number}", before, arguments, grammar.text(frame.after)))
    return names


def _tagged(grammar: Grammar, frame: _TagFrame, tool: Tool, number: int) -> str:
    """Adds rules for arguments in tags; the parts of a call that they are."""
    properties, required = properties_of(tool.parameters)
    arguments = []
    for place, (key, schema) in enumerate(properties.items()):
        name = f"argument_{number}_{place}"
        types = declared_types(tool, key)
        is_text = not types or "string" in types
        value = frame.value.replace(_IS_TEXT, "true" if is_text else "false")
        rule = f"value_{number}_{place}"
        end = grammar.text(frame.trim + frame.end)
        if types == STRING and isinstance(allowed := schema.get("enum"), list):
            answer = f"({' | '.join(literal(str(each)) for each in allowed)}) {end}"
        elif is_text:
            answer = grammar.text_until(rule, frame.end)
        else:
            answer = f"{grammar.json_value(rule, tool, schema)} {end}"
        before = grammar.text(f"{frame.key}{key}{value}")
        grammar.add(name, before, answer, grammar.text(frame.line))
        arguments.append(name if key in required else f"{name}?")
    return " ".join(arguments)


def _analysis(grammar: Grammar) -> str:
    """Harmony's reasoning, which may come first; its end has to be a token."""
    if harmony.END not in grammar.special:
        return ""
    grammar.add(
        "analysis",
        grammar.text(f"{harmony.CHANNEL}analysis{harmony.MESSAGE}"),
        r"/(?s:.*)/",
        grammar.text(f"{harmony.END}{harmony.START}assistant"),
    )
    return "analysis?"
