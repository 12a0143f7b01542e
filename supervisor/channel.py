"""The supervisor's side of the wire to one worker generation: the only zmq here.

A fresh pair of sockets per generation, so that nothing of an earlier one can
ever arrive, not even for a request that runs again. Within a generation every frame
arrives once and in order, by the transport: what a worker says twice it has made twice,
which no number on the frame would show. Frames are read raw by a reader on the socket's
descriptor and decoded afterwards; the reader always empties the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from protocol.codec import CodecError, Encoder, FromWorkerDecoder
from protocol.messages import FromWorker, ToWorker

log = logging.getLogger(__name__)

#: Longest path of a unix socket that every supported system takes.
MAX_SOCKET_PATH = 103

_FOLDER_PREFIX = "run-"
#: Room for a socket's name, and for the suffix that zmq gives it while it binds.
_NAME_BYTES = 32

#: A message of this protocol is a few kB; a larger one is none. Checked before it is
#: decoded. zmq's own limit is no way to find out: it drops the connection in silence.
MAX_FRAME_BYTES = 16 * 1024 * 1024
#: The net below, for this process's memory.
MAX_RECEIVED_BYTES = 1024 * 1024 * 1024

# Plain numbers: the flags' own operators are Python code that takes as long as a message.
_DONT_WAIT = int(zmq.NOBLOCK)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_CONNECTED = int(zmq.EVENT_ACCEPTED)
_DISCONNECTED = int(zmq.EVENT_DISCONNECTED) | int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)

#: Frames handled before other work of the event loop gets a turn.
FRAMES_PER_TURN = 256


class ChannelFull(Exception):
    """The worker does not read, or is not there; the message was not sent."""


class ChannelClosed(Exception):
    """The message was not sent: this side is closed."""


class Channel:
    """Both sockets of one generation. Use on the event loop's thread only.

    ``on_message`` gets every message, ``on_violation`` the reason when a frame
    is none; both may be changed at any time. ``name`` must be unique among the channels
    of ``folder``.
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
        self.on_message = on_message
        self.on_violation = on_violation
        self._encode = Encoder()
        self._decode = FromWorkerDecoder()
        self._closed = False
        self._ended = asyncio.Event()
        self._ended.set()
        self._monitor: zmq.Socket[bytes] | None = None
        self._sockets: list[tuple[zmq.Socket[bytes], Path]] = []
        # The folder lives where cleaners of temporary files may come by.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._data = self._bind(context, folder / f"{name}.d")
            self._monitor = self._data.get_monitor_socket(_CONNECTED | _DISCONNECTED)
            self._loop.add_reader(int(self._monitor.getsockopt(zmq.FD)), self._look_at_connection)
            beats = self._bind(context, folder / f"{name}.b")
        except BaseException:
            self.close()
            raise
        self.data_endpoint = _endpoint(self._data)
        self.beat_endpoint = _endpoint(beats)

    def send(self, message: ToWorker) -> None:
        """Raises ``ChannelFull`` instead of waiting, and ``ChannelClosed``."""
        if self._data.closed:
            raise ChannelClosed
        try:
            self._data.send(self._encode(message), _DONT_WAIT)
        except zmq.Again as error:
            raise ChannelFull from error
        finally:
            # The descriptor signals edges; sending may have consumed one, also in vain.
            if _can_read(self._data):
                self._loop.call_soon(self._on_readable, self._data)

    async def ended(self) -> None:
        """Wait until no worker is connected: nothing will arrive that ``drain`` does not find."""
        self._look_at_connection()
        await self._ended.wait()

    def drain(self) -> None:
        """Handle all that has arrived, now."""
        while not self._closed and self._pump(self._data):
            pass

    def close(self) -> None:
        """Idempotent; nothing is delivered afterwards."""
        if self._closed:
            return
        self._closed = True
        if self._monitor is not None:
            self._loop.remove_reader(int(self._monitor.getsockopt(zmq.FD)))
            self._data.disable_monitor()
        for socket, path in self._sockets:
            if not socket.closed:
                self._loop.remove_reader(int(socket.getsockopt(zmq.FD)))
                socket.close(linger=0)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _bind(self, context: zmq.Context[zmq.Socket[bytes]], path: Path) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._sockets.append((socket, path))
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_RECEIVED_BYTES)
        socket.bind(f"ipc://{path}")
        self._loop.add_reader(int(socket.getsockopt(zmq.FD)), self._on_readable, socket)
        # Something may have arrived before the reader was there.
        self._loop.call_soon(self._on_readable, socket)
        return socket

    def _look_at_connection(self) -> None:
        """Its descriptor signals edges as well: take all that is there."""
        while not self._closed and self._monitor is not None:
            try:
                event = self._monitor.recv_multipart(_DONT_WAIT)[0]
            except zmq.Again:
                return
            # A frame of a 16-bit event number and a value; the second is an address.
            if int.from_bytes(event[:2], sys.byteorder) & _CONNECTED:
                self._ended.clear()
            else:
                self._ended.set()

    def _on_readable(self, socket: zmq.Socket[bytes]) -> None:
        if not self._closed and self._pump(socket):
            self._loop.call_soon(self._on_readable, socket)

    def _pump(self, socket: zmq.Socket[bytes]) -> bool:
        """Handle one turn's worth of frames; True when there may be more."""
        try:
            for _ in range(FRAMES_PER_TURN):
                # Not copied before its size is known: 0.7 µs, against a stall of
                # everyone by a frame of hundreds of MB.
                self._handle(socket.recv(_DONT_WAIT, False).buffer)
                # Asking is cheaper than the exception for nothing more.
                if self._closed or not _can_read(socket):
                    return False
        except zmq.Again:
            return False
        return True

    def _handle(self, frame: memoryview) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            self.on_violation(f"a message of {len(frame)} bytes")
            return
        try:
            message = self._decode(frame)
        except CodecError as error:
            self.on_violation(f"not a message of this protocol: {error}")
            return
        try:
            self.on_message(message)
        except Exception as error:
            # Left to the loop, it would end this turn with messages unread, of
            # which the descriptor has already told.
            log.exception("a message could not be handled")
            self.on_violation(f"{type(message).__name__} could not be handled: {error}")


