"""Drives an ASGI application message by message: what an HTTP client cannot do in process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from supervisor.gateway.connection import BODY_WRITER

#: Settings by name to an application.
MakeApp = Callable[..., ASGIApp]


class Exchange:
    """One request. ``body`` pieces are handed out one by one, then nothing until ``disconnect``."""

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        *,
        body: bytes | Sequence[bytes] = b"",
        json: object = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        sent = {"host": "127.0.0.1:8000", **(headers or {})}
        pieces = [body] if isinstance(body, bytes) else list(body)
        if json is not None:
            pieces = [msgspec.json.encode(json)]
            sent.setdefault("content-type", "application/json")
        self._pieces = pieces
        path, _, query = path.partition("?")
        self._gone = asyncio.Event()
        self._news = asyncio.Event()
        self.pieces_read = 0
        self.messages: list[Message] = []
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 5000),
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in sent.items()],
            BODY_WRITER: self,
        }
        #: Whether the client is behind: nothing can be written without waiting.
        self.behind = False
        self.task = asyncio.create_task(self._run(app))

    async def _run(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self._receive, self._send)
        finally:
            self._news.set()

    async def _receive(self) -> Message:
        if self._pieces:
            self.pieces_read += 1
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        assert not self.ended, "a message after the end of the answer"
        self.messages.append(message)
        self._news.set()

    def write(self, data: bytes) -> None:
        """As ``supervisor.gateway.connection.BodyWriter``."""
        assert not self.ended, "a piece after the end of the answer"
        assert data, "an empty piece would end the answer"
        self.messages.append({"type": "http.response.body", "body": data, "more_body": True})
        self._news.set()

    def disconnect(self) -> None:
        self._gone.set()

    async def wait_for_messages(self, count: int) -> None:
        while len(self.messages) < count:
            assert not self.task.done() or self.task.exception() is None
            self._news.clear()
            await self._news.wait()

    async def wait_for(self, part: bytes) -> None:
        """Wait until it is in the body."""
        async with asyncio.timeout(5):
            while part not in self.body:
                assert not self.task.done(), self.body
                self._news.clear()
                await self._news.wait()

    async def finish(self) -> None:
        await self.task

    @property
    def ended(self) -> bool:
        return any(
            message["type"] == "http.response.body" and not message.get("more_body", False)
            for message in self.messages
        )

    @property
    def status(self) -> int:
        status = self.messages[0]["status"]
        assert isinstance(status, int)
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.messages[1:]]

    @property
    def body(self) -> bytes:
        return b"".join(self.bodies)

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def events(body: bytes) -> list[Any]:
    """The values of the ``data:`` events of a body; ``[DONE]`` stays a string."""
    found = []
    for block in body.split(b"\n\n"):
        if block.startswith(b"data: "):
            data = block.removeprefix(b"data: ")
            assert b"\n" not in data
            assert b"\r" not in data
            found.append("[DONE]" if data == b"[DONE]" else msgspec.json.decode(data))
    return found
