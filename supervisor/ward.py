"""Where suspects run when they have a worker of their own, beside that of everybody else."""

from __future__ import annotations

from protocol.errors import CodedError
from supervisor.entries import Entry
from supervisor.requests import RequestTable


class Ward(RequestTable):
    """Has the suspects of ``home`` that run apart, one at a time; whoever is cleared goes back.

    Without a worker they wait for the next one. They count as the home's, which ends them
    when it ends its own.
    """

    def __init__(self, home: RequestTable, *, max_stream_buffer_bytes: int) -> None:
        super().__init__(max_stream_buffer_bytes=max_stream_buffer_bytes)
        self._home = home
        home.ward = self

    @property
    def is_called_for(self) -> bool:
        """Whether anybody at home waits for a suspect that has the worker."""
        home = self._home
        if home._suspects.current is None:
            return False
        asked = len(home._inquiries) > len(home._inquiries.sent())
        return asked or any(not (each.suspect or each.sent) for each in home._entries.values())

    def admit(self) -> int:
        """Take the home's suspects in, so that the others there go on; how many.

        None while the one that runs cannot be taken from its worker.
        """
        home = self._home
        current = home._suspects.current
        if current is not None and current.sent and not home._put_aside(current, anew=True):
            return 0
        waiting = [each for each in home._entries.values() if each.suspect and not each.sent]
        self.take(home._give(waiting))
        if current is not None:
            home._call_next()
        return len(waiting)

    def dissolve(self, error: CodedError) -> None:
        """Let all go home, the suspects to be isolated there. The worker must not be dead:
        what cannot be taken from it fails with ``error``."""
        self._suspects.current = None
        for entry in list(self._entries.values()):
            if entry.is_canary or (entry.sent and not self._put_aside(entry, anew=True)):
                self._remove(entry.id)
                entry.stream.fail(error)
        self._home.take(self._give(list(self._entries.values())))
        self._flows = False

    def _pause_and_call_next(self) -> None:
        entry = self._suspects.current
        if entry is not None and self._put_aside(entry):
            self._home.take(self._give([entry]))
        self._call_next()

    def _remove(self, request_id: int) -> Entry | None:
        entry = super()._remove(request_id)
        self._home.idle_since = self.idle_since
        return entry
