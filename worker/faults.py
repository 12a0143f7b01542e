"""Faults on order, for the fault harness: what real backends do when they break.

Reachable through the simulated backend only, which the supervisor refuses unless it
is explicitly enabled; and a worker refuses them unless ``FAULTS_ENV`` says otherwise,
which only the tests and the harness set.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path

import msgspec

from protocol.errors import ErrorCode

#: Faults are refused unless this is not empty in the environment of the server.
FAULTS_ENV = "SIMULATED_FAULTS"

#: Names a file with a JSON list of ``Fault`` for the points before a script is known.
BOOT_FAULTS_ENV = "SIMULATED_BOOT_FAULTS"


#: Longer than any pause between two requests of the canary.
IDLE_S = 0.5


class FaultPoint(StrEnum):
    """Where a fault strikes.

    ``spawn`` and ``hello`` are before the script is known: only the file that
    ``BOOT_FAULTS_ENV`` names can have them. ``loaded`` is right after that message,
    ``idle`` when the worker has had nothing to do for ``IDLE_S``.
    """

    SPAWN = "spawn"
    HELLO = "hello"
    LOAD = "load"
    LOADED = "loaded"
    PROMPT = "prompt"
    TOKEN = "token"
    IDLE = "idle"
    CLOSE = "close"


class FaultKind(StrEnum):
    """What happens.

    To the process: ``stop`` is SIGSTOP, ``hang`` never returns while the process
    beats on, ``hold_gil`` is native code that keeps the interpreter's lock, ``doze``
    the same until a signal comes, ``raise`` a backend exception, ``exhaust`` an
    allocation that fails, ``exhaust_native`` one in native code that does not look at what
    it gets, ``grow`` takes ``size`` bytes every 50 ms from now on,
    ``flood`` writes to stdout and stderr without a line end, ``helper`` starts a
    process that inherits both, a ``flooding_helper`` writes to them from a session of its
    own, and a ``ghost`` goes on talking on the worker's connection when that is dead, as
    if the answers to its requests went on; ``ignore_term`` ignores SIGTERM; ``mark`` does nothing
    but leave its trace.

    On the wire, instead of or in addition to the message of this point.
    """

    MARK = "mark"
    KILL = "kill"
    SEGFAULT = "segfault"
    BUS = "bus"
    ABORT = "abort"
    EXIT = "exit"
    STOP = "stop"
    HANG = "hang"
    HOLD_GIL = "hold_gil"
    DOZE = "doze"
    RAISE = "raise"
    REFUSE = "refuse"
    EXHAUST = "exhaust"
    EXHAUST_NATIVE = "exhaust_native"
    GROW = "grow"
    FLOOD = "flood"
    HELPER = "helper"
    DETACHED_HELPER = "detached_helper"
    FLOODING_HELPER = "flooding_helper"
    GHOST = "ghost"
    IGNORE_TERM = "ignore_term"

    CORRUPT_FRAME = "corrupt_frame"
    EMPTY_FRAME = "empty_frame"
    TRUNCATED_FRAME = "truncated_frame"
    OVERSIZED_FRAME = "oversized_frame"
    WRONG_TAG = "wrong_tag"
    STALE_FRAMES = "stale_frames"
    WRONG_VERSION = "wrong_version"
    WRONG_NONCE = "wrong_nonce"
    OLD_GENERATION = "old_generation"
    SILENT = "silent"
    TWICE = "twice"


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fault. ``n`` is the token's index in its answer (for ``at = token``).

    ``prompt_contains`` restricts it to matching prompts, ``times`` to the first
    few occurrences over all generations of the worker; ``code`` is the error
    code of ``refuse``, ``status`` the exit status of ``exit``, ``size`` in bytes
    that of ``grow`` and ``oversized_frame``, ``seconds`` how long ``hold_gil``,
    ``doze`` and ``flood`` last.
    """

    at: FaultPoint
    kind: FaultKind
    n: int = 0
    prompt_contains: str = ""
    times: int | None = None
    status: int = 1
    code: ErrorCode = ErrorCode.MODEL_LOADER_CRASHED
    size: int = 8 * 1024 * 1024
    seconds: float = 3600.0


class FaultPlan:
    """The faults of one model, in order, with their occurrences counted on disk.

    The trace of each, in a file beside its script, is one line per occurrence:
    the monotonic time at which it struck, in seconds.
    """

    def __init__(self) -> None:
        self._faults: list[tuple[Fault, Path]] = []

    def add(self, faults: Iterable[Fault], counter_base: Path) -> None:
        for index, fault in enumerate(faults):
            self._faults.append((fault, trace_of(counter_base, index)))

    def expects(self, at: FaultPoint) -> bool:
        """Whether anything may strike at this point."""
        return any(fault.at is at for fault, _ in self._faults)

    def due(self, at: FaultPoint, *, n: int = 0, prompt: str = "") -> Iterator[Fault]:
        """What strikes at this point; its trace is on disk before it is returned."""
        for fault, trace in self._faults:
            if fault.at is at and fault.n == n and fault.prompt_contains in prompt:
                fired = trace.read_bytes().count(b"\n") if trace.exists() else 0
                if fault.times is None or fired < fault.times:
                    with trace.open("a") as file:
                        file.write(f"{time.monotonic()}\n")
                    yield fault


def trace_of(counter_base: Path, index: int) -> Path:
    """Where the occurrences of a script's fault of this index are counted."""
    return counter_base.with_suffix(f".fault-{index}")


def read_faults(path: Path) -> list[Fault]:
    """The faults in a file; none when there is no such file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Fault])
    except FileNotFoundError:
        return []
