"""What clients get back: response objects and stream chunks of chats and completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from protocol.chat import Extras, ToolCallPiece
from protocol.messages import FinishReason
from supervisor.gateway.openai.logprobs import (
    ChatLogprobs,
    TextLogprobs,
    TextLogprobsWriter,
    chat_logprobs,
)
from supervisor.gateway.streaming import OpenAIEvents, encode_json
from supervisor.stream import Chunk, RequestStream

_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(msgspec.Struct):
    """Of the answer that took longest; ours, by llama.cpp's names. ``prompt_ms`` counts
    from the submission: waiting for a slot is in it."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


def usage(streams: Sequence[RequestStream], answers_per_prompt: int = 1) -> Usage:
    """What one call used, all its answers together; each prompt counts once."""
    prompts = streams[::answers_per_prompt]
    prompt_tokens = sum(stream.prompt_tokens for stream in prompts)
    completion_tokens = sum(stream.completion_tokens for stream in streams)
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(sum(stream.cached_tokens for stream in prompts)),
        CompletionTokensDetails(sum(stream.reasoning_tokens for stream in streams)),
    )


def timings(streams: Sequence[RequestStream]) -> Timings:
    slowest = max(streams, key=lambda stream: stream.generated_s)
    tokens, seconds = slowest.completion_tokens, slowest.generated_s
    return Timings(
        cache_n=slowest.cached_tokens,
        prompt_n=slowest.prompt_tokens - slowest.cached_tokens,
        prompt_ms=round((slowest.started_after_s or 0.0) * 1000, 3),
        predicted_n=tokens,
        predicted_ms=round(seconds * 1000, 3),
        # The first token was there when the time began.
        predicted_per_second=round((tokens - 1) / seconds, 3) if seconds > 0 else 0.0,
    )


class Function(msgspec.Struct):
    name: str
    arguments: str


class AnsweredCall(msgspec.Struct):
    id: str
    function: Function
    type: Literal["function"] = "function"


class ChatAnswerMessage(msgspec.Struct, omit_defaults=True):
    content: str | None
    # Without a default: it is always there.
    role: str
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] = []


def answered_calls(pieces: Sequence[ToolCallPiece]) -> list[AnsweredCall]:
    """Whole calls from all their pieces."""
    calls: dict[int, AnsweredCall] = {}
    for piece in pieces:
        call = calls.get(piece.index)
        if call is None:
            call = calls[piece.index] = AnsweredCall(piece.id or "", Function(piece.name or "", ""))
        call.function.arguments += piece.arguments
    return [calls[index] for index in sorted(calls)]


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


def chat_choice(index: int, answer: Chunk, *, logprobs: bool) -> ChatChoice:
    extras = answer.extras or Extras()
    calls = answered_calls(extras.tool_calls)
    message = ChatAnswerMessage(
        # With calls, no text is no answer; without, an empty one is.
        content=answer.text if answer.text or not calls else None,
        role="assistant",
        refusal=None,
        reasoning_content=extras.reasoning or None,
        tool_calls=calls,
    )
    return ChatChoice(
        index,
        message,
        answer.finish or FinishReason.STOP,
        chat_logprobs(extras.logprobs) if logprobs else None,
    )


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None
    timings: Timings


class TextChoice(msgspec.Struct):
    text: str
    index: int
    finish_reason: FinishReason
    logprobs: TextLogprobs | None = None


def text_choice(index: int, answer: Chunk, *, logprobs: bool) -> TextChoice:
    found = answer.extras.logprobs if answer.extras is not None else []
    return TextChoice(
        answer.text,
        index,
        answer.finish or FinishReason.STOP,
        TextLogprobsWriter().write(found) if logprobs else None,
    )


class TextCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str | None
    timings: Timings


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


class _Chunks(OpenAIEvents):
    """Chunk objects of one stream: all that stays the same is encoded once."""

    def __init__(
        self,
        kind: str,
        id_prefix: str,
        model: str,
        fingerprint: str | None,
        *,
        include_usage: bool,
        answers: int,
        answers_per_prompt: int,
    ) -> None:
        constant = {
            "id": new_id(id_prefix),
            "object": kind,
            "created": int(time.time()),
            "system_fingerprint": fingerprint,
        }
        self._head = (
            b"data: " + _encode(constant)[:-1] + b',"model":' + encode_json(model) + b',"choices":['
        )
        self._include_usage = include_usage
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._answers = answers
        self._answers_per_prompt = answers_per_prompt

    def _chunk(self, choice: bytes) -> bytes:
        return self._head + choice + self._tail

    def end(self, streams: Sequence[RequestStream]) -> bytes:
        if not self._include_usage:
            return _DONE
        numbers = _encode(usage(streams, self._answers_per_prompt))
        times = _encode(timings(streams))
        return self._head + b'],"usage":' + numbers + b',"timings":' + times + b"}\n\n" + _DONE


