"""Responses that clients may read again or go on from: in memory, and only so many.

Each has its whole conversation, so that those before it may be forgotten; encoded, so
that what it takes is known. Nobody but the key that asked for a response sees it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from supervisor.gateway.openai.responses_items import Item, OutputItem

_items = msgspec.json.Decoder(list[Item])
_encode = msgspec.json.Encoder().encode

#: What an item's place in the index takes, roughly.
_INDEX_BYTES = 200


class Stored(NamedTuple):
    """``input`` is the conversation before ``output``, in as many parts as it came.

    ``owner`` is the digest of a key.
    """

    owner: str
    response: bytes
    input: tuple[bytes, ...]
    output: bytes
    item_ids: tuple[str, ...]

    @property
    def input_items(self) -> list[Item]:
        return _decoded(self.input)

    @property
    def conversation_items(self) -> list[Item]:
        return _decoded(self.conversation)

    @property
    def conversation(self) -> tuple[bytes, ...]:
        return (*self.input, self.output)

    @property
    def size(self) -> int:
        """Parts that are shared with other responses count for each."""
        parts = sum(map(len, self.conversation))
        return len(self.response) + parts + _INDEX_BYTES * len(self.item_ids)


def _decoded(parts: Sequence[bytes]) -> list[Item]:
    return [item for part in parts for item in _items.decode(part)]


class ResponseStore:
    """At most ``max_count`` responses of ``max_bytes`` together; the longest unused go first."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0
        #: The response that an item was in last, by its owner and id.
        self._items: dict[tuple[str, str], str] = {}

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._max_count > 0 and self._max_bytes > 0

    def put(
        self,
        owner: str,
        response_id: str,
        response: bytes,
        previous: Stored | None,
        given: Sequence[Item],
        output: Sequence[OutputItem],
    ) -> None:
        """Keep a response, what it answered to ``given`` in the conversation of ``previous``.

        One that would not fit even alone is not kept.
        """
        stored = Stored(
            owner,
            response,
            (*(previous.conversation if previous is not None else ()), _encode(given)),
            _encode(output),
            tuple(item.id for item in (*given, *output)),
        )
        size = stored.size
        if size > self._max_bytes or self._max_count < 1:
            return
        while self._stored and (
            len(self._stored) >= self._max_count or self._bytes + size > self._max_bytes
        ):
            self._drop(next(iter(self._stored)))
        self._stored[response_id] = stored
        self._bytes += size
        self._items.update(((owner, item_id), response_id) for item_id in stored.item_ids)

    def get(self, owner: str, response_id: str) -> Stored | None:
        """None also for a response of another owner."""
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner:
            return None
        self._stored.move_to_end(response_id)
        return stored

    def delete(self, owner: str, response_id: str) -> bool:
        """Whether there was one. Later responses keep what they have of it."""
        if self.get(owner, response_id) is None:
            return False
        self._drop(response_id)
        return True

    def item(self, owner: str, item_id: str) -> Item | None:
        """An item by its id, as long as a response is kept that it came in or out with."""
        response_id = self._items.get((owner, item_id))
        stored = self.get(owner, response_id) if response_id is not None else None
        if stored is None:
            return None
        items = _decoded((stored.input[-1], stored.output))
        return next((item for item in items if item.id == item_id), None)

    def _drop(self, response_id: str) -> None:
        stored = self._stored.pop(response_id)
        self._bytes -= stored.size
        for item_id in stored.item_ids:
            if self._items.get((stored.owner, item_id)) == response_id:
                del self._items[stored.owner, item_id]
