"""The compatibility registry: what worked and what failed, by model and backend version.

The supervisor that holds the home lock is the only writer. Records are kept in
memory, oldest first, and written whole: the history is bounded. What they say is
for ``compatibility`` and ``regressions``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from supervisor import jsonfile
from supervisor.compatibility import EventName, Outcome, Record

log = logging.getLogger(__name__)

FILE_NAME = "compatibility-registry.json"
SCHEMA_VERSION = 1
MAX_RECORDS = 2000
MAX_REASON_CHARS = 2000


class _File(msgspec.Struct, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    records: list[Record] = []


class _EncodedFile(msgspec.Struct, kw_only=True):
    """A ``_File`` whose records are JSON already."""

    schema_version: int = SCHEMA_VERSION
    records: list[msgspec.Raw]


class Registry:
    """Open it once per supervisor; methods run on the event loop."""

    def __init__(self, home: Path, *, clock: Callable[[], float] = time.time) -> None:
        file, self._writer = jsonfile.open_state(
            home / FILE_NAME, _File, schema_version=SCHEMA_VERSION
        )
        self._records: list[Record] = file.records if file is not None else []
        # Each record is encoded once: all of them at every write would hold the
        # interpreter, and with it the event loop, for many milliseconds.
        self._encoded = [_encode(record) for record in self._records]
        self._clock = clock

    @property
    def records(self) -> Sequence[Record]:
        """Oldest first; what is handed out does not change any more."""
        return self._records

    def matching(self, *, model: str | None = None, backend: str | None = None) -> list[Record]:
        """Records of one model, one backend, or all; oldest first."""
        return [
            record
            for record in self._records
            if (model is None or record.model == model)
            and (backend is None or record.backend == backend)
        ]

    def add(
        self,
        *,
        model: str,
        backend: str,
        backend_version: str,
        outcome: Outcome,
        reason: str,
        metadata: dict[str, object],
        once: bool = False,
    ) -> None:
        """Remember one outcome; it reaches the disk in the background.

        ``once``: in place of the newest record of the model, if that says the same.
        """
        record = Record(
            model=model,
            backend=backend,
            backend_version=backend_version,
            outcome=outcome,
            reason=reason[:MAX_REASON_CHARS],
            metadata=metadata,
            timestamp=self._clock(),
        )
        encoded = _encode(record)
        # Decoded again it is what the next start will read, and nobody else's to change.
        record = msgspec.json.decode(encoded, type=Record)
        surplus = _newest_if_same(self._records, record) if once else None
        self._records = [*self._records, record]
        self._encoded = [*self._encoded, encoded]
        if surplus is None and len(self._records) > MAX_RECORDS:
            surplus = _least_needed(self._records)
        if surplus is not None:
            self._records.pop(surplus)
            self._encoded.pop(surplus)
        self._writer.save(_EncodedFile(records=self._encoded))

    def add_event(
        self,
        event: EventName,
        *,
        model: str,
        digest: str,
        backend: str,
        backend_version: str,
        reason: str,
    ) -> None:
        """Remember a quarantine or a release; see ``compatibility`` for how it is stored."""
        self.add(
            model=model,
            backend=backend,
            backend_version=backend_version,
            outcome="fail",
            reason=reason,
            metadata={"event": event, "digest": digest},
        )

    def query(
        self,
        *,
        model: str | None = None,
        backend: str | None = None,
        outcome: str | None = None,
        since: float | None = None,
        limit: int = 100,
    ) -> dict[str, object]:
        """Matching records, newest first; an event has no outcome to ask for.

        ``total`` counts all matches, not only the ``limit`` returned; ``summary``
        has the outcomes per model, backend and version among them, and the number of
        ``events``, which are no outcomes.
        """
        matching = [
            record
            for record in reversed(self.matching(model=model, backend=backend))
            if (outcome is None or (record.outcome == outcome and record.event is None))
            and (since is None or record.timestamp >= since)
        ]
        return {
            "records": matching[:limit],
            "total": len(matching),
            "summary": _summarise(matching),
        }

    async def flush(self) -> None:
        """Wait for the pending write."""
        await self._writer.flush()


def _summarise(newest_first: Iterable[Record]) -> list[dict[str, object]]:
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in newest_first:
        key = (record.model, record.backend, record.backend_version)
        groups.setdefault(key, []).append(record)
    summary: list[dict[str, object]] = []
    for (model, backend, version), records in groups.items():
        decided = [record for record in records if record.event is None]
        outcomes = Counter(record.outcome for record in decided)
        last = decided[0] if decided else records[0]
        summary.append(
            {
                "model": model,
                "backend": backend,
                "backend_version": version,
                "pass": outcomes["pass"],
                "fail": outcomes["fail"],
                "events": len(records) - len(decided),
                "last_outcome": last.outcome if decided else None,
                "last_reason": last.reason,
                "last_timestamp": last.timestamp,
            }
        )
    return summary


def _newest_if_same(records: Sequence[Record], record: Record) -> int | None:
    """Where the newest record of the model is, if it differs from this one in time only."""
    for index in reversed(range(len(records))):
        if records[index].model == record.model:
            found = msgspec.structs.replace(records[index], timestamp=record.timestamp)
            return index if found == record else None
    return None


def _least_needed(records: Sequence[Record]) -> int:
    """The oldest record of whatever has the most: a model that is loaded all day must
    not push out the one record that tells how another did on an earlier version."""
    keys = [(record.model, record.backend, record.backend_version) for record in records]
    counts = Counter(keys)
    most = max(counts.values())
    return next(index for index, key in enumerate(keys) if counts[key] == most)


def _encode(record: Record) -> msgspec.Raw:
    """Any record becomes JSON: one that could not would keep all others off the disk."""
    try:
        content = msgspec.json.encode(record)
    except Exception as error:
        # Half a character of a file name or a worker's output, at its likeliest.
        log.error("a registry record about %a cannot be kept as it is: %s", record.model, error)
        names = ("model", "backend", "backend_version", "reason")
        plain = {name: getattr(record, name).encode(errors="replace").decode() for name in names}
        content = msgspec.json.encode(msgspec.structs.replace(record, **plain, metadata={}))
    return msgspec.Raw(msgspec.json.format(content, indent=1))
