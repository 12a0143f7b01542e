"""All models of this server: one actor for every id, made when the gate lets a load pass."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Detokenize, Detokenized, Job, Tokenize, Tokenized
from supervisor.actor import Actor
from supervisor.admission import BlockRule
from supervisor.autoload import Autoload, ReportAutoload
from supervisor.downloads.downloads import Downloads
from supervisor.gate import NO_OPTIONS, Gate, LoadSpec
from supervisor.idle_watch import IdleWatch
from supervisor.isolation import Quarters
from supervisor.loads import Loads
from supervisor.marks import Janitor
from supervisor.memory_room import MemoryRoom, Preview
from supervisor.memory_watch import MemoryWatch
from supervisor.metrics import Metrics
from supervisor.overview import Overview
from supervisor.probe import Prober, ProbeSpec
from supervisor.quarantine import release
from supervisor.records import Records
from supervisor.resting import Resting
from supervisor.services import open_services
from supervisor.settings import Settings
from supervisor.spares import Spares
from supervisor.status import unstable
from supervisor.stream import RequestStream
from supervisor.sweep import sweep
from supervisor.views import LoadResult, ModelView, ProbeResult, SpareView

log = logging.getLogger(__name__)


class Fleet:
    """Reads the state of ``settings.home``, whose lock the caller holds.

    ``start`` and everything after it runs on one event loop; ``stop`` must be
    awaited before that ends.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        blocklist: Sequence[BlockRule],
        *,
        on_autoload: ReportAutoload,
    ) -> None:
        self._on_autoload = on_autoload
        self._services = services = open_services(settings, metrics)
        self._accounts = services.accounts
        self.journal = services.journal
        self.downloads = Downloads(settings, services.server_mark, self.load, self.journal)
        sweep(services)
        self._gate = Gate(settings, services.registry, blocklist)
        #: What can be looked up without a model.
        self.records: Records = Records(services.registry, services.incidents, lambda: self._gate)
        limit = settings.safe_start_after
        self._configured = Autoload(settings.home, self._gate.configured, limit)
        self._resting = Resting(
            self._accounts, services.incidents, services.policy, services.registry.records
        )
        self._janitor: Janitor | None = None
        self._actors: dict[str, Actor] = {}
        #: What can be asked about all of it.
        self.overview: Overview = Overview(
            *(self._actors, services, self.models, self._configured, self.records.installed)
        )
        self._spares = Spares(
            services,
            in_use=self._backends_in_use,
            calm=self._is_calm,
            has_room=lambda backend: self._room.has_room_for_spare(backend),
            installed=lambda: self._gate.installed(),
        )
        self._room = MemoryRoom(self._actors, services, self._spares)
        self._prober = Prober(lambda: self._gate, services, reserve=self._room.hold)
        self._room.trials = self._prober.trials
        quarters = Quarters(self._spares, self._room.hold, self._prober.trials)
        self._loads = Loads(
            self._actors,
            services,
            lambda: self._gate,
            room=self._room,
            quarters=quarters,
            resting=self._resting,
        )
        #: What goes on by itself until the end.
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Task[None] | None = None

    # --- queries ---

    @property
    def safe_start(self) -> str | None:
        """Why the configured models were not loaded, after starts that ended badly."""
        return self._configured.safe_start

    def models(self) -> list[ModelView]:
        """Every tracked model, and every one that rests in quarantine; in the order of ids."""
        return [self.model(name) for name in sorted(self._actors.keys() | self._resting.models())]

    def files_in_use(self) -> dict[Path, str]:
        """Where the models are that run or are about to, and their draft models: by whom."""
        used = {worker.path: worker.purpose for worker in self._prober.trials.values()}
        for name, actor in self._actors.items():
            if not actor.rests:
                used[actor.spec.files.path] = name
                if actor.spec.draft_path is not None:
                    used[actor.spec.draft_path] = name
        return used

    def spares(self) -> list[SpareView]:
        """Workers that wait without a model."""
        return self._spares.views()

    def model(self, model_id: str) -> ModelView:
        """Raise ``model_not_found`` for an id that is neither tracked nor quarantined."""
        if model_id not in self._actors and (resting := self._resting.view(model_id)) is not None:
            return resting
        return self._actor(model_id).view()

    def fingerprint(self, model_id: str) -> str:
        """Backend and version, which with the seed decide the text. Raises ``model_not_found``."""
        spec = self._actor(model_id).spec
        return f"{spec.backend}-{spec.backend_version}"

    # --- requests ---

    def must_prepare(self, model_id: str) -> bool:
        """Whether a request for the model has to wait for ``prepare``."""
        return self._loads.wanted(model_id)

    async def prepare(self, model_id: str, options: Mapping[str, Any] = NO_OPTIONS) -> None:
        """With ``load_on_demand``, begin to load a model that is on disk and not loaded.

        ``options`` are fields of the ``LoadSpec``. Raises as a load does, but for an id that
        nothing is known of: ``submit`` does. Absolute paths are for operators only.
        """
        await self._loads.prepare(model_id, options)

    def submit(
        self, model_id: str, request: Job, *, streaming: bool, resume: bool = True
    ) -> RequestStream:
        """Start a request (its ``request_id`` is overwritten).

        ``streaming`` False: the answer will be taken whole with ``collect``; ``resume``
        False: it must not go on on another worker when its own dies.
        Raises at once ``model_not_found``, ``model_not_ready`` (with
        ``retry_after_s`` when a load is under way), ``model_unstable`` or
        ``rate_limit_exceeded``.
        """
        return self._actor(model_id).submit(request, streaming=streaming, resume=resume)

    async def tokenize(self, model_id: str, inquiry: Tokenize) -> Tokenized:
        """Ask the model's worker (the ``request_id`` is overwritten), the next one if it dies.

        Raises what ``submit`` does, the worker's refusal, or what became of the model.
        Takes no slot; who is cancelled calls it off.
        """
        answer = await self._actor(model_id).ask(inquiry)
        assert isinstance(answer, Tokenized)
        return answer

    async def detokenize(self, model_id: str, inquiry: Detokenize) -> Detokenized:
        """As ``tokenize``, the other way round."""
        answer = await self._actor(model_id).ask(inquiry)
        assert isinstance(answer, Detokenized)
        return answer

    # --- operations ---

    async def start_load(self, spec: LoadSpec) -> ModelView:
        """Accept a load and return at once (HTTP 202). Raises ``CodedError``."""
        return (await self._loads.admit(spec)).view()

    async def load(self, spec: LoadSpec) -> LoadResult:
        """Load and wait until routable. Raises ``CodedError`` with how it ended."""
        started = time.monotonic()
        actor = await self._loads.admit(spec)
        readiness = await actor.routable()
        return LoadResult(
            success=True,
            model_id=actor.spec.model_id,
            memory_after_load_gb=actor.memory_gb(),
            time_to_load_ms=round((time.monotonic() - started) * 1000, 1),
            readiness=readiness,
        )

    async def plan(self, spec: LoadSpec) -> Preview:
        """What a load would do to the memory. Raises ``CodedError`` as the gate does."""
        return await self._room.preview(await self._gate.admit(spec), may_evict=spec.may_evict)

    async def unload(self, model_id: str, drain_s: float | None = None) -> None:
        """Stop the worker and wait for it to be gone, with all that runs, or after ``drain_s``.

        None: as long as the settings say. Raises ``model_not_found``, and
        ``internal_error`` when the model is gone, but its process cannot be killed.
        """
        if model_id not in self._actors and self._resting.view(model_id) is not None:
            return  # Nothing runs, and the quarantine stays.
        actor = self._actor(model_id)
        known = self._loads.forget(model_id)
        drain_s = self._services.settings.unload_drain_s if drain_s is None else drain_s
        try:
            await actor.drain(drain_s)
        except BaseException:
            self._loads.remember(model_id, known)
            raise
        if actor.tracked:
            actor.unload()
        await actor.left()
        if actor.left_behind is not None:
            raise CodedError(
                ErrorCode.INTERNAL_ERROR, f"model {model_id!r} is unloaded, but {actor.left_behind}"
            )

    async def release(self, model_id: str) -> None:
        """End a quarantine, also one from before this start of the server.

        Raises ``model_not_found``, or ``model_conflict`` without a quarantine.
        """
        actor = self._actors.get(model_id)
        keys = self._accounts.quarantined(model_id)
        if actor is None and not keys:
            self._actor(model_id)
        if actor is not None:
            actor.release()
        for key in keys:
            self._accounts.put(key, release(self._accounts.get(key)))

    async def probe(self, spec: ProbeSpec) -> ProbeResult:
        """See ``Prober.probe``: changes nothing that is loaded."""
        return await self._prober.probe(spec)

    def adopting(self, settings: Settings) -> Callable[[], None]:
        """Look for what new settings name; what is returned makes them take effect at once."""
        gate = self._gate.successor(settings)

        def adopt() -> None:
            self._services.settings, self._gate = settings, gate
            self.downloads.adopt(settings)

        return adopt

    async def start(self) -> None:
        """Begin loading the configured models, one after the other, in the background."""
        self._janitor = Janitor(self._services.server_mark)
        self._loads.announce(spec.model_id for spec in self._gate.configured)
        autoload = self._configured.run(self.load, self._loads.leave, self._on_autoload)
        settings = self._services.settings
        watch = MemoryWatch(
            self._actors,
            self._services.oom_kills,
            interval_s=settings.memory_interval_s,
            low_water=settings.memory_low_water_bytes,
            trials=self._prober.trials,
            spares=self._spares,
        )
        idle = IdleWatch(self._actors, lambda: self._services.settings.keep_alive_sec, self.journal)
        self._tasks = [
            asyncio.create_task(autoload, name="autoload"),
            asyncio.create_task(watch.run(), name="memory watch"),
            asyncio.create_task(idle.run(), name="idle watch"),
            asyncio.create_task(self._spares.run(), name="spare workers"),
        ]

    async def stop(self) -> None:
        """Stop every worker; answers everyone who waits. Every call waits for the end,
        and cancelling one does not call the stop off."""
        if self._stopping is None:
            self._loads.close()
            self._stopping = asyncio.create_task(self._stop(), name="stop fleet")
        await asyncio.shield(self._stopping)

    # --- inside ---

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        actors = list(self._actors.values())
        # Whatever fails, the workers that are left have to go.
        steps = [("downloads", self.downloads.stop)]
        steps += [(actor.spec.model_id, partial(_unload, actor)) for actor in actors]
        steps += [("probe", self._prober.stop), ("spare workers", self._spares.drop)]
        steps += [(actor.spec.model_id, partial(_end, actor)) for actor in actors]
        steps.append(("workers beside the models", self._see_off))
        try:
            went_well = [await _tried(name, step) for name, step in steps]
            if self._janitor is not None and all(went_well):
                self._janitor.dismiss()
        finally:
            await _tried("state", self._services.flush)
            await _tried("count of starts", self._configured.went_well)
            self._services.close()

    async def _see_off(self) -> None:
        """Wait until the workers are gone that were called off."""
        for worker in list(self._prober.trials.values()):
            await worker.gone.wait()

    def _backends_in_use(self) -> set[str]:
        return {actor.spec.backend for actor in self._actors.values() if not actor.rests}

    def _is_calm(self) -> bool:
        """Whether nothing is being loaded and nobody waits for an answer, or for a spare."""
        return not self._room.turn.locked() and all(a.is_calm for a in self._actors.values())

    def _actor(self, model_id: str) -> Actor:
        actor = self._actors.get(model_id)
        if actor is not None:
            return actor
        if (resting := self._resting.view(model_id)) is not None:
            raise unstable(model_id, resting.readiness.reason, resting.last_incident_id)
        if model_id in self._loads:
            raise CodedError(
                ErrorCode.MODEL_NOT_READY,
                f"model {model_id!r} is about to be loaded",
                retry_after_s=1.0,
            )
        raise CodedError(
            ErrorCode.MODEL_NOT_FOUND, f"model {model_id!r} is not loaded", param="model"
        )


async def _unload(actor: Actor) -> None:
    if actor.tracked:
        actor.unload(ErrorCode.SHUTTING_DOWN, "the server is shutting down")


async def _end(actor: Actor) -> None:
    await actor.left()
    await actor.close()


async def _tried(name: str, step: Callable[[], Awaitable[None]]) -> bool:
    """Take one step of the stop. Whether it went well; what did not is logged."""
    try:
        await step()
    except Exception:
        log.exception("while stopping: %s", name)
        return False
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Not this, but something that it has waited for.
        return False
    return True