class ChatChunks(_Chunks):
    """``chat.completion.chunk`` events of ``answers`` answers to one prompt."""

    def __init__(
        self,
        model: str,
        fingerprint: str | None,
        *,
        include_usage: bool,
        answers: int = 1,
        logprobs: bool = False,
    ) -> None:
        super().__init__(
            "chat.completion.chunk",
            "chatcmpl",
            model,
            fingerprint,
            include_usage=include_usage,
            answers=answers,
            answers_per_prompt=answers,
        )
        self._logprobs = logprobs
        self._starts = [self._head + b'{"index":%d,"delta":' % i for i in range(answers)]
        self._befores = [start + b'{"content":' for start in self._starts]
        self._rest = b',"logprobs":null,"finish_reason":null}' + self._tail
        self._after = b"}" + self._rest

    def first(self, streams: Sequence[RequestStream]) -> bytes:
        role = b'{"role":"assistant","content":"","refusal":null}'
        return b"".join(start + role + self._rest for start in self._starts)

    def piece(self, index: int, text: str, extras: Extras | None) -> bytes:
        if extras is None:
            return self._befores[index] + encode_json(text) + self._after
        return self._with_extras(index, text, extras)

    def last(self, index: int, finish: FinishReason, stream: RequestStream) -> bytes:
        reason = finish.value.encode()
        return (
            self._starts[index]
            + b'{},"logprobs":null,"finish_reason":"%s"}' % reason
            + (self._tail)
        )

    def _with_extras(self, index: int, text: str, extras: Extras) -> bytes:
        start = self._starts[index]
        events = []
        if extras.reasoning:
            reasoning = b'{"reasoning_content":' + encode_json(extras.reasoning) + b"}"
            events.append(start + reasoning + self._rest)
        if text or (self._logprobs and extras.logprobs):
            rest = self._rest
            if self._logprobs and extras.logprobs:
                found = encode_json(chat_logprobs(extras.logprobs))
                rest = b',"logprobs":' + found + b',"finish_reason":null}' + self._tail
            events.append(start + b'{"content":' + encode_json(text) + b"}" + rest)
        if extras.tool_calls:
            calls = encode_json([call_piece(piece) for piece in extras.tool_calls])
            events.append(start + b'{"tool_calls":' + calls + b"}" + self._rest)
        return b"".join(events)


def call_piece(piece: ToolCallPiece) -> dict[str, Any]:
    """A piece as an element of ``tool_calls`` in a delta."""
    function: dict[str, str] = {"arguments": piece.arguments}
    if piece.id is None:
        return {"index": piece.index, "function": function}
    return {
        "index": piece.index,
        "id": piece.id,
        "type": "function",
        "function": {"name": piece.name, **function},
    }


class TextChunks(_Chunks):
    """Streamed ``text_completion`` events of ``answers`` answers, so many to each prompt."""

    def __init__(
        self,
        model: str,
        fingerprint: str | None,
        *,
        include_usage: bool,
        answers: int = 1,
        answers_per_prompt: int = 1,
        top_logprobs: int | None = None,
    ) -> None:
        super().__init__(
            "text_completion",
            "cmpl",
            model,
            fingerprint,
            include_usage=include_usage,
            answers=answers,
            answers_per_prompt=answers_per_prompt,
        )
        self._writers = None
        if top_logprobs is not None:
            self._writers = [TextLogprobsWriter() for _ in range(answers)]
        self._before = self._head + b'{"text":'
        self._afters = [
            b',"index":%d,"logprobs":null,"finish_reason":null}' % index + self._tail
            for index in range(answers)
        ]

    def first(self, streams: Sequence[RequestStream]) -> bytes:
        return b""

    def piece(self, index: int, text: str, extras: Extras | None) -> bytes:
        if extras is None or not extras.logprobs or self._writers is None:
            return self._before + encode_json(text) + self._afters[index] if text else b""
        found = encode_json(self._writers[index].write(extras.logprobs))
        after = b',"index":%d,"logprobs":%s,"finish_reason":null}' % (index, found) + self._tail
        return self._before + encode_json(text) + after

    def last(self, index: int, finish: FinishReason, stream: RequestStream) -> bytes:
        reason = finish.value.encode()
        choice = b'{"text":"","index":%d,"logprobs":null,"finish_reason":"%s"}' % (index, reason)
        return self._chunk(choice)
