"""From a validated request to a running one, and to its whole answer.

Whoever holds a stream here lets go of it in every case: at the end, on an
error, and the moment the client disconnects, so that no worker generates for
nobody.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.types import Receive

from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason, Job
from supervisor.gate import NO_OPTIONS
from supervisor.gateway.body import ClientDisconnected
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import DeadlinePassed, RequestCancelled
from supervisor.gateway.routing import GENERATE, candidates
from supervisor.gateway.scheduling import Terms
from supervisor.gateway.starting import begun, start_later
from supervisor.stream import Chunk, RequestStream


async def submit(
    gateway: Gateway,
    call: Call,
    model: str,
    requests: Sequence[Job],
    terms: Terms,
    *,
    streaming: bool,
    kind: str = GENERATE,
) -> list[RequestStream]:
    """Start the requests of one call, all or none, on the terms of that call.

    ``model`` is an id, or a name that stands for some; ``kind`` is what the model has to be.
    Whoever gets the streams must ``release`` them, and may find others in the list after
    ``accepted`` or ``collect``, if there was a model to wait for or the first one failed.
    Labels the call with the model's id once that is known to be tracked.

    Raises what ``Fleet.submit`` does, or ``request_timeout`` when the client's deadline has
    passed by now. A model that has to be loaded for them is not waited for here: what
    ``Fleet.prepare`` says then is raised by ``begun``, ``accepted`` or ``collect``.
    """
    gateway.metrics.client_request(terms.client_name)
    if _remaining_s(terms) <= 0:
        raise DeadlinePassed(terms.timeout_s or 0.0, 0)

    async def start(model_id: str, options: Mapping[str, Any]) -> list[RequestStream]:
        await gateway.fleet.prepare(model_id, options)
        return _start(gateway, call, model_id, requests, terms, streaming)

    route = gateway.names.routes.get(model)
    if route is not None:
        call.candidates = await candidates(gateway, model, route, start, kind)
        work, ids = call.candidates.first(), call.candidates.left
    else:
        work, ids = start(model, NO_OPTIONS), [model]
    if any(map(gateway.fleet.must_prepare, ids)):
        streams: list[RequestStream] = []
        call.only_model = ids[0] if len(ids) == 1 else ""
        start_later(call, streams, work, partial(_let_go, gateway, call))
    else:
        streams = await work
    gateway.running.add(call.request_id, call, streams)
    if terms.timeout_s is not None:
        loop = asyncio.get_running_loop()
        call.deadline = loop.call_later(_remaining_s(terms), _expire, streams, terms.timeout_s)
    return streams


def _start(
    gateway: Gateway,
    call: Call,
    model: str,
    requests: Sequence[Job],
    terms: Terms,
    streaming: bool,
) -> list[RequestStream]:
    streams: list[RequestStream] = []
    try:
        for request in requests:
            request = msgspec.structs.replace(request, client=terms.client, priority=terms.priority)
            stream = gateway.fleet.submit(model, request, streaming=streaming, resume=terms.resume)
            streams.append(stream)
    except CodedError as error:
        if error.code is not ErrorCode.MODEL_NOT_FOUND:
            call.model = model
        # One was refused: those before it are given up.
        _let_go(gateway, call, streams)
        raise
    call.model = model
    return streams


async def accepted(gateway: Gateway, call: Call, streams: list[RequestStream]) -> None:
    """Wait until a worker has taken the requests, another model's if the first one fails.

    Raises the refusal. After it has returned the call stays with its model. Who is cancelled
    may come back: what the requests wait for goes on.
    """
    while True:
        await begun(call)
        try:
            for stream in streams:
                await stream.accepted()
        except CodedError as error:
            _move_on(gateway, call, streams, error)
        else:
            call.candidates = None
            call.served_by = call.model
            return


def _move_on(gateway: Gateway, call: Call, streams: list[RequestStream], error: CodedError) -> None:
    """Let the next candidate have the requests; without one ``error`` is raised."""
    if call.candidates is None:
        raise error
    failed = streams[:]
    start_later(call, streams, call.candidates.after(error), partial(_let_go, gateway, call))
    _let_go(gateway, call, failed)


def _remaining_s(terms: Terms) -> float:
    """Until the client's deadline, if it has one."""
    if terms.timeout_s is None:
        return math.inf
    return terms.arrived + terms.timeout_s - time.perf_counter()


