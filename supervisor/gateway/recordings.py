"""Streams that go on without their clients, for those to come back to.

A recording is the client that stays: it takes what a stream sends, and has gone only when
nobody has read it for ``keep_s``. Clients read the recording, each at its own pace.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.types import Message, Receive, Scope, Send

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.connection import BODY_WRITER
from supervisor.gateway.eventlog import EventLog

log = logging.getLogger(__name__)

#: Names a stream to its client.
STREAM_ID = b"x-stream-id"

#: The part of all the memory for recordings that one of them may take.
_SHARE = 4


class Recordable(Protocol):
    """An ASGI application that sends whole events, and nothing for the sake of silence."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...

    def still_alive(self) -> bytes:
        """What a client that has nothing to read is told."""


class Reader:
    """Somebody who reads a recording; ``gone`` when they have left."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self.gone = False

    def wake(self) -> None:
        self._news.set()

    def leave(self) -> None:
        self.gone = True
        self._news.set()

    async def news(self) -> None:
        """Wait until something has happened since the last call."""
        await self._news.wait()
        self._news.clear()


class Recording:
    """One stream; ``owner`` is the digest of the key that asked for it.

    It is the stream's ASGI server, with ``receive``, ``send`` and what a ``BodyWriter`` has.
    """

    #: Whoever writes is never held up.
    behind = False

    def __init__(
        self,
        store: Recordings,
        recording_id: str,
        owner: str,
        cancel: Callable[[], None],
        max_bytes: int,
        lasting: bool,
    ) -> None:
        self.id = recording_id
        self.owner = owner
        self.events = EventLog(max_bytes)
        self.ended = False
        #: The model that answers, once that is certain.
        self.served_by = ""
        #: Where the answer stands, for who does not read events; None: they are all there is.
        self.state: Callable[[], bytes] | None = None
        self._store = store
        self._lasting = lasting
        self._abandoned = asyncio.Event()
        self._readers: set[Reader] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._stream: Recordable | None = None
        self._cancel: Callable[[], None] | None = cancel

    def run(self, stream: Recordable, served_by: str) -> None:
        """Let the stream go on by itself from here."""
        self._stream, self.served_by = stream, served_by
        self._store.spawn(self, stream)
        self._may_be_abandoned()

    def refuse(self, end: bytes) -> None:
        """There will be no stream; who waits for it already is told."""
        self.write(end)
        self._store.forget(self)
        self.over()

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        return [(STREAM_ID, self.id.encode())]

    @property
    def has_readers(self) -> bool:
        return bool(self._readers)

    def enter(self) -> Reader:
        reader = Reader()
        self._readers.add(reader)
        if not self.ended:
            self.disarm()
        return reader

    def exit(self, reader: Reader) -> None:
        self._readers.discard(reader)
        self._may_be_abandoned()

    async def end(self) -> None:
        """Wait for it."""
        reader = self.enter()
        try:
            while not self.ended:
                await reader.news()
        finally:
            self.exit(reader)

    def read(self, at: int, max_bytes: int) -> tuple[bytes, int]:
        """As of its events; raises ``stream_events_gone``."""
        if at < (first := self.events.first):
            raise CodedError(
                ErrorCode.STREAM_EVENTS_GONE,
                f"the stream has outgrown what is kept of it: its first event now is {first}",
                param="from",
                details={"first": first},
            )
        return self.events.read(at, max_bytes)

    def still_alive(self) -> bytes:
        return b"" if self._stream is None else self._stream.still_alive()

    def cancel(self) -> None:
        """End it with an error, unless it has ended."""
        if self._cancel is not None:
            self._cancel()

    def abandon(self) -> None:
        self._abandoned.set()

    def arm(self) -> None:
        """From now on it has ``keep_s``."""
        self.disarm()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._store.keep_s, self._store.forget, self)

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def over(self) -> None:
        """Its stream has come to its end."""
        self.ended = True
        # They hold the request and all that it needed.
        self._stream = self._cancel = None
        if self.state is not None:
            last = self.state()
            self.state = lambda: last
        self._wake()

    # --- for the stream ---

    async def receive(self) -> Message:
        await self._abandoned.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if body := message.get("body"):
            self.write(body)

    def write(self, data: bytes) -> None:
        before = self.events.size
        self.events.add(data)
        self._store.grew(self, self.events.size - before)
        self._wake()

    def abort(self) -> None:
        """As of a connection; here nobody has to be hung up on."""

    def _may_be_abandoned(self) -> None:
        # Before it runs, its client waits for that.
        if not self._readers and self._stream is not None and not self._lasting:
            self.arm()

    def _wake(self) -> None:
        for reader in self._readers:
            reader.wake()


class Recordings:
    """At most ``max_count`` of ``max_bytes`` together, each forgotten ``keep_s`` after its end.

    For room those that have ended go first, the earliest first; then the largest lose their
    oldest events. What runs or is being read is never forgotten for another.
    """

    def __init__(self, max_count: int, max_bytes: int, keep_s: float) -> None:
        self.keep_s = keep_s
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._all: dict[str, Recording] = {}
        #: In the order in which they ended.
        self._ended: dict[str, Recording] = {}
        #: The newest of each conversation, by owner and the client's name for it.
        self._conversations: dict[tuple[str, str], Recording] = {}
        self._bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._all)

    @property
    def size(self) -> int:
        return self._bytes

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._max_count > 0 and self._max_bytes > 0

    def begin(
        self,
        owner: str,
        conversation: str | None,
        cancel: Callable[[], None],
        lasting_id: str | None = None,
    ) -> Recording | None:
        """A new recording, under an id that nobody can guess; None when there is no place.

        ``cancel`` ends its requests with an error. With a ``lasting_id`` of its own it goes
        on although nobody reads it.
        """
        if conversation is not None:
            self._conversations.pop((owner, conversation), None)
        while len(self._all) >= self._max_count and self._forget_one():
            pass
        if len(self._all) >= self._max_count or self._max_bytes <= 0:
            return None
        recording_id = lasting_id or f"stream_{secrets.token_urlsafe(24)}"
        share, lasting = self._max_bytes // _SHARE, lasting_id is not None
        recording = Recording(self, recording_id, owner, cancel, share, lasting)
        self._all[recording.id] = recording
        if conversation is not None:
            self._conversations[owner, conversation] = recording
        return recording

    def get(self, owner: str, recording_id: str) -> Recording | None:
        """None also for one of another owner."""
        recording = self._all.get(recording_id)
        return recording if recording is not None and recording.owner == owner else None

    def latest(self, owner: str, conversation: str) -> Recording | None:
        return self._conversations.get((owner, conversation))

    def forget(self, recording: Recording) -> None:
        """Nobody finds it any more, and if it still runs it ends. Idempotent."""
        recording.abandon()
        recording.disarm()
        if self._all.pop(recording.id, None) is None:
            return
        self._ended.pop(recording.id, None)
        self._bytes -= recording.events.size
        for place in [each for each, held in self._conversations.items() if held is recording]:
            del self._conversations[place]

    def spawn(self, recording: Recording, stream: Recordable) -> None:
        scope = {BODY_WRITER: recording}
        task = asyncio.create_task(stream(scope, recording.receive, recording.send))
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("recording %s failed", recording.id, exc_info=error)
            recording.over()
            if recording.id in self._all:
                self._ended[recording.id] = recording
                recording.arm()

        task.add_done_callback(done)

    def grew(self, recording: Recording, size: int) -> None:
        """Make room for what has been added to a recording."""
        if recording.id not in self._all:
            return
        self._bytes += size
        while self._bytes > self._max_bytes and self._forget_one():
            pass
        if self._bytes <= self._max_bytes:
            return
        # The largest first, so that nobody's events go for a stream that has many.
        for each in sorted(self._all.values(), key=lambda held: -held.events.size):
            before = each.events.size
            each.events.trim(before - (self._bytes - self._max_bytes))
            self._bytes += each.events.size - before
            if self._bytes <= self._max_bytes:
                return

    async def close(self) -> None:
        """End what is left; by now the fleet has told it why."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for recording in list(self._all.values()):
            self.forget(recording)

    def _forget_one(self) -> bool:
        unread = (each for each in self._ended.values() if not each.has_readers)
        if (recording := next(unread, None)) is None:
            return False
        self.forget(recording)
        return True
