"""What a request table says to the worker it is connected to, and hears of what it gave up."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from protocol.messages import Cancel, ToWorker

#: Requests that were given up and of which the worker has not told the end yet. It does
#: so within a step: one that has so many does not read, and what it is sent piles up.
MAX_GIVEN_UP = 64


class Delivery(StrEnum):
    """What became of a message to the worker."""

    SENT = "sent"
    #: The worker is dying or dead; its exit is about to be told.
    LOST = "lost"
    #: The worker is alive and does not read.
    BLOCKED = "blocked"


SendToWorker = Callable[[ToWorker], Delivery]


class Line:
    """To one worker at a time, or to none."""

    def __init__(self) -> None:
        self._send: SendToWorker | None = None
        #: Given up, and not ended yet at the worker; by id, whether that was told.
        self._given_up: dict[int, bool] = {}

    def connect(self, send: SendToWorker | None) -> None:
        self._given_up.clear()
        self._send = send

    @property
    def is_up(self) -> bool:
        return self._send is not None

    @property
    def is_clogged(self) -> bool:
        """Whether the worker has not ended so much that it gets no more."""
        return len(self._given_up) >= MAX_GIVEN_UP

    def send(self, message: ToWorker) -> Delivery:
        """``LOST`` without a worker."""
        return Delivery.LOST if self._send is None else self._send(message)

    def give_up(self, request_id: int) -> None:
        """The worker need not go on with what it was sent."""
        if self._send is not None:
            self._given_up[request_id] = self._send(Cancel(request_id)) is Delivery.SENT

    def hear_of(self, request_id: int, *, ended: bool = False) -> None:
        """The worker has spoken of a request that nobody waits for any more."""
        if ended:
            self._given_up.pop(request_id, None)
        elif self._given_up.get(request_id) is False:
            # It could not be told then. It works at it, so now it may well read.
            self.give_up(request_id)
