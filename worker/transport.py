"""The worker's side of the wire: the only module here that knows zmq.

A zmq socket belongs to one thread. The engine sends a step's deltas itself, on
the data socket, so that no second thread wakes up per token; the I/O thread has
a socket of its own for beats, which go on while native code is busy.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import zmq

from protocol.codec import Encoder, ToWorkerDecoder
from protocol.handshake import WorkerBoot
from protocol.messages import Beat, FromWorker, ToWorker
from worker.vitals import Vitals

#: How long a closing socket may still deliver its last messages.
LINGER_MS = 2000


class DataLink:
    """The engine's connection. Use from the thread that made it only."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = _connect(context, endpoint)
        self._encode = Encoder()
        self._decode = ToWorkerDecoder()

    def send(self, message: FromWorker) -> None:
        """Send, waiting while the supervisor is not reading: the engine must not run ahead."""
        self._socket.send(self._encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send bytes as they are."""
        self._socket.send(frame)

    def wait(self) -> ToWorker:
        """Block until a message arrives. Raises ``CodecError``."""
        return self._decode(self._socket.recv())

    def has_news(self, wait_s: float) -> bool:
        """Whether a message is there, or arrives within so many seconds."""
        return bool(self._socket.poll(round(wait_s * 1000), zmq.POLLIN))

    def pending(self) -> Iterator[ToWorker]:
        """The messages that are there now. Raises ``CodecError``."""
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield self._decode(frame)

    def close(self) -> None:
        self._socket.close()


class Heart(threading.Thread):
    """The I/O thread: sends a beat now and then, whatever the main thread does."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], boot: WorkerBoot, vitals: Vitals
    ) -> None:
        super().__init__(name="heart", daemon=True)
        self._context = context
        self._boot = boot
        self._vitals = vitals
        self._stop_requested = threading.Event()

    def run(self) -> None:
        socket = _connect(self._context, self._boot.beat_endpoint)
        encode = Encoder()
        interval_s = self._boot.beat_interval_s
        last: Beat | None = None
        quiet_until = 0.0
        while not self._stop_requested.is_set():
            beat, now = self._vitals.beat(), time.monotonic()
            if beat != last or now >= quiet_until:
                # A supervisor that does not read loses beats; it never blocks the thread.
                with contextlib.suppress(zmq.Again):
                    socket.send(encode(beat), zmq.NOBLOCK)
                last, quiet_until = beat, now + self._boot.quiet_beat_interval_s
            # All workers at the same moments: the supervisor wakes up once for them.
            self._stop_requested.wait(interval_s - now % interval_s)
        socket.close(linger=0)

    def stop(self) -> None:
        self._stop_requested.set()
        self.join()


def _connect(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.connect(endpoint)
    return socket
