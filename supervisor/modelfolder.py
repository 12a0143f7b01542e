"""A model in a folder as the Hugging Face hub has them: what it says of itself, and what is
missing. Reads headers and small JSON files only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from protocol.messages import ModelKind
from supervisor.safetensors import Damaged, read_header
from supervisor.traits import Traits, incomplete

#: Such files are a few kB, an index some MB; what is larger is none.
MAX_JSON_BYTES = 64 * 1024 * 1024

INDEX = "model.safetensors.index.json"
#: Any of these makes a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")
#: What loading a model reads, beside its weights.
SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"})
_MAX_SHARDS = 1000
#: Where huggingface_hub leaves what it has begun to download into a folder.
_DOWNLOADS = ".cache/huggingface/download"
_UNFINISHED = "*.incomplete"

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass
class _Folder:
    path: Path
    problems: list[str] = field(default_factory=list)

    def read_json(self, name: str) -> dict[str, Any]:
        """An empty object, and a problem, where there is no such file or it is none."""
        try:
            if not self.has(name):  # opening a pipe would wait for ever
                raise FileNotFoundError(name)
            with (self.path / name).open("rb") as file:
                content = file.read(MAX_JSON_BYTES)
            return msgspec.json.decode(content, type=dict[str, Any])
        except FileNotFoundError:
            self.problems.append(f"{name} is missing")
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self.problems.append(f"{name} cannot be read: {error}")
        return {}

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()


def read_model(path: Path) -> tuple[Traits, list[Path]]:
    """The model's traits and its files.

    Raises ``model_incomplete`` with all that is missing or short, and ``OSError``.
    """
    folder = _Folder(path)
    config = folder.read_json("config.json")
    if config and not isinstance(config.get("model_type", ""), str):
        folder.problems.append("config.json cannot be read: its model_type is no text")
    quantization = config.get("quantization")
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    bits = bits if isinstance(bits, int) and 0 < bits <= 32 else None
    parameters = _check_weights(folder, bits)
    if not any(folder.has(name) for name in TOKENIZERS) and not any(path.glob("*.tiktoken")):
        folder.problems.append(f"no tokenizer is there (one of {', '.join(TOKENIZERS)})")
    if folder.problems:
        # By themselves they may be left of files that nobody needs.
        unfinished = sorted({*path.glob(_UNFINISHED), *(path / _DOWNLOADS).glob(_UNFINISHED)})
        folder.problems += [
            f"{each.name} has not been downloaded to its end" for each in unfinished
        ]
        raise incomplete(path.name, folder.problems)
    # Regular files only: opening a pipe would wait for ever.
    files = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES and each.is_file())
    return _traits(folder, config, bits, parameters), files


def _check_weights(folder: _Folder, bits: int | None) -> int:
    """The parameters of all shards. What is in which is not compared with the index: that
    may be older, as it is where none of what it names is there, but other weights are."""
    present = sorted(each.name for each in folder.path.glob("*.safetensors"))
    known = len(folder.problems)
    names = _shards(folder) if folder.has(INDEX) else present
    if names and present and not any(map(folder.has, names)):
        names = present
    if not names and len(folder.problems) == known:
        folder.problems.append("no weights are there (*.safetensors)")
    parameters = 0
    for name in names:
        if not folder.has(name):
            folder.problems.append(f"{name} is missing")
            continue
        try:
            parameters += read_header(folder.path / name).parameters(bits)
        except (Damaged, OSError) as error:
            folder.problems.append(f"{name}: {error}")
    return parameters


def _shards(folder: _Folder) -> list[str]:
    """The files that the index says are there."""
    known = len(folder.problems)
    weight_map = folder.read_json(INDEX).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        if len(folder.problems) == known:
            folder.problems.append(f"{INDEX} has no weight_map")
        return []
    for name in weight_map.values():
        if not isinstance(name, str) or not name or PurePosixPath(name).name != name:
            folder.problems.append(f"{INDEX} names a file {name!r}"[:200])
            return []
    names = list(dict.fromkeys(weight_map.values()))
    if len(names) > _MAX_SHARDS:
        folder.problems.append(f"{INDEX} names {len(names)} files")
        return []
    return names


def _traits(folder: _Folder, config: dict[str, Any], bits: int | None, parameters: int) -> Traits:
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
    return next((value for key in _CONTEXT_KEYS if isinstance(value := merged.get(key), int)), None)


def _kind(architectures: object) -> ModelKind:
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(name, str) or not name.endswith(("Model", "SequenceClassification")):
        return ModelKind.GENERATE
    return ModelKind.EMBED if name.endswith("Model") else ModelKind.RERANK


def _has_chat_template(folder: _Folder) -> bool:
    if folder.has("chat_template.jinja") or folder.has("chat_template.json"):
        return True
    return folder.has("tokenizer_config.json") and bool(
        _Folder(folder.path).read_json("tokenizer_config.json").get("chat_template")
    )
