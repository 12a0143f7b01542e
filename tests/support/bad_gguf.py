"""Writes GGUF files that are broken in the ways that occur: cut downloads, wrong
files, later formats, damaged headers.

Layout of a GGUF's start, little-endian: the magic b"GGUF", version (u32), number
of tensors (u64), number of metadata entries (u64).
"""

import random
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_HEADER = struct.Struct("<4sIQQ")


def write_truncated(path: Path, whole: Path, *, keep: float = 0.5) -> Path:
    """The first part of `whole`, as a cut download leaves it; `keep` is a fraction."""
    content = whole.read_bytes()
    return _write(path, content[: int(len(content) * keep)])


def write_truncated_header(path: Path) -> Path:
    """A file that ends inside the header."""
    return _write(path, _MAGIC + struct.pack("<I", 3))


def write_garbage(path: Path, *, size: int = 4096, seed: int = 0) -> Path:
    """Random bytes, with no GGUF magic."""
    return _write(path, b"\x00" + random.Random(seed).randbytes(size - 1))


def write_empty(path: Path) -> Path:
    """No bytes at all."""
    return _write(path, b"")


def write_future_version(path: Path, whole: Path, *, version: int = 99) -> Path:
    """`whole`, claiming a version of the format that does not exist yet."""
    return _rewrite_header(path, whole, version=version)


def write_bad_tensor_count(path: Path, whole: Path, *, tensors: int = 1 << 60) -> Path:
    """`whole`, claiming a number of tensors that it does not hold."""
    return _rewrite_header(path, whole, tensors=tensors)


def write_bad_metadata_count(path: Path, whole: Path, *, entries: int = 1 << 60) -> Path:
    """`whole`, claiming a number of metadata entries that it does not hold."""
    return _rewrite_header(path, whole, entries=entries)


def _rewrite_header(
    path: Path,
    whole: Path,
    *,
    version: int | None = None,
    tensors: int | None = None,
    entries: int | None = None,
) -> Path:
    content = whole.read_bytes()
    magic, old_version, old_tensors, old_entries = _HEADER.unpack_from(content)
    header = _HEADER.pack(
        magic,
        old_version if version is None else version,
        old_tensors if tensors is None else tensors,
        old_entries if entries is None else entries,
    )
    return _write(path, header + content[_HEADER.size :])


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
