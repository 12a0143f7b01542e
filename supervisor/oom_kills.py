"""Whose end the kernel's out-of-memory killer was."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

#: From the kill until the end of the victim: a large process takes a while to die.
DYING_S = 30.0

#: Kills that nobody has claimed; a machine with more in ``DYING_S`` has other troubles.
_MOST = 64

_CGROUPS = Path("/sys/fs/cgroup")


def default_sources() -> list[Path]:
    """Where kills are counted, the best first: of this process's cgroup, which its workers
    are in as well, by either version of them; of the whole host."""
    found = [Path("/proc/vmstat")]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            found.insert(0, _CGROUPS / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            # In a container its own cgroup may be mounted in the place of the root.
            top = _CGROUPS / "memory"
            found.insert(0, top / "memory.oom_control")
            found.insert(0, top / path.lstrip("/") / "memory.oom_control")
    return found


class OomKills:
    """The kernel's kills that may explain the end of a worker; each explains one.

    The first of ``sources`` that tells a number is the one that is read. That takes a
    tenth of a millisecond, so it is done for all workers together. From any thread.
    """

    def __init__(
        self,
        sources: Sequence[Path] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        candidates = default_sources() if sources is None else sources
        self._source = next((path for path in candidates if _read(path) is not None), None)
        self._count = self._read()
        self._seen_at: deque[float] = deque(maxlen=_MOST)

    def refresh(self) -> None:
        """Take note of the kills until now. Call it about once a second, and at a spawn."""
        with self._lock:
            self._refresh()

    def claim(self, since: float) -> bool:
        """Whether one of the last ``DYING_S`` and not before ``since`` (on ``clock``) was
        still unexplained; it explains a death now. False where nobody tells."""
        with self._lock:
            self._refresh()
            oldest = max(since, self._clock() - DYING_S)
            for seen_at in self._seen_at:
                if seen_at >= oldest:
                    self._seen_at.remove(seen_at)
                    return True
            return False

    def _refresh(self) -> None:
        before, self._count = self._count, self._read()
        if before is not None and self._count is not None:
            self._seen_at.extend([self._clock()] * min(_MOST, self._count - before))

    def _read(self) -> int | None:
        return None if self._source is None else _read(self._source)


def _read(source: Path) -> int | None:
    try:
        text = source.read_bytes()
    except OSError:
        return None
    _, found, rest = (b"\n" + text).partition(b"\noom_kill ")
    return int(rest.split(maxsplit=1)[0]) if found else None
