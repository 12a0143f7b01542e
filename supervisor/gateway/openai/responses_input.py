"""From the items that a client sends to those that are kept, and from them to turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec import UNSET

from protocol.chat import ChatMessage, ToolCall
from supervisor.gateway.openai.parameters import invalid_value, missing, unsupported
from supervisor.gateway.openai.responses_items import (
    FunctionCall,
    FunctionCallOutput,
    InputText,
    Item,
    Message,
    OutputItem,
    OutputText,
    Reasoning,
    ReasoningText,
    Refusal,
    Role,
    Status,
    SummaryText,
    new_item_id,
    unseal,
)
from supervisor.gateway.openai.responses_tools import qualified

T = TypeVar("T")

#: Finds a stored item by its id.
FindItem = Callable[[str], Item | None]


class Part(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, kw_only=True):
    """Any item; which fields it needs depends on ``type``, without which it is a message."""

    type: str | None = None
    id: str | None = None
    status: Status | None = None
    role: Role | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None
    namespace: str | None = None


def items_of(given: str | list[InputItem], find: FindItem) -> list[Item]:
    """Raises ``CodedError`` for what the decoder cannot see, with where it is."""
    if isinstance(given, str):
        return [Message(new_item_id("msg"), "user", [InputText(given)])]
    if not given:
        raise invalid_value("input", "must not be empty")
    return [_item(each, f"input[{i}]", find) for i, each in enumerate(given)]


def _item(given: InputItem, at: str, find: FindItem) -> Item:
    if given.namespace is not None and given.type != "function_call":
        raise unsupported(f"{at}.namespace")
    match given.type:
        case "message":
            return _message(given, at)
        case None if given.role is not None or given.id is None:
            return _message(given, at)
        case "item_reference" | None:
            return _referenced(given, at, find)
        case "reasoning":
            return _reasoning(given, at)
        case "function_call":
            return FunctionCall(
                given.id or new_item_id("fc"),
                _required(given.call_id, f"{at}.call_id"),
                _required(given.name, f"{at}.name"),
                _required(given.arguments, f"{at}.arguments"),
                given.status or "completed",
                UNSET if given.namespace is None else given.namespace,
            )
        case "function_call_output":
            output = given.output
            if output is None:
                raise missing(f"{at}.output")
            return FunctionCallOutput(
                given.id or new_item_id("fco"),
                _required(given.call_id, f"{at}.call_id"),
                output if isinstance(output, str) else _input_texts(output, f"{at}.output"),
                given.status or "completed",
            )
    raise unsupported(at, f"items of type {given.type[:50]!r} are")


def _message(given: InputItem, at: str) -> Message:
    role: Role = _required(given.role, f"{at}.role")
    at, content = f"{at}.content", given.content
    if content is None:
        raise missing(at)
    parts: list[InputText | OutputText | Refusal]
    if isinstance(content, str):
        parts = [OutputText(content) if role == "assistant" else InputText(content)]
    elif not content:
        raise invalid_value(at, "must not be empty")
    elif role == "assistant":
        parts = [_answered(part, f"{at}[{i}]") for i, part in enumerate(content)]
    else:
        parts = [*_input_texts(content, at)]
    return Message(given.id or new_item_id("msg"), role, parts, given.status or "completed")


def _answered(part: Part, at: str) -> OutputText | Refusal:
    if part.type == "refusal":
        return Refusal(_required(part.refusal, f"{at}.refusal"))
    return OutputText(_text(part, at))


def _input_texts(parts: Sequence[Part], at: str) -> list[InputText]:
    return [InputText(_text(part, f"{at}[{i}]")) for i, part in enumerate(parts)]


def _text(part: Part, at: str) -> str:
    if part.type not in {"input_text", "output_text", "text"}:
        raise unsupported(at, f"parts of type {part.type[:50]!r} are")
    return _required(part.text, f"{at}.text")


def _reasoning(given: InputItem, at: str) -> Reasoning:
    content = given.content
    if isinstance(content, str):
        content = [Part("reasoning_text", content)]
    texts = _texts_of_type("reasoning_text", content, f"{at}.content")
    summary = _texts_of_type("summary_text", given.summary, f"{at}.summary")
    sealed = given.encrypted_content
    if not texts and sealed is not None:
        text = unseal(sealed)
        if text is None:
            raise unsupported(f"{at}.encrypted_content", "reasoning sealed by another server is")
        texts = [text]
    return Reasoning(
        given.id or new_item_id("rs"),
        [SummaryText(text) for text in summary],
        [ReasoningText(text) for text in texts],
        UNSET if sealed is None else sealed,
        given.status or "completed",
    )


def _texts_of_type(kind: str, parts: Sequence[Part] | None, at: str) -> list[str]:
    texts = []
    for i, part in enumerate(parts or ()):
        if part.type != kind:
            raise unsupported(f"{at}[{i}]", f"parts of type {part.type[:50]!r} are")
        texts.append(_required(part.text, f"{at}[{i}].text"))
    return texts


def _referenced(given: InputItem, at: str, find: FindItem) -> Item:
    identifier = _required(given.id, f"{at}.id")
    item = find(identifier)
    if item is None:
        raise invalid_value(
            f"{at}.id", f"no item {identifier[:100]!r} is stored; send the item itself"
        )
    return item


def _required(value: T | None, param: str) -> T:
    if value is None:
        raise missing(param)
    return value


# --- turns ----------------------------------------------------------------------------


class _Turn(msgspec.Struct):
    """What an assistant did between two inputs: several items, but one turn of a chat."""

    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCall] = []

    def takes(self, item: OutputItem) -> bool:
        """After a plain answer another one, or the thoughts before it, is a new turn."""
        return isinstance(item, FunctionCall) or not self.content or bool(self.calls)

    def add(self, item: OutputItem) -> None:
        match item:
            case Reasoning():
                # A summary stands in for what is not there.
                self.reasoning += [part.text for part in item.content or item.summary]
            case Message():
                self.content.append(_text_of(item.content))
            case FunctionCall():
                self.calls.append(ToolCall(item.call_id, _name_of(item), item.arguments))

    def message(self) -> ChatMessage:
        reasoning = "\n".join(self.reasoning) if self.reasoning else None
        return ChatMessage("assistant", "\n".join(self.content), None, self.calls, None, reasoning)


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[ChatMessage]:
    """The turns of a chat. ``instructions`` and the system's words at the beginning are one
    message: most templates know no second."""
    turns: list[ChatMessage | _Turn] = []
    if instructions:
        turns.append(ChatMessage("system", instructions))
    #: Tools by the ids of their calls: templates want a result's name as well.
    called = {item.call_id: _name_of(item) for item in items if isinstance(item, FunctionCall)}
    for item in items:
        if isinstance(item, FunctionCallOutput):
            turns.append(_result(item, called.get(item.call_id)))
        elif isinstance(item, Message) and item.role != "assistant":
            _append(turns, item)
        else:
            last = turns[-1] if turns else None
            if not isinstance(last, _Turn) or not last.takes(item):
                last = _Turn()
                turns.append(last)
            last.add(item)
    return [turn.message() if isinstance(turn, _Turn) else turn for turn in turns]


def _name_of(call: FunctionCall) -> str:
    return qualified(None if call.namespace is UNSET else call.namespace, call.name)


def _append(turns: list[ChatMessage | _Turn], item: Message) -> None:
    text = _text_of(item.content)
    if item.role == "user":
        turns.append(ChatMessage("user", text))
        return
    # Chat templates know developers under their older name.
    match turns:
        case [ChatMessage(role="system", content=before)]:
            turns[0] = ChatMessage("system", f"{before}\n\n{text}")
        case _:
            turns.append(ChatMessage("system", text))


def _result(item: FunctionCallOutput, name: str | None) -> ChatMessage:
    output = item.output
    text = output if isinstance(output, str) else _text_of(output)
    return ChatMessage("tool", text, name, [], item.call_id)


def _text_of(parts: Sequence[InputText | OutputText | Refusal]) -> str:
    return "\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in parts)
