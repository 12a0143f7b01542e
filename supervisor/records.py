"""What is on record about models, and on this machine's disks: looked up, never changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from protocol.errors import CodedError, ErrorCode
from supervisor.compatibility import Record, recommendations
from supervisor.gate import Gate
from supervisor.incidents import Incident, IncidentStore
from supervisor.registry import Registry
from supervisor.regressions import regressions

T = TypeVar("T")

#: Reads the registry's records, oldest first, beside the backends installed now.
ReadRecords = Callable[[Sequence[Record], Mapping[str, str | None]], list[T]]


class Records:
    """Answers in the words of the outside. Touches no model, loaded or not.

    ``gate`` gives the one that knows the settings in effect.
    """

    def __init__(
        self, registry: Registry, incidents: IncidentStore, gate: Callable[[], Gate]
    ) -> None:
        self._registry = registry
        self._incidents = incidents
        self._current_gate = gate

    async def compatibility(
        self,
        *,
        model: str | None = None,
        backend: str | None = None,
        outcome: str | None = None,
        since: float | None = None,
        limit: int = 100,
    ) -> dict[str, object]:
        """Registry records, newest first: ``{records, total, summary}``."""
        return self._registry.query(
            model=model, backend=backend, outcome=outcome, since=since, limit=limit
        )

    async def recommendations(
        self, *, model: str | None = None, backend: str | None = None
    ) -> dict[str, object]:
        """Allow, deny or unproven, by model, backend and version: ``{recommendations, count}``."""
        found = await self._read_records(recommendations, model, backend)
        return {"recommendations": found, "count": len(found)}

    async def regressions(
        self, *, model: str | None = None, backend: str | None = None
    ) -> dict[str, object]:
        """What a newer backend version made worse: ``{regressions, count}``."""
        found = await self._read_records(regressions, model, backend)
        return {"regressions": found, "count": len(found)}

    async def _read_records(
        self, read: ReadRecords[T], model: str | None, backend: str | None
    ) -> list[T]:
        records = self._registry.matching(model=model, backend=backend)
        # Off the loop: some tens of milliseconds for a full registry.
        return await asyncio.to_thread(read, records, await self._current_gate().installed())

    def incidents(self, *, model: str | None = None, limit: int = 100) -> list[Incident]:
        """Newest first."""
        return self._incidents.list(model=model, limit=limit)

    def incident(self, incident_id: str) -> Incident:
        """Raise ``not_found``."""
        found = self._incidents.get(incident_id)
        if found is None:
            raise CodedError(ErrorCode.NOT_FOUND, f"no incident {incident_id!r}")
        return found

    async def installed(self) -> dict[str, str | None]:
        """Versions of the backends that are here now, None for one that is not."""
        return await self._current_gate().installed()

    async def available(self) -> dict[str, object]:
        """What is on this machine, loaded or not: ``{models, count}``."""
        found = await self._current_gate().available()
        return {"models": found, "count": len(found)}
