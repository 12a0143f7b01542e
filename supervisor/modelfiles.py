"""Finds a model on disk and reads what the gate has to know, without any backend."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from protocol.errors import CodedError, ErrorCode
from protocol.messages import ModelKind
from supervisor import gguf_model, modelfolder
from supervisor.settings import ModelSetting
from supervisor.traits import Traits
from weights.folder import TOKENIZERS

SIMULATED_SUFFIX = ".sim.json"

#: Bytes at either end of a file that go into the digest: weights are too large
#: to hash whole at every load.
DIGEST_SAMPLE_BYTES = 1024 * 1024

#: How the hub's cache names the folder of a model.
_CACHED = "models--"
_REVISION = re.compile(r"[0-9a-zA-Z._-]{1,128}")

SIMULATED_TRAITS = Traits("simulated", "", 0, None, ModelKind.GENERATE, has_chat_template=True)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model as found on disk. ``digest`` changes whenever its files do.

    ``vocabulary`` is a digest of its tokenizer's file where that is one of its own.
    """

    path: Path
    format: str
    traits: Traits
    size_bytes: int
    digest: str
    count: int = 1
    vocabulary: str = ""

    def signature(self, model_id: str) -> dict[str, str]:
        """What the runtime blocklist's rules match against."""
        return {
            "id": model_id,
            "format": self.format,
            "architecture": self.traits.architecture,
            "quantization": self.traits.quantization,
        }


def default_id(path: Path) -> str:
    """The id of a local path: the file's name without its format's suffix, or the folder's."""
    return gguf_model.stem_of(path.name.removesuffix(SIMULATED_SUFFIX))


def configured_id(setting: ModelSetting) -> str:
    """The id of a model of the settings: its own, that of its path, or what it is looked up by."""
    path = Path(setting.path).absolute()
    return setting.id or (default_id(path) if exists(path) else setting.path)


def canonical_id(model_id: str) -> str:
    """An id in the one way it is kept: a file's name in the models folder loses its suffix."""
    return model_id.removesuffix(SIMULATED_SUFFIX).removesuffix(".gguf")


def exists(path: Path) -> bool:
    """False also for a path that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """False also for a path that cannot be looked at."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def find(model_id: str, models_dir: Path, hub_cache: Path | None = None) -> Path:
    """The path of an id in the models folder, or else in the hub's cache; an absolute path
    stands for itself.

    A hub model ``org/name`` is a folder, a GGUF of it ``org/name:file-stem``; the first part
    stands for one that is split. Raises ``model_not_found``.
    """
    if PurePosixPath(model_id).is_absolute():
        candidates = [Path(model_id)]
    elif not _is_plain(model_id):
        candidates = []
    else:
        repo, _, stem = canonical_id(model_id).partition(":")
        base = models_dir / repo / stem if stem else models_dir / repo
        candidates = [
            base,
            base.with_name(base.name + ".gguf"),
            base.with_name(base.name + SIMULATED_SUFFIX),
        ]
    for candidate in candidates:
        if exists(candidate):
            return candidate
        if (part := gguf_model.find_first_part(candidate.parent, candidate.name)) is not None:
            return part
    if candidates and hub_cache is not None:
        cached = _find_cached(model_id, hub_cache)
        if cached is not None:
            return cached
    raise CodedError(ErrorCode.MODEL_NOT_FOUND, f"no model {model_id!r} here", param="model_id")


