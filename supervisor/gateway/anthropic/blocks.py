"""The turns of a chat: from Anthropic's content blocks to the messages of the worker."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from protocol.chat import ChatMessage, ToolCall
from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.openai.parameters import invalid_value, unsupported


class Block(msgspec.Struct, kw_only=True):
    """A block of any type; which of the fields it has is up to that.

    ``cache_control`` changes no answer and is not looked at: what prompts share is
    found without it.
    """

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    #: A dict is that of a type which is not served.
    content: str | list[Block] | dict[str, Any] | None = None
    is_error: bool | None = None


class Turn(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


def messages_of(system: str | list[Block] | None, turns: list[Turn]) -> list[ChatMessage]:
    """Turns in a row of the same role are one, as Anthropic has it; each result of a tool
    is a message of its own.

    Raises ``CodedError`` for what the decoder cannot see, with where it is.
    """
    if not turns:
        raise invalid_value("messages", "must not be empty")
    transcript = _Transcript()
    if system:
        transcript.add(ChatMessage("system", _text_of(system, "system")))
    for i, turn in enumerate(turns):
        transcript.take(turn, f"messages[{i}].content")
    return transcript.messages


class _Transcript:
    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        #: Tools by the ids of their calls: templates want a result's name as well.
        self._called: dict[str, str] = {}

    def take(self, turn: Turn, at: str) -> None:
        content = turn.content
        if isinstance(content, str):
            self.add(ChatMessage(turn.role, content))
        elif turn.role == "assistant":
            self._take_answer(content, at)
        elif not content:
            raise invalid_value(at, "must not be empty")
        elif turn.role == "system":
            self.add(ChatMessage("system", _text_of(content, at)))
        else:
            self._take_question(content, at)

    def add(self, message: ChatMessage) -> None:
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != message.role or message.role == "tool":
            self.messages.append(message)
            return
        self.messages[-1] = ChatMessage(
            last.role,
            _joined([last.content, message.content]),
            tool_calls=[*last.tool_calls, *message.tool_calls],
            reasoning=_joined([last.reasoning or "", message.reasoning or ""]) or None,
        )

    def _take_question(self, blocks: list[Block], at: str) -> None:
        texts: list[str] = []

        def flush() -> None:
            if texts:
                self.add(ChatMessage("user", "\n".join(texts)))
                texts.clear()

        for i, block in enumerate(blocks):
            where = f"{at}[{i}]"
            if block.type == "tool_result":
                flush()
                self.add(self._result(block, where))
            else:
                texts.append(_text(block, where))
        flush()

    def _result(self, block: Block, at: str) -> ChatMessage:
        call_id = _required(block.tool_use_id, f"{at}.tool_use_id")
        content = block.content
        if isinstance(content, dict):
            raise invalid_value(f"{at}.content", "must be a text or blocks")
        text = _text_of(content or "", f"{at}.content")
        if block.is_error:
            # Chat templates have no other way to say so.
            text = f"Error: {text}"
        return ChatMessage("tool", text, self._called.get(call_id), tool_call_id=call_id)

    def _take_answer(self, blocks: list[Block], at: str) -> None:
        texts, thoughts = [], []
        calls: list[ToolCall] = []
        for i, block in enumerate(blocks):
            where = f"{at}[{i}]"
            match block.type:
                case "thinking":
                    thoughts.append(_required(block.thinking, f"{where}.thinking"))
                case "redacted_thinking":
                    # Only the one who wrote it can read it.
                    pass
                case "tool_use":
                    call = _call(block, where)
                    self._called[call.id] = call.name
                    calls.append(call)
                case _:
                    texts.append(_text(block, where))
        self.add(
            ChatMessage(
                "assistant",
                _joined(texts),
                tool_calls=calls,
                reasoning=_joined(thoughts) or None,
            )
        )


def _call(block: Block, at: str) -> ToolCall:
    return ToolCall(
        _required(block.id, f"{at}.id"),
        _required(block.name, f"{at}.name"),
        msgspec.json.encode(block.input or {}).decode(),
    )


def _text_of(content: str | list[Block], at: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text(block, f"{at}[{i}]") for i, block in enumerate(content))


def _text(block: Block, at: str) -> str:
    if block.type != "text":
        raise unsupported(at, f"blocks of type {block.type[:50]!r} are")
    return _required(block.text, f"{at}.text")


def _required(value: str | None, at: str) -> str:
    if value is None:
        raise CodedError(ErrorCode.MISSING_PARAMETER, f"{at} is required", param=at)
    return value


def _joined(texts: list[str]) -> str:
    return "\n".join(text for text in texts if text)
