"""What the session and a backend see of the connection to the supervisor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from protocol.messages import FromWorker, ToWorker


class Link(Protocol):
    """See ``transport.DataLink``. Use from the thread that made it only."""

    def send(self, message: FromWorker) -> None:
        """Send, waiting while the supervisor is not reading."""

    def send_frame(self, frame: bytes) -> None:
        """Send bytes as they are."""

    def wait(self) -> ToWorker:
        """Block until a message arrives. Raises ``CodecError``."""

    def has_news(self, wait_s: float) -> bool:
        """Whether a message is there, or arrives within so many seconds."""

    def pending(self) -> Iterator[ToWorker]:
        """The messages that are there now. Raises ``CodecError``."""


@runtime_checkable
class LinkWrapper(Protocol):
    """A backend that stands between the session and its link.

    The seam of the fault harness: no backend but the simulated one has it.
    """

    def wrap_link(self, link: Link) -> Link:
        """The link to use from now on; called once, before anything is sent."""
