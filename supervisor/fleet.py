"""All models of this server: one actor for every id, made when the gate lets a load pass."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Detokenize, Detokenized, Job, Tokenize, Tokenized
from supervisor.actor import Actor
from supervisor.admission import BlockRule
from supervisor.autoload import Autoload, ReportAutoload
from supervisor.compatibility import Record, recommendations
from supervisor.gate import Gate, LoadSpec, ModelSpec
from supervisor.idle_watch import IdleWatch
from supervisor.ids import complaint_about_id
from supervisor.incidents import Incident
from supervisor.lifecycle import Readiness
from supervisor.marks import Janitor, await_gone, home_mark, kill_marked
from supervisor.memory_watch import MemoryWatch
from supervisor.metrics import Metrics
from supervisor.quarantine import release
from supervisor.regressions import regressions
from supervisor.resting import Resting
from supervisor.services import open_services
from supervisor.settings import Settings
from supervisor.status import unstable
from supervisor.stream import RequestStream
from supervisor.views import LoadResult, ModelView

log = logging.getLogger(__name__)

#: How long a start waits for what an earlier server left: it holds memory until it ends.
SWEEP_TIMEOUT_S = 10.0

T = TypeVar("T")

#: Reads the registry's records, oldest first, beside the backends installed now.
ReadRecords = Callable[[Sequence[Record], Mapping[str, str | None]], list[T]]


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
        self._registry = services.registry
        self._accounts = services.accounts
        self._incidents = services.incidents
        # Nobody else runs workers of this home: its lock is ours.
        swept = [*services.ledger.sweep(), *kill_marked(home_mark(settings.home))]
        if left := await_gone(swept, SWEEP_TIMEOUT_S):
            log.error("left by an earlier server, and they do not end: %s", left)
        self._gate = Gate(settings, self._registry, blocklist)
        limit = settings.safe_start_after
        self._configured = Autoload(settings.home, self._gate.configured, limit)
        self._resting = Resting(
            self._accounts, self._incidents, services.policy, self._registry.records
        )
        self._janitor: Janitor | None = None
        self._actors: dict[str, Actor] = {}
        #: How what is loaded, or was until it was idle, was asked for.
        self._last_loads: dict[str, LoadSpec] = {}
        #: Ids whose loads are being looked at, with their number.
        self._at_gate: Counter[str] = Counter()
        self._memory_watch: asyncio.Task[None] | None = None
        self._idle_watch: asyncio.Task[None] | None = None
        self._autoload: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    # --- queries ---

    @property
    def safe_start(self) -> str | None:
        """Why the configured models were not loaded, after starts that ended badly."""
        return self._configured.safe_start

    def models(self) -> list[ModelView]:
        """Every tracked model, and every one that rests in quarantine; in the order of ids."""
        return [self.model(name) for name in sorted(self._actors.keys() | self._resting.models())]

    def model(self, model_id: str) -> ModelView:
        """Raise ``model_not_found`` for an id that is neither tracked nor quarantined."""
        if model_id not in self._actors and (resting := self._resting.view(model_id)) is not None:
            return resting
        return self._actor(model_id).view()

    def fingerprint(self, model_id: str) -> str:
        """Backend and version, which with the seed decide the text. Raises ``model_not_found``."""
        spec = self._actor(model_id).spec
        return f"{spec.backend}-{spec.backend_version}"

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
        return await asyncio.to_thread(read, records, await self._gate.installed())

    def incidents(self, *, model: str | None = None, limit: int = 100) -> list[Incident]:
        """Newest first."""
        return self._incidents.list(model=model, limit=limit)

    def incident(self, incident_id: str) -> Incident:
        """Raise ``not_found``."""
        found = self._incidents.get(incident_id)
        if found is None:
            raise CodedError(ErrorCode.NOT_FOUND, f"no incident {incident_id!r}")
        return found

    async def available(self) -> dict[str, object]:
        """What is on this machine, loaded or not: ``{models, count}``."""
        found = await self._gate.available()
        return {"models": found, "count": len(found)}

    # --- requests ---

    async def prepare(self, model_id: str) -> None:
        """With ``load_on_demand``, begin to load a model that is on disk and not loaded.

        Raises as a load does, but for an id that nothing is known of: ``submit`` does.
        Absolute paths are for operators only.
        """
        actor = self._actors.get(model_id)
        if (
            not self._services.settings.load_on_demand
            or (actor is not None and not _is_leaving(actor))
            or self._resting.view(model_id) is not None
            or Path(model_id).is_absolute()
        ):
            return
        # As it was loaded before, but for what an operator has to say each time.
        known = self._last_loads.get(model_id, LoadSpec(model_id=model_id))
        spec = msgspec.structs.replace(known, allow_unsupported_runtime=False)
        if complaint_about_id(model_id) or self._gate.id_of(spec) != model_id:
            return
        try:
            if model_id not in self._last_loads:
                path = await self._gate.locate(spec)
                if any(other.spec.files.path == path for other in self._actors.values()):
                    return  # by another name it is loaded already
            await self._admit(spec)
        except CodedError as error:
            if error.code is not ErrorCode.MODEL_NOT_FOUND:
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

    async def unload(self, model_id: str) -> None:
        """Stop the worker and wait for it to be gone. Raises ``model_not_found``, and
        ``internal_error`` when the model is gone, but its process cannot be killed."""
        if model_id not in self._actors and self._resting.view(model_id) is not None:
            return  # Nothing runs, and the quarantine stays.
        actor = self._actor(model_id)
        self._last_loads.pop(model_id, None)
        actor.unload()
        while actor.tracked and actor.state.unloading:
            await actor.changed()
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

    async def start(self) -> None:
        """Begin loading the configured models, one after the other, in the background."""
        self._janitor = Janitor(self._services.server_mark)
        self._at_gate.update(spec.model_id for spec in self._gate.configured)
        autoload = self._configured.run(self.load, self._leave_gate, self._on_autoload)
        self._autoload = asyncio.create_task(autoload, name="autoload")
        settings = self._services.settings
        watch = MemoryWatch(
            self._actors,
            self._services.oom_kills,
            interval_s=settings.memory_interval_s,
            low_water=settings.memory_low_water_bytes,
        )
        self._memory_watch = asyncio.create_task(watch.run(), name="memory watch")
        idle = IdleWatch(self._actors, settings.keep_alive_sec)
        self._idle_watch = asyncio.create_task(idle.run(), name="idle watch")

    async def stop(self) -> None:
        """Stop every worker; answers everyone who waits. Every call waits for the end,
        and cancelling one does not call the stop off."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="stop fleet")
        await asyncio.shield(self._stopping)

    # --- inside ---

    async def _stop(self) -> None:
        for task in (self._autoload, self._memory_watch, self._idle_watch):
            if task is not None:
                task.cancel()
        try:
            for actor in list(self._actors.values()):
                actor.unload(ErrorCode.SHUTTING_DOWN, "the server is shutting down")
            for actor in list(self._actors.values()):
                while actor.tracked and actor.state.unloading:
                    await actor.changed()
                await actor.close()
            if self._janitor is not None:
                self._janitor.dismiss()
            await self._services.flush()
            await self._configured.went_well()
        finally:
            self._services.close()

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
                if actor is not None and not _rests(actor):
                    await self._gate.check_same(actor.spec, spec)
                    same = self._actors.get(model_id) is actor
                    if same and not _rests(actor) and not _is_leaving(actor):
                        return actor
                    continue
                model = await self._gate.admit(spec)
                if self._stopping is not None:
                    raise CodedError(ErrorCode.SHUTTING_DOWN, "the server is shutting down")
                # Nothing waits from here on: what is found now is what is used.
                if self._actors.get(model_id) is actor and (
                    actor is None or (_rests(actor) and not _is_leaving(actor))
                ):
                    return self._wake(actor, model, spec)
        except CodedError as error:
            log.warning("%s: load refused: %s (%s)", model_id, error.message, error.code)
            raise
        finally:
            self._leave_gate(model_id)

    def _leave_gate(self, model_id: str) -> None:
        self._at_gate[model_id] -= 1
        if not self._at_gate[model_id]:
            del self._at_gate[model_id]

    async def _settled(self, model_id: str) -> None:
        """Wait until the model is not on its way out."""
        while (actor := self._actors.get(model_id)) is not None and _is_leaving(actor):
            await actor.changed()

    def _wake(self, actor: Actor | None, model: ModelSpec, spec: LoadSpec) -> Actor:
        """Start what the gate admitted: a new actor, or the quarantined one on probation."""
        self._resting.admitted(model.account_key)
        if actor is not None and actor.spec.account_key == model.account_key:
            if not spec.allow_unsupported_runtime:
                raise actor.unstable()
            actor.load_again()
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
        actor = Actor(model, self._services, on_gone=forget)
        self._actors[model_id] = actor
        actor.start(probation=spec.allow_unsupported_runtime)
        if _rests(actor):
            raise actor.unstable()
        return actor


def _is_leaving(actor: Actor) -> bool:
    """Whether its worker is on the way out, with nothing to come after it."""
    return actor.state.unloading or (_rests(actor) and actor.state.worker_alive)


def _rests(actor: Actor) -> bool:
    """Whether nothing runs for the model any more: it is quarantined."""
    return actor.state.readiness is Readiness.QUARANTINED