def cached_repos(hub_cache: Path) -> Iterator[tuple[str, Path]]:
    """The hub's models in its cache: id, and the folder of the revision that ``main`` was.

    Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    try:
        folders = sorted(hub_cache.glob(f"{_CACHED}*"))
    except OSError:
        return
    for folder in folders:
        repo = folder.name.removeprefix(_CACHED).replace("--", "/")
        if (snapshot := _snapshot(folder)) is not None:
            yield repo, snapshot


def cached_name(repo: str) -> str:
    """The name of a repository's folder in the hub's cache."""
    return f"{_CACHED}{repo.replace('/', '--')}"


def _find_cached(model_id: str, hub_cache: Path) -> Path | None:
    repo, _, stem = canonical_id(model_id).partition(":")
    snapshot = cached_snapshot(hub_cache, repo)
    if snapshot is None or not stem:
        return snapshot
    for folder in gguf_folders(snapshot):
        whole = folder / f"{stem}.gguf"
        found = whole if exists(whole) else gguf_model.find_first_part(folder, stem)
        if found is not None:
            return found
    return None


def cached_snapshot(hub_cache: Path, repo: str) -> Path | None:
    """The folder of the revision that ``main`` of a repository was, if it is in the cache."""
    if PurePosixPath(repo).is_absolute() or "--" in repo:
        return None
    return _snapshot(hub_cache / cached_name(repo))


def gguf_folders(snapshot: Path) -> list[Path]:
    """Where a repository has its GGUF files: in itself, or in a folder for each quantisation."""
    try:
        below = sorted(path for path in snapshot.iterdir() if path.is_dir())
    except OSError:
        below = []
    return [snapshot, *below]


def _snapshot(folder: Path) -> Path | None:
    try:
        revision = (folder / "refs" / "main").read_text().strip()
        snapshot = folder / "snapshots" / revision
        return snapshot if _REVISION.fullmatch(revision) and snapshot.is_dir() else None
    except (OSError, ValueError):
        return None


def _is_plain(model_id: str) -> bool:
    """Whether an id has one spelling only and stays below the models folder."""
    repo, colon, stem = model_id.partition(":")
    if colon and (not stem or "/" in stem or ":" in stem or stem in {".", ".."}):
        return False
    parts = PurePosixPath(repo).parts
    return bool(parts) and ".." not in parts and str(PurePosixPath(repo)) == repo


def format_of(path: Path) -> str:
    """What a model is by its look; its content may tell otherwise."""
    if is_folder(path):
        return "mlx"
    return "simulated" if path.name.endswith(SIMULATED_SUFFIX) else "gguf"


def inspect(path: Path) -> ModelFiles:
    """Read headers only. Raises ``model_not_found``, ``model_incomplete`` with all that is
    missing or short, or ``model_unsupported_backend``."""
    try:
        if path.is_dir():
            traits, files = modelfolder.read_model(path)
            return _found(files, path, "mlx", traits)
        if path.name.endswith(SIMULATED_SUFFIX) and path.is_file():
            return _found([path], path, "simulated", SIMULATED_TRAITS)
        if path.is_file():
            traits, files = gguf_model.read_model(path)
            return _found(files, files[0], "gguf", traits)
    except (OSError, ValueError) as error:
        raise CodedError(ErrorCode.MODEL_INCOMPLETE, f"cannot read {path.name}: {error}") from error
    raise CodedError(ErrorCode.MODEL_NOT_FOUND, f"no model at {path}", param="path")


def _found(files: list[Path], path: Path, model_format: str, traits: Traits) -> ModelFiles:
    digest = hashlib.sha256()
    total = 0
    vocabulary = ""
    for file in files:
        size = file.stat().st_size
        total += size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            sample = content.read(DIGEST_SAMPLE_BYTES)
            digest.update(sample)
            if file.name in TOKENIZERS and not vocabulary:
                vocabulary = f"{size}:{hashlib.sha256(sample).hexdigest()}"
            if size > DIGEST_SAMPLE_BYTES:
                content.seek(max(DIGEST_SAMPLE_BYTES, size - DIGEST_SAMPLE_BYTES))
                digest.update(content.read(DIGEST_SAMPLE_BYTES))
    return ModelFiles(
        path=path,
        format=model_format,
        traits=traits,
        size_bytes=total,
        digest=digest.hexdigest(),
        count=len(files),
        vocabulary=vocabulary,
    )
