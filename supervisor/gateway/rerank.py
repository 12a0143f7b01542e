"""``POST /v1/rerank``, as Jina and Cohere have it: which documents answer a query best."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from protocol.messages import Embed
from supervisor.gateway.body import read_json
from supervisor.gateway.endpoint import Call, Gateway
from supervisor.gateway.errors import json_response
from supervisor.gateway.generation import collect, submit
from supervisor.gateway.openai.embeddings import MAX_INPUTS, EmbeddingUsage
from supervisor.gateway.openai.parameters import (
    PositiveInt,
    invalid_value,
    refuse_unsupported,
)
from supervisor.gateway.scheduling import terms_of


class Document(msgspec.Struct):
    text: str


class RerankRequest(msgspec.Struct, kw_only=True):
    model: str
    query: str
    documents: list[str | Document]
    top_n: PositiveInt | None = None
    return_documents: bool | None = None
    user: Any = None
    rank_fields: Any = None
    max_chunks_per_doc: Any = None
    max_tokens_per_doc: Any = None


#: Documented fields that cannot be honoured, with the values that ask for nothing.
_LIMITS: Mapping[str, Sequence[Any]] = {
    "rank_fields": ([], ["text"]),
    "max_chunks_per_doc": (1,),
    "max_tokens_per_doc": (),
}


class Result(msgspec.Struct, omit_defaults=True):
    """``index`` is the document's place in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class Ranking(msgspec.Struct):
    """``results``: the best document first."""

    model: str
    results: list[Result]
    usage: EmbeddingUsage


_decoder = msgspec.json.Decoder(RerankRequest)


async def rerank(gateway: Gateway, call: Call) -> Response:
    started = time.perf_counter()
    request = await read_json(call, _decoder, gateway.settings)
    texts = texts_of(request)
    job = Embed(0, list(texts), query=request.query)
    claims = (request.user,)
    terms = terms_of(call, started, api_key=gateway.settings.api_key, claims=claims)
    streams = await submit(
        gateway, call, request.model, [job], terms, streaming=False, kind="rerank"
    )
    await collect(gateway, call, streams)
    (stream,) = streams
    scores = [struct.unpack("<f", vector)[0] for vector in stream.vectors]
    best = sorted(range(len(texts)), key=lambda index: -scores[index])[: request.top_n]
    results = [
        Result(index, scores[index], Document(texts[index]) if request.return_documents else None)
        for index in best
    ]
    usage = EmbeddingUsage(stream.prompt_tokens, stream.prompt_tokens)
    return json_response(Ranking(call.model, results, usage))


def texts_of(request: RerankRequest) -> list[str]:
    """Raises ``CodedError`` for what the decoder cannot see."""
    refuse_unsupported(request, _LIMITS)
    if not request.query:
        raise invalid_value("query", "must not be empty")
    if not request.documents:
        raise invalid_value("documents", "must not be empty")
    if len(request.documents) > MAX_INPUTS:
        raise invalid_value(
            "documents", f"at most {MAX_INPUTS} documents, not {len(request.documents)}"
        )
    return [each if isinstance(each, str) else each.text for each in request.documents]