def fingerprint(gateway: Gateway, model: str) -> str | None:
    """OpenAI's ``system_fingerprint``: what, besides the seed, decides the text."""
    try:
        return gateway.fleet.fingerprint(model)
    except CodedError:
        return None


def watch_disconnect(receive: Receive, streams: Sequence[RequestStream]) -> asyncio.Task[None]:
    """Cancel the streams' work when the client goes; their consumer gets ``ClientDisconnected``.

    The body must have been read. The caller cancels the task when it is done.
    """
    return asyncio.create_task(_watch(receive, streams))


async def _watch(receive: Receive, streams: Sequence[RequestStream]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    for stream in streams:
        give_up(stream, ClientDisconnected())


def _expire(streams: Sequence[RequestStream], timeout_s: float) -> None:
    for stream in streams:
        give_up(stream, DeadlinePassed(timeout_s, _tokens_sent(stream)))


def cancel(streams: Sequence[RequestStream]) -> None:
    """End requests because somebody asked for it; their consumer gets ``RequestCancelled``."""
    for stream in streams:
        give_up(stream, RequestCancelled(_tokens_sent(stream)))


def _tokens_sent(stream: RequestStream) -> int:
    return stream.completion_tokens if stream.delivered else 0


def give_up(stream: RequestStream, error: CodedError) -> None:
    """Cancel a stream's work; its consumer gets ``error`` after what has come by now."""
    # Close first: a stream that has failed is over, and nobody would be told to cancel it.
    stream.close()
    stream.fail(error)


async def collect(gateway: Gateway, call: Call, streams: list[RequestStream]) -> list[Chunk]:
    """Wait for all the answers; when one fails, all are given up, and another model gets
    the requests if there is one that may; else the error is raised."""
    watch = watch_disconnect(call.receive, streams)
    try:
        while True:
            await begun(call)
            try:
                chunks = [checked(await stream.collect()) for stream in streams]
            except CodedError as error:
                _move_on(gateway, call, streams, error)
            else:
                call.served_by = call.model
                return chunks
    finally:
        watch.cancel()
        release(gateway, call, streams)


def release(gateway: Gateway, call: Call, streams: Sequence[RequestStream]) -> None:
    """Let go of streams, finished or not, and of their deadline; count their tokens."""
    gateway.running.remove(call.request_id, call)
    if call.deadline is not None:
        call.deadline.cancel()
    _let_go(gateway, call, streams)


def _let_go(gateway: Gateway, call: Call, streams: Sequence[RequestStream]) -> None:
    if not streams:
        return
    for stream in streams:
        stream.close()
        if stream.started_after_s is not None:
            gateway.metrics.started(call.model, stream.started_after_s)
        if stream.resumes:
            gateway.metrics.resumed(call.model, completed=stream.completed)
    call.resumes = max((stream.resumes for stream in streams), default=0)
    gateway.metrics.tokens(
        call.model,
        sum(stream.prompt_tokens for stream in streams),
        sum(stream.completion_tokens for stream in streams),
        sum(stream.cached_tokens for stream in streams),
    )


def checked(chunk: Chunk) -> Chunk:
    """Pass a chunk on unless it ends in a cancellation that the client never asked for."""
    if chunk.finish is FinishReason.CANCELLED:
        raise cancelled_by_server()
    return chunk


def cancelled_by_server() -> CodedError:
    return CodedError(ErrorCode.INTERNAL_ERROR, "the server cancelled the request")
