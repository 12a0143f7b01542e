"""Which models are on this machine, and what could be done with each: files only, no backend."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from protocol.errors import CodedError
from protocol.messages import ModelKind
from supervisor import admission, gguf_model, modelfiles
from supervisor.admission import BlockRule
from supervisor.modelfiles import ModelFiles
from supervisor.settings import ModelSetting

#: Of the folders below the models folder: an organisation's, a model's.
_DEPTH = 3
#: Files and folders that are looked at in one place; what has more is no models folder.
MAX_ENTRIES = 20_000
#: A draft has at most this share of the parameters of the model that it guesses for.
_DRAFT_SHARE = 1 / 4


class Place(NamedTuple):
    """Where a model may be. ``source``: ``configured``, ``models_dir`` or ``hub_cache``."""

    model_id: str
    path: Path
    source: str


class BackendOption(msgspec.Struct, frozen=True):
    """``usable`` as far as files, installation and blocklist tell; ``reason`` why not."""

    backend: str
    version: str | None
    usable: bool
    reason: str | None = None


class AvailableModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model on disk. ``complete`` false: ``problem`` says what is wrong, and nothing else
    is known of it. ``drafts``: models here that can guess tokens for it."""

    id: str
    path: str
    source: str
    format: str
    complete: bool
    problem: str | None = None
    architecture: str | None = None
    quantization: str | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    files: int | None = None
    context_length: int | None = None
    kind: ModelKind | None = None
    has_chat_template: bool | None = None
    backends: Sequence[BackendOption] = ()
    drafts: Sequence[str] = ()


class Catalog:
    """Looks for models in these places, the first of an id being the one that is loaded."""

    def __init__(
        self,
        models_dir: Path,
        hub_cache: Path,
        configured: Mapping[str, ModelSetting],
        blocklist: Sequence[BlockRule],
    ) -> None:
        self._models_dir = models_dir
        self._hub_cache = hub_cache
        self._configured = configured
        self._blocklist = blocklist

    def available(self, installed: Mapping[str, str | None]) -> list[AvailableModel]:
        """In the order of ids. Reads every header: milliseconds for each model."""
        places: dict[str, Place] = {}
        paths: set[Path] = set()
        for place in self._places(simulated=installed.get("simulated") is not None):
            # Under another name it would be the same weights again.
            if place.model_id not in places and place.path not in paths:
                places[place.model_id] = place
                paths.add(place.path)
        found: dict[str, tuple[AvailableModel, ModelFiles | None]] = {}
        for model_id in sorted(places):
            found[model_id] = self._describe(places[model_id], installed)
        complete = {name: files for name, (_, files) in found.items() if files is not None}
        return [
            model
            if (files := complete.get(name)) is None
            else msgspec.structs.replace(model, drafts=_drafts(name, files, complete))
            for name, (model, _) in found.items()
        ]

    def _describe(
        self, place: Place, installed: Mapping[str, str | None]
    ) -> tuple[AvailableModel, ModelFiles | None]:
        try:
            files = modelfiles.inspect(place.path)
        except CodedError as error:
            return (
                AvailableModel(
                    id=place.model_id,
                    path=str(place.path),
                    source=place.source,
                    format=modelfiles.format_of(place.path),
                    complete=False,
                    problem=error.message,
                ),
                None,
            )
        traits = files.traits
        return (
            AvailableModel(
                id=place.model_id,
                path=str(place.path),
                source=place.source,
                format=files.format,
                complete=True,
                architecture=traits.architecture,
                quantization=traits.quantization or None,
                parameters=traits.parameters,
                size_bytes=files.size_bytes,
                files=files.count,
                context_length=traits.context_length,
                kind=traits.kind,
                has_chat_template=traits.has_chat_template,
                backends=[
                    self._option(place.model_id, files, backend, installed.get(backend))
                    for backend in admission.BACKENDS_BY_FORMAT.get(files.format, ())
                ],
            ),
            files,
        )

    def _option(
        self, model_id: str, files: ModelFiles, backend: str, version: str | None
    ) -> BackendOption:
        if version is None:
            return BackendOption(backend, None, usable=False, reason="it is not installed")
        rule = admission.find_block(self._blocklist, files.signature(model_id), backend, version)
        if rule is not None:
            return BackendOption(backend, version, usable=False, reason=rule.reason)
        if files.format == "mlx" and files.traits.kind is not ModelKind.GENERATE:
            reason = "it makes no embeddings and ranks"
            return BackendOption(backend, version, usable=False, reason=reason)
        return BackendOption(backend, version, usable=True)

    def _places(self, *, simulated: bool) -> Iterator[Place]:
        for model_id, setting in self._configured.items():
            if Path(setting.path).is_absolute():
                yield Place(model_id, Path(setting.path), "configured")
        yield from _in_folder(self._models_dir, simulated=simulated)
        for repo, snapshot in modelfiles.cached_repos(self._hub_cache):
            yield from _in_repo(snapshot, repo, "hub_cache")
            for folder in modelfiles.gguf_folders(snapshot)[1:]:
                yield from _ggufs(folder, repo, "hub_cache")


