"""What a load has to pass before anything is started: files, backend, blocklist."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from protocol.errors import UNCOUNTED_LOAD_FAILURES, CodedError, ErrorCode
from supervisor import admission, compatibility, modelfiles
from supervisor.accounts import AccountKey
from supervisor.admission import BlockRule
from supervisor.catalog import AvailableModel, Catalog, hub_cache_dir
from supervisor.memory_plan import MemoryPlan
from supervisor.modelfiles import ModelFiles
from supervisor.registry import Registry
from supervisor.runtimes import installed_backends
from supervisor.settings import ModelSetting, Settings

#: A backend that a load names may be anything; what is longer is none.
MAX_BACKEND_CHARS = 64

#: Of a load that asks for nothing in particular.
NO_OPTIONS: Mapping[str, Any] = {}


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A load as an operator asks for it. ``path`` None: look the id up."""

    model_id: str
    path: str | None = None
    backend: str | None = None
    allow_unsupported_runtime: bool = False
    keep_alive_sec: int | None = None
    context_length: int | None = None
    tool_format: str | None = None
    draft_model: str | None = None
    pinned: bool = False
    #: Whether idle models may be unloaded for it.
    may_evict: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What to run, as the gate decided it. ``draft_bytes`` is the size of the draft model.

    ``plan`` is set once there is room for it.
    """

    model_id: str
    files: ModelFiles
    backend: str
    backend_version: str
    context_length: int | None
    keep_alive_sec: int | None
    memory_limit_bytes: int | None
    tool_format: str | None = None
    draft_path: Path | None = None
    draft_bytes: int = 0
    pinned: bool = False
    plan: MemoryPlan | None = None
    resume: bool = True

    @property
    def account_key(self) -> AccountKey:
        return AccountKey(self.model_id, self.files.digest, self.backend, self.backend_version)


class Gate:
    """Turns a ``LoadSpec`` into a ``ModelSpec``, or refuses it. Reads disks off the loop."""

    def __init__(
        self, settings: Settings, registry: Registry, blocklist: Sequence[BlockRule]
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._blocklist = blocklist
        self._hub_cache = settings.hub_cache_dir or hub_cache_dir()
        self._configured = dict(map(_resolve, settings.models))
        self._catalog = Catalog(
            settings.effective_models_dir, self._hub_cache, self._configured, blocklist
        )

    def successor(self, settings: Settings) -> Gate:
        """One that goes by other settings."""
        return Gate(settings, self._registry, self._blocklist)

    @property
    def configured(self) -> list[LoadSpec]:
        """The loads the settings ask for: none of them is to cost another."""
        return [LoadSpec(model_id=model_id, may_evict=False) for model_id in self._configured]

    def id_of(self, spec: LoadSpec) -> str:
        """The id a load is about: that of its file, if it names one by an absolute path."""
        if PurePosixPath(spec.model_id).is_absolute():
            return modelfiles.default_id(Path(spec.model_id))
        if spec.model_id in self._configured:
            return spec.model_id
        return modelfiles.canonical_id(spec.model_id)

    async def locate(self, spec: LoadSpec) -> Path:
        """Where the model's files should be. Raises ``model_not_found``."""
        if spec.path is not None:
            return _absolute(spec.path)
        configured = self._configured.get(spec.model_id)
        wanted = configured.path if configured is not None else spec.model_id
        return await asyncio.to_thread(self._find, wanted)

    def _find(self, wanted: str) -> Path:
        return modelfiles.find(wanted, self._settings.effective_models_dir, self._hub_cache)

    async def available(self) -> list[AvailableModel]:
        """What is on this machine, loaded or not; see ``catalog``."""
        installed = await self.installed()
        return await asyncio.to_thread(self._catalog.available, installed)

    async def installed(self) -> dict[str, str | None]:
        """Versions of the backends that are here now, see ``runtimes``."""
        return await asyncio.to_thread(
            installed_backends, simulated=self._settings.enable_simulated
        )

    async def readers(self, spec: LoadSpec) -> Sequence[str]:
        """The backends that read the model's format, best first. Raises ``model_not_found``."""
        path = await self.locate(spec)
        return admission.BACKENDS_BY_FORMAT[await asyncio.to_thread(modelfiles.format_of, path)]

    async def admit(self, spec: LoadSpec) -> ModelSpec:
        """Raises ``model_not_found``, ``model_incomplete`` or ``model_unsupported_backend``."""
        model_id = self.id_of(spec)
        configured = self._configured.get(model_id) or ModelSetting(path="")
        path = await self.locate(spec)
        installed = await self.installed()
        requested = spec.backend or configured.backend
        files: ModelFiles | None = None
        try:
            files = await asyncio.to_thread(modelfiles.inspect, path)
            failing = compatibility.failing(
                self._registry.records, model=model_id, digest=files.digest, installed=installed
            )
            backend = admission.choose_backend(files.format, requested, installed, failing)
            version = installed[backend]
            assert version is not None
            if not spec.allow_unsupported_runtime:
                traits = files.signature(model_id)
                admission.check_blocklist(self._blocklist, traits, backend, version)
        except CodedError as refusal:
            if refusal.code in UNCOUNTED_LOAD_FAILURES:
                likely = await asyncio.to_thread(_likely_backend, path)
                self._record(refusal, model_id, files, requested or likely, installed)
            raise
        context = spec.context_length or configured.context_length or self._settings.context_length
        check_context_length(files, context)
        keep_alive = spec.keep_alive_sec
        draft_path = await self.find_draft(spec.draft_model or configured.draft_model)
        return ModelSpec(
            model_id=model_id,
            files=files,
            backend=backend,
            backend_version=version,
            context_length=context,
            keep_alive_sec=configured.keep_alive_sec if keep_alive is None else keep_alive,
            memory_limit_bytes=(
                configured.memory_limit_bytes or self._settings.worker_memory_limit_bytes
            ),
            tool_format=spec.tool_format or configured.tool_format,
            draft_path=draft_path,
            draft_bytes=await asyncio.to_thread(_size_of, draft_path),
            pinned=spec.pinned or configured.pinned,
            resume=self._settings.resume if configured.resume is None else configured.resume,
        )

    async def check_same(self, running: ModelSpec, spec: LoadSpec) -> None:
        """Raise ``model_conflict`` if a load asks for something else than what is running."""
        wanted = {"backend": (spec.backend, running.backend)}
        if spec.context_length is not None:
            wanted["context_length"] = (str(spec.context_length), str(running.context_length))
        if spec.path is not None or Path(spec.model_id).is_absolute():
            path = await self.locate(spec)
            wanted["path"] = (str(path), str(running.files.path))
        if spec.draft_model is not None:
            draft = await self.find_draft(spec.draft_model)
            wanted["draft_model"] = (str(draft), str(running.draft_path))
        for name, (asked, used) in wanted.items():
            if asked is not None and asked != used:
                raise CodedError(
                    ErrorCode.MODEL_CONFLICT,
                    f"model {running.model_id!r} is loaded with {name} {used}; "
                    "unload it first to load it with another",
                    param=name,
                )

    async def find_draft(self, wanted: str | None) -> Path | None:
        """Where a draft model is: at a path, or in the models folder."""
        if wanted is None:
            return None
        path = _absolute(wanted)
        if await asyncio.to_thread(modelfiles.exists, path):
            return path
        try:
            return await asyncio.to_thread(self._find, wanted)
        except CodedError as refusal:
            raise CodedError(
                ErrorCode.INVALID_VALUE, f"draft model: {refusal}", param="draft_model"
            ) from refusal

    def _record(
        self,
        refusal: CodedError,
        model_id: str,
        files: ModelFiles | None,
        backend: str,
        installed: Mapping[str, str | None],
    ) -> None:
        """Remember a refusal that is about the model: what is known of the file and the
        backend; an empty version is that of a backend that is not here."""
        metadata: dict[str, object] = {"code": refusal.code, "refused": True}
        if files is not None:
            metadata["digest"] = files.digest
            metadata["architecture"] = files.traits.architecture
            metadata["quantization"] = files.traits.quantization
        self._registry.add(
            model=model_id,
            backend=backend[:MAX_BACKEND_CHARS],
            backend_version=installed.get(backend) or "",
            outcome="fail",
            reason=refusal.message,
            metadata=metadata,
            # Whoever asks again and again learns nothing, and must not push out what was learnt.
            once=True,
        )


