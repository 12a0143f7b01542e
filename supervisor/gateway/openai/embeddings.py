"""``POST /v1/embeddings``: texts in, a vector of length 1 for each out."""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from base64 import b64encode
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from protocol.messages import Embed
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import JSON_TYPE
from supervisor.gateway.generation import collect, submit
from supervisor.gateway.openai.parameters import (
    PositiveInt,
    TokenId,
    invalid_value,
    texts_or_tokens,
)
from supervisor.gateway.scheduling import terms_of

#: Inputs of one request.
MAX_INPUTS = 2048

#: After so many vectors of an answer others have their turn on the event loop.
_VECTORS_PER_TURN = 64

_encode = msgspec.json.Encoder().encode


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveInt | None = None
    user: Any = None
    safety_identifier: Any = None


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


_decoder = msgspec.json.Decoder(EmbeddingRequest)


async def embeddings(gateway: Gateway, call: Call) -> Response:
    started = time.perf_counter()
    request = await read_json(call, _decoder, gateway.settings)
    job = Embed(0, inputs_of(request), dimensions=request.dimensions)
    claims = (request.user, request.safety_identifier)
    terms = terms_of(call, started, api_key=gateway.settings.api_key, claims=claims)
    streams = await submit(
        gateway, call, request.model, [job], terms, streaming=False, kind="embed"
    )
    await collect(gateway, call, streams)
    (stream,) = streams
    base64 = request.encoding_format == "base64"
    body = await _render(call.model, stream.vectors, stream.prompt_tokens, base64=base64)
    return Response(body, media_type=JSON_TYPE)


def inputs_of(request: EmbeddingRequest) -> list[str | list[int]]:
    """Raises ``CodedError`` for what the decoder cannot see."""
    inputs = texts_or_tokens(request.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise invalid_value("input", f"at most {MAX_INPUTS} inputs, not {len(inputs)}")
    for text in inputs:
        if not text:
            raise invalid_value("input", "must not be, or have in it, an empty text")
    return inputs


async def _render(model: str, vectors: list[bytes], tokens: int, *, base64: bool) -> bytes:
    """The answer, made in pieces: thousands of vectors are tens of megabytes of text."""
    pieces = []
    for index, vector in enumerate(vectors):
        value = _encode(b64encode(vector).decode() if base64 else _numbers(vector))
        pieces.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, value))
        if index % _VECTORS_PER_TURN == _VECTORS_PER_TURN - 1:
            await asyncio.sleep(0)
    usage = _encode(EmbeddingUsage(tokens, tokens))
    head = b'{"object":"list","model":%b,"usage":%b,"data":[' % (_encode(model), usage)
    return b"".join([head, b",".join(pieces), b"]}"])


def _numbers(vector: bytes) -> list[float]:
    numbers = array("f", vector)
    if sys.byteorder != "little":
        numbers.byteswap()
    return numbers.tolist()
