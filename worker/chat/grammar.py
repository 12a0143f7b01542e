"""Builds grammars in llguidance's variant of Lark, rule by rule."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from protocol.chat import Tool
from protocol.errors import CodedError, ErrorCode

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


#: Of a grammar; ``worker.constraints`` takes no larger one.
MAX_CHARS = 256 * 1024


class Member(NamedTuple):
    """A rule of one argument, which may be left out unless it is ``required``."""

    rule: str
    required: bool


class Grammar:
    """``special``: ids of special tokens by their texts."""

    def __init__(self, special: Specials) -> None:
        self.special = special
        self._rules: list[str] = []
        self._left = MAX_CHARS
        tokens = sorted(special, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, tokens))})" if tokens else r"(?!)")

    def written(self, *start: str) -> str:
        """The whole, beginning with these parts."""
        return "\n".join([f"start: {' '.join(filter(None, start))}", *self._rules]) + "\n"

    def add(self, name: str, *parts: str) -> str:
        """Adds a rule; its name. Raises ``CodedError`` once all of them are too large."""
        rule = f"{name}: {' '.join(filter(None, parts))}"
        self._left -= len(rule)
        if self._left < 0:
            raise CodedError(
                ErrorCode.INVALID_VALUE,
                f"tools: a grammar of their schemas has more than {MAX_CHARS} characters",
                param="tools",
            )
        self._rules.append(rule)
        return name

    def text(self, text: str) -> str:
        """Literal text; of what is in it of special tokens, the tokens."""
        parts = filter(None, self._tokens.split(text))
        return " ".join(
            f"<[{self.special[part]}]>" if part in self.special else literal(part) for part in parts
        )

    def text_until(self, name: str, end: str) -> str:
        """Any text and then ``end``: the parts of a rule, for which ``name`` may be added."""
        if self._tokens.search(end):
            # Text holds no special tokens, so there is no doubt where it ends.
            return rf"/(?s:.*)/ {self.text(end)}"
        # Parsers take the first end there is, whatever is before it.
        self._rules.append(f"{name}[suffix={literal(end)}]: /(?s:.*)/")
        return name

    def json(self, name: str, tool: Tool, schema: Mapping[str, Any], type: str = "") -> str:
        """Adds a rule for JSON that fits a schema; its name. ``type``: unless it has its own."""
        options = {"x-guidance": {**JSON_OPTIONS, "lenient": not tool.strict}}
        schema = {**({"type": type} if type else {}), **schema, **options}
        return self.add(name, f"%json {json.dumps(schema)}")

    def json_value(self, name: str, tool: Tool, schema: Mapping[str, Any]) -> str:
        """The same for a part of the tool's schema, which may refer to others of it."""
        for keyword in ("$defs", "definitions"):
            if keyword in tool.parameters:
                schema = {keyword: tool.parameters[keyword], **schema}
        return self.json(name, tool, schema)

    def joined(self, name: str, members: Sequence[Member], separator: str) -> str:
        """Adds rules for members in their order with ``separator`` between them; the name of
        the first of these rules, or nothing without members."""
        if not members:
            return ""
        between = self.text(separator)
        for place, (rule, required) in reversed(list(enumerate(members))):
            last = place == len(members) - 1
            more = "" if last else f"{name}_more_{place + 1}"
            if place:
                left_out = "" if required else f" | {more or literal('')}"
                self.add(f"{name}_more_{place}", f"{between} {rule} {more}{left_out}")
            left_out = "" if required else f" | {literal('') if last else f'{name}_{place + 1}'}"
            self.add(f"{name}_{place}", f"{rule} {more}{left_out}")
        return f"{name}_0"


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def properties_of(schema: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[str]]:
    """What an object's schema says of its members, and which have to be there."""
    properties, required = schema.get("properties"), schema.get("required")
    return (
        properties if isinstance(properties, dict) else {},
        required if isinstance(required, list) else (),
    )
