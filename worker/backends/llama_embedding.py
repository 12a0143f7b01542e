"""Embedding models and rerankers on llama.cpp: whole sequences in, one vector each out.

Pooling is the model's own. An encoder, and whatever else pools over all of a sequence,
has to see it in one piece, so the context's batch holds the longest input. A decoder
that pools the last token needs no more than the hidden state of that one: it reads a
long input in parts, as a generator does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy

from protocol.errors import ErrorCode
from protocol.messages import Load, ModelKind
from worker.backends.base import EmbedInput, LoadRefused
from worker.backends.llama_batch import DecodeBatch
from worker.backends.llama_library import ENCODERS, LOG, default_threads
from worker.backends.llama_model import BATCH_SIZE
from worker.backends.llama_vocab import Vocabulary

#: Sequences of one batch.
MAX_SEQUENCES = 64

_NONE = llama_cpp.LLAMA_POOLING_TYPE_NONE
_MEAN = llama_cpp.LLAMA_POOLING_TYPE_MEAN
_LAST = llama_cpp.LLAMA_POOLING_TYPE_LAST
_RANK = llama_cpp.LLAMA_POOLING_TYPE_RANK


class EmbeddingFailed(Exception):
    """llama.cpp could not compute a batch."""


def pooling_of(model: Any, architecture: str | None) -> int | None:
    """How the model's hidden states become one vector; None: it is a generator.

    The file says so. An encoder whose file does not is pooled as sentence-transformers
    does it by default, by the mean.
    """
    found = read_metadata(model, f"{architecture}.pooling_type")
    pooling = int(found) if found is not None and found.lstrip("-").isdecimal() else _NONE
    if pooling > _NONE:
        return pooling
    causal = read_metadata(model, f"{architecture}.attention.causal") != "false"
    return None if causal and architecture not in ENCODERS else _MEAN


def read_metadata(model: Any, key: str) -> str | None:
    """A value of the file's header as text; None if it has none of this name."""
    buffer = ctypes.create_string_buffer(64)
    size = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return None if size < 0 else buffer.value.decode(errors="replace")


def create_embedding_context(model: Any, context_length: int, options: Load, pooling: int) -> Any:
    """A context for whole sequences, or a null pointer: the log has the reason."""
    threads = options.threads or default_threads()
    params = llama_cpp.llama_context_default_params()
    params.embeddings = True
    params.pooling_type = _NONE if pooling == _LAST else pooling
    params.n_seq_max = MAX_SEQUENCES
    params.n_ctx = max(context_length, BATCH_SIZE)
    params.n_batch = params.n_ubatch = params.n_ctx
    params.n_threads = threads
    params.n_threads_batch = threads
    params.kv_unified = True
    params.no_perf = True
    context = llama_cpp.llama_init_from_model(model, params)
    if context and pooling == _LAST and llama_cpp.llama_get_causal_attn(context):
        llama_cpp.llama_free(context)
        params.n_batch = params.n_ubatch = BATCH_SIZE
        context = llama_cpp.llama_init_from_model(model, params)
    return context


