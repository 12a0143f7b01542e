"""Tools as Anthropic's clients offer them: theirs only, none that runs on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from protocol.chat import Tool, ToolChoice
from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.openai.parameters import invalid_value, unsupported

Name = Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,128}$")]


class ToolSpec(msgspec.Struct, kw_only=True):
    """A tool of the client, or one of Anthropic's own, which is known by its ``type``."""

    type: str | None = None
    name: Name | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Any = None
    allowed_callers: Any = None
    input_examples: Any = None


class Choice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


#: Fields of a tool that cannot be honoured, with the values that ask for nothing.
_LIMITS: Mapping[str, Sequence[Any]] = {
    "defer_loading": (False,),
    "allowed_callers": (["direct"], []),
    "input_examples": ([],),
}


class ToolUse(NamedTuple):
    """What an answer may call: the fields of ``Generate`` that say so."""

    tools: list[Tool]
    choice: ToolChoice
    named: str | None
    parallel: bool


def tool_use(specs: list[ToolSpec] | None, choice: Choice | None) -> ToolUse:
    """Raises ``CodedError`` for what is not served, and for what does not fit together."""
    tools = [_tool(spec, f"tools[{i}]") for i, spec in enumerate(specs or [])]
    names = {tool.name for tool in tools}
    if len(names) < len(tools):
        raise invalid_value("tools", "two tools have the same name")
    if choice is None:
        return ToolUse(tools, ToolChoice.AUTO, None, True)
    parallel = not choice.disable_parallel_tool_use
    match choice.type:
        case "tool":
            if choice.name is None:
                param = "tool_choice.name"
                raise CodedError(ErrorCode.MISSING_PARAMETER, f"{param} is required", param=param)
            if choice.name not in names:
                what = f"there is no tool {choice.name[:100]!r} in tools"
                raise invalid_value("tool_choice.name", what)
            return ToolUse(tools, ToolChoice.NAMED, choice.name, parallel)
        case "any":
            if not tools:
                raise invalid_value("tool_choice", "'any' needs tools")
            return ToolUse(tools, ToolChoice.REQUIRED, None, parallel)
        case "none":
            return ToolUse(tools, ToolChoice.NONE, None, parallel)
    return ToolUse(tools, ToolChoice.AUTO, None, parallel)


def _tool(spec: ToolSpec, at: str) -> Tool:
    if spec.type is not None and spec.type != "custom":
        raise unsupported(at, f"tools of type {spec.type[:50]!r} are")
    for name, values in _LIMITS.items():
        value = getattr(spec, name)
        if value is not None and value not in values:
            raise unsupported(f"{at}.{name}")
    for param, value in (("name", spec.name), ("input_schema", spec.input_schema)):
        if value is None:
            param = f"{at}.{param}"
            raise CodedError(ErrorCode.MISSING_PARAMETER, f"{param} is required", param=param)
    assert spec.name is not None
    return Tool(spec.name, spec.description, spec.input_schema or {}, bool(spec.strict))
