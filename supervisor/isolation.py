"""A cell for the suspects of a model: a second worker, so that others need not wait for them.

After a crash the suspects run on the model's own worker, one at a time. Where others wait for
that, and a spare worker and the memory are there, the suspects go on in a cell: a worker of the
same model, which proves itself like any other before it gets them. Whoever is cleared goes back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from protocol.errors import CodedError, ErrorCode
from supervisor.gate import ModelSpec
from supervisor.generation import Generation
from supervisor.lifecycle import (
    CanaryPassed,
    CellFailed,
    Event,
    LoadRefused,
    WorkerExited,
    WorkerFailed,
)
from supervisor.requests import RequestTable
from supervisor.resumption import NextRun
from supervisor.services import Services
from supervisor.sideworker import SideWorker
from supervisor.spares import Spares
from supervisor.views import IsolationView
from supervisor.ward import Ward
from supervisor.worker import Worker

log = logging.getLogger(__name__)

#: Seconds between two looks, and until the first: most suspects are cleared by then.
LOOK_S = 0.25
#: For so many seconds those whose cell has died wait for the next one.
PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Quarters:
    """Workers that wait for a model, and room beside those of the models: ``reserve`` holds
    the memory, or raises; who is in ``beside`` is watched."""

    spares: Spares
    reserve: Callable[[ModelSpec], AbstractAsyncContextManager[None]]
    beside: dict[str, SideWorker]


class Isolation:
    """Looks after the suspects of one model, whose table is ``requests``.

    ``known``: what the model's proven worker recalled, see ``prove``; a cell that does, too, needs
    no longer canary. ``tell`` applies a lifecycle event at once; ``buried`` is told of a cell
    whose process is gone. Methods run on the event loop and, but for ``left``, never wait.
    """

    def __init__(
        self,
        services: Services,
        requests: RequestTable,
        quarters: Quarters,
        *,
        known: Callable[[], str | None],
        tell: Callable[[Event], None],
        buried: Callable[[Generation], None],
    ) -> None:
        self._services = services
        self._requests = requests
        self._quarters = quarters
        self._known = known
        self._tell = tell
        self._buried = buried
        buffer_bytes = services.settings.max_stream_buffer_bytes
        self.ward = Ward(requests, max_stream_buffer_bytes=buffer_bytes)
        self._cell: SideWorker | None = None
        #: Whether the cell is being brought down: to cancel its task would cut that short.
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    def begin(self, spec: ModelSpec) -> None:
        """The model's own worker takes traffic: look after its suspects until there are none."""
        if self._requests.suspects and (self._task is None or self._task.done()):
            name = f"isolation {spec.model_id}"
            self._task = asyncio.create_task(self._run(spec, set(self._leaving)), name=name)

    def end(self) -> None:
        """Nothing is to run in the cell any more: bring it down. Idempotent."""
        task, self._task = self._task, None
        if task is not None and not task.done():
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            if not self._closing:
                task.cancel()

    async def left(self) -> None:
        """Wait for the end of a cell that is being brought down for good."""
        while self._leaving:
            await asyncio.wait(self._leaving)

    def park(self, error: CodedError, *, accuse: bool) -> Counter[NextRun]:
        """The cell is dead: see ``RequestTable.park``."""
        self.ward.disconnect()
        return self.ward.park(error, accuse=accuse)

    @property
    def generation(self) -> Generation | None:
        """The cell's worker."""
        return None if self._cell is None else self._cell.generation

    @property
    def wants_spare(self) -> bool:
        """Whether a spare worker would be of use at once."""
        at_work = self._task is not None and not self._task.done()
        return at_work and self._cell is None and self._is_needed

    def view(self) -> IsolationView | None:
        """None when there are no suspects, and no cell."""
        suspects = self._requests.suspects + self.ward.suspects
        cell = self._cell
        worker = None if cell is None else cell.worker
        if not suspects and worker is None:
            return None
        return IsolationView(
            suspects=suspects,
            pid=None if worker is None else worker[1],
            memory_gb=None if cell is None or worker is None else cell.memory_gb(),
        )

    # --- the task ---

    @property
    def _is_needed(self) -> bool:
        return len(self.ward) > 0 or self.ward.is_called_for

    async def _run(self, spec: ModelSpec, before: set[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)
        gone = CodedError(ErrorCode.MODEL_CRASHED, f"model {spec.model_id!r}: its cell is gone")
        try:
            await self._look_after(spec, gone)
        except Exception:
            # Without a cell they are isolated as ever.
            log.exception("%s: suspects could not be looked after", spec.model_id)
        finally:
            self.ward.dissolve(gone)

    async def _look_after(self, spec: ModelSpec, gone: CodedError) -> None:
        needed_since = time.monotonic()
        mine = asyncio.current_task()
        while self._task is mine and (self._requests.suspects or len(self.ward)):
            await asyncio.sleep(LOOK_S)
            if not self._is_needed:
                continue
            if self._quarters.spares.has(spec.backend, spec.backend_version):
                if not await self._open(spec, gone):
                    return
                needed_since = time.monotonic()
            elif len(self.ward) and time.monotonic() - needed_since > PATIENCE_S:
                log.info("%s: no other cell to be had for its suspects", spec.model_id)
                self.ward.dissolve(gone)

    async def _open(self, spec: ModelSpec, gone: CodedError) -> bool:
        """Have a cell for as long as it is needed. False if none can be had, for these suspects."""
        try:
            async with self._quarters.reserve(spec):
                if not self._is_needed:
                    return True
                worker = self._quarters.spares.take(spec.backend, spec.backend_version)
                return worker is not None and await self._house(spec, worker, gone)
        except CodedError as refusal:
            log.info("%s: no cell for its suspects: %s", spec.model_id, refusal.message)
            return False

    async def _house(self, spec: ModelSpec, worker: Worker, gone: CodedError) -> bool:
        name = f"/cell/{worker.process.pid}"
        cell = SideWorker(
            *(name, spec, self._services),
            requests=self.ward,
            purpose=f"a cell of {spec.model_id}",
            known=self._known(),
        )
        self._cell = self._quarters.beside[name] = cell
        broken = True
        try:
            cell.spawn(worker)
            event = await cell.decision(strict=False)
            if not isinstance(event, CanaryPassed):
                assert isinstance(event, LoadRefused | WorkerFailed | WorkerExited)
                log.warning("%s: no cell for its suspects: %s", spec.model_id, event.reason)
                return False
            broken = not await self._serve(spec, cell, gone)
            return cell.displaced is None
        finally:
            self._closing = True
            await cell.end(broken=broken)
            self._closing = False
            del self._quarters.beside[name]
            self._cell = None
            if cell.generation is not None:
                self._buried(cell.generation)

    async def _serve(self, spec: ModelSpec, cell: SideWorker, gone: CodedError) -> bool:
        """Run suspects in the cell, which has passed its canary. False if it has failed."""
        name, pid = spec.model_id, cell.worker[1] if cell.worker else None
        self.ward.resume()
        if self._is_needed:
            self.ward.admit()
            log.info("%s: a cell is open (pid %s) for %d suspects", name, pid, self.ward.suspects)
        while self._is_needed:
            try:
                async with asyncio.timeout(LOOK_S):
                    event = await cell.event()
            except TimeoutError:
                if self.ward.is_called_for:
                    self.ward.admit()
                continue
            assert isinstance(event, WorkerFailed | WorkerExited)
            log.warning("%s: its cell (pid %s) has failed: %s", name, pid, event.reason)
            if event is cell.displaced:
                self.ward.dissolve(gone)
            else:
                self._closing = True
                self._tell(CellFailed(event.kind, event.reason))
            return False
        log.info("%s: the cell (pid %s) is closed: no suspect is left in it", name, pid)
        return True
