"""Tells a hung worker from a busy one: progress that stands still is hung.

Pure: fed with beats and the time, asked for a verdict. A model that advances,
however slowly, is never hung.
"""

from __future__ import annotations

from collections.abc import Mapping

from protocol.messages import Beat, Phase

#: Phases that never come back; the others alternate. Beats have a socket of their own,
#: and may be overtaken by a message that tells of the next phase.
_ORDER = {Phase.STARTING: 0, Phase.LOAD: 1}
_LATE = 2


class Watchdog:
    """Watches one worker generation. Times are seconds on one monotonic clock.

    ``limits`` is how long progress may stand still per phase; in the idle phase,
    where nothing progresses, how long a beat may stay away.
    """

    def __init__(self, limits: Mapping[Phase, float], now: float) -> None:
        self._limits = limits
        self._phase = Phase.STARTING
        self._progress = -1
        self._alive_at = now

    def observe(self, beat: Beat, now: float) -> None:
        """Take a beat in; one of a phase that is known to be over tells nothing."""
        if _ORDER.get(beat.phase, _LATE) < _ORDER.get(self._phase, _LATE):
            return
        advanced = beat.progress != self._progress or beat.phase is not self._phase
        if advanced or beat.phase is Phase.IDLE:
            self._alive_at = now
        self._phase = beat.phase
        self._progress = beat.progress

    @property
    def phase(self) -> Phase:
        """What the worker does, as far as is known."""
        return self._phase

    def enter(self, phase: Phase, now: float) -> None:
        """The worker is in a new phase, as a message told before any beat could."""
        self._phase = phase
        self._alive_at = now

    def forgive(self, now: float) -> None:
        """Start anew: the watcher itself was held up, or asleep with its machine."""
        self._alive_at = now

    def verdict(self, now: float) -> str | None:
        """Why the worker is hung, or None."""
        limit = self._limits[self._phase]
        frozen_s = now - self._alive_at
        if frozen_s < limit:
            return None
        what = "no sign of life" if self._phase is Phase.IDLE else f"no progress in {self._phase}"
        return f"{what} for {frozen_s:.0f} s (limit {limit:.0f} s)"
