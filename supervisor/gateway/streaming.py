"""Server-sent events: a token is written by whoever read it from the worker.

No task wakes up for it while the client keeps up. While it is behind, everything
that arrives is held back and sent in one piece by the stream's task, which also
sends the beginning and the end. That task talks ASGI itself: a general streaming
response passes every chunk through layers that only ever look at the first message.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from protocol.chat import Extras
from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason
from supervisor.gateway.body import ClientDisconnected
from supervisor.gateway.connection import BODY_WRITER, BodyWriter
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import coded, error_body
from supervisor.gateway.following import HEADERS, Following, error_event
from supervisor.gateway.generation import (
    accepted,
    cancel,
    cancelled_by_server,
    release,
    watch_disconnect,
)
from supervisor.gateway.keepalive import KeepAlive
from supervisor.gateway.recordings import Recording
from supervisor.gateway.scheduling import CONVERSATION_HEADER, key_digest
from supervisor.metrics import CLIENT_DISCONNECTED
from supervisor.stream import RequestStream

log = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode

KEEP_ALIVE = b": keep-alive\n\n"


def encode_json(value: object) -> bytes:
    """JSON without any character that somebody's line splitter takes for a line end.

    SSE ends lines at CR and LF, which JSON escapes; but widely used clients split
    with Unicode rules, which know three more.
    """
    data = _encode(value)
    if not data.isascii():
        data = (
            data.replace(b"\xe2\x80\xa8", b"\\u2028")
            .replace(b"\xe2\x80\xa9", b"\\u2029")
            .replace(b"\xc2\x85", b"\\u0085")
        )
    return data


class EventFormat(Protocol):
    """One API's way to say things in events; every method returns whole events.

    ``index`` counts the answers, where a request has several. What a method returns is
    sent, in that order: a format may keep count.
    """

    def first(self, streams: Sequence[RequestStream]) -> bytes:
        """What precedes any text; the streams have the prompt's token counts."""

    def piece(self, index: int, text: str, extras: Extras | None) -> bytes:
        """A piece of an answer: text, something else, or both."""

    def last(self, index: int, finish: FinishReason, stream: RequestStream) -> bytes:
        """The proper end of an answer; the stream has its token counts."""

    def end(self, streams: Sequence[RequestStream]) -> bytes:
        """What follows the ends of all answers."""

    def error(self, error: CodedError) -> bytes:
        """The end of a stream that failed."""

    def keep_alive(self) -> bytes:
        """Something that means nothing."""


#: Makes the format once it is known which model answers, or that none does.
MakeEvents = Callable[[], EventFormat]


class OpenAIEvents:
    """What all of OpenAI's streams have in common."""

    def error(self, error: CodedError) -> bytes:
        return b"data: " + error_body(error) + b"\n\n"

    def keep_alive(self) -> bytes:
        return KEEP_ALIVE


async def open_event_stream(
    gateway: Gateway,
    call: Call,
    streams: list[RequestStream],
    make_events: MakeEvents,
    started: float,
) -> Response:
    """Wait until the requests are accepted, so that a refusal is a proper HTTP error.

    But with ``load_on_demand`` no longer than a stream may be silent: those that wait for
    their model are told that the connection is alive, and a refusal is an event then.

    With ``CONVERSATION_HEADER`` the stream goes on without its client, if there is a place.

    ``started`` is the ``time.perf_counter`` of the request's arrival.
    """
    recording: Recording | None = None
    if (conversation := call.headers.get(CONVERSATION_HEADER)) is not None:
        recording = gateway.recordings.begin(
            key_digest(call), conversation, lambda: cancel(streams)
        )
    receive = call.receive if recording is None else recording.receive
    watch = watch_disconnect(receive, streams)
    settings = gateway.settings
    silence_s = settings.sse_keepalive_s if settings.load_on_demand else None
    try:
        async with asyncio.timeout(silence_s):
            await accepted(gateway, call, streams)
    except TimeoutError:
        if call.candidates is None or call.candidates.exhausted:
            call.served_by = call.model or call.only_model
    except BaseException as error:
        if recording is not None:
            recording.refuse(error_event(error))
        watch.cancel()
        release(gateway, call, streams)
        raise
    if recording is None:
        return EventStream(gateway, call, streams, make_events, watch, started)
    stream = _RecordedStream(gateway, call, streams, make_events, watch, started)
    recording.run(stream, call.served_by)
    return Following(gateway, call, recording)


def record_events(
    gateway: Gateway,
    call: Call,
    streams: list[RequestStream],
    make_events: MakeEvents,
    started: float,
    recording: Recording,
) -> None:
    """Let a recording have the requests' events; a refusal is one, too."""
    watch = watch_disconnect(recording.receive, streams)
    stream = _RecordedStream(gateway, call, streams, make_events, watch, started)
    recording.run(stream, call.served_by)


