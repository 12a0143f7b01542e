"""What the worker's I/O thread reports while the main thread works."""

from __future__ import annotations

from protocol.messages import Beat, Phase


class Vitals:
    """Written by the main thread, read by the I/O thread.

    Plain attributes: each is replaced whole, which the interpreter does
    atomically, and a beat that mixes two moments does no harm.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.progress = 0
        self.in_hand = 0

    def advance(self) -> None:
        """Something moved on: a load callback, a prefill chunk, a decode step."""
        self.progress += 1

    def beat(self) -> Beat:
        return Beat(phase=self.phase, progress=self.progress, in_hand=self.in_hand)
