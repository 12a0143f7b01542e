"""A model in one GGUF file, or in several parts: what it says of itself, and what is missing."""

from __future__ import annotations

import re
from pathlib import Path

from protocol.errors import CodedError, ErrorCode
from protocol.messages import ModelKind
from supervisor import geometry
from supervisor.gguf import GgufHeader, read_header
from supervisor.traits import Traits, incomplete

#: How llama.cpp names the parts of a split file; parts are counted from 1.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
#: More parts than that are no model.
_MAX_PARTS = 1000

#: Architectures that write no text, whether they name a pooling or not.
_ENCODERS = frozenset(
    {
        *("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"),
        *("jina-bert-v2", "jina-bert-v3", "gemma-embedding", "t5encoder", "llama-embed"),
    }
)
_RANK_POOLING = 4


def stem_of(name: str) -> str:
    """A file's name without its suffix, and without the number of its part."""
    part = _PART.fullmatch(name)
    return part["stem"] if part else name.removesuffix(".gguf")


def is_later_part(name: str) -> bool:
    """Whether a file belongs to a model that another file stands for."""
    part = _PART.fullmatch(name)
    return part is not None and int(part["number"]) != 1


def find_first_part(folder: Path, stem: str) -> Path | None:
    """The file that stands for a split model in a folder."""
    try:
        found = sorted(path for path in folder.glob("*-00001-of-*.gguf") if path.is_file())
    except (OSError, ValueError):
        return None
    return next((path for path in found if stem_of(path.name) == stem), None)


def parts_of(path: Path) -> list[Path]:
    """All files of the model that this one is, or is a part of, whether they are there or not."""
    return [path.with_name(name) for name in names_of_parts(path.name)]


def names_of_parts(name: str) -> list[str]:
    """As ``parts_of``, by name alone."""
    part = _PART.fullmatch(name)
    if part is None or not 1 <= int(part["count"]) <= _MAX_PARTS:
        return [name]
    count = part["count"]
    return [f"{part['stem']}-{number:05}-of-{count}.gguf" for number in range(1, int(count) + 1)]


def read_model(path: Path) -> tuple[Traits, list[Path]]:
    """The model's traits and its files.

    Raises ``model_incomplete`` with all that is missing or short, else as
    ``gguf.read_header`` does.
    """
    parts = parts_of(path)
    if len(parts) == 1:
        return _traits(path, [read_header(path)]), parts
    headers, problems = [], []
    for part in parts:
        if not part.is_file():
            problems.append(f"{part.name} is missing")
            continue
        try:
            headers.append(read_header(part))
        except CodedError as error:
            if error.code is not ErrorCode.MODEL_INCOMPLETE:
                raise
            problems.append(error.message)
    if problems:
        raise incomplete(stem_of(path.name), problems)
    return _traits(path, headers), parts


def _traits(path: Path, headers: list[GgufHeader]) -> Traits:
    # All metadata is in the first part, which may have no tensors.
    header = headers[0]
    if not any(each.parameters for each in headers):
        raise incomplete(path.name, ["it has no tensors"])
    return Traits(
        architecture=header.architecture,
        quantization=header.quantization,
        parameters=sum(each.parameters for each in headers),
        context_length=header.number("context_length"),
        kind=_kind(header),
        has_chat_template="tokenizer.chat_template" in header.values,
        geometry=geometry.of_gguf(header),
    )


def _kind(header: GgufHeader) -> ModelKind:
    pooling = header.number("pooling_type")
    if pooling == _RANK_POOLING:
        return ModelKind.RERANK
    if pooling or header.architecture in _ENCODERS:
        return ModelKind.EMBED
    return ModelKind.GENERATE
