"""``GET /admin/events``: what happens to the server, as it happens.

An id is ``START-NUMBER``: numbers begin anew with each start of the server, and START is
another one then.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from typing import Literal

import msgspec
from starlette.datastructures import QueryParams
from starlette.responses import Response

from protocol.errors import CodedError, ErrorCode
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import invalid
from supervisor.gateway.following import LAST_EVENT_ID, Following
from supervisor.gateway.recordings import Reader
from supervisor.journal import KINDS, Journal, Kept

EVENTS = "/admin/events"

#: That follow at once.
MAX_FOLLOWERS = 32
_RETRY_AFTER_S = 5.0

_KEEP_ALIVE = b": keep-alive\n\n"
_ID = re.compile(r"(?:([0-9a-f]{8})-)?([0-9]{1,15})")


class Hello(msgspec.Struct, kw_only=True, tag_field="event", tag="hello"):
    """The first event of every stream, whatever it is filtered by; its ``id`` is that of the
    event before those that follow.

    ``missing``: what was asked for is not all there. ``gone``: the first events are not kept
    any more; ``restarted``: the id is of another start of the server. ``first`` is the oldest
    event that is kept.
    """

    at: float
    start_id: str
    first: str
    missing: Literal["gone", "restarted"] | None


class Followed:
    """The journal as one client has asked for it; see ``following.Followed``."""

    headers: Sequence[tuple[bytes, bytes]] = ()

    def __init__(
        self,
        journal: Journal,
        hello: bytes,
        model: str | None,
        kinds: Collection[str],
        to: int | None,
    ) -> None:
        self._journal = journal
        self._hello = hello
        self._model = model
        self._kinds = kinds
        #: The number of the event before which it ends; None: it goes on.
        self._to = to

    @property
    def ended(self) -> bool:
        return self._journal.closed or self._to is not None

    def enter(self) -> Reader:
        reader = Reader()
        self._journal.listen(reader.wake)
        return reader

    def exit(self, reader: Reader) -> None:
        self._journal.leave(reader.wake)

    def still_alive(self) -> bytes:
        return _KEEP_ALIVE

    def read(self, at: int, max_bytes: int) -> tuple[bytes, int]:
        journal, said = self._journal, [self._hello] if self._hello else []
        self._hello = b""
        if at < journal.first:
            first = name(journal, journal.first)
            raise CodedError(
                ErrorCode.STREAM_EVENTS_GONE,
                f"too slow: what comes next is not kept any more; the first event now is {first}",
                param="from",
                details={"first": first},
            )
        end = journal.end if self._to is None else self._to
        size = 0
        while at < end and size < max_bytes:
            event = journal.at(at)
            if self._is_wanted(event):
                told = f"id: {name(journal, at)}\nevent: {event.kind}\ndata: ".encode()
                said += [told, event.data, b"\n\n"]
                size += len(event.data)
            at += 1
        return b"".join(said), at

    def _is_wanted(self, event: Kept) -> bool:
        return (not self._kinds or event.kind in self._kinds) and (
            self._model is None or event.model == self._model
        )


async def follow_events(gateway: Gateway, call: Call) -> Response:
    """From now on, from the event ``from``, or from the one after ``Last-Event-ID``;
    ``model`` and ``kind`` filter; with ``follow=false`` it ends with the last there is."""
    journal, query = gateway.fleet.journal, call.query_params
    kinds, follow = _kinds(query), _flag(query, "follow")
    at, missing = _start(journal, call)
    if journal.listeners >= MAX_FOLLOWERS:
        raise CodedError(
            ErrorCode.RATE_LIMIT_EXCEEDED,
            f"{MAX_FOLLOWERS} clients follow the events already",
            retry_after_s=_RETRY_AFTER_S,
        )
    first = name(journal, journal.first)
    hello = Hello(at=time.time(), start_id=journal.start_id, first=first, missing=missing)
    told = b"event: hello\ndata: " + msgspec.json.encode(hello) + b"\n\n"
    if at:
        told = f"id: {name(journal, at - 1)}\n".encode() + told
    followed = Followed(journal, told, query.get("model"), kinds, None if follow else journal.end)
    return Following(gateway, call, followed, at)


def name(journal: Journal, number: int) -> str:
    """The id of an event."""
    return f"{journal.start_id}-{number}"


def _start(journal: Journal, call: Call) -> tuple[int, Literal["gone", "restarted"] | None]:
    """The number to begin with, and what is missing before it."""
    if (value := call.query_params.get("from")) is not None:
        field, after = "from", 0
    elif (value := call.headers.get(LAST_EVENT_ID)) is not None:
        field, after = LAST_EVENT_ID, 1
    else:
        return journal.end, None
    if (found := _ID.fullmatch(value)) is None:
        raise invalid(field, "must be the id of an event")
    if found[1] not in (None, journal.start_id):
        return journal.first, "restarted"
    number = int(found[2]) + after
    if number > journal.end:
        raise invalid(field, f"is beyond the last event, {name(journal, journal.end - 1)}")
    return (number, None) if number >= journal.first else (journal.first, "gone")


def _kinds(query: QueryParams) -> Collection[str]:
    """What ``kind`` names: one, or several with commas, or repeated; empty: all."""
    kinds = {kind for value in query.getlist("kind") for kind in value.split(",") if kind}
    if not kinds.issubset(KINDS):
        raise invalid("kind", f"must be of {', '.join(KINDS)}")
    return kinds


def _flag(query: QueryParams, name: str) -> bool:
    value = query.get(name, "true")
    if value not in ("true", "false"):
        raise invalid(name, "must be true or false")
    return value == "true"
