"""Reads the header of a safetensors file: bounded, without a library that maps the weights.

Format: https://github.com/huggingface/safetensors (8 bytes of length, little-endian, then so
much JSON, then the tensors; a header has at most 100 MB).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 16

_LENGTH = struct.Struct("<Q")
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """``elements`` of each tensor, by name. ``float_bytes``: of the numbers that are floats."""

    elements: Mapping[str, int]
    float_bytes: int = 2

    def parameters(self, bits: int | None) -> int:
        """How many there are. ``bits``: of those that MLX has packed into words of 32."""
        total = 0
        for name, count in self.elements.items():
            stem, _, last = name.rpartition(".")
            packed = bits is not None and f"{stem}.scales" in self.elements
            if packed and last == "weight":
                total += count * 32 // (bits or 32)
            elif not (packed and last in {"scales", "biases"}):
                total += count
        return total


class Damaged(Exception):
    """The file is not whole, or not what it should be; the message says in what way."""


class _Tensor(msgspec.Struct):
    dtype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[int, int]


_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_tensor = msgspec.json.Decoder(_Tensor).decode


def read_header(path: Path) -> SafetensorsHeader:
    """Check structure and size. Raises ``Damaged``, and ``OSError``."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_LENGTH.size)
        if len(start) < _LENGTH.size:
            raise Damaged("it is empty" if not start else "it ends in its header")
        (length,) = _LENGTH.unpack(start)
        if length > MAX_HEADER_BYTES:
            raise Damaged(f"it claims a header of {length} bytes: no safetensors file")
        if _LENGTH.size + length > size:
            raise Damaged("it ends in its header")
        content = _read(file.fileno(), length)
    try:
        entries = _decode(content)
        entries.pop("__metadata__", None)
        tensors = {name: _decode_tensor(entry) for name, entry in entries.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"its header cannot be read: {error}") from error
    end = max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if (wanted := _LENGTH.size + length + end) > size:
        raise Damaged(f"it has {size} bytes where its tensors need {wanted}: truncated")
    return SafetensorsHeader(
        {name: prod(tensor.shape) for name, tensor in tensors.items()},
        float_bytes=max((_FLOATS.get(each.dtype, 0) for each in tensors.values()), default=0) or 2,
    )


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size and (part := os.read(fd, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
