"""Reads the header of a GGUF file: bounded, without a backend, safe on hostile files.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from protocol.errors import CodedError, ErrorCode

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

#: More of either is no model but an attack or an accident.
MAX_TENSORS = 1_000_000
MAX_KEYS = 100_000
MAX_ARRAY_STRINGS = 2_000_000
#: Numbers that are kept of an array: one for each layer.
_MAX_KEPT = 4096

#: Of all texts that are kept: the longest, a chat template, has some 100 kB.
MAX_TEXT_BYTES = 16 * 1024 * 1024

#: A header of a large vocabulary has a few MB.
READ_BYTES = 1024 * 1024

_CUT = "it ends in the middle of its header"

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_INTEGERS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"),
    3: struct.Struct("<h"), 4: _U32, 5: struct.Struct("<i"), 7: struct.Struct("<?"),
    10: _U64, 11: struct.Struct("<q"),
}  # fmt: skip
_SIZES = {kind: layout.size for kind, layout in _INTEGERS.items()} | {6: 4, 12: 8}
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
    """What the file says of itself.

    ``quantization`` is empty when it does not say. ``values`` are its texts and whole
    numbers by key, ``lengths`` those of its arrays, ``arrays`` the short ones of whole
    numbers. ``parameters`` are the elements of all tensors in this file.
    """

    architecture: str
    quantization: str
    values: Mapping[str, str | int]
    lengths: Mapping[str, int]
    arrays: Mapping[str, Sequence[int]]
    parameters: int

    def number(self, key: str) -> int | None:
        """A whole number of the architecture's, such as ``context_length``."""
        value = self.values.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) else None


class _Malformed(Exception):
    pass


class _Cursor:
    """Reads values one after the other; running off the end raises ``_Malformed``.

    Reads, never maps: a mapped file that somebody truncates meanwhile would end
    this process with a SIGBUS.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size
        self._text_left = MAX_TEXT_BYTES
        self.at = 0

    def take(self, size: int) -> bytes:
        self._advance(size)
        value = self._file.read(size)
        if len(value) != size:
            raise _Malformed(_CUT)
        return value

    def skip(self, size: int) -> None:
        self._advance(size)
        self._file.seek(size, os.SEEK_CUR)

    def number(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack(self.take(layout.size))
        return int(value)

    def text(self) -> str:
        size = self.number(_U64)
        self._text_left -= size
        if self._text_left < 0:
            raise _Malformed(f"its header has more than {MAX_TEXT_BYTES} bytes of text")
        return self.take(size).decode(errors="replace")

    def _advance(self, size: int) -> None:
        if size > self._left:
            raise _Malformed(_CUT)
        self._left -= size
        self.at += size


def read_header(path: Path) -> GgufHeader:
    """Check structure and size, and return what it says.

    Raises ``model_incomplete`` for an empty, truncated or damaged file,
    ``model_unsupported_backend`` for another format or an unknown version, and
    ``OSError``.
    """
    with path.open("rb", buffering=READ_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(len(MAGIC))
        if magic != MAGIC and MAGIC.startswith(magic):
            raise _incomplete(path, "it is empty" if not magic else _CUT)
        if magic != MAGIC:
            raise CodedError(
                ErrorCode.MODEL_UNSUPPORTED_BACKEND,
                f"{path.name} is not a GGUF file, nor a model folder",
            )
        file.seek(0)
        try:
            return _parse(_Cursor(file, size), size, path)
        except _Malformed as error:
            raise _incomplete(path, str(error)) from error


def _parse(cursor: _Cursor, file_size: int, path: Path) -> GgufHeader:
    cursor.skip(len(MAGIC))
    version = cursor.number(_U32)
    if version not in VERSIONS:
        raise CodedError(
            ErrorCode.MODEL_UNSUPPORTED_BACKEND,
            f"{path.name} is GGUF version {version}; versions {VERSIONS} are known",
        )
    tensors, keys = cursor.number(_U64), cursor.number(_U64)
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise _Malformed(f"its header claims {tensors} tensors and {keys} keys")
    values: dict[str, str | int] = {}
    lengths: dict[str, int] = {}
    arrays: dict[str, Sequence[int]] = {}
    for _ in range(keys):
        key = cursor.text()
        kind = cursor.number(_U32)
        if kind == _ARRAY:
            lengths[key], numbers = _read_array(cursor)
            if numbers:
                arrays[key] = numbers
        elif (value := _read_value(cursor, kind)) is not None:
            values[key] = value
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Malformed(f"its alignment is {alignment!r}")
    parameters = _check_tensors(cursor, tensors, alignment, file_size)
    file_type = values.get("general.file_type")
    return GgufHeader(
        architecture=str(values.get("general.architecture", "")),
        quantization=_FILE_TYPES.get(file_type, "") if isinstance(file_type, int) else "",
        values=values,
        lengths=lengths,
        arrays=arrays,
        parameters=parameters,
    )


def _read_value(cursor: _Cursor, kind: int) -> str | int | None:
    """A text or a whole number; None for a fraction, which is skipped."""
    if kind == _STRING:
        return cursor.text()
    if kind in _INTEGERS:
        return cursor.number(_INTEGERS[kind])
    if kind in _SIZES:
        cursor.skip(_SIZES[kind])
        return None
    raise _Malformed(f"its header has a value of unknown type {kind}")


def _read_array(cursor: _Cursor) -> tuple[int, Sequence[int]]:
    """Its length; and its values, if they are whole numbers and not many."""
    item_kind, length = cursor.number(_U32), cursor.number(_U64)
    if item_kind in _INTEGERS and length <= _MAX_KEPT:
        return length, [cursor.number(_INTEGERS[item_kind]) for _ in range(length)]
    if item_kind in _SIZES:
        cursor.skip(_SIZES[item_kind] * length)
    elif item_kind == _STRING and length <= MAX_ARRAY_STRINGS:
        for _ in range(length):
            cursor.skip(cursor.number(_U64))
    else:
        raise _Malformed(f"its header has an array of {length} values of type {item_kind}")
    return length, ()


def _check_tensors(cursor: _Cursor, tensors: int, alignment: int, file_size: int) -> int:
    """The last byte of every tensor of a known type must be in the file; their elements."""
    end = parameters = 0
    for _ in range(tensors):
        cursor.skip(cursor.number(_U64))
        dimensions = cursor.number(_U32)
        if dimensions > 8:
            raise _Malformed(f"its header has a tensor of {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= cursor.number(_U64)
        parameters += elements
        per_block, block_bytes = _BLOCKS.get(cursor.number(_U32), (1, 0))
        end = max(end, cursor.number(_U64) + elements // per_block * block_bytes)
    start = -(-cursor.at // alignment) * alignment
    if start + end > file_size:
        raise _Malformed(
            f"it has {file_size} bytes where its tensors need {start + end}: truncated"
        )
    return parameters


def _incomplete(path: Path, why: str) -> CodedError:
    return CodedError(ErrorCode.MODEL_INCOMPLETE, f"{path.name} is incomplete: {why}")