def _likely_backend(path: Path) -> str:
    return admission.BACKENDS_BY_FORMAT[modelfiles.format_of(path)][0]


def check_context_length(files: ModelFiles, context_length: int | None) -> None:
    """Raise ``invalid_value`` for more than the model was trained for: no room is made for it."""
    trained = files.traits.context_length
    if context_length is not None and trained is not None and context_length > trained > 0:
        raise CodedError(
            ErrorCode.INVALID_VALUE,
            f"context_length {context_length} is not between 1 and the {trained} tokens "
            "the model was trained for",
            param="context_length",
        )


def _size_of(draft: Path | None) -> int:
    """0 for what cannot be read: the worker says what is wrong with it."""
    try:
        return 0 if draft is None else modelfiles.inspect(draft).size_bytes
    except CodedError:
        return 0


def _absolute(path: str) -> Path:
    """Relative paths are the server's, as on its command line."""
    return Path(path).absolute()


def _resolve(setting: ModelSetting) -> tuple[str, ModelSetting]:
    """The id of a configured model, and its setting with an absolute path if it is one."""
    model_id, path = modelfiles.configured_id(setting), _absolute(setting.path)
    if modelfiles.exists(path):
        setting = msgspec.structs.replace(setting, path=str(path))
    return model_id, setting
