"""All downloads of this server: one for each model at a time, a few at once, none unasked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from protocol.errors import CodedError, ErrorCode
from supervisor.catalog import hub_cache_dir
from supervisor.downloads import local, removal, selection
from supervisor.downloads.consent import LIFETIME_S, Question, Questions
from supervisor.downloads.messages import FetchJob, Plan
from supervisor.downloads.operation import DownloadView, Operation, operation_id
from supervisor.downloads.planning import ask_hub, require_disk
from supervisor.downloads.process import engine_environment, run_engine
from supervisor.downloads.records import INTERRUPTED, MAX_RECORDS, Records
from supervisor.downloads.selection import Wanted
from supervisor.gate import LoadSpec
from supervisor.journal import DownloadChanged, Journal
from supervisor.settings import Settings
from supervisor.views import LoadResult

log = logging.getLogger(__name__)

#: Each is a process, and they begin with any id that somebody makes up.
_PLANS_AT_ONCE = 4


class Asked(NamedTuple):
    """A download that waits for a yes. Sizes in bytes."""

    token: str
    plan: Plan
    free_bytes: int
    lifetime_s: float


class Downloads:
    """``mark`` is what its engines carry, see ``marks``; ``load`` loads what has come.

    Methods run on the event loop and raise ``CodedError``.
    """

    def __init__(
        self,
        settings: Settings,
        mark: str,
        load: Callable[[LoadSpec], Awaitable[LoadResult]],
        journal: Journal,
    ) -> None:
        self._settings = settings
        self._cache = settings.hub_cache_dir or hub_cache_dir()
        self._environment = engine_environment(settings.hub_endpoint, f"{mark}download")
        self._load = load
        self._journal = journal
        self._questions = Questions()
        self._records = Records(settings.home)
        #: Of all, also of those before this start; the one that changed last comes last.
        self._views: dict[str, DownloadView] = {view.id: view for view in self._records.earlier}
        self._operations: dict[str, Operation] = {}
        self._plan_slots = asyncio.Semaphore(_PLANS_AT_ONCE)
        self._slots = asyncio.Semaphore(settings.max_downloads)
        self._reserving = asyncio.Lock()
        self._stopping = False

    def adopt(self, settings: Settings) -> None:
        """Look for models where new settings say; how many come at once stays as it was."""
        self._settings = settings
        self._cache = settings.hub_cache_dir or hub_cache_dir()

    # --- queries ---

    def view(self, download_id: str) -> DownloadView:
        """Raises ``download_not_found``."""
        if (operation := self._operations.get(download_id)) is not None:
            return operation.view()
        if (view := self._views.get(download_id)) is not None:
            return view
        raise CodedError(ErrorCode.DOWNLOAD_NOT_FOUND, f"no download {download_id[:100]!r}")

    def views(self) -> list[DownloadView]:
        """The newest first."""
        return [self.view(download_id) for download_id in reversed(self._views)]

    def operation(self, download_id: str) -> Operation | None:
        """The one that goes on, or has ended since this server started."""
        return self._operations.get(download_id)

    # --- what an operator asks for ---

    async def fetch(self, model_id: str) -> Operation:
        """Download a model, or join who does."""
        ask = self._wanted(model_id)
        self._require_enabled()
        return self._running(ask) or await self.start(await self._plan(model_id))

    async def offer(
        self, refusal: CodedError, spec: LoadSpec, *, consent: bool
    ) -> LoadSpec | Operation | Asked:
        """What can be done about a load that was refused since its model is not here.

        The load with another id, when the model is here under that; the download that goes
        on or, with ``consent`` or nothing left to fetch, begins; else a question. Raises
        ``refusal`` where a download would not help.
        """
        found = await self._sought(refusal, spec)
        if isinstance(found, Operation):
            return self._join(found, spec)
        if isinstance(found, LoadSpec):
            return found
        spec = msgspec.structs.replace(spec, model_id=found.model_id)
        if consent or not found.missing_bytes or self._active(operation_id(found.model_id)):
            return await self.start(found, spec)
        free = await self._require_disk(found)
        return Asked(self._questions.ask(Question(found, spec)), found, free, LIFETIME_S)

    async def preview(self, refusal: CodedError, spec: LoadSpec) -> LoadSpec | Operation | Asked:
        """As ``offer``, but nothing begins and nobody joins; the question has no token."""
        found = await self._sought(refusal, spec)
        if not isinstance(found, Plan):
            return found
        if (running := self._active(operation_id(found.model_id))) is not None:
            return running
        return Asked("", found, await self._require_disk(found), 0)

    async def _sought(self, refusal: CodedError, spec: LoadSpec) -> LoadSpec | Operation | Plan:
        """The load by another id, a download that goes on, or what the hub has."""
        ask = self._remedy(refusal, spec)
        if (running := self._running(ask)) is not None:
            return running
        known_as = await asyncio.to_thread(local.known_as, self._cache, ask)
        if known_as is not None:
            return msgspec.structs.replace(spec, model_id=known_as)
        self._require_enabled()
        try:
            return await self._plan(spec.model_id, spec.backend)
        except CodedError:
            if refusal.code is ErrorCode.MODEL_INCOMPLETE:
                raise refusal from None
            raise

    async def confirm(self, token: str) -> Operation:
        """Begin what was asked for. The token is used up, whatever comes of it."""
        question = self._questions.take(token)
        self._require_enabled()
        return await self.start(question.plan, question.spec)

    async def start(self, plan: Plan, spec: LoadSpec | None = None) -> Operation:
        """Begin a download, or join that of the same model."""
        if (running := self._active(operation_id(plan.model_id))) is not None:
            return self._join(running, spec)
        # One at a time: what one reserves the next does not find free.
        async with self._reserving:
            await self._require_disk(plan)
            if self._stopping:
                raise CodedError(ErrorCode.SHUTTING_DOWN, "the server is shutting down")
            if (running := self._active(operation_id(plan.model_id))) is not None:
                return self._join(running, spec)
            operation = Operation(plan, spec)
            self._operations[operation.id] = operation
        self._keep(operation)
        operation.task = asyncio.create_task(self._run(operation), name=f"download {plan.model_id}")
        return operation

    async def cancel(self, download_id: str) -> DownloadView:
        """End a download and wait for that. What has come of it stays.

        Raises ``download_not_found``, and ``model_conflict`` for one that has ended or loads.
        """
        view = self.view(download_id)
        operation = self._active(download_id)
        if operation is None or operation.status == "loading":
            if view.status == "cancelled":
                return view
            ended = "is being loaded: unload it" if operation is not None else "has ended"
            raise CodedError(ErrorCode.MODEL_CONFLICT, f"the download of {view.model_id!r} {ended}")
        operation.cancelling = True
        await self._end([operation])
        return operation.view()

    async def remove(self, model_id: str, used: Mapping[Path, str]) -> tuple[str, int]:
        """Delete a model's files: its full id, and the bytes freed.

        Raises ``model_conflict`` while they come, or while they are ``used`` by the model of
        that id.
        """
        ask = selection.wanted(model_id)
        repo = model_id if ask is None else ask.repo
        for operation in self._operations.values():
            if not operation.settled and operation.plan.repo == repo:
                raise CodedError(
                    ErrorCode.MODEL_CONFLICT,
                    f"{operation.plan.model_id!r} is being downloaded: cancel that first",
                    param="id",
                )
        models_dir = self._settings.effective_models_dir
        model_id, freed = await asyncio.to_thread(
            removal.remove, model_id, models_dir, self._cache, used
        )
        log.info("%s: deleted, %d bytes freed", model_id, freed)
        return model_id, freed

    async def stop(self) -> None:
        """End all that goes on, and answer everyone who waits for it."""
        self._stopping = True
        await self._end([each for each in self._operations.values() if not each.settled])
        await self._records.flush()

    # --- inside ---

    async def _run(self, operation: Operation) -> None:
        plan = operation.plan
        try:
            async with self._slots:
                operation.turn("downloading")
                self._keep(operation)
                job = FetchJob(
                    plan=plan, cache=str(self._cache), stall_s=self._settings.download_stall_s
                )
                await run_engine(job, self._environment, operation.progress)
            log.info("%s: downloaded, %d bytes", plan.model_id, plan.total_bytes)
            if operation.spec is not None:
                operation.turn("loading")
                operation.result = await self._load(operation.spec)
            operation.turn("done")
        except CodedError as error:
            log.warning("%s: download: %s (%s)", plan.model_id, error.message, error.code)
            operation.fail(error)
        except Exception:
            log.exception("%s: download failed", plan.model_id)
            operation.fail(CodedError(ErrorCode.INTERNAL_ERROR, "the server's log has the details"))
        self._keep(operation)

    async def _end(self, operations: Sequence[Operation]) -> None:
        """Cancel what goes on, and say so: a task that has not begun yet never could."""
        tasks = [each.task for each in operations if each.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for operation in operations:
            if not operation.settled:
                operation.fail(
                    CodedError(ErrorCode.DOWNLOAD_CANCELLED, "cancelled; what has come is kept")
                    if operation.cancelling
                    else CodedError(ErrorCode.DOWNLOAD_FAILED, INTERRUPTED.message)
                )
                self._keep(operation)

    def _keep(self, operation: Operation) -> None:
        """Remember how it stands, and no more of the settled than anybody will ask for."""
        self._views.pop(operation.id, None)
        self._views[operation.id] = view = operation.view()
        self._tell(view)
        for download_id in list(self._views)[: max(0, len(self._views) - MAX_RECORDS)]:
            if self._active(download_id) is None:
                del self._views[download_id]
                self._operations.pop(download_id, None)
        self._records.save(list(self._views.values()))

    def _tell(self, view: DownloadView) -> None:
        error = view.error
        self._journal.add(
            DownloadChanged(
                model=view.model_id,
                download_id=view.id,
                status=view.status,
                downloaded_bytes=view.downloaded_bytes,
                total_bytes=view.total_bytes,
                code=None if error is None else error.code,
                message=None if error is None else error.message,
            )
        )

    def _remedy(self, refusal: CodedError, spec: LoadSpec) -> Wanted:
        """What to ask the hub for; raises the refusal where it cannot help."""
        ask = selection.wanted(spec.model_id)
        elsewhere = any(
            model.id == spec.model_id and model.path != spec.model_id
            for model in self._settings.models
        )
        if ask is None or spec.path is not None or elsewhere:
            raise refusal
        if refusal.code is ErrorCode.MODEL_NOT_FOUND:
            return ask
        # Begun by a program that was killed, say; what is in the models folder is its owner's.
        mine = Path(self._settings.effective_models_dir, ask.repo)
        if refusal.code is not ErrorCode.MODEL_INCOMPLETE or mine.exists():
            raise refusal
        return ask

    def _wanted(self, model_id: str) -> Wanted:
        if (ask := selection.wanted(model_id)) is None:
            raise CodedError(
                ErrorCode.INVALID_VALUE,
                f"model_id must name a model of the hub, as org/name or org/name:file-stem, "
                f"not {model_id[:200]!r}",
                param="model_id",
            )
        return ask

    def _running(self, ask: Wanted) -> Operation | None:
        """The download that goes on under this very name."""
        name = ask.repo if ask.stem is None else f"{ask.repo}:{ask.stem}"
        return self._active(operation_id(name))

    def _active(self, download_id: str) -> Operation | None:
        operation = self._operations.get(download_id)
        return None if operation is None or operation.settled else operation

    def _join(self, operation: Operation, spec: LoadSpec | None) -> Operation:
        """One more who wants the model; raises ``model_conflict`` for another kind of load."""
        if spec is not None:
            if operation.spec is not None and operation.spec != spec:
                raise CodedError(
                    ErrorCode.MODEL_CONFLICT,
                    f"{operation.plan.model_id!r} is being downloaded, to be loaded with other "
                    "options",
                )
            operation.spec = spec
        return operation

    def _require_enabled(self) -> None:
        if not self._settings.downloads_enabled:
            raise CodedError(
                ErrorCode.DOWNLOADS_DISABLED,
                "the model is not on this machine, and downloads_enabled is false",
            )

    async def _plan(self, model_id: str, backend: str | None = None) -> Plan:
        async with self._plan_slots:
            return await ask_hub(model_id, self._cache, self._environment, backend)

    async def _require_disk(self, plan: Plan) -> int:
        """The free bytes; raises ``insufficient_disk``."""
        others = sum(
            each.to_write_bytes
            for each in self._operations.values()
            if each.id != operation_id(plan.model_id)
        )
        reserve = self._settings.download_disk_reserve_bytes
        return await require_disk(plan, self._cache, reserve=reserve, others=others)
