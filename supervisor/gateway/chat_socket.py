"""``/v1/chat/stream``: chats over one WebSocket connection, for agents that hold one.

Each frame is a JSON object with a ``type``. Requests run beside each other, and every
frame of an answer has the ``id`` of its request. What is wrong with a frame is told in a
``chat.error``; the connection goes on. A request is accounted for as one over HTTP is:
the handshake's headers say whose it is, in which lane it waits, and how long it may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, cast

import msgspec
from msgspec import Meta
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from protocol.chat import Extras
from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason
from supervisor.gateway.auth import Side
from supervisor.gateway.body import ClientDisconnected, decode
from supervisor.gateway.endpoint import Call, Gateway, request_id_of
from supervisor.gateway.errors import coded, error_object, error_response, retry_after
from supervisor.gateway.generation import (
    accepted,
    cancelled_by_server,
    fingerprint,
    give_up,
    release,
    submit,
)
from supervisor.gateway.keepalive import KeepAlive
from supervisor.gateway.openai.answers import call_piece, timings, usage
from supervisor.gateway.openai.chat import ChatRequest, to_generate
from supervisor.gateway.openai.logprobs import chat_logprobs
from supervisor.gateway.openai.parameters import unsupported
from supervisor.gateway.preset_fields import add_preset
from supervisor.gateway.scheduling import terms_of
from supervisor.gateway.streaming import encode_json
from supervisor.gateway.websocket import SHUTDOWN
from supervisor.metrics import CLIENT_DISCONNECTED
from supervisor.stream import RequestStream

log = logging.getLogger(__name__)

#: Requests of one connection whose last frame has not been sent yet.
MAX_IN_FLIGHT = 32

#: Seconds for requests to end by themselves after their client has gone.
_LET_GO_S = 1.0

#: The server goes away, as RFC 6455's registry has it.
_SERVICE_RESTART = 1012

FrameId = Annotated[str, Meta(min_length=1, max_length=128)] | Annotated[int, Meta(ge=0)]


class RequestFrame(ChatRequest, tag_field="type", tag="chat.request", kw_only=True):
    id: FrameId


class CancelFrame(msgspec.Struct, tag_field="type", tag="chat.cancel"):
    id: FrameId


_decoder = msgspec.json.Decoder(RequestFrame | CancelFrame)


class _OnlyId(msgspec.Struct):
    id: FrameId | None = None


_id_decoder = msgspec.json.Decoder(_OnlyId)


class _Cancelled(CodedError):
    """The client has cancelled its request."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.INTERNAL_ERROR, "the client cancelled the request")


async def no_upgrade(_gateway: Gateway, _call: Call) -> Response:
    """The answer to a request for the route that is no proper WebSocket handshake."""
    raise CodedError(
        ErrorCode.INVALID_VALUE,
        "this route speaks WebSocket (RFC 6455, version 13): open it as ws://",
        param="Upgrade",
    )


class ChatSocket:
    """The ASGI application behind the route. ``name`` is its label in the metrics."""

    def __init__(self, gateway: Gateway, name: str) -> None:
        self._gateway = gateway
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._gateway.guard.check(HTTPConnection(scope), Side.INFERENCE)
        except CodedError as refusal:
            self._gateway.metrics.request_ended("", self._name, refusal.code.value)
            answer = error_response(refusal)
            answer.raw_headers.append((b"x-request-id", request_id_of(scope)))
            await answer(scope, receive, send)
            return
        headers = [(b"x-request-id", request_id_of(scope))]
        await send({"type": "websocket.accept", "headers": headers})
        await _Session(self._gateway, self._name, scope, receive, send).run()


