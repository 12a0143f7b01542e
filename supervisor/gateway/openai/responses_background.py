"""Responses that are answered whether or not anybody waits: ``background``.

Each is a recorded stream under the response's own id, whose numbers are those of the
events; who does not read it gets the response object as far as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import msgspec
from starlette.responses import Response as HttpResponse

from protocol.errors import CodedError, ErrorCode
from protocol.messages import Generate
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import JSON_TYPE
from supervisor.gateway.following import Following
from supervisor.gateway.generation import cancel, release, submit
from supervisor.gateway.openai.parameters import invalid_value, unsupported
from supervisor.gateway.openai.responses_answers import Response
from supervisor.gateway.openai.responses_events import ResponseEvents
from supervisor.gateway.recordings import Recording
from supervisor.gateway.scheduling import CONVERSATION_HEADER, Terms, key_digest
from supervisor.gateway.starting import begun
from supervisor.gateway.streaming import record_events
from supervisor.stream import RequestStream

#: When to ask again if every place is taken by a stream that runs.
_RETRY_AFTER_S = 5.0
#: So long it is waited for a refusal of a model that has to be loaded.
_AT_ONCE_S = 1.0


class Background:
    """One response on its way. Raises, when it is made, if there is no place for it."""

    def __init__(
        self,
        gateway: Gateway,
        call: Call,
        response: Response,
        make_events: Callable[[], ResponseEvents],
    ) -> None:
        if not response.store:
            raise invalid_value("background", "needs a response that is kept (store)")
        if not gateway.recordings.keeps:
            raise unsupported("background", "with stream_store_max 0 it is")
        self._gateway = gateway
        self._call = call
        self._response = response
        self._make_events = make_events
        self._events: ResponseEvents | None = None
        self._streams: list[RequestStream] = []
        conversation = call.headers.get(CONVERSATION_HEADER)
        recording = gateway.recordings.begin(
            key_digest(call), conversation, lambda: cancel(self._streams), response.id
        )
        if recording is None:
            raise CodedError(
                ErrorCode.RATE_LIMIT_EXCEEDED,
                "as many streams as are kept are running already",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._recording: Recording = recording
        recording.state = self._state

    async def start(self, model: str, generate: Generate, terms: Terms, started: float) -> None:
        """Raises what is refused at once; what is refused later ends the response."""
        gateway, call = self._gateway, self._call
        streams = self._streams
        try:
            streams = self._streams = await submit(
                gateway, call, model, [generate], terms, streaming=True
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AT_ONCE_S):
                    await begun(call)
        except BaseException:
            gateway.recordings.forget(self._recording)
            release(gateway, call, streams)
            raise
        record_events(gateway, call, streams, self._begin, started, self._recording)

    def followed(self) -> HttpResponse:
        return Following(self._gateway, self._call, self._recording)

    def answer(self) -> HttpResponse:
        return HttpResponse(self._state(), media_type=JSON_TYPE)

    def _begin(self) -> ResponseEvents:
        self._events = self._make_events()
        return self._events

    def _state(self) -> bytes:
        response = self._response if self._events is None else self._events.response
        return msgspec.json.encode(response)


def in_background(gateway: Gateway, call: Call) -> Recording | None:
    """The recording of the response that a request names, if its key has one."""
    recording = gateway.recordings.get(key_digest(call), call.path_params["id"])
    return recording if recording is not None and recording.state is not None else None
