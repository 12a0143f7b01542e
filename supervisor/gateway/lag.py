"""For how long the event loop was held up: by code that does not wait, or by a busy machine."""

from __future__ import annotations

from collections import deque

#: One sample a second.
_SAMPLES = 60


class Lag:
    """The last minute. Seconds."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_SAMPLES)

    def note(self, late: float) -> None:
        """What should have run has run so much later."""
        self._samples.append(max(0.0, late))

    @property
    def worst(self) -> float:
        return max(self._samples, default=0.0)