class LlamaEmbedder:
    """See ``base.Embedder``. The model and the context must outlive it.

    Raises ``LoadRefused`` for a classifier, which is neither of the two.
    """

    batch_tokens = BATCH_SIZE
    batch_sequences = MAX_SEQUENCES

    def __init__(
        self, model: Any, context: Any, vocabulary: Vocabulary, context_length: int, pooling: int
    ) -> None:
        self._context = context
        self._vocabulary = vocabulary
        self._memory = llama_cpp.llama_get_memory(context)
        self._takes_last = pooling == _LAST
        #: Tokens of one call to the library.
        self._part = llama_cpp.llama_n_ubatch(context)
        self._batch = DecodeBatch(max(context_length, BATCH_SIZE))
        self._dimensions = llama_cpp.llama_model_n_embd_out(model)
        self.kind = ModelKind.EMBED
        if pooling == _RANK:
            self.kind = ModelKind.RERANK
            self._outputs = llama_cpp.llama_model_n_cls_out(model)
            # Two are the probabilities of "yes" and "no" of one that was a generator.
            self._is_probability = self._outputs == 2
            if self._outputs > 2:
                raise LoadRefused(
                    ErrorCode.MODEL_UNSUPPORTED_BACKEND,
                    f"the model sorts texts into {self._outputs} classes; it is no reranker",
                )
            template = llama_cpp.llama_model_chat_template(model, b"rerank")
            self._template = template.decode(errors="replace") if template else None

    @property
    def dimensions(self) -> int:
        return 1 if self.kind is ModelKind.RERANK else self._dimensions

    def encode_input(self, text: str) -> list[int]:
        return self._vocabulary.encode_whole(text, param="input")

    def encode_pair(self, query: str, document: str) -> list[int]:
        if self._template is None:
            return self._vocabulary.encode_pair(query, document)
        # In this order: what a query says must not be taken for a place in the template.
        before, found, after = self._template.partition("{document}")
        filled = before.replace("{query}", query) + document * bool(found)
        filled += after.replace("{query}", query)
        return self._vocabulary.encode(filled, param="documents")

    def embed(
        self, inputs: Sequence[EmbedInput], advance: Callable[[], None]
    ) -> list[bytes | None]:
        if self._memory:
            # Without the data: it is written over anyway.
            llama_cpp.llama_memory_clear(self._memory, False)
        last = self._takes_last
        rows = self._read_last(inputs, advance) if last else self._read_pooled(inputs)
        LOG.start()  # what it warns about explains no later failure
        return [
            self._finish(row, wanted.dimensions) for row, wanted in zip(rows, inputs, strict=True)
        ]

    def _read_pooled(self, inputs: Sequence[EmbedInput]) -> list[numpy.ndarray[Any, Any]]:
        batch = self._batch
        batch.clear()
        for sequence, wanted in enumerate(inputs):
            batch.add_whole(wanted.tokens, sequence)
        self._compute()
        width = self._outputs if self.kind is ModelKind.RERANK else self._dimensions
        return [
            _copy(llama_cpp.llama_get_embeddings_seq(self._context, sequence), width)
            for sequence in range(len(inputs))
        ]

    def _read_last(
        self, inputs: Sequence[EmbedInput], advance: Callable[[], None]
    ) -> list[numpy.ndarray[Any, Any]]:
        batch = self._batch
        rows: list[numpy.ndarray[Any, Any]] = []

        def compute(ends: Sequence[int]) -> None:
            self._compute()
            for end in ends:
                found = llama_cpp.llama_get_embeddings_ith(self._context, end)
                rows.append(_copy(found, self._dimensions))
            batch.clear()
            advance()

        batch.clear()
        ends: list[int] = []
        for sequence, wanted in enumerate(inputs):
            done, count = 0, len(wanted.tokens)
            while done < count:
                part = wanted.tokens[done : done + self._part - batch.size]
                complete = done + len(part) == count
                batch.add_prompt(part, done, sequence, complete=complete)
                done += len(part)
                if complete:
                    ends.append(batch.size - 1)
                if batch.size == self._part:
                    compute(ends)
                    ends = []
        if batch.size:
            compute(ends)
        return rows

    def _compute(self) -> None:
        self._batch.native.n_tokens = self._batch.size
        # Of an encoder it calls ``llama_encode``, but for those that have a decoder too.
        if llama_cpp.llama_model_has_encoder(llama_cpp.llama_get_model(self._context)):
            status = llama_cpp.llama_encode(self._context, self._batch.native)
        else:
            status = llama_cpp.llama_decode(self._context, self._batch.native)
        if status != 0:
            raise EmbeddingFailed(f"llama.cpp returned {status}: {LOG.reason}")
        llama_cpp.llama_synchronize(self._context)

    def _finish(self, row: numpy.ndarray[Any, Any], dimensions: int | None) -> bytes | None:
        if not numpy.isfinite(row).all():
            return None
        if self.kind is ModelKind.RERANK:
            score = row[:1].astype(numpy.float64)
            if not self._is_probability:
                score = 1 / (1 + numpy.exp(-score.clip(-700, 700)))
            return score.astype("<f4").tobytes()
        vector = row[:dimensions].astype(numpy.float64)
        length = numpy.linalg.norm(vector)
        return (vector / length if length else vector).astype("<f4").tobytes()


def _copy(pointer: Any, width: int) -> numpy.ndarray[Any, Any]:
    if not pointer:
        raise EmbeddingFailed(f"llama.cpp made no vector: {LOG.reason}")
    return numpy.ctypeslib.as_array(pointer, (width,)).copy()
