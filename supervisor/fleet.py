"""All models of this server: one actor for every id, made when the gate lets a load pass."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Detokenize, Detokenized, Job, Tokenize, Tokenized
from supervisor.actor import Actor
from supervisor.admission import BlockRule
from supervisor.autoload import Autoload, ReportAutoload
from supervisor.downloads.downloads import Downloads
from supervisor.gate import NO_OPTIONS, Gate, LoadSpec, ModelSpec
from supervisor.idle_watch import IdleWatch
from supervisor.ids import complaint_about_id
from supervisor.isolation import Quarters
from supervisor.marks import Janitor, await_gone, home_mark, kill_marked
from supervisor.memory_room import MemoryRoom, Preview
from supervisor.memory_watch import MemoryWatch
from supervisor.metrics import Metrics
from supervisor.probe import Prober, ProbeSpec
from supervisor.quarantine import release
from supervisor.records import Records
from supervisor.resting import Resting
from supervisor.services import open_services
from supervisor.settings import Settings
from supervisor.spares import Spares
from supervisor.status import unstable
from supervisor.stream import RequestStream
from supervisor.views import LoadResult, ModelView, ProbeResult, SpareView

log = logging.getLogger(__name__)

#: How long a start waits for what an earlier server left: it holds memory until it ends.
SWEEP_TIMEOUT_S = 10.0


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
        self.downloads = Downloads(settings, services.server_mark, self.load)
        # Nobody else runs workers of this home: its lock is ours.
        swept = [*services.ledger.sweep(), *kill_marked(home_mark(settings.home))]
        if left := await_gone(swept, SWEEP_TIMEOUT_S):
            log.error("left by an earlier server, and they do not end: %s", left)
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
        self._spares = Spares(services, in_use=self._backends_in_use, calm=self._is_calm)
        self._room = MemoryRoom(self._actors, services, self._spares)
        self._prober = Prober(lambda: self._gate, services, reserve=self._room.hold)
        self._room.trials = self._prober.trials
        self._quarters = Quarters(self._spares, self._room.hold, self._prober.trials)
        #: How what is loaded, or was until it was idle, was asked for.
        self._last_loads: dict[str, LoadSpec] = {}
        #: Ids whose loads are being looked at, with their number.
        self._at_gate: Counter[str] = Counter()
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

    async def prepare(self, model_id: str, options: Mapping[str, Any] = NO_OPTIONS) -> None:
        """With ``load_on_demand``, begin to load a model that is on disk and not loaded.

        ``options`` are fields of the ``LoadSpec``. Raises as a load does, but for an id that
        nothing is known of: ``submit`` does. Absolute paths are for operators only.
        """
        actor = self._actors.get(model_id)
        if (
            not self._services.settings.load_on_demand
            or (actor is not None and not actor.leaving)
            or self._resting.view(model_id) is not None
            or Path(model_id).is_absolute()
        ):
            return
        if self._at_gate[model_id] >= self._services.settings.max_queue:
            raise CodedError(
                ErrorCode.RATE_LIMIT_EXCEEDED,
                f"{self._at_gate[model_id]} requests wait for model {model_id!r} to be loaded",
                retry_after_s=1.0,
            )
        # As it was loaded before, but for what an operator has to say each time.
        known = self._last_loads.get(model_id, LoadSpec(model_id=model_id))
        known = msgspec.structs.replace(known, allow_unsupported_runtime=False, may_evict=True)
        spec = msgspec.structs.replace(known, **options)
        if complaint_about_id(model_id) or self._gate.id_of(spec) != model_id:
            return
        try:
            if model_id not in self._last_loads:
                path = await self._gate.locate(spec)
                if any(other.spec.files.path == path for other in self._actors.values()):
                    return  # by another name it is loaded already
            await self._admit(spec)
        except CodedError as error:
            # A conflict: somebody else's load with other options was quicker, and will do.
            if error.code not in (ErrorCode.MODEL_NOT_FOUND, ErrorCode.MODEL_CONFLICT):
                raise

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
        return (await self._admit(spec)).view()

    async def load(self, spec: LoadSpec) -> LoadResult:
        """Load and wait until routable. Raises ``CodedError`` with how it ended."""
        started = time.monotonic()
        actor = await self._admit(spec)
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
        self._last_loads.pop(model_id, None)
        await actor.drain(self._services.settings.unload_drain_s if drain_s is None else drain_s)
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
        self._at_gate.update(spec.model_id for spec in self._gate.configured)
        autoload = self._configured.run(self.load, self._leave_gate, self._on_autoload)
        settings = self._services.settings
        watch = MemoryWatch(
            self._actors,
            self._services.oom_kills,
            interval_s=settings.memory_interval_s,
            low_water=settings.memory_low_water_bytes,
            trials=self._prober.trials,
        )
        idle = IdleWatch(self._actors, lambda: self._services.settings.keep_alive_sec)
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
            self._stopping = asyncio.create_task(self._stop(), name="stop fleet")
        await asyncio.shield(self._stopping)

    # --- inside ---

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        try:
            await self.downloads.stop()
            for actor in list(self._actors.values()):
                actor.unload(ErrorCode.SHUTTING_DOWN, "the server is shutting down")
            await self._prober.stop()
            await self._spares.drop()
            for actor in list(self._actors.values()):
                await actor.left()
                await actor.close()
            for worker in list(self._prober.trials.values()):
                await worker.gone.wait()
            if self._janitor is not None:
                self._janitor.dismiss()
            await self._services.flush()
            await self._configured.went_well()
        finally:
            self._services.close()

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
        if self._at_gate[model_id]:
            raise CodedError(
                ErrorCode.MODEL_NOT_READY,
                f"model {model_id!r} is about to be loaded",
                retry_after_s=1.0,
            )
        raise CodedError(
            ErrorCode.MODEL_NOT_FOUND, f"model {model_id!r} is not loaded", param="model"
        )

    async def _admit(self, spec: LoadSpec) -> Actor:
        """The actor that loads, or has loaded, the model; a new one if the gate lets it pass."""
        model_id = self._gate.id_of(spec)
        self._at_gate[model_id] += 1
        try:
            while True:
                await self._settled(model_id)
                actor = self._actors.get(model_id)
                if actor is not None and not actor.rests:
                    await self._gate.check_same(actor.spec, spec)
                    same = self._actors.get(model_id) is actor
                    if same and actor.stays:
                        return actor
                    continue
                model = await self._gate.admit(spec)
                async with self._room.turn:
                    if not self._is_free(model_id, actor):
                        continue
                    account = self._accounts.get(model.account_key)
                    if spec.allow_unsupported_runtime or not account.quarantined:
                        plan = await self._room.make(model, may_evict=spec.may_evict)
                        model = replace(model, plan=plan)
                    # Nothing waits from here on: what is found now is what is used.
                    if self._is_free(model_id, actor):
                        return self._wake(actor, model, spec)
        except CodedError as error:
            log.warning("%s: load refused: %s (%s)", model_id, error.message, error.code)
            raise
        finally:
            self._leave_gate(model_id)

    def _is_free(self, model_id: str, actor: Actor | None) -> bool:
        """Whether the model may be given a worker, as when ``actor`` was what there was."""
        if self._stopping is not None:
            raise CodedError(ErrorCode.SHUTTING_DOWN, "the server is shutting down")
        same = self._actors.get(model_id) is actor
        return same and (actor is None or (actor.rests and not actor.leaving))

    def _leave_gate(self, model_id: str) -> None:
        self._at_gate[model_id] -= 1
        if not self._at_gate[model_id]:
            del self._at_gate[model_id]

    async def _settled(self, model_id: str) -> None:
        """Wait until the model is not on its way out."""
        while (actor := self._actors.get(model_id)) is not None and actor.leaving:
            await actor.changed()

    def _wake(self, actor: Actor | None, model: ModelSpec, spec: LoadSpec) -> Actor:
        """Start what the gate admitted: a new actor, or the quarantined one on probation."""
        self._resting.admitted(model.account_key)
        if actor is not None and actor.spec.account_key == model.account_key:
            if not spec.allow_unsupported_runtime:
                raise actor.unstable()
            actor.load_again(model)
            return actor
        if actor is not None:
            # Another file or backend version: its quarantine is none of ours.
            del self._actors[model.model_id]
            actor.abandon()
        return self._create(model, spec)

    def _create(self, model: ModelSpec, spec: LoadSpec) -> Actor:
        model_id = model.model_id

        def forget() -> None:
            del self._actors[model_id]

        self._last_loads[model_id] = spec
        self._actors[model_id] = actor = Actor(model, self._services, self._quarters, forget)
        actor.start(probation=spec.allow_unsupported_runtime)
        if actor.rests:
            raise actor.unstable()
        return actor
