"""What to say to a request that is for another kind of model."""

from __future__ import annotations

from protocol.errors import CodedError, ErrorCode
from protocol.messages import ModelKind

_USES = {
    ModelKind.GENERATE: (
        "this model generates text; vectors and ranks take an embedding model or a reranker, "
        "as a GGUF on llama.cpp"
    ),
    ModelKind.EMBED: "this is an embedding model: it serves /v1/embeddings and nothing else",
    ModelKind.RERANK: "this is a reranker: it serves /v1/rerank and nothing else",
}


def wrong_kind(kind: ModelKind) -> CodedError:
    """The refusal, by a model that is of this kind."""
    return CodedError(ErrorCode.INVALID_VALUE, _USES[kind], param="model")
