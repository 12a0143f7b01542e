"""Checks of an mlx-lm model directory that need no library.

They come before the library sees the files, because its own complaints do not
tell an incomplete download from an unsupported model, and some are crashes.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from protocol.errors import ErrorCode
from worker.backends.base import LoadRefused

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)
_FOREIGN_WEIGHTS = ("*.gguf", "*.bin", "*.pt", "*.pth", "*.npz", "*.onnx")
_HEADER_LENGTH = struct.Struct("<Q")
#: As in the safetensors library: a longer header is no header.
_MAX_HEADER_BYTES = 100_000_000


def check_model_directory(path: Path) -> dict[str, Any]:
    """Return the parsed ``config.json`` of a complete model directory.

    Raises ``LoadRefused``: ``model_not_found``, ``model_unsupported_backend``
    (not this backend's format), or ``model_incomplete`` naming what is missing.
    """
    if not path.exists():
        raise LoadRefused(ErrorCode.MODEL_NOT_FOUND, f"{path} does not exist")
    if not path.is_dir():
        raise LoadRefused(
            ErrorCode.MODEL_UNSUPPORTED_BACKEND,
            f"{path} is a file; the mlx backend loads model directories",
        )
    config = _read_config(path)
    _check_shards(path)
    _check_tokenizer(path)
    return config


def vocab_size(config: dict[str, Any]) -> int | None:
    """Rows of the embedding according to the config; None if it does not say."""
    size = config.get("vocab_size", _text_config(config).get("vocab_size"))
    return size if isinstance(size, int) else None


def trained_context_length(config: dict[str, Any]) -> int | None:
    """Tokens the model was trained for, rope scaling included; None if unknown."""
    text = {**config, **_text_config(config)}
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    lengths: list[int] = [text[name] for name in names if isinstance(text.get(name), int)]
    if not lengths:
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    if isinstance(scaling, dict):
        # Configs differ in whether the first number includes the factor.
        original = scaling.get("original_max_position_embeddings")
        factor = scaling.get("factor")
        if isinstance(original, int) and isinstance(factor, int | float):
            return max(lengths[0], int(original * factor))
    return lengths[0]


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json_object(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise _incomplete(f"{path.name}/config.json names no model_type")
    return config


def _check_shards(path: Path) -> None:
    shards = {shard.name for shard in path.glob("model*.safetensors")}
    index = path / _INDEX
    if index.exists():
        weight_map = _read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise _incomplete(f"{path.name}/{_INDEX} has no weight_map")
        missing = sorted({str(shard) for shard in weight_map.values()} - shards)
        if missing:
            raise _incomplete(f"{path.name} lacks the weights {', '.join(missing)}")
    if not shards:
        foreign = [file.name for pattern in _FOREIGN_WEIGHTS for file in path.glob(pattern)]
        if foreign:
            raise LoadRefused(
                ErrorCode.MODEL_UNSUPPORTED_BACKEND,
                f"{path.name} has no safetensors weights, only {', '.join(sorted(foreign))}",
            )
        raise _incomplete(f"{path.name} has no weights (model*.safetensors)")
    for shard in sorted(shards):
        check_safetensors(path / shard)


def check_safetensors(path: Path) -> None:
    """Raise ``LoadRefused`` unless the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_HEADER_LENGTH.size)
        if len(start) < _HEADER_LENGTH.size:
            raise _incomplete(f"{path.name} is truncated: {size} bytes")
        (length,) = _HEADER_LENGTH.unpack(start)
        if length > _MAX_HEADER_BYTES:
            raise _incomplete(f"{path.name} is not a safetensors file")
        raw = file.read(length)
    if len(raw) < length:
        raise _incomplete(f"{path.name} is truncated inside its header: {size} bytes")
    try:
        end = _data_end(json.loads(raw))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _incomplete(f"{path.name} has a damaged header: {error}") from error
    expected = _HEADER_LENGTH.size + length + end
    if size < expected:
        raise _incomplete(f"{path.name} is truncated: {size} of {expected} bytes")


def _data_end(header: dict[str, Any]) -> int:
    tensors = (entry for name, entry in header.items() if name != "__metadata__")
    return max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)


def _check_tokenizer(path: Path) -> None:
    if not any(True for pattern in _TOKENIZER_FILES for _ in path.glob(pattern)):
        raise _incomplete(f"{path.name} has no tokenizer (tokenizer.json or tokenizer.model)")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (path / name).exists():
            _read_json_object(path / name)


def _read_json_object(path: Path) -> dict[str, Any]:
    name = f"{path.parent.name}/{path.name}"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _incomplete(f"{name} is missing") from error
    except ValueError as error:
        raise _incomplete(f"{name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise _incomplete(f"{name} is not a JSON object")
    return content


def _incomplete(message: str) -> LoadRefused:
    return LoadRefused(ErrorCode.MODEL_INCOMPLETE, message)
