"""The calls that have requests running, by their ids: what can be cancelled."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import Request

from supervisor.gateway.scheduling import presented_key
from supervisor.stream import RequestStream


class _Running(NamedTuple):
    request: Request
    streams: Sequence[RequestStream]


class RunningCalls:
    """As many as there are calls with streams; whoever adds one removes it.

    A client chooses its ids itself, so several calls may have the same.
    """

    def __init__(self) -> None:
        self._calls: dict[bytes, list[_Running]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._calls.values()))

    def add(self, request_id: bytes, request: Request, streams: Sequence[RequestStream]) -> None:
        self._calls.setdefault(request_id, []).append(_Running(request, streams))

    def remove(self, request_id: bytes, request: Request) -> None:
        """Idempotent."""
        calls = [each for each in self._calls.get(request_id, []) if each.request is not request]
        if calls:
            self._calls[request_id] = calls
        else:
            self._calls.pop(request_id, None)

    def unfinished(self, request_id: bytes, asking: Request) -> list[RequestStream]:
        """What runs under this id of calls with the same key as the one who asks."""
        key = presented_key(asking).encode()
        return [
            stream
            for each in self._calls.get(request_id, [])
            if hmac.compare_digest(presented_key(each.request).encode(), key)
            for stream in each.streams
            if not stream.ended
        ]
