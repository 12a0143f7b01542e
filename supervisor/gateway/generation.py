"""From a validated request to a running one, and to its whole answer.

Whoever holds a stream here lets go of it in every case: at the end, on an
error, and the moment the client disconnects, so that no worker generates for
nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.types import Receive

from protocol.errors import CodedError, ErrorCode
from protocol.messages import FinishReason, Generate
from supervisor.gateway.body import ClientDisconnected
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.stream import Chunk, RequestStream


def submit(
    gateway: Gateway, call: Call, model: str, request: Generate, *, streaming: bool
) -> RequestStream:
    """Start a request and label the call with the model's id once that is known to be tracked."""
    try:
        stream = gateway.fleet.submit(model, request, streaming=streaming)
    except CodedError as error:
        if error.code is not ErrorCode.MODEL_NOT_FOUND:
            call.model = model
        raise
    call.model = model
    return stream


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
        # Close first: a stream that has failed is over, and nobody would be told to cancel it.
        stream.close()
        stream.fail(ClientDisconnected())


async def collect(gateway: Gateway, call: Call, streams: Sequence[RequestStream]) -> list[Chunk]:
    """Wait for all the answers; when one fails, all are given up and its error is raised."""
    watch = watch_disconnect(call.receive, streams)
    try:
        return [checked(await stream.collect()) for stream in streams]
    finally:
        watch.cancel()
        release(gateway, call, streams)


def release(gateway: Gateway, call: Call, streams: Sequence[RequestStream]) -> None:
    """Let go of streams, finished or not, and count their tokens."""
    for stream in streams:
        stream.close()
    gateway.metrics.tokens(
        call.model,
        sum(stream.prompt_tokens for stream in streams),
        sum(stream.completion_tokens for stream in streams),
    )


def checked(chunk: Chunk) -> Chunk:
    """Pass a chunk on unless it ends in a cancellation that the client never asked for."""
    if chunk.finish is FinishReason.CANCELLED:
        raise cancelled_by_server()
    return chunk


def cancelled_by_server() -> CodedError:
    return CodedError(ErrorCode.INTERNAL_ERROR, "the server cancelled the request")
