"""Reads the header of a GGUF file: bounded, without a backend, safe on hostile files.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import CodedError, ErrorCode

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

#: More of either is no model but an attack or an accident.
MAX_TENSORS = 1_000_000
MAX_KEYS = 100_000
MAX_ARRAY_STRINGS = 10_000_000

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

#: ggml tensor type: elements per block, bytes per block.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17),
}  # fmt: skip

#: ``general.file_type`` values, as llama.cpp names them.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0",
    38: "MXFP4_MOE",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the gate needs. ``quantization`` is empty when the file does not say."""

    architecture: str
    quantization: str


class _Malformed(Exception):
    pass


class _Cursor:
    """Reads values one after the other; running off the end raises ``_Malformed``."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if size < 0 or end > len(self._data):
            raise _Malformed("it ends in the middle of its header")
        value = self._data[self.at : end]
        self.at = end
        return value

    def skip(self, size: int) -> None:
        if size > len(self._data) - self.at:
            raise _Malformed("it ends in the middle of its header")
        self.at += size

    def number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return int(value)

    def text(self) -> str:
        return self.take(self.number("<Q")).decode(errors="replace")


def read_header(path: Path) -> GgufHeader:
    """Check structure and size, and return what the gate needs.

    Raises ``model_incomplete`` for an empty, truncated or damaged file,
    ``model_unsupported_backend`` for another format or an unknown version.
    """
    if path.stat().st_size == 0:
        raise _incomplete(path, "it is empty")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if data[:4] != MAGIC:
            if MAGIC.startswith(data[:4]):
                raise _incomplete(path, "it ends in the middle of its header")
            raise CodedError(
                ErrorCode.MODEL_UNSUPPORTED_BACKEND,
                f"{path.name} is not a GGUF file, nor a model folder",
            )
        try:
            return _parse(_Cursor(data), len(data), path)
        except (_Malformed, struct.error) as error:
            raise _incomplete(path, str(error)) from error


def _parse(cursor: _Cursor, file_size: int, path: Path) -> GgufHeader:
    cursor.skip(len(MAGIC))
    version = cursor.number("<I")
    if version not in VERSIONS:
        raise CodedError(
            ErrorCode.MODEL_UNSUPPORTED_BACKEND,
            f"{path.name} is GGUF version {version}; versions {VERSIONS} are known",
        )
    tensors, keys = cursor.number("<Q"), cursor.number("<Q")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise _Malformed(f"its header claims {tensors} tensors and {keys} keys")
    values: dict[str, str | int] = {}
    for _ in range(keys):
        key = cursor.text()
        kind = cursor.number("<I")
        value = _read_value(cursor, kind)
        if value is not None:
            values[key] = value
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Malformed(f"its alignment is {alignment!r}")
    _check_tensors(cursor, tensors, alignment, file_size)
    file_type = values.get("general.file_type")
    return GgufHeader(
        architecture=str(values.get("general.architecture", "")),
        quantization=_FILE_TYPES.get(file_type, "") if isinstance(file_type, int) else "",
    )


def _read_value(cursor: _Cursor, kind: int) -> str | int | None:
    """A string or a number; None for an array, which is skipped."""
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        layout = _SCALARS[kind]
        if layout in {"<f", "<d"}:
            cursor.skip(struct.calcsize(layout))
            return None
        return cursor.number(layout)
    if kind != _ARRAY:
        raise _Malformed(f"its header has a value of unknown type {kind}")
    item_kind, length = cursor.number("<I"), cursor.number("<Q")
    if item_kind in _SCALARS:
        cursor.skip(struct.calcsize(_SCALARS[item_kind]) * length)
    elif item_kind == _STRING and length <= MAX_ARRAY_STRINGS:
        for _ in range(length):
            cursor.skip(cursor.number("<Q"))
    else:
        raise _Malformed(f"its header has an array of {length} values of type {item_kind}")
    return None


def _check_tensors(cursor: _Cursor, tensors: int, alignment: int, file_size: int) -> None:
    """The last byte of every tensor of a known type must be in the file."""
    end = 0
    for _ in range(tensors):
        cursor.skip(cursor.number("<Q"))
        dimensions = cursor.number("<I")
        if dimensions > 8:
            raise _Malformed(f"its header has a tensor of {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= cursor.number("<Q")
        per_block, block_bytes = _BLOCKS.get(cursor.number("<I"), (1, 0))
        end = max(end, cursor.number("<Q") + elements // per_block * block_bytes)
    start = -(-cursor.at // alignment) * alignment
    if start + end > file_size:
        raise _Malformed(
            f"it has {file_size} bytes where its tensors need {start + end}: truncated"
        )


def _incomplete(path: Path, why: str) -> CodedError:
    return CodedError(ErrorCode.MODEL_INCOMPLETE, f"{path.name} is incomplete: {why}")
