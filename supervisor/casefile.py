"""What is noted of one worker generation while it lives, for the incident if it fails."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections import deque
from collections.abc import Sequence
from importlib import metadata

import msgspec

from protocol.messages import PROTOCOL_VERSION
from supervisor.incidents import (
    OUTPUT_BYTES,
    Incident,
    MemorySample,
    Moment,
    new_id,
    stacks_in,
)

#: Looked up once: it reads the disk, which a server in trouble may not be able to.
SERVER_VERSION = metadata.version("opta-lmx")

#: Workers run with the same interpreter.
PYTHON_VERSION = platform.python_version()
PLATFORM = " ".join((os.uname().sysname, os.uname().release, os.uname().machine))

#: What is noted on the way to the canary.
SPAWNED, ALIVE, GREETED, LOADED = "spawned", "first sign of life", "said hello", "loaded"

#: The parts of a load, and where each ends.
_PARTS = {"start": ALIVE, "import": GREETED, "load": LOADED, "canary": None}

#: Memory samples kept: the minutes before a failure, at one a second.
MAX_SAMPLES = 240


class CaseFile:
    """One generation's timeline and memory curve. At most one incident comes of it."""

    def __init__(self, *, model: str, generation: int, backend: str, backend_version: str) -> None:
        self._model = model
        self._generation = generation
        self._backend = backend
        self._backend_version = backend_version
        self._timeline: list[Moment] = []
        #: The same on the monotonic clock.
        self._noted_at: dict[str, float] = {}
        self._memory: deque[MemorySample] = deque(maxlen=MAX_SAMPLES)
        self._incident: Incident | None = None
        self.note(SPAWNED)

    def note(self, what: str) -> None:
        """Add to the timeline."""
        self._timeline.append(Moment(time.time(), what))
        self._noted_at[what] = time.monotonic()

    def parts_s(self) -> dict[str, float]:
        """Seconds of each part from the spawn until now, when the canary has passed:
        ``start`` of the interpreter, ``import`` of the backend, ``load``, ``canary``."""
        parts: dict[str, float] = {}
        before, now = self._noted_at[SPAWNED], time.monotonic()
        for part, end in _PARTS.items():
            reached = now if end is None else self._noted_at.get(end, before)
            parts[part] = reached - before
            before = reached
        return parts

    def sample(self, size: int) -> None:
        """Add to the memory curve; bytes."""
        self._memory.append(MemorySample(time.time(), size))

    def open(
        self,
        *,
        phase: str,
        kind: str,
        code: str,
        reason: str,
        quarantined: bool,
        crash_count: int,
        output: str,
        in_flight: Sequence[str],
        convicted: str | None = None,
    ) -> Incident:
        """The incident of a failure that was just counted; the process may still be there."""
        now = time.time()
        self.note(f"failed: {reason}")
        self._incident = Incident(
            id=new_id(now),
            model=self._model,
            generation=self._generation,
            phase=phase,
            kind=kind,
            code=code,
            reason=reason,
            timestamp=now,
            quarantined=quarantined,
            crash_count=crash_count,
            backend=self._backend,
            backend_version=self._backend_version,
            server_version=SERVER_VERSION,
            protocol_version=PROTOCOL_VERSION,
            python_version=PYTHON_VERSION,
            platform=PLATFORM,
            output_tail=output[-OUTPUT_BYTES:],
            stacks=stacks_in(output)[-OUTPUT_BYTES:],
            memory=list(self._memory),
            in_flight=list(in_flight),
            convicted=convicted,
            timeline=list(self._timeline),
        )
        return self._incident

    def close(self, exit_status: int | None, output: str) -> Incident | None:
        """The incident with how the process ended (None: not even by SIGKILL), if there was one."""
        ended = exit_status is not None
        self.note(f"exited with status {exit_status}" if ended else "cannot be killed: given up")
        if self._incident is None:
            return None
        return msgspec.structs.replace(
            self._incident,
            exit_status=exit_status,
            signal=_signal_name(exit_status),
            output_tail=output[-OUTPUT_BYTES:],
            stacks=stacks_in(output)[-OUTPUT_BYTES:],
            timeline=list(self._timeline),
        )


def _signal_name(exit_status: int | None) -> str | None:
    if exit_status is None or exit_status >= 0:
        return None
    try:
        return signal.Signals(-exit_status).name
    except ValueError:
        return f"signal {-exit_status}"
