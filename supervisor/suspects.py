"""Blame by isolation: who was in flight at a crash runs alone until it is cleared.

One that kills its worker alone, before it has come a token further, is convicted. Whoever
else is there waits meanwhile, so that nobody is blamed for what another one does.
"""

from __future__ import annotations

from collections.abc import Iterable

from supervisor.entries import Entry
from supervisor.resumption import is_guilty

#: Tokens beyond those of the crash after which a request is not suspected any more: what is
#: in its prompt, or has just been written, would have struck again by then.
CLEARED_AFTER = 8


class Suspects:
    """Marks entries of one model, and picks the ``current`` one that has the worker alone."""

    def __init__(self) -> None:
        self.current: Entry | None = None

    def accuse(self, entry: Entry, *, suspected: bool) -> None:
        """It was in flight when its worker died, which may be its doing if it is suspected."""
        entry.suspect = entry.suspect or suspected
        self.current = None

    def call(self, entries: Iterable[Entry]) -> Entry | None:
        """The oldest suspect, which is to run alone now; None if there is none."""
        waiting = [entry for entry in entries if entry.suspect and not entry.sent]
        self.current = min(waiting, key=lambda entry: entry.opened_at, default=None)
        return self.current

    def is_cleared(self) -> bool:
        """Whether the current one has come far enough; it is no suspect any more then."""
        entry = self.current
        if entry is None or entry.gained < CLEARED_AFTER:
            return False
        entry.suspect = False
        return True

    def forget(self, entry: Entry) -> bool:
        """A request has ended; whether it was the current one."""
        entry.suspect = False
        if entry is not self.current:
            return False
        self.current = None
        return True


def convict(entries: Iterable[Entry]) -> Entry | None:
    """The one that its worker's death is certainly to blame on, now that the worker is dead."""
    sent = [entry for entry in entries if entry.sent]
    if len(sent) != 1:
        return None
    (entry,) = sent
    if entry.is_canary or not entry.suspect or not is_guilty(entry.runs, entry.gained):
        return None
    entry.convicted = True
    return entry
