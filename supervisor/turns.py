"""Whose turn it is on a model's worker: everybody's, or that of one suspect alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from protocol.messages import Cancel
from supervisor.entries import Entry, OpenInquiry, worker_blocked
from supervisor.inquiries import Inquiries
from supervisor.line import Delivery, Line, SendToWorker
from supervisor.suspects import Suspects

#: Ids are unique within one supervisor, so that no message can be mistaken.
_ids = count(1)


def new_id() -> int:
    """For a request, or for one more run of it."""
    return next(_ids)


class Turns:
    """The unfinished ``entries`` of one model, and the inquiries beside them, by what its worker
    has of them. Methods run on the event loop and never wait.

    After a death those that were in flight have the worker one at a time, oldest first; others
    wait until it ``flows`` again. Canaries never wait.
    """

    def __init__(self, *, max_inquiries: int) -> None:
        self.entries: dict[int, Entry] = {}
        self.inquiries = Inquiries(
            max_inquiries, run=self.run, call_off=self._call_off, when_free=self.call_next
        )
        self.line = Line()
        #: Whether everybody has the worker.
        self.flows = False
        self._suspects = Suspects()

    def connect(self, send: SendToWorker | None) -> None:
        """Another worker, or none: only canaries reach it until ``call_next``."""
        self.line.connect(send)
        self.halt()

    def halt(self) -> None:
        """From now on nobody is given the worker, but for canaries."""
        self.flows, self._suspects.current = False, None

    @property
    def current(self) -> Entry | None:
        """The suspect that has the worker alone."""
        return self._suspects.current

    @property
    def suspects(self) -> int:
        return sum(entry.suspect for entry in self.entries.values())

    @property
    def is_blocked(self) -> bool:
        """Whether anybody waits for the current suspect."""
        if self.current is None:
            return False
        asked = len(self.inquiries) > len(self.inquiries.sent())
        return asked or any(not (each.suspect or each.sent) for each in self.entries.values())

    def sent(self) -> list[Entry]:
        """Those that the worker has."""
        return [entry for entry in self.entries.values() if entry.sent]

    def run(self, entry: Entry | OpenInquiry) -> bool:
        """Give a request to the worker if it is its turn; False when that does not read.

        A request that is lost with its worker stays, and runs on the next one.
        """
        alone = (self.current, self.inquiries.current)
        may_run = self.flows or entry.is_canary or any(entry is each for each in alone)
        if not self.line.is_up or not may_run:
            return True
        delivery = self.line.send(entry.request)
        if delivery is Delivery.SENT:
            entry.sent = True
            entry.runs += 1
        return delivery is not Delivery.BLOCKED

    def call_next(self) -> None:
        """Let the next suspect have the worker alone; everybody, if there is none."""
        while (entry := self._suspects.call(self.entries.values())) is not None:
            if self.run(entry):
                return
            self._refuse(entry)
        if self.inquiries.call():
            return
        self.flows = True
        for entry in sorted(self.entries.values(), key=lambda entry: entry.opened_at):
            if not entry.sent and not self.run(entry):
                self._refuse(entry)
        self.inquiries.resume()

    def cleared(self) -> Entry | None:
        """The current one, if it has come far enough to be no suspect any more."""
        return self.current if self._suspects.is_cleared() else None

    def accuse(self, entry: Entry, *, suspected: bool) -> None:
        """See ``Suspects``; its worker is dead."""
        entry.sent = entry.begun = False
        self._suspects.accuse(entry, suspected=suspected)

    def put_aside(self, entry: Entry, *, anew: bool = False) -> bool:
        """Take one from the worker, to run later or elsewhere; see ``Entry.run_as``."""
        before = entry.id
        if not entry.run_as(new_id(), anew=anew):
            return False
        del self.entries[before]
        self.entries[entry.id] = entry
        self.line.give_up(before)
        return True

    def join(self, entries: Iterable[Entry]) -> None:
        """Take in what comes from elsewhere, suspects or not; the worker has none of them."""
        self.entries.update((entry.id, entry) for entry in entries)
        if not self.flows:
            return
        if self.suspects:
            # Who runs goes on after them: beside one it might die of that.
            for entry in self.sent():
                self.put_aside(entry, anew=True)
            self.flows = False
        self.call_next()

    def ended(self, entry: Entry) -> None:
        """One that was taken out of ``entries``; if it had the worker alone, the next gets it."""
        if self._suspects.forget(entry):
            self.call_next()

    def clear(self) -> list[Entry]:
        """Forget all entries, and whom was suspected; those that there were."""
        self._suspects = Suspects()
        entries, self.entries = list(self.entries.values()), {}
        return entries

    def _refuse(self, entry: Entry) -> None:
        """The worker does not take it."""
        self.entries.pop(entry.id, None)
        entry.stream.fail(worker_blocked())

    def _call_off(self, request_id: int) -> None:
        self.line.send(Cancel(request_id))
