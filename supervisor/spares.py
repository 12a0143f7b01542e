"""Workers that have loaded a backend and hold no model, for whoever needs one next.

To start an interpreter and import a backend takes longer than to load a small model: a
respawn that takes a spare worker saves that. One is prepared when nothing else goes on and
there is memory to spare, for each backend that is in use.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping

from protocol.handshake import HandshakeError, verify_hello
from protocol.messages import FromWorker, Hello, LoadFailed
from supervisor.footprint import resident_gb
from supervisor.journal import SpareChanged
from supervisor.marks import end_helpers
from supervisor.memory_plan import overhead_bytes
from supervisor.services import Services
from supervisor.views import SpareView
from supervisor.worker import Worker

log = logging.getLogger(__name__)

#: Seconds between two looks at whether one is missing.
INTERVAL_S = 1.0
#: Who is busy all the time gets a spare worker after so long all the same.
PATIENCE_S = 30.0
#: Until it is asked again whether there is room, which takes a look at every worker.
NO_ROOM_S = 30.0
#: Between two looks at which versions are installed.
VERSIONS_S = 30.0
#: So many that end badly in a row, and no more are made for that backend.
MAX_FAILURES = 3

#: One that is well is heard more often than every so many of its beats.
_BEATS = 3

_HELPERS_TIMEOUT_S = 2.0
#: A generation is never of this number.
_NUMBER = 0


class Spare:
    """Listens to a worker until somebody takes it. ``on_end``: it has ended by itself."""

    def __init__(self, backend: str, services: Services, on_end: Callable[[Spare], None]) -> None:
        self.backend = backend
        #: Its end is no fault of its own.
        self.unwanted = False
        self._journal = services.journal
        self._on_end = on_end
        self._settings = services.settings
        self._failure = ""
        self._heard_at = 0.0
        self.worker = Worker(
            backend, services, self, generation=_NUMBER, name=f"spare worker ({backend})"
        )
        # One that never says hello must not stand for a spare worker for ever.
        self._timer = asyncio.get_running_loop().call_later(
            self._settings.start_timeout_s, self.dismiss, "it does not say hello"
        )
        self._ending: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether it waits for a model."""
        process = self.worker.process
        alive = process.exit_status is None and not process.is_dead()
        # It beats several times within that: one that is stopped would not read its model.
        heard = time.monotonic() - self._heard_at < self._settings.beat_timeout_s
        return self.worker.hello is not None and self._ending is None and alive and heard

    @property
    def brisk(self) -> bool:
        """Whether it has missed no beats and is not stopped: whoever takes one that is would
        only find out when the load stalls, after minutes."""
        lately = time.monotonic() - self._heard_at < _BEATS * self._settings.beat_interval_s
        return self.ready and lately and not self.worker.process.is_stopped()

    @property
    def failure(self) -> str:
        """Why it ended, in the words of the one who saw it."""
        return self._failure or self.worker.process.describe_exit()[1]

    def taken(self) -> Worker:
        """Give it away: from here on somebody else listens."""
        self._timer.cancel()
        self.tell("taken")
        return self.worker

    def dismiss(self, reason: str) -> None:
        """Begin to bring it down. Idempotent."""
        if self._ending is None:
            self._failure = reason
            self._ending = asyncio.create_task(self._end())

    def recall(self, reason: str) -> None:
        """Begin to bring it down for the sake of others."""
        self.unwanted = True
        self.dismiss(reason)

    async def stop(self) -> None:
        """Bring it down, and wait for its end."""
        self.recall("it is not needed any more")
        assert self._ending is not None
        await asyncio.shield(self._ending)

    def tell(self, status: str, reason: str = "") -> None:
        """Say what became of it."""
        pid = self.worker.process.pid
        self._journal.add(SpareChanged(backend=self.backend, pid=pid, status=status, reason=reason))

    def view(self) -> SpareView:
        hello, pid = self.worker.hello, self.worker.process.pid
        return SpareView(
            backend=self.backend,
            backend_version=None if hello is None else hello.backend_version,
            pid=pid,
            ready=self.ready,
            memory_gb=resident_gb(pid),
        )

    # --- for the worker; see ``worker.Listener`` ---

    def on_message(self, message: FromWorker) -> None:
        self._heard_at = time.monotonic()
        if isinstance(message, LoadFailed):
            self._failure = message.message
        if not isinstance(message, Hello):
            return  # a beat
        try:
            verify_hello(message, self.worker.boot, self.worker.process.pid)
        except HandshakeError as error:
            self.on_violation(str(error))
            return
        self._timer.cancel()
        self.worker.hello = message
        self.tell("ready")

    def on_violation(self, reason: str) -> None:
        self.dismiss(reason)

    def on_exit(self) -> None:
        self._timer.cancel()
        self.worker.channel.close()
        if self._ending is None:
            self._ending = asyncio.create_task(self._clean_up())
            self._on_end(self)

    # --- inside ---

    async def _end(self) -> None:
        self._timer.cancel()
        await self.worker.process.stop(grace_s=self._settings.stop_grace_s, broken=True)
        self.worker.channel.close()
        await self._clean_up()
        self._on_end(self)

    async def _clean_up(self) -> None:
        process = self.worker.process
        await end_helpers(process.mark, _HELPERS_TIMEOUT_S, process.name)


