"""One client connection: deadlines and bounds for what arrives before a handler can look.

Handlers bound what they read; this bounds what no handler sees. A request's head
(request line and headers) must be there whole within ``head_timeout_s``, counted
from the connection's opening or from the first byte after the previous answer,
and may not be larger than ``MAX_HEAD_BYTES``. What is left of a finished answer must
be read within ``drain_timeout_s``.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import cast

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.errors import error_body, status_of
from supervisor.gateway.websocket import is_handshake

MAX_HEAD_BYTES = 64 * 1024

#: How long to swallow what a client still sends after its last answer.
_LINGER_S = 5.0

#: Paths of requests whose work ends when their client has gone.
_END_WITH_CLIENT = ("/v1/", "/admin/models/probe")

#: Paths of streams that end some time after their last reader has gone.
_KNOWS_ITS_READERS = "/v1/stream/"

#: Where an application finds the ``BodyWriter`` in a request's scope.
BODY_WRITER = "opta_lmx.body_writer"


class _HeadTooLarge(Exception):
    """Ends the parsing from inside one of the parser's callbacks."""


def protocol(head_timeout_s: float, drain_timeout_s: float) -> type[HttpToolsProtocol]:
    """The protocol class that uvicorn makes an instance of for each connection."""

    class Protocol(_Connection):
        pass

    Protocol.head_timeout_s = head_timeout_s
    Protocol.drain_timeout_s = drain_timeout_s
    return Protocol


class _Connection(HttpToolsProtocol):
    """uvicorn's protocol, with deadlines, our envelope, and a patient close."""

    head_timeout_s: float
    drain_timeout_s: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._lingering = False
        self._in_body = False
        #: Whether the request whose head came last becomes a WebSocket connection.
        self._upgrading = False
        #: Bytes of the head that is arriving, and since when it is awaited. None:
        #: a request runs, or the connection rests between two (uvicorn's keep-alive).
        self._head_bytes = 0
        self._head_since: float | None = self.loop.time()
        self._unfinished = _Unfinished(self)
        #: The request being answered: ``cycle`` is the newest, which may wait behind it.
        self._running: RequestResponseCycle | None = None
        # One timer per connection, which looks whether anything is overdue: a
        # request costs a store of the time.
        self._timer = self.loop.call_later(self.head_timeout_s, self._look_at_head)
        self._rest_timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        # uvicorn tells only the newest request, behind which this one may be at work.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        if self._head_since is None and not self._busy():
            self._head_since = self.loop.time()
        if not self._in_body:
            self._head_bytes += len(data)
        super().data_received(data)
        # A complete head set it back to zero.
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_too_large())

    def on_headers_complete(self) -> None:
        # What came with the head, a body or the next request, is in the count as well.
        if self._head_bytes > MAX_HEAD_BYTES and self._head_size() > MAX_HEAD_BYTES:
            raise _HeadTooLarge
        # Never behind a request that is still being answered.
        self._upgrading = (
            self._get_upgrade() == b"websocket"
            and not self._busy()
            and is_handshake(self.parser.get_method(), self.url, self.headers)
        )
        super().on_headers_complete()
        self._head_since = None
        self._head_bytes = 0
        if self._upgrading:
            return
        self._in_body = True
        self.cycle.transport = self._unfinished
        cast(dict[str, object], self.cycle.scope)[BODY_WRITER] = BodyWriter(self.cycle)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._upgrading:
            return
        self._in_body = False
        self.cycle.transport = self.transport

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._rest_timer is None and self.transport.get_write_buffer_size():
            self._rest_timer = self.loop.call_later(self.drain_timeout_s, self._look_at_rest)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to keep the connection although the client sends no more.

        Nobody can tell a client that has gone from one that has only finished
        sending. Generation and probes must end with their client, so there it counts as
        gone; any other answer is still delivered.
        """
        if self._lingering or self._in_body or not self._busy():
            return False
        scope = self.cycle.scope
        if scope["method"] == "POST" and scope["path"].startswith(_END_WITH_CLIENT):
            return False
        if scope["path"].startswith(_KNOWS_ITS_READERS):
            return False
        self.cycle.keep_alive = False
        return True

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())
        else:
            self._refuse(CodedError(ErrorCode.INVALID_VALUE, msg))

    def _should_upgrade(self) -> bool:
        return self._upgrading

    def handle_websocket_upgrade(self) -> None:
        self._timer.cancel()
        super().handle_websocket_upgrade()

    def _unsupported_upgrade_warning(self) -> None:
        # It is answered as if it had not asked. The parser stops at an upgrade,
        # so this request is the connection's last.
        self.cycle.keep_alive = False

    def linger(self) -> None:
        """Close, but let a client that still sends read its answer first.

        Closing with unread data makes the kernel reset the connection, and the
        client sees that instead of the answer.
        """
        if self._lingering:
            return
        self._lingering = True
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer.cancel()
        self._timer = self.loop.call_later(_LINGER_S, self.transport.abort)

    def _busy(self) -> bool:
        """Whether a request has been received that is not answered yet."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _look_at_head(self) -> None:
        now = self.loop.time()
        if self._head_since is None or self._busy():
            self._head_since = None if self._head_since is None else now
            due = now + self.head_timeout_s
        else:
            due = self._head_since + self.head_timeout_s
            # The loop's clock has the timer's granularity: a hair early is on time.
            if now >= due - 0.001:
                self._give_up()
                return
        self._timer = self.loop.call_later(due - now, self._look_at_head)

    def _look_at_rest(self) -> None:
        """Whether the client has read the rest of an answer that was complete by then."""
        self._rest_timer = None
        # A next answer's text is not this one's rest, unless that one cannot even begin.
        if self.flow.write_paused or (self.transport.get_write_buffer_size() and not self._busy()):
            self.transport.abort()

    def _give_up(self) -> None:
        if self._in_body or not self._head_bytes:
            # The rest of a request that was answered early, or no request at all.
            self.transport.close()
            return
        self._refuse(
            CodedError(
                ErrorCode.REQUEST_TIMEOUT,
                f"the request's headers were not complete after {self.head_timeout_s:g} s",
            )
        )

    def _refuse(self, error: CodedError) -> None:
        """Answer what never reached a handler, and close."""
        if self._busy():
            # An answer is under way; another one would end up in the middle of it.
            self.transport.close()
            return
        body = error_body(error)
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {secrets.token_hex(16)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[status_of(error.code)] + head.encode() + body)
        self.linger()


class BodyWriter:
    """Writes into a response that has begun, without waiting.

    ASGI's ``send`` is for everything else: it is a coroutine, made anew and checked
    for every message, which is more than all the rest that a token costs here.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow

    @property
    def behind(self) -> bool:
        """Whether the client has enough to read: what is written now is kept in memory."""
        return bool(self._flow.write_paused)

    def write(self, data: bytes) -> None:
        """Write a piece of the body, never empty."""
        cycle = self._cycle
        if not cycle.disconnected:
            # A stream has no length: uvicorn has announced chunks.
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def abort(self) -> None:
        """Hang up without waiting for the client to read what was written."""
        self._cycle.transport.abort()


class _Unfinished(asyncio.Transport):
    """What a request writes to while its body is not here yet: closing it lingers."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__()
        self._connection = connection

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        self._connection.linger()

    def abort(self) -> None:
        self._connection.transport.abort()


def _too_large() -> CodedError:
    return CodedError(
        ErrorCode.INVALID_VALUE, f"the request's headers are larger than {MAX_HEAD_BYTES} bytes"
    )
