"""Finds stop strings in text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop string begins.

    Holds back the longest tail that could still become a stop string, so that
    no part of one is ever emitted, wherever the pieces are cut. Of several stop
    strings the one that begins first wins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        #: The stop string that was found.
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def feed(self, text: str) -> str:
        """Return what may be emitted now; empty for ever once ``stopped``."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        first = self._first(text)
        keep_from = self._first_possible_start(text)
        # A stop string that began earlier and is still incomplete may yet win
        # over one that is complete, which decides only before that point.
        if first is not None and first[0] <= keep_from:
            at, self.found = first
            self._held = ""
            return text[:at]
        self._held = text[keep_from:]
        return text[:keep_from]

    def flush(self) -> str:
        """Return what is held back: no more text will come."""
        held, self._held = self._held, ""
        if self.stopped:
            return ""
        if (first := self._first(held)) is not None:
            at, self.found = first
            return held[:at]
        return held

    def _first(self, text: str) -> tuple[int, str] | None:
        """Where the first whole stop string begins, and which it is."""
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found, key=lambda each: each[0], default=None)

    def _first_possible_start(self, text: str) -> int:
        """Where the earliest unfinished stop string may begin; the length if none can."""
        first = len(text)
        for stop in self._stops:
            for start in range(max(0, len(text) - len(stop) + 1), first):
                if stop.startswith(text[start:]):
                    first = start
                    break
        return first