class EventStream(Response):
    """Relays the requests of one call as server-sent events, once they are accepted."""

    def __init__(
        self,
        gateway: Gateway,
        call: Call,
        streams: list[RequestStream],
        make_events: MakeEvents,
        watch: asyncio.Task[None],
        started: float,
    ) -> None:
        # Not Response.__init__: there is no body to render or to measure.
        self.status_code = 200
        self.background = None
        self.raw_headers = [*HEADERS]
        self._gateway = gateway
        self._call = call
        self._streams = streams
        self._make_events = make_events
        self._watch = watch
        self._started = started
        self._waiting_for_first = True
        #: None: the stream has not begun.
        self._events: EventFormat | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keep_alive = KeepAlive(
            lambda: self._say_alive(send),
            self._gateway.settings.sse_keepalive_s,
        )
        # Under another server than ours there is none, and all goes through ``send``.
        body: BodyWriter | None = scope.get(BODY_WRITER)
        last_call = _LastCall(self._streams, body, self._gateway.settings.drain_timeout_s)
        events: EventFormat | None = None
        end = b""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await accepted(self._gateway, self._call, self._streams)
            finally:
                last_call.watch()
            self._events = events = self._make_events()
            await _send(send, events.first(self._streams), more=True)
            end = await self._relay_all(events, send, body, keep_alive)
            end += events.end(self._streams)
        except (ClientDisconnected, OSError):
            self._call.outcome = CLIENT_DISCONNECTED
        except Exception as error:
            failure = coded(error)
            if failure is not error:
                log.exception("stream %s failed", self._call.request_id.decode())
            self._call.outcome = failure.code.value
            end = (events or self._make_events()).error(failure)
        except asyncio.CancelledError:
            self._call.outcome = ErrorCode.SHUTTING_DOWN.value
            last_call.stop()
            raise
        finally:
            keep_alive.stop()
            self._watch.cancel()
            release(self._gateway, self._call, self._streams)
        try:
            await _send(send, end, more=False)
        finally:
            last_call.stop()

    async def _say_alive(self, send: Send) -> None:
        await _send(send, self.still_alive(), more=True)

    def still_alive(self) -> bytes:
        """What the format has for it; a comment with how far the prompts are, if they are."""
        if self._events is None:
            # Before its first event a stream has none of its format's.
            return KEEP_ALIVE
        told = self._events.keep_alive()
        prefills = [stream.prefill for stream in self._streams if stream.prefill is not None]
        if not prefills:
            return told
        computed, total = map(sum, zip(*prefills, strict=True))
        comment = b": prefill %d/%d\n\n" % (computed, total)
        # A comment alone will do; an event that stands for one may be waited for.
        return comment if told is KEEP_ALIVE else comment + told

    async def _relay_all(
        self, events: EventFormat, send: Send, body: BodyWriter | None, keep_alive: KeepAlive
    ) -> bytes:
        """Send everything but the end of what ended last, which is returned."""
        if len(self._streams) == 1:
            return await self._relay(0, events, send, body, keep_alive)
        relays = [
            asyncio.ensure_future(self._relay(index, events, send, body, keep_alive))
            for index in range(len(self._streams))
        ]
        try:
            for relay in asyncio.as_completed(relays):
                await _send(send, await relay, more=True)
        finally:
            for each in relays:
                each.cancel()
            # What else failed has nobody to tell it to.
            await asyncio.gather(*relays, return_exceptions=True)
        return b""

    async def _relay(
        self,
        index: int,
        events: EventFormat,
        send: Send,
        body: BodyWriter | None,
        keep_alive: KeepAlive,
    ) -> bytes:
        """Send everything of one answer but the end, which is returned."""
        stream = self._streams[index]
        clock = asyncio.get_running_loop().time

        def pass_on(text: str, extras: Extras | None) -> bool:
            assert body is not None
            # Before the piece is put into words: a format counts what it has said.
            if body.behind:
                return False
            # Some extras are nothing to tell; an empty piece would end the body.
            if data := events.piece(index, text, extras):
                body.write(data)
            keep_alive.last_sent = clock()
            return True

        while True:
            text, finish, extras = await stream.next()
            something = bool(text) or extras is not None
            if self._waiting_for_first and something:
                self._waiting_for_first = False
                self._gateway.metrics.first_token(
                    self._call.model, time.perf_counter() - self._started
                )
            data = events.piece(index, text, extras) if something else b""
            if finish is None:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                keep_alive.last_sent = clock()
                if body is not None:
                    stream.drain_into(pass_on)
                continue
            if finish is FinishReason.CANCELLED:
                await _send(send, data, more=True)
                raise cancelled_by_server()
            if stream.resumes:
                # Before what may be the last that a client reads.
                data += b": resumed %d\n\n" % stream.resumes
            return data + events.last(index, finish, stream)


class _RecordedStream(EventStream):
    """One that nobody reads but a recording, which has no use for signs of life."""

    async def _say_alive(self, send: Send) -> None:
        pass


async def _send(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


class _LastCall:
    """Hangs up on a client that does not read, some time after its answer has ended.

    Without it a stream that was cut off, or whose deadline has passed, waits for its
    client to read what came before that: for ever, if it just stops.
    """

    def __init__(
        self, streams: Sequence[RequestStream], body: BodyWriter | None, timeout_s: float
    ) -> None:
        self._streams = streams
        self._body = body
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Begin, once no other model takes the requests any more."""
        if self._body is not None:
            for stream in self._streams:
                stream.when_over(self._on_over)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _on_over(self) -> None:
        over = all(stream.ended for stream in self._streams)
        # When one of several answers fails, the others are given up for it.
        if self._timer is None and (over or any(stream.failed for stream in self._streams)):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._timeout_s, self._hang_up)

    def _hang_up(self) -> None:
        assert self._body is not None
        log.info("a client is hung up on: it does not read the end of its answer")
        self._body.abort()