class Spares:
    """``size`` spare workers of each backend in use. Methods run on the event loop.

    ``in_use`` tells the backends of the models there are, ``calm`` whether nothing goes on,
    ``has_room`` whether there is memory for one of a backend, and ``installed`` the versions of
    the backends.
    """

    def __init__(
        self,
        services: Services,
        *,
        in_use: Callable[[], Collection[str]],
        calm: Callable[[], bool],
        has_room: Callable[[str], Awaitable[bool]],
        installed: Callable[[], Awaitable[Mapping[str, str | None]]],
    ) -> None:
        self._services = services
        self._size = services.settings.warm_spares
        self._in_use = in_use
        self._calm = calm
        self._has_room = has_room
        self._find_installed = installed
        self._installed: Mapping[str, str | None] = {}
        self._spares: list[Spare] = []
        self._failures: Counter[str] = Counter()
        self._waits_since: float | None = None
        self._room_due = self._versions_due = 0.0

    def take(self, backend: str, version: str) -> Worker | None:
        """A worker that waits for a model on this version of the backend, if there is one."""
        spare = self._waiting(backend, version)
        if spare is None:
            return None
        self._spares.remove(spare)
        self._failures[backend] = 0
        return spare.taken()

    def has(self, backend: str, version: str) -> bool:
        """Whether ``take`` would give one."""
        return self._waiting(backend, version) is not None

    def _waiting(self, backend: str, version: str) -> Spare | None:
        for spare in self._spares:
            hello = spare.worker.hello
            if not (spare.brisk and hello and spare.backend == backend):
                continue
            if hello.backend_version == version:
                return spare
        return None

    def views(self) -> list[SpareView]:
        return [spare.view() for spare in self._spares]

    @property
    def planned(self) -> Mapping[int, int]:
        """Bytes that each may take, by its pid."""
        return {each.worker.process.pid: overhead_bytes(each.backend) for each in self._spares}

    async def drop(self) -> None:
        """Bring all of them down: their memory is needed."""
        await asyncio.gather(*(spare.stop() for spare in list(self._spares)))

    def recall(self, reason: str) -> bool:
        """Begin to bring all of them down. Whether there are any, whose memory is about to be
        free."""
        for spare in self._spares:
            spare.recall(reason)
        return bool(self._spares)

    async def run(self) -> None:
        """Keep as many as there should be, until cancelled."""
        while self._size:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self._look()
            except Exception:
                # Without a spare worker everything goes on, only more slowly.
                log.exception("spare workers could not be looked after")

    async def _look(self) -> None:
        in_use = set(self._in_use())
        if in_use:
            await self._look_at_versions()
        for spare in self._spares:
            started = spare.worker.hello is not None
            if started and not (spare.backend in in_use and spare.ready):
                spare.dismiss("it is not needed any more" if spare.ready else "it does not beat")
        missing = [backend for backend in sorted(in_use) if self._is_missing(backend)]
        if not missing:
            self._waits_since = None
            return
        now = time.monotonic()
        self._waits_since = self._waits_since or now
        # One at a time: it takes a processor for a second or so.
        starting = any(not spare.ready for spare in self._spares)
        patient = self._waits_since + PATIENCE_S >= now and not self._calm()
        if starting or patient or now < self._room_due:
            return
        if not await self._has_room(missing[0]):
            self._room_due = now + NO_ROOM_S
            return
        # Nothing has waited since there was room.
        self._spares.append(Spare(missing[0], self._services, self._on_end))

    async def _look_at_versions(self) -> None:
        """Nobody can take one that was started before an upgrade."""
        if (now := time.monotonic()) < self._versions_due:
            return
        self._versions_due = now + VERSIONS_S
        installed = await self._find_installed()
        for backend, version in installed.items():
            if version != self._installed.get(backend, version):
                self._failures[backend] = 0
        self._installed = installed
        for spare in self._spares:
            hello, version = spare.worker.hello, installed.get(spare.backend)
            if hello is not None and spare.ready and hello.backend_version != version:
                # One that says something else each time must not be made for ever.
                self._failures[spare.backend] += 1
                spare.dismiss(f"it has version {hello.backend_version}, installed is {version}")

    def _is_missing(self, backend: str) -> bool:
        if self._installed.get(backend, "") is None:
            return False
        there = sum(spare.backend == backend for spare in self._spares)
        return there < self._size and self._failures[backend] < MAX_FAILURES

    def _on_end(self, spare: Spare) -> None:
        if spare not in self._spares:
            return
        self._spares.remove(spare)
        log.info("%s: ended: %s", spare.worker.process.name, spare.failure)
        spare.tell("ended", spare.failure)
        if spare.worker.hello is None and not spare.unwanted:
            self._failures[spare.backend] += 1
            if self._failures[spare.backend] == MAX_FAILURES:
                log.warning("no more spare workers for backend %s: none starts", spare.backend)
