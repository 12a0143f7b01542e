"""Embedding models and rerankers on llama.cpp: whole sequences in, one vector each out.

Pooling is the model's own. An encoder, and whatever else pools over all of a sequence,
has to see it in one piece, so the context's batch holds the longest input. A decoder
that pools the last token reads a long input in parts, as a generator does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


#: What the library may take for the outputs of one batch, in bytes, if nobody asks for
#: a longer context: it keeps room for the logits of every token, which nobody reads.
_OUTPUT_BYTES = 2 * 1024**3


class Pooling(NamedTuple):
    """``kind`` is the library's number; ``in_parts``: of what is last, which may come alone."""

    kind: int
    in_parts: bool


class EmbeddingFailed(Exception):
    """llama.cpp could not compute a batch."""


def pooling_of(model: Any, architecture: str | None) -> Pooling | None:
    """How the model's hidden states become one vector; None: it is a generator.

    The file says so. An encoder whose file does not is pooled as sentence-transformers
    does it by default, by the mean.
    """
    found = read_metadata(model, f"{architecture}.pooling_type")
    kind = int(found) if found is not None and found.isdecimal() else _NONE
    causal = (
        architecture not in ENCODERS
        and read_metadata(model, f"{architecture}.attention.causal") != "false"
    )
    if kind == _NONE:
        return None if causal else Pooling(_MEAN, in_parts=False)
    # Rerankers judge the first token; only those that were generators of this family
    # the last one.
    last = kind == _LAST or (kind == _RANK and str(architecture).startswith("qwen3"))
    return Pooling(kind, in_parts=causal and last)


def default_length(model: Any, context_length: int, pooling: Pooling) -> int:
    """How long inputs may be if nobody says it, of at most ``context_length`` tokens."""
    if pooling.in_parts:
        return context_length
    vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
    return min(context_length, max(BATCH_SIZE, _OUTPUT_BYTES // (4 * vocab)))


def read_metadata(model: Any, key: str) -> str | None:
    """A value of the file's header as text; None if it has none of this name."""
    buffer = ctypes.create_string_buffer(64)
    size = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return None if size < 0 else buffer.value.decode(errors="replace")


def create_embedding_context(
    model: Any, context_length: int, options: Load, pooling: Pooling
) -> Any:
    """A context for whole sequences, or a null pointer: the log has the reason."""
    threads = options.threads or default_threads()
    params = llama_cpp.llama_context_default_params()
    params.embeddings = True
    # The hidden state of a last token is to be had without pooling, and then without
    # the logits of all the others.
    params.pooling_type = _NONE if pooling.kind == _LAST and pooling.in_parts else pooling.kind
    params.n_seq_max = MAX_SEQUENCES
    # The library aborts on a batch that is no multiple of the sequences.
    longest = max(context_length, BATCH_SIZE)
    params.n_ctx = -(-longest // MAX_SEQUENCES) * MAX_SEQUENCES
    params.n_batch = params.n_ubatch = BATCH_SIZE if pooling.in_parts else params.n_ctx
    params.n_threads = threads
    params.n_threads_batch = threads
    params.kv_unified = True
    params.no_perf = True
    return llama_cpp.llama_init_from_model(model, params)


class LlamaEmbedder:
    """See ``base.Embedder``. The model and the context must outlive it.

    Raises ``LoadRefused`` for a classifier, which is neither of the two.
    """

    batch_tokens = BATCH_SIZE
    batch_sequences = MAX_SEQUENCES

    def __init__(
        self,
        model: Any,
        context: Any,
        vocabulary: Vocabulary,
        context_length: int,
        pooling: Pooling,
    ) -> None:
        self._context = context
        self._vocabulary = vocabulary
        self._memory = llama_cpp.llama_get_memory(context)
        self._in_parts = pooling.in_parts
        self._has_encoder = llama_cpp.llama_model_has_encoder(model)
        #: Tokens of one call to the library.
        self._part = llama_cpp.llama_n_ubatch(context)
        self._batch = DecodeBatch(max(context_length, BATCH_SIZE))
        self._width = llama_cpp.llama_model_n_embd_out(model)
        self.kind = ModelKind.EMBED
        if pooling.kind == _RANK:
            self.kind = ModelKind.RERANK
            self._width = llama_cpp.llama_model_n_cls_out(model)
            # Of one that was a generator: the probabilities of "yes" and "no".
            self._is_probability = self._width == 2 and pooling.in_parts
            if self._width != 1 and not self._is_probability:
                raise LoadRefused(
                    ErrorCode.MODEL_UNSUPPORTED_BACKEND,
                    f"the model sorts texts into {self._width} classes; it is no reranker",
                )
            template = llama_cpp.llama_model_chat_template(model, b"rerank")
            self._template = template.decode(errors="replace") if template else None

    @property
    def dimensions(self) -> int:
        return 1 if self.kind is ModelKind.RERANK else self._width

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
        parts = self._in_parts
        rows = self._read_parts(inputs, advance) if parts else self._read_whole(inputs)
        LOG.start()  # what it warns about explains no later failure
        return [
            self._finish(row, wanted.dimensions) for row, wanted in zip(rows, inputs, strict=True)
        ]

    def _read_whole(self, inputs: Sequence[EmbedInput]) -> list[numpy.ndarray[Any, Any]]:
        batch = self._batch
        batch.clear()
        for sequence, wanted in enumerate(inputs):
            batch.add_pooled(wanted.tokens, 0, sequence)
        self._compute()
        return [self._pooled(sequence) for sequence in range(len(inputs))]

    def _read_parts(
        self, inputs: Sequence[EmbedInput], advance: Callable[[], None]
    ) -> list[numpy.ndarray[Any, Any]]:
        batch, pools = self._batch, self.kind is ModelKind.RERANK
        rows: list[numpy.ndarray[Any, Any]] = []
        #: Which sequences end in the batch, and where.
        ends: list[tuple[int, int]] = []

        def compute() -> None:
            self._compute()
            for sequence, row in ends:
                rows.append(self._pooled(sequence) if pools else self._hidden(row))
            ends.clear()
            batch.clear()
            advance()

        batch.clear()
        for sequence, wanted in enumerate(inputs):
            done, count = 0, len(wanted.tokens)
            while done < count:
                part = wanted.tokens[done : done + self._part - batch.size]
                complete = done + len(part) == count
                if pools:
                    batch.add_pooled(part, done, sequence)
                else:
                    batch.add_prompt(part, done, sequence, complete=complete)
                done += len(part)
                if complete:
                    ends.append((sequence, batch.size - 1))
                if batch.size == self._part:
                    compute()
        if batch.size:
            compute()
        return rows

    def _pooled(self, sequence: int) -> numpy.ndarray[Any, Any]:
        return self._copy(llama_cpp.llama_get_embeddings_seq(self._context, sequence))

    def _hidden(self, row: int) -> numpy.ndarray[Any, Any]:
        return self._copy(llama_cpp.llama_get_embeddings_ith(self._context, row))

    def _copy(self, pointer: Any) -> numpy.ndarray[Any, Any]:
        if not pointer:
            raise EmbeddingFailed(f"llama.cpp made no vector: {LOG.reason}")
        return numpy.ctypeslib.as_array(pointer, (self._width,)).copy()

    def _compute(self) -> None:
        self._batch.native.n_tokens = self._batch.size
        # The library's second half of a T5 is none of its encoder's business; every other
        # encoder is run by ``llama_decode`` as well.
        run = llama_cpp.llama_encode if self._has_encoder else llama_cpp.llama_decode
        status = run(self._context, self._batch.native)
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
