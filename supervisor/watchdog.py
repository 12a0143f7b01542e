"""Tells a hung worker from a busy one: progress that stands still is hung.

Pure: fed with beats, with what was asked of the worker and with the time, asked for a
verdict. A model that advances, however slowly, is never hung; one that says it has
nothing to do is not believed while it has been given something.
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
        self._moved_at = self._beat_at = now
        self._busy = False
        #: It was sent something since it last answered or moved. Set by the owner, too.
        self.owes = False

    def observe(self, beat: Beat, now: float) -> None:
        """Take a beat in; one of a phase that is known to be over tells nothing."""
        phase = beat.phase
        if _ORDER.get(phase, _LATE) < _ORDER.get(self._phase, _LATE):
            return
        if _ORDER.get(self._phase, _LATE) < _LATE <= _ORDER.get(phase, _LATE):
            # It is loaded when that has arrived, not when it believes to have said so.
            phase = self._phase
        self._beat_at = now
        # Whether it computes a prompt or an answer changes with what it is given.
        begins = phase is not self._phase and Phase.IDLE in (phase, self._phase)
        if begins or beat.progress != self._progress:
            self._moved_at = now
            self.owes = False
        self._phase = phase
        self._progress = beat.progress

    @property
    def phase(self) -> Phase:
        """What the worker does, as far as is known."""
        return self._phase

    def enter(self, phase: Phase, now: float) -> None:
        """The worker is in a new phase, as a message told before any beat could."""
        self._phase = phase
        self._moved_at = self._beat_at = now

    def forgive(self, now: float) -> None:
        """Start anew: the watcher itself was held up, or asleep with its machine."""
        self._moved_at = self._beat_at = now

    def verdict(self, now: float, *, in_hand: bool = False) -> str | None:
        """Why the worker is hung, or None. ``in_hand``: it was given what it has not ended."""
        idle = self._phase is Phase.IDLE
        busy = in_hand or self.owes
        if idle and not (busy and self._busy):
            # Nothing has to move, or only since the last time we were asked.
            self._moved_at = now
        self._busy = busy
        silent_s, limit = now - self._beat_at, self._limits[self._phase]
        if idle and silent_s >= limit:
            return f"no sign of life for {silent_s:.0f} s (limit {limit:.0f} s)"
        frozen_s = now - self._moved_at
        limit = self._limits[Phase.PREFILL if idle else self._phase]
        if frozen_s < limit:
            return None
        what = "what it was sent is not taken up" if idle else f"no progress in {self._phase}"
        return f"{what} for {frozen_s:.0f} s (limit {limit:.0f} s)"
