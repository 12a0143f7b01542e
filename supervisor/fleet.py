"""All models of this server: the gate for loads, and the actor for every id."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Generate
from supervisor import admission, modelfiles
from supervisor.accounts import AccountStore
from supervisor.actor import Actor, ModelSpec, Services
from supervisor.admission import BlockRule
from supervisor.channel import make_socket_folder
from supervisor.lifecycle import Readiness
from supervisor.metrics import Metrics
from supervisor.quarantine import Policy
from supervisor.registry import Registry
from supervisor.runtimes import installed_backends
from supervisor.settings import ModelSetting, Settings
from supervisor.stream import RequestStream
from supervisor.views import LoadResult, ModelView

log = logging.getLogger(__name__)


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A load as an operator asks for it. ``path`` None: look the id up."""

    model_id: str
    path: str | None = None
    backend: str | None = None
    allow_unsupported_runtime: bool = False
    keep_alive_sec: int | None = None
    context_length: int | None = None


#: Told how the load of a configured model ended; no error: it is routable.
ReportAutoload = Callable[[str, CodedError | None], None]


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
        self._settings = settings
        self._on_autoload = on_autoload
        self._blocklist = blocklist
        self._registry = Registry(settings.home)
        self._accounts = AccountStore(settings.home)
        self._zmq_context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket_folder = make_socket_folder()
        self._services = Services(
            settings=settings,
            policy=Policy(
                threshold=settings.failure_threshold,
                window_s=settings.failure_window_s,
                delay_cap_s=settings.restart_delay_cap_s,
                decay_s=settings.failure_window_s,
            ),
            registry=self._registry,
            accounts=self._accounts,
            metrics=metrics,
            zmq_context=self._zmq_context,
            socket_folder=Path(self._socket_folder.name),
        )
        self._actors: dict[str, Actor] = {}
        #: Where ids were found before, so that an unloaded model can be loaded by id.
        self._known = dict(map(_resolve, settings.models))
        self._autoload: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    # --- queries ---

    def models(self) -> list[ModelView]:
        """Every tracked model, in the order of ids."""
        return [self._actors[model_id].view() for model_id in sorted(self._actors)]

    def model(self, model_id: str) -> ModelView:
        """Raise ``model_not_found`` for an id that is not tracked."""
        return self._actor(model_id).view()

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

    # --- requests ---

    def submit(self, model_id: str, request: Generate, *, streaming: bool) -> RequestStream:
        """Start a request (its ``request_id`` is overwritten).

        ``streaming`` False: the answer will be taken whole with ``collect``.
        Raises at once ``model_not_found``, ``model_not_ready`` (with
        ``retry_after_s`` when a load is under way), ``model_unstable`` or
        ``rate_limit_exceeded``.
        """
        return self._actor(model_id).submit(request, streaming=streaming)

    # --- operations ---

    async def start_load(self, spec: LoadSpec) -> ModelView:
        """Accept a load and return at once (HTTP 202). Raises ``CodedError``."""
        return (await self._admit(spec)).view()

    async def load(self, spec: LoadSpec) -> LoadResult:
        """Load and wait until routable. Raises ``CodedError`` with how it ended."""
        started = time.monotonic()
        actor = await self._admit(spec)
        await actor.routable()
        return LoadResult(
            success=True,
            model_id=actor.spec.model_id,
            memory_after_load_gb=actor.memory_gb(),
            time_to_load_ms=round((time.monotonic() - started) * 1000, 1),
            readiness=actor.readiness(),
        )

    async def unload(self, model_id: str) -> ModelView:
        """Stop the worker, waiting for it to be gone; returns the last view before."""
        actor = self._actor(model_id)
        view = actor.view()
        actor.unload()
        while actor.tracked and actor.state.unloading:
            await actor.changed()
        return view

    async def release(self, model_id: str) -> ModelView:
        """End a quarantine; returns the last view. Raises ``model_conflict`` without one."""
        actor = self._actor(model_id)
        view = actor.view()
        actor.release()
        return view

    async def start(self) -> None:
        """Begin loading the configured models, one after the other, in the background."""
        self._autoload = asyncio.create_task(self._load_configured(), name="autoload")

    async def stop(self) -> None:
        """Stop every worker; answers everyone who waits. Every call waits for the end,
        and cancelling one does not call the stop off."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="stop fleet")
        await asyncio.shield(self._stopping)

    # --- inside ---

    async def _stop(self) -> None:
        if self._autoload is not None:
            self._autoload.cancel()
        actors = list(self._actors.values())
        for actor in actors:
            actor.unload()
        for actor in actors:
            while actor.tracked and actor.state.unloading:
                await actor.changed()
            await actor.close()
        await self._registry.flush()
        await self._accounts.flush()
        self._zmq_context.term()
        self._socket_folder.cleanup()

    def _actor(self, model_id: str) -> Actor:
        try:
            return self._actors[model_id]
        except KeyError:
            raise CodedError(
                ErrorCode.MODEL_NOT_FOUND, f"model {model_id!r} is not loaded", param="model"
            ) from None

    async def _admit(self, spec: LoadSpec) -> Actor:
        """The actor that loads, or has loaded, the model; a new one if the gate lets it pass."""
        known = self._known.get(spec.model_id)
        path = await self._locate(spec, known)
        model_id = spec.model_id
        if Path(model_id).is_absolute():
            model_id = modelfiles.default_id(path)
        while (actor := self._actors.get(model_id)) is not None and _is_leaving(actor):
            await actor.changed()
        if actor is not None and not _rests(actor):
            return actor
        model = await self._gate(model_id, path, spec, known)
        # Another load of the same id may have come first meanwhile.
        actor = self._actors.get(model_id)
        if actor is not None and _rests(actor):
            if actor.spec.account_key == model.account_key:
                if not spec.allow_unsupported_runtime:
                    raise _unstable(actor)
                actor.load_again()
                return actor
            # Another file or backend version: its quarantine is none of ours.
            del self._actors[model_id]
            await actor.close()
            actor = self._actors.get(model_id)
        return actor if actor is not None else self._create(model, spec)

    async def _locate(self, spec: LoadSpec, known: ModelSetting | None) -> Path:
        if spec.path is not None:
            return Path(spec.path)
        models_dir = self._settings.effective_models_dir
        wanted = known.path if known is not None else spec.model_id
        return await asyncio.to_thread(modelfiles.find, wanted, models_dir)

    async def _gate(
        self, model_id: str, path: Path, spec: LoadSpec, known: ModelSetting | None
    ) -> ModelSpec:
        if self._stopping is not None:
            raise CodedError(ErrorCode.SHUTTING_DOWN, "the server is shutting down")
        requested = spec.backend or (known.backend if known is not None else None)
        files = await asyncio.to_thread(modelfiles.inspect, path)
        installed = await asyncio.to_thread(
            installed_backends, simulated=self._settings.enable_simulated
        )
        backend = admission.choose_backend(files.format, requested, installed)
        version = installed[backend]
        assert version is not None
        rule = admission.find_block(self._blocklist, files.traits(model_id), backend, version)
        if rule is not None and not spec.allow_unsupported_runtime:
            refusal = admission.refuse_blocked(rule, backend, version)
            self._registry.add(
                model=model_id,
                backend=backend,
                backend_version=version,
                outcome="fail",
                reason=refusal.message,
                metadata={"code": refusal.code, "blocklisted": True},
            )
            raise refusal
        context_length = spec.context_length or (known.context_length if known else None)
        keep_alive = spec.keep_alive_sec
        if keep_alive is None and known is not None:
            keep_alive = known.keep_alive_sec
        return ModelSpec(
            model_id=model_id,
            files=files,
            backend=backend,
            backend_version=version,
            context_length=context_length or self._settings.context_length,
            keep_alive_sec=keep_alive,
        )

    def _create(self, model: ModelSpec, spec: LoadSpec) -> Actor:
        model_id = model.model_id

        def forget() -> None:
            del self._actors[model_id]

        actor = Actor(model, self._services, on_gone=forget)
        quarantined = self._accounts.get(model.account_key).quarantined
        actor.start(probation=quarantined and spec.allow_unsupported_runtime)
        self._actors[model_id] = actor
        self._known.setdefault(model_id, ModelSetting(path=str(model.files.path), id=model_id))
        if actor.state.readiness is Readiness.QUARANTINED:
            raise _unstable(actor)
        return actor

    async def _load_configured(self) -> None:
        for model_id, setting in list(self._known.items()):
            spec = LoadSpec(
                model_id=model_id,
                backend=setting.backend,
                keep_alive_sec=setting.keep_alive_sec,
                context_length=setting.context_length,
            )
            try:
                await self.load(spec)
            except CodedError as error:
                log.error("%s: not loaded: %s (%s)", spec.model_id, error.message, error.code)
                self._on_autoload(spec.model_id, error)
            else:
                self._on_autoload(spec.model_id, None)


def _resolve(setting: ModelSetting) -> tuple[str, ModelSetting]:
    """The id of a configured model, and its setting with an absolute path if it is one."""
    path = Path(setting.path).absolute()
    if not path.exists():
        return setting.id or setting.path, setting
    model_id = setting.id or modelfiles.default_id(path)
    return model_id, msgspec.structs.replace(setting, path=str(path))


def _is_leaving(actor: Actor) -> bool:
    """Whether its worker is on the way out, with nothing to come after it."""
    return actor.state.unloading or (_rests(actor) and actor.state.worker_alive)


def _rests(actor: Actor) -> bool:
    """Whether nothing runs for the model any more: it is quarantined."""
    return actor.state.readiness is Readiness.QUARANTINED


def _unstable(actor: Actor) -> CodedError:
    return CodedError(
        ErrorCode.MODEL_UNSTABLE,
        f"model {actor.spec.model_id!r} is quarantined: {actor.state.reason}; "
        "release it, or load it with allow_unsupported_runtime=true to put it on probation",
    )
