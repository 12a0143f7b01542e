"""What clients get back in a stream: one block of content after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protocol.chat import Extras, ToolCallPiece
from protocol.errors import CodedError
from protocol.messages import FinishReason
from supervisor.gateway.anthropic.answers import (
    SIGNATURE,
    Block,
    Stop,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
    message,
    stop_of,
    usage,
)
from supervisor.gateway.anthropic.errors import error_body
from supervisor.gateway.streaming import encode_json
from supervisor.stream import RequestStream

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_DELTA = b"event: content_block_delta\ndata: "

_TEXT, _THINKING, _CALL = "text", "thinking", "call"


class MessageEvents:
    """The events of one message; see ``streaming.EventFormat``. Keeps count of its blocks."""

    def __init__(self, model: str, request_id: bytes, *, shows_thinking: bool) -> None:
        self._model = model
        self._request_id = request_id
        self._shows_thinking = shows_thinking
        self._blocks = 0
        #: What the open block is, and which call if it is one; None: none is open.
        self._open: str | None = None
        self._call = -1
        #: What comes before and after the fragment of a delta of the open block.
        self._before = b""
        self._stop_sequence: str | None = None

    def first(self, streams: Sequence[RequestStream]) -> bytes:
        started = message(self._model, [], Stop(), streams[0])
        return _event("message_start", message=started) + _PING

    def piece(self, index: int, text: str, extras: Extras | None) -> bytes:
        if extras is None:
            return self._say(text)
        if extras.stop is not None:
            self._stop_sequence = extras.stop
        parts = []
        calls = list(extras.tool_calls)
        # Of several pieces that have become one: what belongs to the open call was first.
        while calls and self._open is _CALL and calls[0].index == self._call:
            parts.append(self._fragment(calls.pop(0).arguments))
        if extras.reasoning:
            parts.append(self._think(extras.reasoning))
        if text:
            parts.append(self._say(text))
        parts += [self._go_on(piece) for piece in calls]
        return b"".join(parts)

    def last(self, index: int, finish: FinishReason, stream: RequestStream) -> bytes:
        stop = stop_of(finish, self._stop_sequence)
        return self._close() + _event("message_delta", delta=stop, usage=usage(stream))

    def end(self, streams: Sequence[RequestStream]) -> bytes:
        return _STOP

    def error(self, error: CodedError) -> bytes:
        return b"event: error\ndata: " + error_body(error, self._request_id) + b"\n\n"

    def keep_alive(self) -> bytes:
        return _PING

    def _say(self, text: str) -> bytes:
        if self._open is _TEXT:
            return self._fragment(text)
        return self._begin(_TEXT, TextBlock(""), "text_delta", "text") + self._fragment(text)

    def _think(self, thought: str) -> bytes:
        start = b""
        if self._open is not _THINKING:
            block = ThinkingBlock("", "")
            start = self._begin(_THINKING, block, "thinking_delta", "thinking")
        return start + self._fragment(thought) if self._shows_thinking else start

    def _go_on(self, piece: ToolCallPiece) -> bytes:
        start = b""
        if self._open is not _CALL or piece.index != self._call:
            block = ToolUseBlock(piece.id or "", piece.name or "", {})
            start = self._begin(_CALL, block, "input_json_delta", "partial_json")
            self._call = piece.index
        return start + self._fragment(piece.arguments) if piece.arguments else start

    def _begin(self, kind: str, block: Block, delta: str, field: str) -> bytes:
        before = self._close()
        index = self._blocks
        self._blocks += 1
        self._open = kind
        self._before = _DELTA + (
            b'{"type":"content_block_delta","index":%d,"delta":{"type":"%s","%s":'
            % (index, delta.encode(), field.encode())
        )
        return before + _event("content_block_start", index=index, content_block=block)

    def _fragment(self, text: str) -> bytes:
        return self._before + encode_json(text) + b"}}\n\n"

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        index = self._blocks - 1
        signature = b""
        if self._open is _THINKING:
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            signature = _event("content_block_delta", index=index, delta=delta)
        self._open = None
        return signature + _event("content_block_stop", index=index)


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: " % name.encode() + encode_json({"type": name, **fields}) + b"\n\n"
