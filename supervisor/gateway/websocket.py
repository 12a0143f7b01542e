"""WebSocket connections: which are offered, and what uvicorn's protocol lacks for ours.

A connection comes out of an ordinary HTTP request, so everything that is checked of one
has been checked before: what is not a proper handshake stays an HTTP request, and gets
an HTTP answer in our envelope.
"""

from __future__ import annotations

import base64
import binascii
from asyncio.transports import BaseTransport
from collections.abc import Sequence
from typing import cast

from uvicorn._types import ASGIReceiveEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

#: The one path with WebSocket connections.
CHAT_STREAM = "/v1/chat/stream"

#: Told to the application when the server shuts down; it ends the connection itself.
SHUTDOWN = "opta_lmx.shutdown"

#: The library's own bounds are a little higher; it has no answer for what is beyond.
_MAX_HEADERS = 100
_MAX_LINE = 8000

#: Seconds that a client has to answer the end of its connection.
_CLOSE_TIMEOUT_S = 2.0

_VERSION = b"13"
_KEY_BYTES = 16

Headers = Sequence[tuple[bytes, bytes]]


def is_handshake(method: bytes, url: bytes, headers: Headers) -> bool:
    """Whether a request that asks for an upgrade to WebSocket is to be given it."""
    if method != b"GET" or url.partition(b"?")[0] != CHAT_STREAM.encode():
        return False
    if len(headers) > _MAX_HEADERS or len(url) > _MAX_LINE:
        return False
    if any(len(name) + len(value) > _MAX_LINE for name, value in headers):
        return False
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    if b"content-length" in values or b"transfer-encoding" in values:
        return False
    return (
        values.get(b"sec-websocket-version") == [_VERSION]
        and values.get(b"upgrade", [b""])[0].lower() == b"websocket"
        and _is_key(values.get(b"sec-websocket-key", []))
    )


def _is_key(values: list[bytes]) -> bool:
    try:
        return len(values) == 1 and len(base64.b64decode(values[0], validate=True)) == _KEY_BYTES
    except binascii.Error:
        return False


class WebSocketConnection(WebSocketsSansIOProtocol):
    """uvicorn's protocol; what runs may end at a shutdown, and who does not read is cut off."""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self.close_timeout = _CLOSE_TIMEOUT_S

    def shutdown(self) -> None:
        if not self.handshake_complete or self.close_sent:
            super().shutdown()
            return
        self.queue.put_nowait(cast(ASGIReceiveEvent, {"type": SHUTDOWN}))

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        # A close waits for a client to read what is there for it; this one does not.
        self.transport.abort()

    def handle_close(self, event: Frame) -> None:
        super().handle_close(event)
        # Nor does one that has said goodbye have to read what is there for it.
        self.loop.call_later(_CLOSE_TIMEOUT_S, self.transport.abort)

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is None:
            # Not even a handshake: there is nobody to tell.
            self.transport.close()
            return
        super().handle_parser_exception()
