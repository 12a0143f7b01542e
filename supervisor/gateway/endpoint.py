"""What happens around every handler: request id, keys, errors, counting.

An ``Endpoint`` is the ASGI application behind one route. A handler gets a
``Call`` and returns a Starlette response or raises; nothing wraps ``send``, so a
streamed chunk goes from the handler's loop straight to the server.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import string
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Literal
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from protocol.errors import CodedError
from supervisor.fleet import Fleet
from supervisor.gateway.auth import Guard, Side
from supervisor.gateway.body import ClientDisconnected
from supervisor.gateway.candidates import Candidates
from supervisor.gateway.errors import MethodNotAllowed, coded, error_response
from supervisor.gateway.lag import Lag
from supervisor.gateway.openai.responses_store import ResponseStore
from supervisor.gateway.recordings import Recordings
from supervisor.gateway.running import RunningCalls
from supervisor.metrics import CLIENT_DISCONNECTED, OK, Metrics
from supervisor.names import Names
from supervisor.settings import Settings
from supervisor.stream import RequestStream

log = logging.getLogger(__name__)

#: ``*`` takes every method that has no handler of its own.
Method = Literal["GET", "POST", "DELETE", "*"]

_IN_HEADERS = string.punctuation.replace("%", "") + " "

#: Names the model that has answered.
SERVED_BY = b"x-served-model"

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Gateway(msgspec.Struct, eq=False):
    """What every handler may use. A reload replaces ``settings`` and ``names``.

    ``names``: what models may be asked for by.
    """

    fleet: Fleet
    settings: Settings
    names: Names
    metrics: Metrics
    guard: Guard
    running: RunningCalls
    responses: ResponseStore
    recordings: Recordings
    #: Reads the settings as at the start; raises ``ConfigError``.
    reread: Callable[[], Settings]
    lag: Lag = msgspec.field(default_factory=Lag)
    reloading: asyncio.Lock = msgspec.field(default_factory=asyncio.Lock)


class Call(Request):
    """One HTTP request on its way through a handler.

    ``model`` is the metrics label: the id of a tracked model, else empty.
    ``outcome`` is ``OK`` or the stable error code; a stream may change it after
    its headers have gone. ``deadline`` is the timer of the client's own deadline.
    ``served_by`` is the id of the model that serves it, once that is certain;
    ``candidates`` are those it may still go to, when it did not name one by its id.
    ``starting`` stands for its requests while they wait for a model, ``only_model`` for which,
    if there is only one.
    ``resumes`` is how often its answer has gone on after a crash, once it is released.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        super().__init__(scope, receive)
        self.request_id = request_id_of(scope)
        self.model = ""
        self.outcome = OK
        self.deadline: asyncio.TimerHandle | None = None
        self.served_by = ""
        self.candidates: Candidates[list[RequestStream]] | None = None
        self.starting: RequestStream | None = None
        self.only_model = ""
        self.resumes = 0


Handler = Callable[[Gateway, Call], Awaitable[Response]]
#: Puts an error into the words of one API.
Refuse = Callable[[CodedError, Call], Response]


def _refuse(error: CodedError, call: Call) -> Response:
    return error_response(error)


class Endpoint:
    """One resource and its handlers by method. ``name`` is its label in the metrics."""

    def __init__(
        self,
        gateway: Gateway,
        side: Side,
        name: str,
        handlers: Mapping[Method, Handler],
        refuse: Refuse = _refuse,
    ) -> None:
        self._gateway = gateway
        self._side = side
        self._name = name
        self._refuse = refuse
        self._handlers: dict[str, Handler] = {name: handlers[name] for name in handlers}
        if "GET" in self._handlers:
            self._handlers["HEAD"] = self._handlers["GET"]

    @property
    def side(self) -> Side:
        return self._side

    @property
    def methods(self) -> list[str]:
        return list(self._handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive)
        try:
            response = await self._answer(call)
        except ClientDisconnected:
            # The server drops this; it only keeps the exchange complete.
            call.outcome = CLIENT_DISCONNECTED
            response = Response(status_code=499)
        except Exception as error:
            refusal = coded(error)
            if refusal is not error and refusal.code.value == "internal_error":
                log.exception("request %s to %s failed", call.request_id.decode(), self._name)
            call.outcome = refusal.code.value
            response = self._refuse(refusal, call)
        else:
            if call.served_by:
                response.raw_headers.append((SERVED_BY, _header_value(call.served_by)))
        response.raw_headers.append((b"x-request-id", call.request_id))
        if call.resumes:
            response.raw_headers.append((b"x-resumed", b"%d" % call.resumes))
        try:
            await response(scope, receive, send)
        finally:
            self._gateway.metrics.request_ended(call.model, self._name, call.outcome)

    async def _answer(self, call: Call) -> Response:
        self._gateway.guard.check(call, self._side)
        handler = self._handlers.get(call.method) or self._handlers.get("*")
        if handler is None:
            raise MethodNotAllowed(", ".join(sorted(self._handlers)))
        return await handler(self._gateway, call)


@lru_cache
def _header_value(model_id: str) -> bytes:
    """As it is, but for what a header cannot have, which is percent-encoded."""
    return quote(model_id, safe=_IN_HEADERS).encode()


def request_id_of(scope: Scope) -> bytes:
    """The client's own id when it is well-formed, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return secrets.token_hex(16).encode()
