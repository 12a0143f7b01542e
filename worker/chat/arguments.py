"""Arguments that are written as bare text: which type a tool's schema gives them.

Formats like XML tags write ``5`` for the number and for the string; only the schema
knows. What does not fit any declared type stays a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from protocol.chat import Tool
from worker.chat.answer import Answer, Call
from worker.chat.json_text import parse
from worker.chat.literals import PYTHON, literal_to_json
from worker.chat.parsing import Malformed, Steps

STRING = frozenset({"string"})
NOT_STRING = frozenset({"null", "boolean", "number", "array", "object"})

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_OF_VALUES = {str: "string", bool: "boolean", int: "integer", float: "number"} | {
    type(None): "null",
    list: "array",
    dict: "object",
}
#: References can go round in circles.
_MAX_REFERENCES = 16


def declared_types(tool: Tool | None, key: str) -> frozenset[str]:
    """The JSON types that an argument may have; none if the schema does not say."""
    if tool is None:
        return frozenset()
    properties = tool.parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, dict) else None
    return frozenset(_types(schema, tool.parameters, _MAX_REFERENCES))


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    if not isinstance(schema, dict) or depth == 0:
        return set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {name for name in declared if isinstance(name, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if isinstance(values, list) and values:
        return {_OF_VALUES[type(value)] for value in values if type(value) in _OF_VALUES}
    if isinstance(reference := schema.get("$ref"), str):
        return _types(_referenced(reference, root), root, depth - 1)
    found: set[str] = set()
    for keyword in ("anyOf", "oneOf", "allOf"):
        if isinstance(choices := schema.get(keyword), list):
            for choice in choices:
                found |= _types(choice, root, depth - 1)
    return found


def resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a reference ends at; an empty one if it ends nowhere."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        found = _referenced(reference, root)
        schema = found if isinstance(found, dict) else {}
    return {}


def _referenced(reference: str, root: Mapping[str, Any]) -> Any:
    """What ``#/$defs/Name`` points to; references out of the schema point nowhere."""
    if not reference.startswith("#/"):
        return None
    node: Any = root
    for step in reference[2:].split("/"):
        node = node.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else 0
    return node


def coerce(text: str, types: frozenset[str]) -> str:
    """The JSON text of the argument that was written as ``text``.

    An undeclared type is a string, unless the text is that of an object or array,
    which templates write as JSON.
    """
    bare = text.strip()
    lower = bare.lower()
    if "null" in types and lower in ("null", "none"):
        return "null"
    if "boolean" in types and lower in ("true", "false"):
        return lower
    if types & {"integer", "number"} and (number := _number(bare, "number" in types)):
        return number
    if (not types or types & {"object", "array"}) and bare[:1] in ("{", "["):
        wanted = types or {"object", "array"}
        if ("object" if bare[0] == "{" else "array") in wanted and (value := _container(bare)):
            return value
    return json.dumps(text, ensure_ascii=False)


def _number(text: str, fractions: bool) -> str:
    """JSON text of a number; empty if the text is none."""
    try:
        if _INTEGER.fullmatch(text):
            return str(int(text))
        if _FLOAT.fullmatch(text):
            value = float(text)
            if value.is_integer() and abs(value) < 1e15:
                return str(int(value)) if not fractions else json.dumps(value)
            return json.dumps(value, allow_nan=False) if fractions else ""
    except (ValueError, OverflowError):
        pass
    return ""


def _container(text: str) -> str:
    """JSON text of an object or array that is written as JSON or Python; empty if neither."""
    if parse(text) is not Malformed:
        return text
    return literal_to_json(text, PYTHON)


def read_argument(
    answer: Answer, call: Call, key: str, types: frozenset[str], stop: str, trim: str = ""
) -> Steps[None]:
    """One argument's text up to ``stop``. Strings are passed on as they arrive.

    ``trim`` is what a template puts on either side of the value.
    """
    source = answer.source
    if types != STRING:
        parts: list[str] = []
        if not (yield from source.until(parts.append, stop)):
            raise Malformed
        text = "".join(parts).removeprefix(trim).removesuffix(trim)
        call.member(key, coerce(text, types))
        return
    call.open_string(key)
    if trim:
        yield from source.accept(trim)
    stops = (trim + stop, stop) if trim else (stop,)
    if not (yield from source.until(call.write_string, *stops)):
        raise Malformed
    call.close_string()
