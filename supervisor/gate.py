"""What a load has to pass before anything is started: files, backend, blocklist."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from protocol.errors import CodedError
from supervisor import admission, compatibility, modelfiles
from supervisor.accounts import AccountKey
from supervisor.admission import BlockRule
from supervisor.modelfiles import ModelFiles
from supervisor.registry import Registry
from supervisor.runtimes import installed_backends
from supervisor.settings import ModelSetting, Settings


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A load as an operator asks for it. ``path`` None: look the id up."""

    model_id: str
    path: str | None = None
    backend: str | None = None
    allow_unsupported_runtime: bool = False
    keep_alive_sec: int | None = None
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What to run, as the gate decided it."""

    model_id: str
    files: ModelFiles
    backend: str
    backend_version: str
    context_length: int | None
    keep_alive_sec: int | None
    memory_limit_bytes: int | None

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
        self._configured = dict(map(_resolve, settings.models))

    @property
    def configured(self) -> list[LoadSpec]:
        """The loads the settings ask for."""
        return [LoadSpec(model_id=model_id) for model_id in self._configured]

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
        return await asyncio.to_thread(modelfiles.find, wanted, self._settings.effective_models_dir)

    async def installed(self) -> dict[str, str | None]:
        """Versions of the backends that are here now, see ``runtimes``."""
        return await asyncio.to_thread(
            installed_backends, simulated=self._settings.enable_simulated
        )

    async def admit(self, spec: LoadSpec) -> ModelSpec:
        """Raises ``model_not_found``, ``model_incomplete`` or ``model_unsupported_backend``."""
        model_id = self.id_of(spec)
        configured = self._configured.get(model_id) or ModelSetting(path="")
        files = await asyncio.to_thread(modelfiles.inspect, await self.locate(spec))
        installed = await self.installed()
        requested = spec.backend or configured.backend
        failing = compatibility.failing(
            self._registry.records, model=model_id, digest=files.digest, installed=installed
        )
        backend = admission.choose_backend(files.format, requested, installed, failing)
        version = installed[backend]
        assert version is not None
        if not spec.allow_unsupported_runtime:
            self._check_blocklist(model_id, files, backend, version)
        keep_alive = spec.keep_alive_sec
        return ModelSpec(
            model_id=model_id,
            files=files,
            backend=backend,
            backend_version=version,
            context_length=(
                spec.context_length or configured.context_length or self._settings.context_length
            ),
            keep_alive_sec=configured.keep_alive_sec if keep_alive is None else keep_alive,
            memory_limit_bytes=(
                configured.memory_limit_bytes or self._settings.worker_memory_limit_bytes
            ),
        )

    def _check_blocklist(
        self, model_id: str, files: ModelFiles, backend: str, version: str
    ) -> None:
        rule = admission.find_block(self._blocklist, files.traits(model_id), backend, version)
        if rule is None:
            return
        refusal: CodedError = admission.refuse_blocked(rule, backend, version)
        self._registry.add(
            model=model_id,
            backend=backend,
            backend_version=version,
            outcome="fail",
            reason=refusal.message,
            metadata={"code": refusal.code, "blocklisted": True},
        )
        raise refusal


def _absolute(path: str) -> Path:
    """Relative paths are the server's, as on its command line."""
    return Path(path).absolute()


def _resolve(setting: ModelSetting) -> tuple[str, ModelSetting]:
    """The id of a configured model, and its setting with an absolute path if it is one."""
    path = _absolute(setting.path)
    if not modelfiles.exists(path):
        return setting.id or setting.path, setting
    model_id = setting.id or modelfiles.default_id(path)
    return model_id, msgspec.structs.replace(setting, path=str(path))
