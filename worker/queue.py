"""Who gets the next free slot: lanes, turns among clients, arrival.

Pure and deterministic: no clock, no I/O. Knows requests by their ids only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.messages import Priority

#: A lane in which somebody waits is passed over at most so often in a row; then it
#: has its turn. Of two lanes at that point the higher goes first.
MAX_PASSED_OVER = 8

#: How many clients without a request are remembered, so that who comes back after
#: each answer is not taken for somebody new. Who is forgotten was served the longest ago.
_REMEMBERED_CLIENTS = 1024

#: From the highest to the lowest.
_LANES = (Priority.HIGH, Priority.NORMAL, Priority.LOW)


@dataclass(slots=True)
class _Client:
    """``turn`` orders clients by when they were served last; see ``RequestQueue.take``."""

    turn: int
    running: int = 0
    waiting: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    """Per client the ids that wait, in order, each with its number of arrival."""

    waiting: dict[str, dict[int, int]] = field(default_factory=dict)
    passed_over: int = 0


class RequestQueue:
    """The order in which waiting requests are run.

    A request ``enter``s, is ``take``n when there is room for it, and ``leave``s at its
    end, or from the queue when it is cancelled. Lanes go by priority; within one the
    client with the fewest running requests comes first, of those the one that was
    served longest ago, and a client's own requests in order of arrival. So a client
    with one request waits for one turn of each other client that is as entitled, not
    for all that these have queued. A choice costs O(clients that wait).
    """

    def __init__(self) -> None:
        self._lanes = {priority: _Lane() for priority in _LANES}
        self._clients: dict[str, _Client] = {}
        self._waiting: dict[int, tuple[str, Priority]] = {}
        self._running: dict[int, str] = {}
        self._turns = 0
        self._arrivals = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def enter(self, request_id: int, client: str, priority: Priority) -> None:
        """Add a request at the end of its client's line. Raises ``ValueError`` if it is here."""
        if request_id in self._waiting or request_id in self._running:
            raise ValueError(f"request {request_id} is in the queue already")
        known = self._clients.get(client)
        if known is None:
            # Before the client that was served last, behind all that were served
            # earlier: newcomers without end must not keep anybody from a turn.
            known = self._clients[client] = _Client(turn=2 * self._turns)
        known.waiting += 1
        self._arrivals += 1
        self._waiting[request_id] = (client, priority)
        self._lanes[priority].waiting.setdefault(client, {})[request_id] = self._arrivals

    def take(self) -> int | None:
        """Choose the request that runs next and count it as running; None if none waits."""
        if not self._waiting:
            return None
        lines = self._choose_lane().waiting
        client = min(lines, key=lambda name: self._claim(name, lines[name]))
        request_id = next(iter(lines[client]))
        self._drop_waiting(request_id)
        self._running[request_id] = client
        self._turns += 1
        served = self._clients.pop(client)
        served.running += 1
        served.turn = 2 * self._turns + 1
        # At the end: the dict stays in the order of turns, but for newcomers.
        self._clients[client] = served
        return request_id

    def leave(self, request_id: int) -> None:
        """Forget a request, whether it waits or runs; an unknown one is ignored."""
        if request_id in self._waiting:
            self._drop_waiting(request_id)
        elif (client := self._running.pop(request_id, None)) is not None:
            self._clients[client].running -= 1
        self._forget_clients()

    def _claim(self, client: str, line: dict[int, int]) -> tuple[int, int, int]:
        """What is smallest for the client whose turn it is."""
        known = self._clients[client]
        return known.running, known.turn, next(iter(line.values()))

    def _choose_lane(self) -> _Lane:
        """The highest lane that is overdue, else the highest; counts who is passed over."""
        filled = [lane for lane in self._lanes.values() if lane.waiting]
        overdue = (lane for lane in filled if lane.passed_over >= MAX_PASSED_OVER)
        chosen = next(overdue, filled[0])
        for lower in filled[filled.index(chosen) + 1 :]:
            lower.passed_over += 1
        chosen.passed_over = 0
        return chosen

    def _drop_waiting(self, request_id: int) -> None:
        client, priority = self._waiting.pop(request_id)
        self._clients[client].waiting -= 1
        lane = self._lanes[priority]
        del lane.waiting[client][request_id]
        if not lane.waiting[client]:
            del lane.waiting[client]
        if not lane.waiting:
            lane.passed_over = 0

    def _forget_clients(self) -> None:
        if len(self._clients) <= _REMEMBERED_CLIENTS:
            return
        idle = next((n for n, c in self._clients.items() if not c.running and not c.waiting), None)
        if idle is not None:
            del self._clients[idle]
