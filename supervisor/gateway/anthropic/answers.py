"""What clients get back when the answer is whole."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Literal

import msgspec

from protocol.chat import Extras
from protocol.messages import FinishReason
from supervisor.gateway.openai.answers import answered_calls
from supervisor.stream import Chunk, RequestStream

#: Nothing is signed here, and nothing checked when thinking comes back; but clients
#: expect a signature, and some drop the thinking when that is empty.
SIGNATURE = "opta-lmx"

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]

_REASONS: dict[FinishReason, StopReason] = {
    FinishReason.LENGTH: "max_tokens",
    FinishReason.TOOL_CALLS: "tool_use",
}


class TextBlock(msgspec.Struct, tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, tag="tool_use"):
    id: str
    name: str
    #: Values as the model wrote them: its numbers may be of any size.
    input: dict[str, msgspec.Raw]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class OutputTokensDetails(msgspec.Struct):
    thinking_tokens: int


class Usage(msgspec.Struct):
    """The prompt is ``input_tokens`` and those that were read from the cache together.
    Nothing is ever charged for being put there."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    cache_creation_input_tokens: int = 0


def usage(stream: RequestStream) -> Usage:
    return Usage(
        stream.prompt_tokens - stream.cached_tokens,
        stream.cached_tokens,
        stream.completion_tokens,
        OutputTokensDetails(stream.reasoning_tokens),
    )


class Stop(msgspec.Struct):
    """Why an answer ended, and the stop sequence if it was one."""

    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


def stop_of(finish: FinishReason, sequence: str | None) -> Stop:
    if finish is FinishReason.STOP and sequence is not None:
        return Stop("stop_sequence", sequence)
    return Stop(_REASONS.get(finish, "end_turn"))


class Message(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: Sequence[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage


def message(model: str, content: Sequence[Block], stop: Stop, stream: RequestStream) -> Message:
    return Message(
        id=f"msg_{secrets.token_hex(12)}",
        model=model,
        content=content,
        stop_reason=stop.stop_reason,
        stop_sequence=stop.stop_sequence,
        usage=usage(stream),
    )


def answered_message(
    model: str, answer: Chunk, stream: RequestStream, *, shows_thinking: bool
) -> Message:
    """Thinking, text, calls: each text that the model wrote between its calls is in the one
    before them."""
    extras = answer.extras or Extras()
    content: list[Block] = []
    if extras.reasoning:
        content.append(ThinkingBlock(extras.reasoning if shows_thinking else "", SIGNATURE))
    if answer.text:
        content.append(TextBlock(answer.text))
    for call in answered_calls(extras.tool_calls):
        function = call.function
        arguments = msgspec.json.decode(function.arguments or "{}", type=dict[str, msgspec.Raw])
        content.append(ToolUseBlock(call.id, function.name, arguments))
    stop = stop_of(answer.finish or FinishReason.STOP, extras.stop)
    return message(model, content, stop, stream)
