"""What clients get back, byte by byte: response objects and stream chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from protocol.messages import FinishReason
from supervisor.gateway.streaming import encode_text
from supervisor.stream import RequestStream

_DONE = b"data: [DONE]\n\n"


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage(streams: Sequence[RequestStream]) -> Usage:
    """What one call used, all its answers together."""
    prompt_tokens = sum(stream.prompt_tokens for stream in streams)
    completion_tokens = sum(stream.completion_tokens for stream in streams)
    cached_tokens = sum(stream.cached_tokens for stream in streams)
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached_tokens),
    )


class ChatAnswerMessage(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    message: ChatAnswerMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None


class TextChoice(msgspec.Struct):
    text: str
    index: int
    finish_reason: FinishReason
    logprobs: None = None


class TextCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str | None


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


class _Chunks:
    """Chunk objects of one stream: all that stays the same is encoded once."""

    def __init__(
        self, kind: str, id_prefix: str, model: str, fingerprint: str | None, include_usage: bool
    ) -> None:
        constant = {
            "id": new_id(id_prefix),
            "object": kind,
            "created": int(time.time()),
            "system_fingerprint": fingerprint,
        }
        self._head = (
            b"data: "
            + msgspec.json.encode(constant)[:-1]
            + b',"model":'
            + encode_text(model)
            + b',"choices":['
        )
        self._include_usage = include_usage
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def _chunk(self, choice: bytes) -> bytes:
        return self._head + choice + self._tail

    def _end(self, choice: bytes, stream: RequestStream) -> bytes:
        end = self._chunk(choice)
        if self._include_usage:
            numbers = msgspec.json.encode(usage([stream]))
            end += self._head + b'],"usage":' + numbers + b"}\n\n"
        return end + _DONE


class ChatChunks(_Chunks):
    """``chat.completion.chunk`` events."""

    def __init__(self, model: str, fingerprint: str | None, *, include_usage: bool) -> None:
        super().__init__("chat.completion.chunk", "chatcmpl", model, fingerprint, include_usage)
        self._before = self._head + b'{"index":0,"delta":{"content":'
        self._after = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def first(self) -> bytes:
        return self._chunk(
            b'{"index":0,"delta":{"role":"assistant","content":"","refusal":null},'
            b'"logprobs":null,"finish_reason":null}'
        )

    def text(self, text: str) -> bytes:
        return self._before + encode_text(text) + self._after

    def last(self, finish: FinishReason, stream: RequestStream) -> bytes:
        reason = finish.value.encode()
        choice = b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"' + reason + b'"}'
        return self._end(choice, stream)


class TextChunks(_Chunks):
    """Streamed ``text_completion`` events."""

    def __init__(self, model: str, fingerprint: str | None, *, include_usage: bool) -> None:
        super().__init__("text_completion", "cmpl", model, fingerprint, include_usage)
        self._before = self._head + b'{"text":'
        self._after = b',"index":0,"logprobs":null,"finish_reason":null}' + self._tail

    def first(self) -> bytes:
        return b""

    def text(self, text: str) -> bytes:
        return self._before + encode_text(text) + self._after

    def last(self, finish: FinishReason, stream: RequestStream) -> bytes:
        reason = finish.value.encode()
        choice = b'{"text":"","index":0,"logprobs":null,"finish_reason":"' + reason + b'"}'
        return self._end(choice, stream)