def _can_read(socket: zmq.Socket[bytes]) -> bool:
    events: int = socket.getsockopt(_EVENTS)  # type: ignore[assignment]
    return bool(events & _POLLIN)


def _endpoint(socket: zmq.Socket[bytes]) -> str:
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


class SocketFolder:
    """A folder only this user can enter, with a name short enough for a socket.

    In ``home``, whose lock the caller holds, where it fits: what a killed
    supervisor left there is then swept away here. Raises ``OSError``.
    """

    def __init__(self, home: Path) -> None:
        for stale in home.glob(f"{_FOLDER_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
        self._folders = [_make_folder((home, None, Path("/tmp")))]

    @property
    def path(self) -> Path:
        return Path(self._folders[-1].name)

    def renew(self) -> None:
        """Move out of the home, which may have become read-only or full."""
        with contextlib.suppress(OSError):
            self._folders.append(_make_folder((None, Path("/tmp"))))

    def cleanup(self) -> None:
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.cleanup()


def _make_folder(parents: Sequence[Path | None]) -> tempfile.TemporaryDirectory[str]:
    """In the first of ``parents`` that takes one; None is the system's choice."""
    for parent in parents:
        try:
            folder = tempfile.TemporaryDirectory(
                prefix=_FOLDER_PREFIX, dir=parent, ignore_cleanup_errors=True
            )
        except OSError:
            continue
        if len(os.fsencode(folder.name)) + _NAME_BYTES <= MAX_SOCKET_PATH:
            return folder
        folder.cleanup()
    raise OSError("no folder with a short enough path for sockets; set TMPDIR to one")
