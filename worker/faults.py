"""Faults on order, for the fault harness: what real backends do when they break."""

from __future__ import annotations

import os
import signal
import threading
from enum import StrEnum
from pathlib import Path

import msgspec

from protocol.errors import ErrorCode
from worker.backends.base import LoadRefused


class FaultPoint(StrEnum):
    """Where a fault strikes."""

    LOAD = "load"
    PROMPT = "prompt"
    TOKEN = "token"


class FaultKind(StrEnum):
    """What happens. ``hang`` never returns; ``raise`` is a backend exception."""

    KILL = "kill"
    SEGFAULT = "segfault"
    ABORT = "abort"
    EXIT = "exit"
    HANG = "hang"
    RAISE = "raise"
    REFUSE = "refuse"


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fault. ``n`` is the token's index in its answer (for ``at = token``).

    ``prompt_contains`` restricts it to matching prompts, ``times`` to the first
    few occurrences over all generations of the worker; ``code`` is the error
    code of ``refuse`` and ``status`` the exit status of ``exit``.
    """

    at: FaultPoint
    kind: FaultKind
    n: int = 0
    prompt_contains: str = ""
    times: int | None = None
    status: int = 1
    code: ErrorCode = ErrorCode.MODEL_LOADER_CRASHED


class FaultPlan:
    """The faults of one model, with their occurrences counted in files beside it."""

    def __init__(self, faults: list[Fault], counter_base: Path) -> None:
        self._faults = faults
        self._counter_base = counter_base

    def strike(self, at: FaultPoint, *, n: int = 0, prompt: str = "") -> None:
        """Cause what is due at this point; returns if nothing is."""
        for index, fault in enumerate(self._faults):
            if fault.at is at and fault.n == n and fault.prompt_contains in prompt:
                if fault.times is not None and not self._count(index, fault.times):
                    continue
                _cause(fault)

    def _count(self, index: int, times: int) -> bool:
        counter = self._counter_base.with_suffix(f".fault-{index}")
        fired = counter.stat().st_size if counter.exists() else 0
        if fired >= times:
            return False
        # One byte per occurrence, on disk before the process dies of it.
        with counter.open("ab") as file:
            file.write(b"x")
        return True


def _cause(fault: Fault) -> None:
    match fault.kind:
        case FaultKind.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case FaultKind.SEGFAULT:
            os.kill(os.getpid(), signal.SIGSEGV)
        case FaultKind.ABORT:
            os.abort()
        case FaultKind.EXIT:
            os._exit(fault.status)
        case FaultKind.HANG:
            threading.Event().wait()
        case FaultKind.RAISE:
            raise RuntimeError("simulated backend exception")
        case FaultKind.REFUSE:
            raise LoadRefused(fault.code, "simulated refusal")
