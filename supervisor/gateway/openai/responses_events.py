"""The events of a streamed response, numbered from 0, in OpenAI's order.

Every event says its type twice, in its ``event:`` line and its data. There is no
``[DONE]``: the last event has the whole response. A failure is told twice as well, as
OpenAI does: by ``error``, which client libraries raise, and by ``response.failed``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from protocol.chat import Extras
from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason
from supervisor.gateway.errors import error_object
from supervisor.gateway.openai.logprobs import ContentLogprob
from supervisor.gateway.openai.responses_answers import Response, cancelled, failed, finished
from supervisor.gateway.openai.responses_items import (
    FunctionCall,
    Message,
    OutputItem,
    OutputText,
    ReasoningText,
    SummaryText,
)
from supervisor.gateway.openai.responses_output import Change, Closed, Grew, Opened, OutputBuilder
from supervisor.gateway.streaming import KEEP_ALIVE, encode_json
from supervisor.stream import RequestStream

_encode = msgspec.json.Encoder().encode

Part = OutputText | ReasoningText | SummaryText

#: Takes a response that has ended properly, before the client knows.
Keep = Callable[[Response], None]


class ResponseEvents:
    """One stream; see ``EventFormat``."""

    def __init__(self, response: Response, builder: OutputBuilder, keep: Keep) -> None:
        self._response = response
        self._builder = builder
        self._keep = keep
        self._number = 0
        # Of the item that is open: what its events have in common.
        self._where = b""
        self._delta = b""
        self._after = b""

    @property
    def response(self) -> Response:
        """As far as it is."""
        return self._response

    def first(self, streams: Sequence[RequestStream]) -> bytes:
        return self._response_event("response.created") + self._response_event(
            "response.in_progress"
        )

    def piece(self, index: int, text: str, extras: Extras | None) -> bytes:
        if extras is None and self._builder.goes_on(text):
            return self._grown(text, ())
        return self._tell(self._builder.feed(text, extras))

    def last(self, index: int, finish: FinishReason, stream: RequestStream) -> bytes:
        events = self._tell(self._builder.finish(finish))
        self._response = finished(self._response, self._builder.items, finish, stream)
        self._keep(self._response)
        return events + self._response_event(f"response.{self._response.status}")

    def end(self, streams: Sequence[RequestStream]) -> bytes:
        return b""

    def error(self, error: CodedError) -> bytes:
        envelope = error_object(error)
        items = self._builder.break_off()
        if self._response.background and error.code is ErrorCode.REQUEST_CANCELLED:
            self._response = cancelled(self._response, items)
        else:
            self._response = failed(self._response, items, error)
        # Documented is the flat form; what OpenAI sends, and clients read, is the other.
        flat = {"code": error.code.value, "message": error.message, "param": error.param}
        event = self._event("error", _encode({**flat, "error": envelope})[1:-1] + b",")
        return event + self._response_event(f"response.{self._response.status}")

    def keep_alive(self) -> bytes:
        return KEEP_ALIVE

    def _tell(self, changes: Sequence[Change]) -> bytes:
        return b"".join(map(self._change, changes))

    def _change(self, change: Change) -> bytes:
        match change:
            case Grew():
                return self._grown(change.text, change.logprobs)
            case Opened():
                return self._opened(change.place, change.item)
            case Closed():
                return self._closed(change.place, change.item)

    def _grown(self, text: str, logprobs: Sequence[ContentLogprob]) -> bytes:
        number, self._number = self._number, self._number + 1
        if logprobs:
            after = b',"logprobs":%s,"sequence_number":%d}\n\n' % (encode_json(logprobs), number)
        else:
            after = self._after % number
        return self._delta + encode_json(text) + after

    def _opened(self, place: int, item: OutputItem) -> bytes:
        kind, part = self._kind(item)
        logprobs = b',"logprobs":[]' if isinstance(item, Message) else b""
        self._after = logprobs + b',"sequence_number":%d}\n\n'
        self._where = b'"item_id":%s,"output_index":%d,' % (encode_json(item.id), place)
        if part is not None:
            index = b"summary_index" if isinstance(part, SummaryText) else b"content_index"
            self._where += b'"%s":0,' % index
        self._delta = (
            b'event: response.%s.delta\ndata: {"type":"response.%s.delta",' % (kind, kind)
            + self._where
            + b'"delta":'
        )
        event = self._item_event("response.output_item.added", place, item)
        if part is not None:
            event += self._part_event("added", part)
        return event

    def _closed(self, place: int, item: OutputItem) -> bytes:
        kind, part = self._kind(item)
        said: dict[str, object]
        match item:
            case FunctionCall():
                said = {"arguments": item.arguments, "name": item.name}
            case Message():
                [answered] = item.content
                assert isinstance(answered, OutputText)
                part, said = answered, {"text": answered.text, "logprobs": answered.logprobs}
            case _:
                [part] = item.content or item.summary
                said = {"text": part.text}
        event = self._event(
            f"response.{kind.decode()}.done", self._where + encode_json(said)[1:-1] + b","
        )
        if part is not None:
            event += self._part_event("done", part)
        return event + self._item_event("response.output_item.done", place, item)

    def _item_event(self, name: str, place: int, item: OutputItem) -> bytes:
        return self._event(name, b'"output_index":%d,"item":%s,' % (place, encode_json(item)))

    def _part_event(self, what: str, part: Part) -> bytes:
        kind = "reasoning_summary_part" if isinstance(part, SummaryText) else "content_part"
        return self._event(
            f"response.{kind}.{what}", self._where + b'"part":' + encode_json(part) + b","
        )

    def _response_event(self, name: str) -> bytes:
        return self._event(name, b'"response":' + encode_json(self._response) + b",")

    def _event(self, name: str, fields: bytes) -> bytes:
        """``fields`` are members of the data, each with its comma."""
        kind = name.encode()
        number, self._number = self._number, self._number + 1
        head = b'event: %s\ndata: {"type":"%s",' % (kind, kind)
        return head + fields + b'"sequence_number":%d}\n\n' % number

    def _kind(self, item: OutputItem) -> tuple[bytes, Part | None]:
        """How the events of an item's text are called, and the part it is in as that begins."""
        match item:
            case Message():
                return b"output_text", OutputText("")
            case FunctionCall():
                return b"function_call_arguments", None
        if self._response.reasoning.summary is not None:
            return b"reasoning_summary_text", SummaryText("")
        return b"reasoning_text", ReasoningText("")
