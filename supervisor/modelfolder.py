"""A model in a folder as the Hugging Face hub has them: what it says of itself, and what is
missing. Reads headers and small JSON files only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from protocol.messages import ModelKind
from supervisor import geometry
from supervisor.traits import Traits, incomplete
from weights.folder import Folder

#: What loading a model reads, beside its weights.
SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"})
#: Where huggingface_hub leaves what it has begun to download into a folder.
_DOWNLOADS = ".cache/huggingface/download"
_UNFINISHED = "*.incomplete"

#: No model is stretched further.
_MAX_FACTOR = 1000
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def read_model(path: Path) -> tuple[Traits, list[Path]]:
    """The model's traits and its files.

    Raises ``model_incomplete`` with all that is missing or short, and ``OSError``.
    """
    folder = Folder(path)
    config = folder.read_json("config.json")
    if config and not isinstance(config.get("model_type", ""), str):
        folder.problems.append("config.json cannot be read: its model_type is no text")
    quantization = config.get("quantization")
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    bits = bits if isinstance(bits, int) and 0 < bits <= 32 else None
    weights = folder.read_weights()
    parameters = sum(header.parameters(bits) for header in weights)
    folder.check_tokenizer()
    if folder.problems:
        # By themselves they may be left of files that nobody needs.
        unfinished = sorted({*path.glob(_UNFINISHED), *(path / _DOWNLOADS).glob(_UNFINISHED)})
        folder.problems += [
            f"{each.name} has not been downloaded to its end" for each in unfinished
        ]
        raise incomplete(path.name, folder.problems)
    # Regular files only: opening a pipe would wait for ever.
    files = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES and each.is_file())
    traits = replace(
        _traits(folder, config, bits, parameters),
        geometry=geometry.of_config(config),
        float_bytes=max(header.float_bytes for header in weights),
    )
    return traits, files


def _traits(folder: Folder, config: dict[str, Any], bits: int | None, parameters: int) -> Traits:
    return Traits(
        architecture=config.get("model_type", ""),
        quantization="" if bits is None else f"{bits}bit",
        parameters=parameters,
        context_length=_context_length(config),
        kind=_kind(config.get("architectures")),
        has_chat_template=_has_chat_template(folder),
    )


def _context_length(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    merged = {**config, **(text if isinstance(text, dict) else {})}
    lengths = (value for key in _CONTEXT_KEYS if isinstance(value := merged.get(key), int))
    if (length := next(lengths, None)) is None:
        return None
    scaling = merged.get("rope_scaling") or merged.get("rope_parameters")
    if not isinstance(scaling, dict):
        return length
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    # Configs differ in whether the first number includes the factor.
    if isinstance(original, int) and isinstance(factor, int | float) and 1 <= factor <= _MAX_FACTOR:
        return max(length, int(original * factor))
    return length


def _kind(architectures: object) -> ModelKind:
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(name, str) or not name.endswith(("Model", "SequenceClassification")):
        return ModelKind.GENERATE
    return ModelKind.EMBED if name.endswith("Model") else ModelKind.RERANK


def _has_chat_template(folder: Folder) -> bool:
    if folder.has("chat_template.jinja") or folder.has("chat_template.json"):
        return True
    return folder.has("tokenizer_config.json") and bool(
        Folder(folder.path).read_json("tokenizer_config.json").get("chat_template")
    )
