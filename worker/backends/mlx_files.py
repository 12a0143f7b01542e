"""Checks of an mlx-lm model directory that need no library.

They come before the library sees the files, because its own complaints do not
tell an incomplete download from an unsupported model, and some are crashes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol.errors import ErrorCode
from weights.folder import Folder
from worker.backends.base import LoadRefused

#: What mlx-lm loads.
_WEIGHTS = "model*.safetensors"
_FOREIGN_WEIGHTS = ("*.gguf", "*.bin", "*.pt", "*.pth", "*.npz", "*.onnx")


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
    folder = Folder(path)
    config = folder.read_json("config.json")
    if not folder.problems and not isinstance(config.get("model_type"), str):
        folder.problems.append("config.json names no model_type")
    _check_weights(folder)
    _check_tokenizer(folder)
    if folder.problems:
        reason = f"{path.name} is incomplete: {'; '.join(folder.problems)}"
        raise LoadRefused(ErrorCode.MODEL_INCOMPLETE, reason)
    return config


def _check_weights(folder: Folder) -> None:
    if any(folder.path.glob(_WEIGHTS)):
        folder.read_weights()
        return
    foreign = [file.name for pattern in _FOREIGN_WEIGHTS for file in folder.path.glob(pattern)]
    if foreign:
        raise LoadRefused(
            ErrorCode.MODEL_UNSUPPORTED_BACKEND,
            f"{folder.path.name} has no safetensors weights, only {', '.join(sorted(foreign))}",
        )
    folder.problems.append(f"no weights are there ({_WEIGHTS})")


def _check_tokenizer(folder: Folder) -> None:
    folder.check_tokenizer()
    # One that is cut short, the library would say to be unsupported.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder.path / name).exists():
            folder.read_json(name)


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
