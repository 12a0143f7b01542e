"""The turns of a chat: from OpenAI's message objects to those of the worker."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from protocol.chat import ChatMessage, ToolCall
from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.openai.parameters import invalid_value, unsupported
from supervisor.presets import RESERVED_OPTIONS

#: Of the turns that tell a model how to behave.
SYSTEM_ROLES = frozenset({"system", "developer"})


class Part(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str = ""


class CallTurn(msgspec.Struct):
    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class Turn(msgspec.Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[CallTurn] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    #: What reasoning models said before their answer; ours and others' extension.
    reasoning_content: str | None = None
    function_call: Any = None
    audio: Any = None


def checked_options(given: dict[str, Any] | None) -> dict[str, Any]:
    """``chat_template_kwargs``, to add to. Raises ``invalid_value``."""
    options = dict(given or {})
    if taken := sorted(RESERVED_OPTIONS & options.keys()):
        raise invalid_value("chat_template_kwargs", f"{taken[0]!r} is not a client's to set")
    return options


def messages_of(turns: list[Turn]) -> list[ChatMessage]:
    """Raises ``CodedError`` for what the decoder cannot see, with where it is."""
    if not turns:
        raise invalid_value("messages", "must not be empty")
    #: Tools by the ids of their calls: templates want a result's name as well.
    called: dict[str, str] = {}
    messages = []
    for i, turn in enumerate(turns):
        message = _message(turn, f"messages[{i}]", called)
        called.update((call.id, call.name) for call in message.tool_calls)
        messages.append(message)
    return messages


def _message(turn: Turn, at: str, called: dict[str, str]) -> ChatMessage:
    for field in ("function_call", "audio"):
        if getattr(turn, field) is not None:
            raise unsupported(f"{at}.{field}")
    calls = []
    if turn.tool_calls:
        if turn.role != "assistant":
            raise invalid_value(f"{at}.tool_calls", "only an assistant calls tools")
        calls = [
            ToolCall(call.id, call.function.name, call.function.arguments)
            for call in turn.tool_calls
        ]
    name = turn.name
    if turn.role == "tool":
        if turn.tool_call_id is None:
            param = f"{at}.tool_call_id"
            raise CodedError(ErrorCode.MISSING_PARAMETER, f"{param} is required", param=param)
        name = name or called.get(turn.tool_call_id)
    return ChatMessage(
        # Chat templates know the role under its older name.
        "system" if turn.role == "developer" else turn.role,
        _content(turn, f"{at}.content", optional=bool(calls or turn.refusal)),
        name,
        calls,
        turn.tool_call_id if turn.role == "tool" else None,
        turn.reasoning_content,
    )


def _content(turn: Turn, at: str, *, optional: bool) -> str:
    content = turn.content
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return turn.refusal or ""
        raise CodedError(ErrorCode.MISSING_PARAMETER, f"{at} is required", param=at)
    if not content:
        raise invalid_value(at, "must not be empty")
    return "\n".join(_text(part, f"{at}[{i}]") for i, part in enumerate(content))


def _text(part: Part, at: str) -> str:
    if part.type not in {"text", "refusal"}:
        raise unsupported(at, f"parts of type {part.type[:50]!r} are")
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        param = f"{at}.{part.type}"
        raise CodedError(ErrorCode.MISSING_PARAMETER, f"{param} is required", param=param)
    return text
