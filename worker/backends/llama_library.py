"""libllama as a whole: its log, its reasons for refusing a file, its threads."""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from pathlib import Path

import llama_cpp

from protocol.errors import ErrorCode
from worker.backends.base import LoadRefused

# ggml.h; the binding's own table is from an older version of it.
_DEBUG, _INFO, _WARNING, _ERROR, _CONTINUED = range(1, 6)

_ARCHITECTURE = re.compile(r"general\.architecture\s+str\s+=\s+(\S+)")

#: Architectures that see a whole text at once and make vectors of it.
ENCODERS = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)

#: Architectures that llama.cpp loads but that neither generate from left to right nor
#: make vectors of texts: diffusion models, and parts of other models.
_NOT_SERVED = frozenset({"clip", "dream", "llada", "llada-moe", "rnd1", "t5", "wavtokenizer-dec"})

#: First match wins. What is not listed is no verdict on the file.
_REASONS = tuple(
    (re.compile(pattern), code)
    for pattern, code in (
        (r"(unknown|unsupported) model architecture", ErrorCode.MODEL_UNSUPPORTED_ARCH),
        (
            r"only supports up to version|GGUFv1 is no longer|is extremely large, is there"
            r"|unknown pre-tokenizer type|unknown tokenizer|has invalid ggml type",
            ErrorCode.MODEL_UNSUPPORTED_BACKEND,
        ),
        (
            r"gguf_init_from_reader|not within the file bounds|corrupted|reached end of file"
            r"|missing tensor|tensor '.*' not found|has wrong shape|wrong number of tensors"
            r"|GGUF split|split file|split count|is duplicated|key not found|wrong array length"
            r"|has wrong (array element )?type",
            ErrorCode.MODEL_INCOMPLETE,
        ),
    )
)


class LibraryLog:
    """What libllama logs: recent warnings and errors, and the architecture of a file.

    The library keeps a bare pointer to the callback until the process ends, so
    there is one log, for the life of the process.
    """

    def __init__(self) -> None:
        self.architecture: str | None = None
        self._lines: deque[str] = deque(maxlen=20)
        self._collecting = False
        self._callback = llama_cpp.llama_log_callback(self._collect)

    def start(self) -> None:
        """Route the library's log here and forget what was collected before."""
        self.architecture = None
        self._lines.clear()
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    @property
    def reason(self) -> str:
        """The collected lines as one sentence-like text."""
        lines = [line for line in self._lines if not line.endswith(": failed to load model")]
        return "; ".join(lines) or "llama.cpp gave no reason"

    def _collect(self, level: int, text: bytes, _user_data: object) -> None:
        if level == _CONTINUED:
            if self._collecting and self._lines:
                self._lines[-1] += text.decode(errors="replace").rstrip()
            return
        self._collecting = level in (_WARNING, _ERROR)
        if self._collecting:
            self._lines.append(text.decode(errors="replace").strip())
        elif level == _INFO and b"general.architecture" in text:
            match = _ARCHITECTURE.search(text.decode(errors="replace"))
            self.architecture = match[1] if match else None


#: The process's only log.
LOG = LibraryLog()


def check_served(architecture: str | None) -> None:
    """Raise ``LoadRefused`` for an architecture that is of no use to any request."""
    if architecture in _NOT_SERVED:
        raise not_served(architecture)


def not_served(architecture: str | None) -> LoadRefused:
    return LoadRefused(
        ErrorCode.MODEL_UNSUPPORTED_ARCH,
        f"{architecture!r} models neither generate text token by token nor embed it",
    )


def refusal(path: Path, log: LibraryLog) -> LoadRefused:
    """Why the library would not load ``path``, going by its log."""
    reason = log.reason
    for pattern, code in _REASONS:
        if pattern.search(reason):
            return LoadRefused(code, f"{path.name}: {reason}")
    return LoadRefused(ErrorCode.MODEL_LOADER_CRASHED, f"{path.name}: {reason}")


def _siblings(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text()
    except OSError:
        return str(cpu)


def default_threads() -> int:
    """Threads to compute with: the physical cores this process may use.

    Elsewhere than on Linux half of the logical ones: what is left after
    hyper-threads, or after the efficiency cores that would hold the others up.
    """
    if hasattr(os, "sched_getaffinity"):
        return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    return max(1, (os.cpu_count() or 2) // 2)