class _Session:
    """One connection, from its opening to its end."""

    def __init__(
        self, gateway: Gateway, name: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._gateway = gateway
        self._name = name
        # Every request is a call of its own, with the headers of the handshake.
        self._scope = {**scope, "type": "http", "method": "GET"}
        self._receive = receive
        self._send = send
        self._streams: dict[str | int, list[RequestStream]] = {}
        #: Those of requests that have ended but could not tell it yet are here as well.
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._closed = False

    async def run(self) -> None:
        """Serve until the client goes, or until the server does and all is answered."""
        try:
            while await self._take(await self._receive()):
                pass
        except OSError:
            # A frame could not be answered: the client has gone.
            pass
        finally:
            for streams in self._streams.values():
                _give_up(streams, ClientDisconnected())
            await self._see_the_end()

    async def _see_the_end(self) -> None:
        """Wait for the requests, which know that there is nobody left to tell."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LET_GO_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, message: Message) -> bool:
        """Carry out one message; False when it was the last."""
        match message["type"]:
            case "websocket.receive" if not self._closed:
                text = message.get("text")
                await self._on_frame(message["bytes"] if text is None else text.encode())
            case "websocket.disconnect":
                return False
            case kind if kind == SHUTDOWN:
                self._stopping = True
                await self._close_if_done()
        return True

    async def _on_frame(self, data: bytes) -> None:
        started = time.perf_counter()
        call = Call(self._scope, self._receive)
        try:
            frame = decode(data, _decoder)
            if isinstance(frame, CancelFrame):
                # One that is not there may just have ended.
                if (running := self._streams.get(frame.id)) is not None:
                    _give_up(running, _Cancelled())
                return
            streams = await self._submit(frame, call, started)
        except Exception as error:
            failure = self._told(error, call)
            self._gateway.metrics.request_ended(call.model, self._name, failure.code.value)
            await self._say(_error_frame(_id_of(data, self._streams), failure))
            return
        self._streams[frame.id] = streams
        answer = _Answer(self._gateway, frame, call, streams, self._say, started)
        task = asyncio.create_task(self._run(frame.id, answer, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _submit(self, frame: RequestFrame, call: Call, started: float) -> list[RequestStream]:
        if frame.id in self._streams:
            raise CodedError(
                ErrorCode.INVALID_VALUE,
                f"id: {frame.id!r} is that of a running request",
                param="id",
            )
        if self._stopping:
            raise CodedError(ErrorCode.SHUTTING_DOWN, "the server is shutting down")
        if len(self._tasks) >= MAX_IN_FLIGHT:
            raise CodedError(
                ErrorCode.RATE_LIMIT_EXCEEDED,
                f"the connection has {len(self._tasks)} requests in flight "
                f"(limit {MAX_IN_FLIGHT}): wait for one to end",
            )
        if (frame.n or 1) > 1:
            raise unsupported("n", "several answers are")
        terms = terms_of(call, started, api_key=self._gateway.settings.api_key, claims=frame.claims)
        add_preset(self._gateway, frame)
        return await submit(
            self._gateway, call, frame.model, [to_generate(frame)], terms, streaming=True
        )

    async def _run(self, request_id: str | int, answer: _Answer, call: Call) -> None:
        last = b""
        try:
            last = await answer.relay()
        except (ClientDisconnected, OSError):
            call.outcome = CLIENT_DISCONNECTED
            return
        except _Cancelled:
            last = answer.done("cancelled")
        except Exception as error:
            last = _error_frame(request_id, self._told(error, call))
        except asyncio.CancelledError:
            call.outcome = CLIENT_DISCONNECTED
            raise
        finally:
            del self._streams[request_id]
            answer.close()
            self._gateway.metrics.request_ended(call.model, self._name, call.outcome)
        try:
            await self._say(last)
        except OSError:
            return
        self._tasks.remove(cast("asyncio.Task[None]", asyncio.current_task()))
        with contextlib.suppress(OSError):
            await self._close_if_done()

    def _told(self, error: Exception, call: Call) -> CodedError:
        failure = coded(error)
        if failure is not error:
            log.exception("request %s to %s failed", call.request_id.decode(), self._name)
        call.outcome = failure.code.value
        return failure

    async def _say(self, frame: bytes) -> None:
        await self._send({"type": "websocket.send", "text": frame.decode()})

    async def _close_if_done(self) -> None:
        if self._stopping and not self._tasks:
            self._closed = True
            await self._send({"type": "websocket.close", "code": _SERVICE_RESTART})


class _Answer:
    """Says what one request brings; ``close`` is to be called in every case."""

    def __init__(
        self,
        gateway: Gateway,
        frame: RequestFrame,
        call: Call,
        streams: list[RequestStream],
        say: Callable[[bytes], Awaitable[None]],
        started: float,
    ) -> None:
        self._gateway = gateway
        self._call = call
        self._streams = streams
        self._say = say
        self._started = started
        self._logprobs = bool(frame.logprobs)
        self._id = encode_json(frame.id)
        self._token = b'{"type":"chat.token","id":%b,' % self._id
        self._call_head = b'{"type":"chat.tool_call","id":%b,"tool_call":' % self._id
        self._keep_alive = KeepAlive(self._ping, gateway.settings.sse_keepalive_s)

    async def relay(self) -> bytes:
        """Say everything but the end, which is returned."""
        clock = asyncio.get_running_loop().time
        await accepted(self._gateway, self._call, self._streams)
        [stream] = self._streams
        first = True
        while True:
            text, finish, extras = await stream.next()
            if first and (text or extras is not None):
                first = False
                self._gateway.metrics.first_token(
                    self._call.model, time.perf_counter() - self._started
                )
            for frame in self._frames(text, extras):
                await self._say(frame)
                self._keep_alive.last_sent = clock()
            if finish is FinishReason.CANCELLED:
                raise cancelled_by_server()
            if finish is not None:
                return self.done(finish.value)

    def done(self, reason: str) -> bytes:
        frame = {
            "type": "chat.done",
            "id": msgspec.Raw(self._id),
            "finish_reason": reason,
            "usage": usage(self._streams),
            "timings": timings(self._streams),
            "model": self._call.model,
            "system_fingerprint": fingerprint(self._gateway, self._call.model),
        }
        if resumes := sum(stream.resumes for stream in self._streams):
            frame["resumed"] = resumes
        return encode_json(frame)

    def close(self) -> None:
        self._keep_alive.stop()
        release(self._gateway, self._call, self._streams)

    def _frames(self, text: str, extras: Extras | None) -> list[bytes]:
        if extras is None:
            return [self._token + b'"content":%b}' % encode_json(text)] if text else []
        frames = []
        if extras.reasoning:
            frames.append(self._token + b'"reasoning_content":%b}' % encode_json(extras.reasoning))
        found = extras.logprobs if self._logprobs else []
        if text or found:
            frame = self._token + b'"content":' + encode_json(text)
            if found:
                frame += b',"logprobs":' + encode_json(chat_logprobs(found))
            frames.append(frame + b"}")
        for piece in extras.tool_calls:
            frames.append(self._call_head + encode_json(call_piece(piece)) + b"}")
        return frames

    async def _ping(self) -> None:
        frame = b'{"type":"chat.keepalive","id":%b' % self._id
        if (prefill := self._streams[0].prefill) is not None:
            frame += b',"prefill":{"computed":%d,"total":%d}' % prefill
        with contextlib.suppress(OSError):
            await self._say(frame + b"}")


def _give_up(streams: Sequence[RequestStream], error: CodedError) -> None:
    for stream in streams:
        give_up(stream, error)


def _id_of(data: bytes, running: Mapping[str | int, object]) -> str | int | None:
    """The id that a refused frame has, unless that would end somebody else's request."""
    try:
        found = _id_decoder.decode(data).id
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return None if found in running else found


def _error_frame(request_id: str | int | None, error: CodedError) -> bytes:
    frame: dict[str, object] = {
        "type": "chat.error",
        "id": request_id,
        "error": error_object(error),
    }
    if (seconds := retry_after(error)) is not None:
        # What is a header over HTTP.
        frame["retry_after"] = int(seconds)
    return encode_json(frame)
