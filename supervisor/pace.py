"""How fast a model gets through its requests, and so when a place in its queue is free.

Pure: times are seconds of any monotonic clock, given by the caller.
"""

from __future__ import annotations

#: What is said before anything is known, and the bounds of what is ever said. Seconds.
DEFAULT_S = 5.0
MIN_S = 1.0
MAX_S = 600.0

#: Weight of the newest interval in the mean: the last ten or so decide. Several
#: requests that run together often end together, and must not look like a rate.
_WEIGHT = 0.1


class Pace:
    """The exponentially weighted mean interval between two answers of a busy model."""

    def __init__(self) -> None:
        self._mean_s: float | None = None
        self._since: float | None = None

    def busy(self, now: float) -> None:
        """There is work. Only the first call after ``idle`` counts."""
        if self._since is None:
            self._since = now

    def idle(self) -> None:
        """There is no work: the time from here on says nothing about the model."""
        self._since = None

    def answered(self, now: float) -> None:
        """A request that had a slot has ended, and its place is free."""
        if self._since is None:
            return
        interval = max(0.0, now - self._since)
        if self._mean_s is None:
            self._mean_s = interval
        else:
            self._mean_s += _WEIGHT * (interval - self._mean_s)
        self._since = now

    def next_place_s(self, now: float) -> float:
        """Seconds until a place may be expected to be free, from ``MIN_S`` to ``MAX_S``.

        An interval that has lasted longer than the mean says that the mean is of a
        better time: then as long again is expected.
        """
        elapsed = 0.0 if self._since is None else now - self._since
        mean_s = DEFAULT_S if self._mean_s is None else self._mean_s
        expected = mean_s - elapsed if elapsed <= mean_s else elapsed
        return min(MAX_S, max(MIN_S, expected))
