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
        return self._home.turns.is_blocked

    def admit(self) -> int:
        """Take the home's suspects in, so that the others there go on; how many.

        None while the one that runs cannot be taken from its worker.
        """
        turns = self._home.turns
        current = turns.current
        if current is not None and current.sent and not turns.put_aside(current, anew=True):
            return 0
        waiting = [each for each in turns.entries.values() if each.suspect and not each.sent]
        self.take(self._home.give(waiting))
        if current is not None:
            turns.call_next()
        return len(waiting)

    def dissolve(self, error: CodedError) -> None:
        """Let all go home, the suspects to be isolated there. The worker must not be dead:
        what cannot be taken from it fails with ``error``."""
        self.turns.halt()
        for entry in list(self.turns.entries.values()):
            if entry.is_canary or (entry.sent and not self.turns.put_aside(entry, anew=True)):
                self._remove(entry.id)
                entry.stream.fail(error)
        self._home.take(self.give(list(self.turns.entries.values())))

    def _go_on_after(self, cleared: Entry) -> None:
        if self.turns.put_aside(cleared):
            self._home.take(self.give([cleared]))
        self.turns.call_next()

    def _remove(self, request_id: int) -> Entry | None:
        entry = super()._remove(request_id)
        self._home.idle_since = self.idle_since
        return entry
