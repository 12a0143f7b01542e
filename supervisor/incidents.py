"""Incident records: what a counted failure looked like, kept for whoever has to explain it.

One JSON file per incident, oldest ones deleted beyond a bound. Requests appear
by fingerprint only: a keyed hash, the key staying in the home folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from protocol.messages import Generate, Job, Priority
from supervisor import jsonfile

log = logging.getLogger(__name__)

FOLDER_NAME = "incidents"
KEY_FILE = "fingerprint.key"
SCHEMA_VERSION = 1

#: Records kept on disk, and the bytes of a worker's output kept in each.
MAX_INCIDENTS = 200
OUTPUT_BYTES = 16 * 1024

#: Not at the start of a line: whatever the worker was writing may not have ended one.
_STACKS = re.compile(
    r"Fatal Python error: |(?:Current thread|Thread) 0x[0-9a-f]+[^\n]*\(most recent call first\)"
)

_ID = re.compile(r"[0-9TZ]+-[0-9a-f]{8}")


class Moment(msgspec.Struct, frozen=True):
    """Something that happened to the generation, at an epoch second."""

    at: float
    what: str


class MemorySample(msgspec.Struct, frozen=True):
    at: float
    bytes: int


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """One counted failure. Times are epoch seconds.

    ``kind`` is how it failed, ``code`` what clients were told. ``phase`` is one of the
    worker's, or ``canary`` while the model was on trial. ``exit_status`` is
    negative for a signal, whose name is ``signal``. ``stacks`` are the worker's Python
    stacks, when it could still write them. ``in_flight`` are request fingerprints, and
    ``convicted`` is that of the one to blame, if that is certain.
    """

    schema_version: int = SCHEMA_VERSION
    id: str
    model: str
    generation: int
    phase: str
    kind: str
    code: str
    reason: str
    timestamp: float
    quarantined: bool
    crash_count: int
    backend: str
    backend_version: str
    server_version: str
    protocol_version: int = 0
    python_version: str = ""
    platform: str = ""
    exit_status: int | None = None
    signal: str | None = None
    output_tail: str = ""
    stacks: str = ""
    memory: list[MemorySample] = []
    in_flight: list[str] = []
    convicted: str | None = None
    timeline: list[Moment] = []


def new_id(now: float) -> str:
    """Begins with the time; the rest keeps two of the same second apart."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    return f"{stamp}-{secrets.token_hex(4)}"


def stacks_in(output: str) -> str:
    """The part of a worker's output that faulthandler wrote, if it did."""
    found = _STACKS.search(output)
    return output[found.start() :] if found else ""


class Fingerprints:
    """Names requests without telling what they say."""

    def __init__(self, home: Path) -> None:
        path = home / KEY_FILE
        try:
            self._key = path.read_bytes()[:64]
        except FileNotFoundError:
            self._key = b""
        except OSError as error:
            # It may be a good one: this run has another, and leaves it alone.
            log.warning("cannot read %s: %s", path, error)
            self._key = secrets.token_bytes(32)
        if len(self._key) < 32:
            self._key = secrets.token_bytes(32)
            try:
                path.touch(mode=0o600)
                path.write_bytes(self._key)
            except OSError as error:
                log.warning("cannot keep %s: %s", path, error)

    def of(self, model: str, request: Job) -> str:
        """The same for the same model, prompt and sampling; 16 hex digits."""
        # Neither the id nor who asks, nor how soon, makes it another request.
        content = msgspec.structs.replace(
            request, request_id=0, client="", priority=Priority.NORMAL
        )
        if isinstance(content, Generate):
            content = msgspec.structs.replace(content, accepted_at=None)
        digest = hashlib.blake2b(key=self._key, digest_size=8)
        digest.update(model.encode() + b"\0" + msgspec.msgpack.encode(content))
        return digest.hexdigest()


class IncidentStore:
    """The records of one home, newest first. Writes happen off the event loop, in order."""

    def __init__(self, home: Path) -> None:
        self._folder = home / FOLDER_NAME
        self._incidents: dict[str, Incident] = {}
        self._unwritten: dict[str, None] = {}
        self._surplus: list[str] = []
        self._writer: asyncio.Task[None] | None = None
        jsonfile.sweep(self._folder)
        found = [
            incident
            for path in self._folder.glob("*.json")
            if not jsonfile.is_later(path, SCHEMA_VERSION)
            and (incident := jsonfile.read(path, Incident, schema_version=SCHEMA_VERSION))
        ]
        # Not by id, which is random within a second.
        for incident in sorted(found, key=lambda each: (each.timestamp, each.id)):
            self._incidents[incident.id] = incident

    def put(self, incident: Incident) -> None:
        """Keep a record, or a more complete version of it."""
        self._incidents[incident.id] = incident
        self._unwritten[incident.id] = None
        for old in list(self._incidents)[: max(0, len(self._incidents) - MAX_INCIDENTS)]:
            del self._incidents[old]
            self._unwritten.pop(old, None)
            self._surplus.append(old)
        self._begin_to_write()

    def get(self, incident_id: str) -> Incident | None:
        return self._incidents.get(incident_id)

    def list(self, *, model: str | None = None, limit: int = 100) -> list[Incident]:
        """Newest first."""
        found = [i for i in reversed(self._incidents.values()) if model in (None, i.model)]
        return found[:limit]

    async def flush(self) -> None:
        """Wait for the pending writes; what has failed before is tried once more."""
        if self._writer is None:
            return
        await self._writer
        if self._unwritten or self._surplus:
            self._begin_to_write()
            await self._writer

    def _begin_to_write(self) -> None:
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="write incidents")

    async def _write(self) -> None:
        """Write what there is; what cannot be written stays for the next time."""
        while self._unwritten or self._surplus:
            surplus, self._surplus = self._surplus, []
            incidents = [self._incidents[incident_id] for incident_id in self._unwritten]
            self._unwritten.clear()
            try:
                await asyncio.to_thread(self._write_now, incidents, surplus)
            except Exception as error:
                jsonfile.note_written(self._folder, error)
                log.error("cannot write incidents: %s", error)
                left = [each.id for each in incidents if each.id in self._incidents]
                self._unwritten = dict.fromkeys([*left, *self._unwritten])
                self._surplus = [*surplus, *self._surplus]
                return
            jsonfile.note_written(self._folder, None)

    def _write_now(self, incidents: Sequence[Incident], surplus: Sequence[str]) -> None:
        for old in surplus:
            if _ID.fullmatch(old):
                (self._folder / f"{old}.json").unlink(missing_ok=True)
        for incident in incidents:
            jsonfile.write(self._folder / f"{incident.id}.json", incident)
