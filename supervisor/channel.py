"""The supervisor's side of the wire to one worker generation: the only zmq here.

A fresh pair of sockets per generation, so that nothing of an earlier one can
ever arrive. Frames are read raw by a reader on the socket's descriptor and
decoded afterwards; the reader always empties the socket.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import zmq

from protocol.codec import CodecError, Encoder, FromWorkerDecoder
from protocol.messages import FromWorker, ToWorker

log = logging.getLogger(__name__)

#: Longest path of a unix socket that every supported system takes.
MAX_SOCKET_PATH = 103

#: Frames handled before other work of the event loop gets a turn.
FRAMES_PER_TURN = 256


class ChannelFull(Exception):
    """The worker does not read; the message was not sent."""


class Channel:
    """Both sockets of one generation. Use on the event loop's thread only.

    ``on_message`` gets every message, ``on_violation`` the reason when a frame
    is none. ``name`` must be unique among the channels of ``folder``.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        folder: Path,
        name: str,
        *,
        on_message: Callable[[FromWorker], None],
        on_violation: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_violation = on_violation
        self._encode = Encoder()
        self._decode = FromWorkerDecoder()
        self.data_endpoint = f"ipc://{folder / name}.d"
        self.beat_endpoint = f"ipc://{folder / name}.b"
        self._data = self._bind(context, self.data_endpoint)
        self._beats = self._bind(context, self.beat_endpoint)

    def send(self, message: ToWorker) -> None:
        """Raises ``ChannelFull`` instead of waiting."""
        try:
            self._data.send(self._encode(message), zmq.NOBLOCK)
        except zmq.Again as error:
            raise ChannelFull from error
        # The descriptor signals edges, and sending may have consumed one.
        if int(self._data.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._pump, self._data)

    def drain(self) -> None:
        """Handle what has arrived, now."""
        self._pump(self._data)

    def close(self) -> None:
        """Idempotent; nothing is delivered afterwards."""
        for socket in (self._data, self._beats):
            if not socket.closed:
                self._loop.remove_reader(int(socket.getsockopt(zmq.FD)))
                socket.close(linger=0)

    def _bind(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        socket.bind(endpoint)
        self._loop.add_reader(int(socket.getsockopt(zmq.FD)), self._pump, socket)
        # Something may have arrived before the reader was there.
        self._loop.call_soon(self._pump, socket)
        return socket

    def _pump(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(FRAMES_PER_TURN):
            if socket.closed:
                return
            try:
                frame = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = self._decode(frame)
            except CodecError as error:
                self._on_violation(f"not a message of this protocol: {error}")
                return
            try:
                self._on_message(message)
            except Exception as error:
                # Left to the loop, it would end this turn with messages unread, of
                # which the descriptor has already told.
                log.exception("a message could not be handled")
                self._on_violation(f"{type(message).__name__} could not be handled: {error}")
        self._loop.call_soon(self._pump, socket)


def make_socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder only this user can enter, with a name short enough for a socket."""
    longest_name = len("/-1234567890.d") + 20
    for parent in (None, "/tmp"):
        folder = tempfile.TemporaryDirectory(prefix="opta-", dir=parent)
        if len(os.fsencode(folder.name)) + longest_name <= MAX_SOCKET_PATH:
            return folder
        folder.cleanup()
    raise OSError("no folder with a short enough path for sockets; set TMPDIR to one")