def hub_cache_dir() -> Path:
    """The cache of Hugging Face's libraries, which their variables move."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(home, "hub").expanduser()


def _in_folder(root: Path, *, simulated: bool) -> Iterator[Place]:
    """What is in the models folder itself, and in the folders below it."""
    for path in _entries(root):
        if modelfiles.is_folder(path):
            yield from _below(path, path.name, _DEPTH - 1)
        elif _stands_for_a_model(path):
            yield Place(gguf_model.stem_of(path.name), path, "models_dir")
        elif simulated and path.name.endswith(modelfiles.SIMULATED_SUFFIX):
            yield Place(modelfiles.canonical_id(path.name), path, "models_dir")


def _below(folder: Path, name: str, depth: int) -> Iterator[Place]:
    models = list(_in_repo(folder, name, "models_dir"))
    yield from models
    if not models and depth:
        for path in _entries(folder):
            if modelfiles.is_folder(path):
                yield from _below(path, f"{name}/{path.name}", depth - 1)


def _in_repo(folder: Path, repo: str, source: str) -> Iterator[Place]:
    """The models of one repository of the hub: one of its own format, and GGUF files."""
    files = [path for path in _entries(folder) if _stands_for_a_model(path)]
    safetensors = any(_entries(folder, "*.safetensors*"))
    # Repositories of GGUF files often come with the original's config.
    if safetensors or (not files and modelfiles.exists(folder / "config.json")):
        yield Place(repo, folder, source)
    yield from _ggufs(folder, repo, source)


def _ggufs(folder: Path, repo: str, source: str) -> Iterator[Place]:
    for path in filter(_stands_for_a_model, _entries(folder)):
        yield Place(f"{repo}:{gguf_model.stem_of(path.name)}", path, source)


def _stands_for_a_model(path: Path) -> bool:
    return path.suffix == ".gguf" and not gguf_model.is_later_part(path.name)


def _entries(folder: Path, pattern: str = "*") -> list[Path]:
    """What is in a folder, hidden ones left out; nothing where it cannot be read."""
    try:
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    except OSError:
        return []
    return found[:MAX_ENTRIES]


def _drafts(name: str, files: ModelFiles, all_files: Mapping[str, ModelFiles]) -> list[str]:
    """Models of the same vocabulary that are much smaller, the smallest first."""
    if files.format != "mlx" or files.traits.kind is not ModelKind.GENERATE:
        return []
    most = files.traits.parameters * _DRAFT_SHARE
    candidates = [
        (other.traits.parameters, other_name)
        for other_name, other in all_files.items()
        if other_name != name
        and other.format == "mlx"
        and other.traits.parameters <= most
        and other.vocabulary == files.vocabulary
    ]
    return [other_name for _, other_name in sorted(candidates)]
