"""What has happened to the server since its start, for whoever wants to be told.

The edges that see something happen add it; nothing here knows who listens. A few events for
each load or failure, none for a request that goes well: a token never comes by here.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from supervisor.views import ReadinessView

log = logging.getLogger(__name__)

#: Kept for those who come back; what one takes is bounded by the length of its texts.
MAX_EVENTS = 1000
MAX_TEXT_CHARS = 500
#: With load_on_demand every request may have its model refused: told once in so long.
REFUSAL_INTERVAL_S = 60.0


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=_snake):
    """``at`` is in epoch seconds; ``model`` None: it is about none, or about all."""

    at: float = msgspec.field(default_factory=time.time)
    model: str | None = None


class ServerStarted(Event, frozen=True, kw_only=True):
    version: str
    pid: int


class ServerStopping(Event, frozen=True, kw_only=True):
    """The last one of all."""


class ModelChanged(Event, frozen=True, kw_only=True):
    """``readiness`` as of the model, None: it is not tracked any more, for the ``reason``.
    ``was`` is the state before, None: it was not tracked."""

    was: str | None
    readiness: ReadinessView | None
    reason: str
    generation: int
    unloading: bool


class WorkerRestarting(Event, frozen=True, kw_only=True):
    """The worker of this generation is gone; the next one is started after so many seconds."""

    generation: int
    delay_s: float


class IncidentOpened(Event, frozen=True, kw_only=True):
    incident_id: str
    kind: str
    phase: str
    code: str
    reason: str
    generation: int
    quarantined: bool
    crash_count: int


class RequestConvicted(Event, frozen=True, kw_only=True):
    """A request, known by its fingerprint, is refused from now on."""

    incident_id: str
    fingerprint: str


class LoadRefused(Event, frozen=True, kw_only=True):
    """The gate did not let a load pass, or it ended in what counts as no failure."""

    code: str
    message: str


class ModelEvicted(Event, frozen=True, kw_only=True):
    """An idle model is unloaded: for another one, or since it was idle for so long."""

    made_room_for: str | None = None
    idle_s: float | None = None


class DownloadChanged(Event, frozen=True, kw_only=True):
    """``status`` is that of the download; with a ``code`` it ended badly."""

    download_id: str
    status: str
    downloaded_bytes: int
    total_bytes: int
    code: str | None
    message: str | None


class ConfigReloaded(Event, frozen=True, kw_only=True):
    """Names of settings, never their values."""

    changed: list[str]
    needs_restart: list[str]


class ConfigRefused(Event, frozen=True, kw_only=True):
    """What was read was wrong; nothing has changed."""

    message: str


class SpareChanged(Event, frozen=True, kw_only=True):
    """``status``: ``ready``, ``taken``, or ``ended`` for the ``reason``."""

    backend: str
    pid: int
    status: str
    reason: str = ""


Happening = (
    ServerStarted
    | ServerStopping
    | ModelChanged
    | WorkerRestarting
    | IncidentOpened
    | RequestConvicted
    | LoadRefused
    | ModelEvicted
    | DownloadChanged
    | ConfigReloaded
    | ConfigRefused
    | SpareChanged
)

#: The names of all events.
KINDS = tuple(_snake(each.__name__) for each in Happening.__args__)


class Kept(NamedTuple):
    """An event, and the JSON that it is told as: one line."""

    kind: str
    model: str | None
    data: bytes


class Journal:
    """The newest events of this start of the server, numbered from 0.

    Methods run on the event loop, and never wait nor fail. ``start_id`` tells this start
    from others; ``started_at`` is in epoch seconds.
    """

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self.start_id = secrets.token_hex(4)
        self.started_at = time.time()
        self._events: deque[Kept] = deque(maxlen=max_events)
        self._listeners: set[Callable[[], None]] = set()
        #: By model and code, when it was told.
        self._refusals: dict[tuple[str | None, str], float] = {}
        #: The number of the event that is to come.
        self.end = 0
        #: There will be no more.
        self.closed = False

    @property
    def first(self) -> int:
        """The number of the oldest event that is kept."""
        return self.end - len(self._events)

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def add(self, event: Happening) -> None:
        """Keep an event, and wake who listens."""
        if self.closed or (isinstance(event, LoadRefused) and self._is_old(event)):
            return
        try:
            kind, data = _snake(type(event).__name__), _encode(event)
        except Exception:
            # Telling of a thing must not get in its way.
            log.exception("an event cannot be told: %r", event)
            return
        self._events.append(Kept(kind, event.model, data))
        self.end += 1
        for wake in self._listeners:
            wake()

    def at(self, number: int) -> Kept:
        """The event of a number from ``first`` on, before ``end``."""
        return self._events[number - self.first]

    def listen(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called after each event, until ``leave``."""
        self._listeners.add(wake)

    def leave(self, wake: Callable[[], None]) -> None:
        self._listeners.discard(wake)

    def _is_old(self, refusal: LoadRefused) -> bool:
        told = {
            each: at
            for each, at in self._refusals.items()
            if 0 <= refusal.at - at < REFUSAL_INTERVAL_S
        }
        known = told.setdefault((refusal.model, refusal.code), refusal.at) != refusal.at
        self._refusals = told
        return known

    def close(self) -> None:
        """The server stops. Idempotent."""
        self.add(ServerStopping())
        self.closed = True
        for wake in self._listeners:
            wake()


def _encode(event: Happening) -> bytes:
    try:
        data = msgspec.json.encode(event)
        if len(data) <= MAX_TEXT_CHARS:
            return data
    except UnicodeEncodeError:
        # Half a character, of a file's name or of a worker's output.
        pass
    tagged: dict[str, Any] = {"event": _snake(type(event).__name__)}
    fields = msgspec.structs.asdict(event)
    return msgspec.json.encode(tagged | {name: _bounded(each) for name, each in fields.items()})


def _bounded(value: Any) -> Any:
    """The same with texts that are not too long, of whole characters."""
    if isinstance(value, str):
        return value[:MAX_TEXT_CHARS].encode(errors="replace").decode()
    if isinstance(value, ReadinessView):
        return {name: _bounded(each) for name, each in msgspec.structs.asdict(value).items()}
    return value
