"""``/v1/stream/{id}``: reading what a recording has, and what is still to come."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.body import ClientDisconnected
from supervisor.gateway.connection import BODY_WRITER, BodyWriter
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import coded, error_body, invalid, json_response
from supervisor.gateway.eventlog import glued
from supervisor.gateway.keepalive import KeepAlive
from supervisor.gateway.recordings import Reader, Recording
from supervisor.gateway.scheduling import key_digest
from supervisor.metrics import CLIENT_DISCONNECTED

#: Of every stream.
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

LAST_EVENT_ID = "Last-Event-ID"

#: What is handed to the connection at once.
_PIECE_BYTES = 64 * 1024

_STOPPED = CodedError(ErrorCode.SHUTTING_DOWN, "the server is shutting down")
_NUMBER = re.compile(r"[0-9]{1,15}")


async def follow_stream(gateway: Gateway, call: Call) -> Response:
    """From the event with the number ``from``, or the one after ``Last-Event-ID``."""
    return follow(gateway, call, _found(gateway, call), _start(call), "from")


async def delete_stream(gateway: Gateway, call: Call) -> Response:
    """End it if it still runs; nobody finds it any more."""
    recording = _found(gateway, call)
    recording.cancel()
    gateway.recordings.forget(recording)
    return json_response({"id": recording.id, "object": "stream", "deleted": True})


def follow(gateway: Gateway, call: Call, recording: Recording, at: int, param: str) -> Following:
    """Raises what is wrong with ``at``, which came as ``param``."""
    if at > recording.events.end:
        raise invalid(param, f"is beyond the {recording.events.end} events there are so far")
    recording.read(at, 0)  # or raise
    call.served_by = recording.served_by
    return Following(gateway, call, recording, at)


class Followed(Protocol):
    """Numbered events, those there are and those to come."""

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """What an answer says of it."""

    @property
    def ended(self) -> bool:
        """Whether there will be no more."""

    def enter(self) -> Reader: ...

    def exit(self, reader: Reader) -> None: ...

    def read(self, at: int, max_bytes: int) -> tuple[bytes, int]:
        """As of an ``EventLog``; raises ``stream_events_gone``."""

    def still_alive(self) -> bytes:
        """What a client that has nothing to read is told."""


class Following(Response):
    """Replays what is followed from event ``at`` on, to its end."""

    def __init__(self, gateway: Gateway, call: Call, followed: Followed, at: int = 0) -> None:
        # Not Response.__init__: there is no body to render or to measure.
        self.status_code = 200
        self.background = None
        self.raw_headers = [*HEADERS, *followed.headers]
        self._call = call
        self._followed = followed
        self._at = at
        self._silence_s = gateway.settings.sse_keepalive_s
        self._patience_s = gateway.settings.drain_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        if scope["method"] == "HEAD":
            await send(start)
            await send({"type": "http.response.body", "body": b""})
            return
        reader = self._followed.enter()
        watch = asyncio.create_task(_watch(receive, reader))
        keep_alive = KeepAlive(lambda: self._say_alive(send), self._silence_s)
        end = b""
        try:
            await send(start)
            await self._follow(reader, send, keep_alive)
        except CodedError as error:
            self._call.outcome = error.code.value
            end = error_event(error)
            if isinstance(error, ClientDisconnected):
                self._call.outcome, end = CLIENT_DISCONNECTED, b""
        except TimeoutError:
            # It may come back, for what it has not read yet.
            self._call.outcome = CLIENT_DISCONNECTED
            body: BodyWriter | None = scope.get(BODY_WRITER)
            if body is not None:
                body.abort()
        except asyncio.CancelledError:
            self._call.outcome = ErrorCode.SHUTTING_DOWN.value
            raise
        finally:
            keep_alive.stop()
            watch.cancel()
            self._followed.exit(reader)
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _follow(self, reader: Reader, send: Send, keep_alive: KeepAlive) -> None:
        """Send every event. Raises ``ClientDisconnected``, ``stream_events_gone`` if the
        client is too far behind, and ``TimeoutError`` if it does not read at all."""
        followed, at = self._followed, self._at
        clock = asyncio.get_running_loop().time
        while not reader.gone:
            data, at = followed.read(at, _PIECE_BYTES)
            if data:
                async with asyncio.timeout(self._patience_s):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                keep_alive.last_sent = clock()
            elif followed.ended:
                return
            else:
                await reader.news()
        raise ClientDisconnected

    async def _say_alive(self, send: Send) -> None:
        if told := glued(self._followed.still_alive()):
            await send({"type": "http.response.body", "body": told, "more_body": True})


def error_event(error: BaseException) -> bytes:
    """An event that the clients of every API take for an error."""
    failure = coded(error) if isinstance(error, Exception) else _STOPPED
    return b"event: error\ndata: " + error_body(failure)[:-1] + b',"type":"error"}\n\n'


async def _watch(receive: Receive, reader: Reader) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reader.leave()


def _found(gateway: Gateway, call: Call) -> Recording:
    name: str = call.path_params["id"]
    owner = key_digest(call)
    recording = gateway.recordings.get(owner, name)
    # Clients' own names can be guessed: they do only for those who have a key.
    if recording is None and gateway.settings.api_key is not None:
        recording = gateway.recordings.latest(owner, name)
    if recording is None:
        raise CodedError(
            ErrorCode.STREAM_NOT_FOUND,
            f"there is no stream {name[:128]!r}: it never was, is not kept any more, "
            "or another key has asked for it",
        )
    return recording


def _start(call: Call) -> int:
    if (value := call.query_params.get("from")) is not None:
        return event_number("from", value)
    if (value := call.headers.get(LAST_EVENT_ID)) is not None:
        return event_number(LAST_EVENT_ID, value) + 1
    return 0


def event_number(name: str, value: str) -> int:
    if not _NUMBER.fullmatch(value):
        raise invalid(name, "must be the number of an event")
    return int(value)
