"""Looks at the memory of all workers now and then, and condemns the one that has to go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from supervisor.footprint import FootprintMeter, available_bytes
from supervisor.memory import Footprint, Verdict, judge
from supervisor.oom_kills import OomKills
from supervisor.quarantine import FailureKind

log = logging.getLogger(__name__)


class Watched(Protocol):
    """Who has a worker, see ``Actor``."""

    @property
    def worker(self) -> tuple[int, int] | None: ...

    @property
    def dying(self) -> bool: ...

    def footprint(self, generation: int, size: int) -> Footprint | None: ...

    def fail(self, generation: int, kind: FailureKind, reason: str) -> None: ...


class Spared(Protocol):
    """Workers that nobody misses, see ``Spares``."""

    def recall(self, reason: str) -> bool: ...


class MemoryWatch:
    """Watches the actors in ``actors`` and in ``trials``, which their owners change.
    Sizes are bytes.

    Keeps ``oom_kills`` fresh. ``interval_s`` lies between two looks, or more if they
    take long; while the host has less than ``low_water`` available, the ``spares`` go, and
    if there are none the worker that grew is stopped.
    """

    def __init__(
        self,
        actors: Mapping[str, Watched],
        oom_kills: OomKills,
        *,
        interval_s: float,
        low_water: int,
        trials: Mapping[str, Watched] | None = None,
        spares: Spared | None = None,
    ) -> None:
        self._actors = actors
        self._trials = {} if trials is None else trials
        self._spares = spares
        self._oom_kills = oom_kills
        self._interval_s = interval_s
        self._low_water = low_water
        self._meter = FootprintMeter()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            started = time.monotonic()
            try:
                await self._look()
            except Exception:
                # Without this watch the rest still works, and the next look may too.
                log.exception("memory could not be looked at")
            # Looking at a large process takes its time: never more than a twentieth of it.
            now = time.monotonic()
            pause = max(self._until_next_s(now), 20 * (now - started))
            await asyncio.sleep(pause)

    def _until_next_s(self, now: float) -> float:
        """To a moment at which the workers' beats wake this process up as well."""
        interval = self._interval_s
        pause = interval - now % interval
        # A timer may be a hair early: that moment has been looked at.
        return pause if pause > interval / 2 else pause + interval

    async def _look(self) -> None:
        workers = [(actor, actor.worker) for actor in self._watched.values()]
        pids = {worker[1]: (actor, worker[0]) for actor, worker in workers if worker}
        if not pids:
            self._oom_kills.refresh()
            return
        sizes, available = await asyncio.to_thread(self._measure, list(pids))
        low_water = self._low_water
        if available < low_water and self._spares and self._spares.recall("memory is short"):
            # No model has to go before it is known what that has brought.
            low_water = 0
        verdicts = self._verdicts(pids, sizes, available, low_water)
        if verdicts:
            # Nobody is stopped for an estimate.
            sizes = await asyncio.to_thread(self._meter.measure, list(pids), exactly=True)
            verdicts = self._verdicts(pids, sizes, available, low_water)
        for verdict in verdicts:
            actor = self._watched.get(verdict.model_id)
            if actor is not None:
                actor.fail(verdict.generation, FailureKind.MEMORY, verdict.reason)

    @property
    def _watched(self) -> Mapping[str, Watched]:
        return {**self._actors, **self._trials}

    def _measure(self, pids: Sequence[int]) -> tuple[dict[int, int], int]:
        self._oom_kills.refresh()
        return self._meter.measure(pids), available_bytes()

    def _verdicts(
        self,
        pids: Mapping[int, tuple[Watched, int]],
        sizes: Mapping[int, int],
        available: int,
        low_water: int,
    ) -> list[Verdict]:
        found = ((*pids[pid], size) for pid, size in sizes.items())
        dying = any(actor.dying for actor in self._watched.values())
        footprints = [
            footprint
            for actor, generation, size in found
            if (footprint := actor.footprint(generation, size)) is not None and not actor.dying
        ]
        # What is being stopped already is about to give its memory back.
        low_water = 0 if dying else low_water
        return judge(footprints, available=available, low_water=low_water)
