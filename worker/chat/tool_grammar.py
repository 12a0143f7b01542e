"""Grammars that make a model call a tool, in the format that its parser reads.

Texts are in llguidance's variant of Lark. Some formats have none here: in Gemma's two
and in Python's no value is JSON, and DSML has an attribute for the type of each. Hermes'
grammar is no substitute there: their parsers would not read what it makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.chat import Tool
from worker.chat.arguments import STRING, declared_types
from worker.chat.formats import Format
from worker.chat.tool_formats import harmony, sections, xml

#: The text of a special token, and its id.
Specials = Mapping[str, int]

#: How JSON is written: llguidance's options, which a schema in a grammar has in its
#: ``x-guidance``. See ``worker.constraints`` for why.
JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": r" |\n[ \t]{0,20}",
    "json_allowed_escapes": 'nrbtf\\"',
    "json_allow_general_unicode_escapes": False,
    "coerce_one_of": False,
    "lenient": False,
}

_NAME = "\0"  # stands for the tool's name in the frames below


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
    "seed": _tag_frame(xml.SEED),
    "minimax": _tag_frame(xml.MINIMAX, '"'),
}


def call_grammar(
    format: Format, tools: Sequence[Tool], *, parallel: bool, special: Specials | None = None
) -> str | None:
    """A Lark grammar of one call to one of ``tools``, or, if ``parallel``, of one or more.

    There is no text before it: reasoning has to be over when the grammar begins, except
    Harmony's, which is part of it. ``special`` are those of the format's markers that
    are special tokens of the model's tokeniser; the others are written as text.

    Arguments fit the tool's schema. Where they are bare text, strings are only kept
    to their ``enum``, and members come in the schema's order. What llguidance cannot
    enforce of a schema is ignored, but for tools that are ``strict``.
    """
    frame = _frame_of(format)
    if frame is None or not tools:
        return None
    grammar = _Grammar(special or {})
    grammar.add("call", " | ".join(grammar.calls(format, frame, tools)))
    more = (
        f"({grammar.text(frame.between)} call)*" if parallel and frame.between is not None else ""
    )
    lead = grammar.analysis() if format.name == "harmony" else ""
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
    frame = _frame_of(format)
    begin = frame.open or frame.before if frame is not None else ""
    opener = next((each for each in format.openers if begin.startswith(each)), None)
    if frame is None or opener is None or not tools:
        return None
    grammar = _Grammar(special or {})
    calls = grammar.calls(format, frame, tools, "" if frame.open else opener)
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


def _frame_of(format: Format) -> _Frame | None:
    name = format.name
    return _JSON_FRAMES.get(name) or _FRAMES.get(name) or _TAG_FRAMES.get(name)


class _Grammar:
    def __init__(self, special: Specials) -> None:
        self.special = special
        self._rules: list[str] = []
        tokens = sorted(special, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, tokens))})" if tokens else r"(?!)")

    def written(self, *start: str) -> str:
        """The whole, beginning with these parts."""
        return "\n".join([f"start: {' '.join(filter(None, start))}", *self._rules]) + "\n"

    def add(self, name: str, *parts: str) -> None:
        self._rules.append(f"{name}: {' '.join(filter(None, parts))}")

    def text(self, text: str) -> str:
        """Literal text; of what is in it of special tokens, the tokens."""
        parts = filter(None, self._tokens.split(text))
        return " ".join(
            f"<[{self.special[part]}]>" if part in self.special else _literal(part)
            for part in parts
        )

    def calls(
        self, format: Format, frame: _Frame, tools: Sequence[Tool], opener: str = ""
    ) -> list[str]:
        """Adds a rule for a call to each tool, without ``opener``; their names."""
        names = []
        for number, tool in enumerate(tools):
            name = json.dumps(tool.name) if format.name in _JSON_FRAMES else tool.name
            arguments = (
                self.tagged(frame, tool, number)
                if isinstance(frame, _TagFrame)
                else self.json(f"arguments_{number}", tool, tool.parameters)
            )
            before = self.text(frame.before.removeprefix(opener).replace(_NAME, name))
            self.add(f"call_{number}", before, arguments, self.text(frame.after))
            names.append(f"call_{number}")
        return names

    def json(self, name: str, tool: Tool, schema: Mapping[str, Any], type: str = "object") -> str:
        """Adds a rule for JSON that fits a schema; its name."""
        options = {"x-guidance": {**JSON_OPTIONS, "lenient": not tool.strict}}
        schema = {**({"type": type} if type else {}), **schema, **options}
        self.add(name, f"%json {json.dumps(schema)}")
        return name

    def tagged(self, frame: _TagFrame, tool: Tool, number: int) -> str:
        """Adds rules for arguments in tags; the parts of a call that they are."""
        properties = tool.parameters.get("properties")
        required = tool.parameters.get("required", ())
        arguments = []
        for place, key in enumerate(properties if isinstance(properties, dict) else ()):
            name = f"argument_{number}_{place}"
            before = self.text(f"{frame.key}{key}{frame.value}")
            value = self._value(frame, tool, f"value_{number}_{place}", key)
            self.add(name, before, value, self.text(frame.line))
            arguments.append(name if key in required else f"{name}?")
        return " ".join(arguments)

    def _value(self, frame: _TagFrame, tool: Tool, name: str, key: str) -> str:
        """A value and what ends it."""
        schema = tool.parameters["properties"][key]
        types = declared_types(tool, key)
        end = self.text(frame.trim + frame.end)
        if types == STRING and isinstance(allowed := schema.get("enum"), list):
            return f"({' | '.join(_literal(str(value)) for value in allowed)}) {end}"
        if types and "string" not in types:
            for keyword in ("$defs", "definitions"):
                if keyword in tool.parameters:
                    schema = {keyword: tool.parameters[keyword], **schema}
            return f"{self.json(name, tool, schema, type='')} {end}"
        if self._tokens.search(frame.end):
            # Text holds no special tokens, so there is no doubt where it ends.
            return rf"/(?s:.*)/ {self.text(frame.end)}"
        # The parser takes the first end there is, whatever is before it.
        self._rules.append(f"{name}[suffix={_literal(frame.end)}]: /(?s:.*)/")
        return name

    def analysis(self) -> str:
        """Harmony's reasoning, which may come first; its end has to be a token."""
        if harmony.END not in self.special:
            return ""
        self.add(
            "analysis",
            self.text(f"{harmony.CHANNEL}analysis{harmony.MESSAGE}"),
            r"/(?s:.*)/",
            self.text(f"{harmony.END}{harmony.START}assistant"),
        )
        return "analysis?"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
