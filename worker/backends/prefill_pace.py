"""How many prompt tokens a step may compute, by what the last ones took.

Pure: durations in seconds, measured by the caller.
"""

from __future__ import annotations

#: No step computes for longer, whether anybody waits for it or not: only between two
#: steps can a request be cancelled, and be seen that the worker moves on.
LONGEST_STEP_S = 2.0

#: So many tokens are computed at once in any case, and before the speed is known. The
#: weights are read once per step: fewer tokens take hardly less time.
FEWEST_TOKENS = 16
#: So few tell something as long as nothing is known.
_TELLING_TOKENS = 4


class PrefillPace:
    """The pace of one model's prefill."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None

    def fitting(self, seconds: float = LONGEST_STEP_S) -> int:
        """Tokens that take so long at most; ``FEWEST_TOKENS`` or more."""
        if self._seconds_per_token is None:
            return FEWEST_TOKENS
        return max(FEWEST_TOKENS, int(seconds / self._seconds_per_token))

    def measured(self, tokens: int, seconds: float) -> None:
        """A step computed ``tokens`` in so many ``seconds``."""
        known = self._seconds_per_token
        if tokens < (_TELLING_TOKENS if known is None else FEWEST_TOKENS) or seconds <= 0:
            return
        took = seconds / tokens
        # The first steps may have read the weights from disk: good news counts at once.
        # Bad news may be a hiccup, and counts by halves.
        self._seconds_per_token = took if known is None or took < known else (known + took) / 2
