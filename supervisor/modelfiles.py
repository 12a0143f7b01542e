"""Finds a model on disk and reads what the gate has to know, without any backend."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from protocol.errors import CodedError, ErrorCode
from supervisor import gguf

SIMULATED_SUFFIX = ".sim.json"

#: Bytes at either end of a file that go into the digest: weights are too large
#: to hash whole at every load.
DIGEST_SAMPLE_BYTES = 1024 * 1024

#: A ``config.json`` is a few kB; what is larger is not one.
MAX_CONFIG_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model as found on disk. ``digest`` changes whenever its files do."""

    path: Path
    format: str
    architecture: str
    quantization: str
    size_bytes: int
    digest: str

    def traits(self, model_id: str) -> dict[str, str]:
        """What the runtime blocklist's signatures match against."""
        return {
            "id": model_id,
            "format": self.format,
            "architecture": self.architecture,
            "quantization": self.quantization,
        }


def default_id(path: Path) -> str:
    """The id of a local path: the file's name without its format's suffix, or the folder's."""
    return path.name.removesuffix(SIMULATED_SUFFIX).removesuffix(".gguf")


def canonical_id(model_id: str) -> str:
    """An id in the one way it is kept: a file's name in the models folder loses its suffix."""
    return model_id.removesuffix(SIMULATED_SUFFIX).removesuffix(".gguf")


def exists(path: Path) -> bool:
    """False also for a path that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def find(model_id: str, models_dir: Path) -> Path:
    """The path of an id in the models folder; an absolute path stands for itself.

    A hub model ``org/name`` is a folder, a GGUF of it ``org/name:file-stem``.
    Raises ``model_not_found``.
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
    raise CodedError(ErrorCode.MODEL_NOT_FOUND, f"no model {model_id!r} here", param="model_id")


def _is_plain(model_id: str) -> bool:
    """Whether an id has one spelling only and stays below the models folder."""
    parts = PurePosixPath(model_id).parts
    return bool(parts) and ".." not in parts and str(PurePosixPath(model_id)) == model_id


def format_of(path: Path) -> str:
    """What a model is by its look; its content may tell otherwise."""
    if path.is_dir():
        return "mlx"
    return "simulated" if path.name.endswith(SIMULATED_SUFFIX) else "gguf"


def inspect(path: Path) -> ModelFiles:
    """Read headers only. Raises ``model_not_found``, ``model_incomplete`` or
    ``model_unsupported_backend``."""
    try:
        if path.is_dir():
            return _inspect_folder(path)
        if path.name.endswith(SIMULATED_SUFFIX):
            return _found([path], path, "simulated", "simulated", "")
        if path.is_file():
            return _inspect_gguf(path)
    except (OSError, ValueError) as error:
        raise CodedError(ErrorCode.MODEL_INCOMPLETE, f"cannot read {path.name}: {error}") from error
    raise CodedError(ErrorCode.MODEL_NOT_FOUND, f"no model at {path}", param="path")


def _inspect_gguf(path: Path) -> ModelFiles:
    header = gguf.read_header(path)
    return _found([path], path, "gguf", header.architecture, header.quantization)


def _inspect_folder(path: Path) -> ModelFiles:
    config_path = path / "config.json"
    if not config_path.is_file():
        raise CodedError(ErrorCode.MODEL_INCOMPLETE, f"{path} has no config.json", param="path")
    try:
        with config_path.open("rb") as file:
            config = msgspec.json.decode(file.read(MAX_CONFIG_BYTES), type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CodedError(
            ErrorCode.MODEL_INCOMPLETE, f"{path.name}/config.json cannot be read: {error}"
        ) from error
    # Regular files only: opening a pipe would wait for ever.
    suffixes = {".safetensors", ".json", ".jinja"}
    files = sorted(p for p in path.iterdir() if p.suffix in suffixes and p.is_file())
    quantization = ""
    if config.quantization is not None:
        quantization = f"{config.quantization.get('bits', '?')}bit"
    return _found(files, path, "mlx", config.model_type, quantization)


class _Config(msgspec.Struct):
    model_type: str = ""
    quantization: dict[str, object] | None = None


def _found(
    files: list[Path], path: Path, model_format: str, architecture: str, quantization: str
) -> ModelFiles:
    digest = hashlib.sha256()
    total = 0
    for file in files:
        size = file.stat().st_size
        total += size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            digest.update(content.read(DIGEST_SAMPLE_BYTES))
            if size > DIGEST_SAMPLE_BYTES:
                content.seek(max(DIGEST_SAMPLE_BYTES, size - DIGEST_SAMPLE_BYTES))
                digest.update(content.read(DIGEST_SAMPLE_BYTES))
    return ModelFiles(
        path=path,
        format=model_format,
        architecture=architecture,
        quantization=quantization,
        size_bytes=total,
        digest=digest.hexdigest(),
    )
