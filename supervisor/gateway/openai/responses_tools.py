"""Tools of the Responses API: functions, and namespaces of functions.

A function of a namespace is ``namespace__name`` for the model. Tools that a server runs itself
there are none of, and they are refused, but for the search of the web: coding agents offer
it in every request and do without. It is never used, and not among the ``tools`` that the
response names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from supervisor.gateway.openai.parameters import missing, refuse_unsupported, unsupported
from supervisor.gateway.openai.tools import (
    Choice,
    FunctionSpec,
    Name,
    NamedFunction,
    NamedTool,
    ToolSpec,
    ToolUse,
    tool_use,
)


class ResponseTool(msgspec.Struct, kw_only=True):
    """Any tool; only functions and namespaces of them are known."""

    type: str
    name: Name | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: Any = None
    defer_loading: Any = None
    output_schema: Any = None
    asynchronous: Any = msgspec.field(default=None, name="async")
    tools: list[ResponseTool] | None = None

    @property
    def is_never_used(self) -> bool:
        return self.type.startswith("web_search")


class ToolChoice(msgspec.Struct):
    """Any choice that is an object; only that of a function is known."""

    type: str
    name: str | None = None


class AnsweredTool(msgspec.Struct, tag="function"):
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class AnsweredNamespace(msgspec.Struct, tag="namespace"):
    name: str
    description: str | None
    tools: list[AnsweredTool]


class _Function(NamedTuple):
    """A function, where it stands in the request, and the namespace it is in."""

    tool: ResponseTool
    at: str
    namespace: ResponseTool | None = None

    @property
    def name(self) -> str:
        """What the model calls it."""
        name = self.tool.name or ""
        return name if self.namespace is None else qualified(self.namespace.name, name)


#: Deferred tools are there from the beginning, which costs tokens and nothing else.
_LIMITS: Mapping[str, Sequence[Any]] = {
    "allowed_callers": ([], ["direct"]),
    "defer_loading": (False,),
    "output_schema": (),
}


def qualified(namespace: str | None, name: str) -> str:
    """What the model calls a function of a namespace."""
    return name if namespace is None else f"{namespace}__{name}"


def tool_use_of(
    tools: Sequence[ResponseTool] | None,
    choice: Literal["none", "auto", "required"] | ToolChoice | None,
) -> ToolUse:
    """Raises ``CodedError`` for what cannot be honoured, naming it."""
    specs = list(map(_spec, _functions(tools)))
    if not isinstance(choice, ToolChoice):
        return tool_use(specs, choice)
    if choice.type != "function":
        raise unsupported("tool_choice", f"choices of type {choice.type[:50]!r} are")
    if choice.name is None:
        raise missing("tool_choice.name")
    named: Choice = NamedTool("function", NamedFunction(choice.name))
    return tool_use(specs, named)


def namespaced(tools: Sequence[ResponseTool] | None) -> dict[str, tuple[str, str]]:
    """Namespace and name of those functions that are in one, by what the model calls them."""
    return {
        function.name: (function.namespace.name or "", function.tool.name or "")
        for function in _functions(tools)
        if function.namespace is not None
    }


def answered_tools(
    tools: Sequence[ResponseTool] | None,
) -> list[AnsweredTool | AnsweredNamespace]:
    """As a response names them, to a request that has been found valid."""
    return [
        AnsweredNamespace(tool.name or "", tool.description, list(map(_answered, tool.tools or ())))
        if tool.type == "namespace"
        else _answered(tool)
        for tool in tools or ()
        if not tool.is_never_used
    ]


def _functions(tools: Sequence[ResponseTool] | None) -> Iterator[_Function]:
    for i, tool in enumerate(tools or ()):
        at = f"tools[{i}]"
        if tool.type == "namespace":
            if tool.name is None:
                raise missing(f"{at}.name")
            for j, inner in enumerate(tool.tools or ()):
                yield _Function(inner, f"{at}.tools[{j}]", tool)
        elif not tool.is_never_used:
            yield _Function(tool, at)


def _spec(function: _Function) -> ToolSpec:
    tool, at, namespace = function
    if tool.type != "function":
        raise unsupported(at, f"tools of type {tool.type[:50]!r} are")
    if tool.name is None:
        raise missing(f"{at}.name")
    refuse_unsupported(tool, _LIMITS, at=f"{at}.")
    if tool.asynchronous:
        raise unsupported(f"{at}.async")
    parts = [tool.description, namespace.description if namespace is not None else None]
    description = "\n\n".join(filter(None, parts)) or None
    return ToolSpec(
        "function", FunctionSpec(function.name, description, tool.parameters, tool.strict)
    )


def _answered(tool: ResponseTool) -> AnsweredTool:
    return AnsweredTool(tool.name or "", tool.description, tool.parameters, bool(tool.strict))
