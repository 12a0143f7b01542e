"""Tools and output formats as OpenAI's clients ask for them, and as the worker needs them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from protocol.chat import Constraint, ConstraintKind, Tool, ToolChoice
from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.openai.parameters import invalid_value

#: As OpenAI bounds them.
MAX_TOOLS = 128

Name = Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionSpec(msgspec.Struct):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct):
    type: Literal["function"]
    function: NamedFunction


Choice = Literal["none", "auto", "required"] | NamedTool


class SchemaSpec(msgspec.Struct):
    name: Name
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, tag="text"):
    pass


class JsonFormat(msgspec.Struct, tag="json_object"):
    pass


class SchemaFormat(msgspec.Struct, tag="json_schema"):
    json_schema: SchemaSpec


class RegexFormat(msgspec.Struct, tag="regex"):
    """Ours: the whole answer matches ``pattern`` (Rust's syntax)."""

    pattern: str


class GrammarFormat(msgspec.Struct, tag="grammar"):
    """Ours: the whole answer is in the language of a Lark grammar, as llguidance has it."""

    grammar: str


ResponseFormat = TextFormat | JsonFormat | SchemaFormat | RegexFormat | GrammarFormat


class ToolUse(NamedTuple):
    """What a chat may call: the fields of ``Generate`` that say so."""

    tools: list[Tool]
    choice: ToolChoice
    named: str | None


def tool_use(tools: list[ToolSpec] | None, choice: Choice | None) -> ToolUse:
    """Raises ``invalid_value`` for what does not fit together."""
    specs = tools or []
    if len(specs) > MAX_TOOLS:
        raise invalid_value("tools", f"at most {MAX_TOOLS} tools")
    names = [spec.function.name for spec in specs]
    if len(set(names)) < len(names):
        raise invalid_value("tools", "two tools have the same name")
    found = [tool_of(spec.function) for spec in specs]
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise invalid_value("tool_choice", f"there is no tool {name[:100]!r} in tools")
        return ToolUse(found, ToolChoice.NAMED, name)
    if choice == "required" and not found:
        raise invalid_value("tool_choice", "'required' needs tools")
    return ToolUse(found, ToolChoice(choice or "auto"), None)


def tool_of(function: FunctionSpec) -> Tool:
    return Tool(
        function.name, function.description, function.parameters or {}, bool(function.strict)
    )


def constraint_of(response_format: ResponseFormat | None) -> Constraint | None:
    """Raises ``missing_required_parameter`` for a schema format without a schema."""
    match response_format:
        case JsonFormat():
            return Constraint(ConstraintKind.JSON)
        case SchemaFormat():
            schema = response_format.json_schema.schema
            if schema is None:
                param = "response_format.json_schema.schema"
                raise CodedError(ErrorCode.MISSING_PARAMETER, f"{param} is required", param=param)
            return Constraint(ConstraintKind.SCHEMA, msgspec.json.encode(schema).decode())
        case RegexFormat():
            return Constraint(ConstraintKind.REGEX, response_format.pattern)
        case GrammarFormat():
            return Constraint(ConstraintKind.LARK, response_format.grammar)
    return None
