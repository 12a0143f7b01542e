"""The events of one stream, numbered from 0, as many of the newest as there is room for."""

from __future__ import annotations

from collections import deque

#: What holding an event takes besides its bytes, roughly.
_OVERHEAD = 64


def glued(data: bytes) -> bytes:
    """The same events and comments, but without a blank line after a comment.

    Once an event has had an ``id:``, widely used clients take a blank line for one more
    event, without data, and fail at that.
    """
    blocks = [block for block in data.split(b"\n\n") if block]
    return b"".join(block + (b"\n" if block.startswith(b":") else b"\n\n") for block in blocks)


class EventLog:
    """Server-sent events as they are sent, each with its number in an ``id:`` line.

    ``size`` is in bytes of memory. Not more than ``max_bytes`` are kept, but the newest
    event always is.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._events: deque[bytes] = deque()
        #: Comments go with the event they precede, in one block: see ``glued``.
        self._comments = b""
        #: The number of the oldest event that is kept ...
        self.first = 0
        #: ... and of the one that is to come.
        self.end = 0
        self.size = 0

    def add(self, data: bytes) -> None:
        """Take whole events and comments, as a stream's format makes them."""
        for block in data.split(b"\n\n"):
            if block.startswith(b":"):
                self._comments += block + b"\n"
            elif block:
                event = b"%bid: %d\n%b\n\n" % (self._comments, self.end, block)
                self._comments = b""
                self._events.append(event)
                self.size += len(event) + _OVERHEAD
                self.end += 1
        self.trim(self._max_bytes)

    def trim(self, max_bytes: int) -> None:
        """Drop the oldest until the rest takes no more than this."""
        while self.size > max_bytes and len(self._events) > 1:
            self.size -= len(self._events.popleft()) + _OVERHEAD
            self.first += 1

    def read(self, at: int, max_bytes: int) -> tuple[bytes, int]:
        """Events from number ``at`` on, which is kept or to come, and the number after them.

        So many that they are ``max_bytes`` or just above; nothing when there are none.
        """
        assert self.first <= at <= self.end
        events: list[bytes] = []
        size = 0
        while at < self.end and size < max_bytes:
            event = self._events[at - self.first]
            events.append(event)
            size += len(event)
            at += 1
        return b"".join(events), at
