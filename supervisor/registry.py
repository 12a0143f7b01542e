"""The compatibility registry: what worked and what failed, by model and backend version.

The supervisor that holds the home lock is the only writer. Records are kept in
memory, oldest first, and written whole: the history is bounded.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from supervisor import jsonfile

FILE_NAME = "compatibility-registry.json"
SCHEMA_VERSION = 1
MAX_RECORDS = 2000

Outcome = Literal["pass", "fail"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was learned. ``timestamp`` is epoch seconds."""

    model: str
    backend: str
    backend_version: str
    outcome: Outcome
    reason: str
    metadata: dict[str, object]
    timestamp: float


class _File(msgspec.Struct, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    records: list[Record] = []


class Registry:
    """Open it once per supervisor; methods run on the event loop."""

    def __init__(self, home: Path, *, clock: Callable[[], float] = time.time) -> None:
        path = home / FILE_NAME
        file = jsonfile.read(path, _File, schema_version=SCHEMA_VERSION)
        self._records: list[Record] = file.records if file is not None else []
        self._writer = jsonfile.BackgroundWriter(path)
        self._clock = clock

    def add(
        self,
        *,
        model: str,
        backend: str,
        backend_version: str,
        outcome: Outcome,
        reason: str,
        metadata: dict[str, object],
    ) -> None:
        """Remember one outcome; it reaches the disk in the background."""
        record = Record(
            model=model,
            backend=backend,
            backend_version=backend_version,
            outcome=outcome,
            reason=reason,
            metadata=metadata,
            timestamp=self._clock(),
        )
        self._records = [*self._records[-(MAX_RECORDS - 1) :], record]
        self._writer.save(_File(records=self._records))

    def query(
        self,
        *,
        model: str | None = None,
        backend: str | None = None,
        outcome: str | None = None,
        since: float | None = None,
        limit: int = 100,
    ) -> dict[str, object]:
        """Matching records, newest first.

        ``total`` counts all matches, not only the ``limit`` returned; ``summary``
        has the outcomes per model, backend and version among them.
        """
        matching = [
            record
            for record in reversed(self._records)
            if (model is None or record.model == model)
            and (backend is None or record.backend == backend)
            and (outcome is None or record.outcome == outcome)
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
        outcomes = Counter(record.outcome for record in records)
        summary.append(
            {
                "model": model,
                "backend": backend,
                "backend_version": version,
                "pass": outcomes["pass"],
                "fail": outcomes["fail"],
                "last_outcome": records[0].outcome,
                "last_reason": records[0].reason,
                "last_timestamp": records[0].timestamp,
            }
        )
    return summary
