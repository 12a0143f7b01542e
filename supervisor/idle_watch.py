"""Unloads models that have had nothing to do for as long as their operator said."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from protocol.errors import CodedError, ErrorCode
from supervisor.actor import Actor
from supervisor.journal import Journal, ModelEvicted

log = logging.getLogger(__name__)

#: Seconds between two looks.
INTERVAL_S = 1.0


class IdleWatch:
    """Watches the actors in ``actors``, which its owner changes.

    ``keep_alive_sec`` tells, each time, that of models that have none of their own; 0 and
    None: for ever.
    """

    def __init__(
        self,
        actors: Mapping[str, Actor],
        keep_alive_sec: Callable[[], int | None],
        journal: Journal,
    ) -> None:
        self._actors = actors
        self._keep_alive_sec = keep_alive_sec
        self._journal = journal

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            for actor in list(self._actors.values()):
                self._look(actor)

    def _look(self, actor: Actor) -> None:
        own = actor.spec.keep_alive_sec
        keep_s = self._keep_alive_sec() if own is None else own
        idle_s = actor.idle_s()
        if not keep_s or actor.spec.pinned or idle_s is None or idle_s < keep_s:
            return
        log.info("%s: unloaded, as it was idle for %.0f s", actor.spec.model_id, idle_s)
        try:
            actor.unload(ErrorCode.MODEL_UNLOADED, f"it was idle for {keep_s} s")
        except CodedError as error:
            log.warning("%s: not unloaded: %s", actor.spec.model_id, error.message)
            return
        self._journal.add(ModelEvicted(model=actor.spec.model_id, idle_s=round(idle_s, 1)))
