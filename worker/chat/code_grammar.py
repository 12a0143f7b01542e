"""Grammars of arguments that look like code: Python's, and Gemma's two."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.chat import Tool
from protocol.errors import CodedError, ErrorCode
from worker.chat.arguments import resolve
from worker.chat.grammar import Grammar, Member, literal, properties_of

#: Schemas nested deeper than that, as those that contain themselves are, have no grammar.
_MAX_DEPTH = 16
#: What strings are not held to where they are no JSON.
_OF_STRINGS = frozenset({"pattern", "format", "minLength", "maxLength"})


@dataclass(frozen=True)
class Code:
    """``assign``: between a name and its value; ``separator``: between two arguments.

    ``quote``: what strings are between; empty: values are JSON. ``key``: what may be the
    name of an argument.
    """

    assign: str
    separator: str
    quote: str
    key: re.Pattern[str]


PYTHON_CODE = Code("=", ", ", "", re.compile(r"\w+"))
_GEMMA_KEY = re.compile(r"[^\s:,\[\]{}<][^:,\[\]{}<\n]*(?<!\s)")
FUNCTION_GEMMA_CODE = Code(":", ",", "<escape>", _GEMMA_KEY)
GEMMA4_CODE = Code(":", ",", '<|"|>', _GEMMA_KEY)


def code_arguments(grammar: Grammar, code: Code, tool: Tool, number: int) -> str:
    """Adds rules for the arguments of a call; the rule that begins them, if there are any.

    Raises ``CodedError`` for a schema that this notation cannot be held to.
    """
    return _Writer(grammar, code, tool).members(f"arguments_{number}", tool.parameters, 0)


class _Writer:
    def __init__(self, grammar: Grammar, code: Code, tool: Tool) -> None:
        self._grammar = grammar
        self._code = code
        self._tool = tool

    def members(self, name: str, schema: Mapping[str, Any], depth: int) -> str:
        properties, required = properties_of(schema)
        members = []
        for place, (key, value) in enumerate(properties.items()):
            if not self._code.key.fullmatch(key):
                raise self._refusal(f"an argument cannot be called {key[:50]!r}")
            rule = f"{name}_member_{place}"
            written = self._value(f"{rule}_value", value, depth + 1)
            self._grammar.add(rule, self._grammar.text(f"{key}{self._code.assign}"), written)
            members.append(Member(rule, key in required))
        return self._grammar.joined(name, members, self._code.separator)

    def _value(self, name: str, schema: Any, depth: int) -> str:
        grammar, tool = self._grammar, self._tool
        schema = schema if isinstance(schema, dict) else {}
        if not self._code.quote:
            return grammar.json_value(name, tool, schema)
        if depth > _MAX_DEPTH:
            raise self._refusal("its schema is nested too deeply, or contains itself")
        schema = resolve(schema, tool.parameters)
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list) and values:
            return f"({' | '.join(map(self._constant, values))})"
        if isinstance(choices := schema.get("anyOf", schema.get("oneOf")), list) and choices:
            return self._any_of(name, choices, depth)
        types = schema.get("type", "string")
        if isinstance(types, list):
            return self._any_of(name, [{**schema, "type": each} for each in types], depth)
        match types:
            case "object":
                inside = self.members(name, schema, depth)
                return f"{literal('{')} {inside} {literal('}')}"
            case "array":
                value = self._value(f"{name}_of", self._items(schema), depth + 1)
                item = grammar.add(f"{name}_item", value)
                return f'"[" ({item} ("," {item})*)? "]"'
            case "string":
                return self._string(name, schema)
        return grammar.json_value(name, tool, schema)

    def _any_of(self, name: str, schemas: Sequence[Any], depth: int) -> str:
        written = [self._value(f"{name}_{i}", each, depth + 1) for i, each in enumerate(schemas)]
        return f"({' | '.join(written)})"

    def _string(self, name: str, schema: Mapping[str, Any]) -> str:
        if self._tool.strict and (kept := sorted(_OF_STRINGS & schema.keys())):
            raise self._refusal(f"strings are not held to {', '.join(kept)}")
        quote = self._code.quote
        return f"{self._grammar.text(quote)} {self._grammar.text_until(name, quote)}"

    def _items(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._tool.strict and (kept := {"minItems", "maxItems", "prefixItems"} & schema.keys()):
            raise self._refusal(f"arrays are not held to {', '.join(sorted(kept))}")
        items = schema.get("items")
        return items if isinstance(items, dict) else {}

    def _constant(self, value: object) -> str:
        if isinstance(value, str):
            return self._grammar.text(f"{self._code.quote}{value}{self._code.quote}")
        if isinstance(value, list | dict):
            raise self._refusal("an enum has an array or an object")
        constants = {True: "true", False: "false", None: "null"}
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return literal(repr(value) if is_number else constants[value])  # type: ignore[index]

    def _refusal(self, why: str) -> CodedError:
        return CodedError(
            ErrorCode.UNSUPPORTED_PARAMETER,
            f"tools: calls of {self._tool.name} cannot be constrained in this model's format: "
            f"{why}",
            param="tools",
        )
