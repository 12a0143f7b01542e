"""GGUF models on llama.cpp, through the low-level API of llama-cpp-python.

Sequences share one context with a unified KV cache, each with room for a full
context of its own. A step decodes one token of every running sequence and, in
the same batch, a chunk of the prompts that wait.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by libgomp when llama_cpp loads it: how long a thread spins for the others
# before it sleeps. By default so long that two busy models on the same cores
# hold each other up: on two cores 1.4 tokens/s each, against 30 with this. A
# model alone makes about 125 either way, within what runs differ.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import llama_cpp
import numpy

from protocol.errors import ErrorCode
from protocol.messages import ChatMessage, Load, Loaded
from worker.backends.base import (
    Detokenizer,
    LoadRefused,
    NonFiniteLogits,
    PromptRefused,
    ReportProgress,
    SequenceSpec,
    StepToken,
)
from worker.backends.detokenize import ByteDetokenizer
from worker.backends.llama_batch import DecodeBatch
from worker.backends.llama_library import (
    LOG,
    check_generates,
    default_threads,
    not_a_generator,
    refusal,
)
from worker.backends.llama_sampling import create_sampler
from worker.backends.llama_vocab import Vocabulary
from worker.chat.template import BrokenTemplate, ChatTemplate

#: Bound of the context length when the request names none, in tokens.
DEFAULT_CONTEXT_LENGTH = 8192
#: Tokens of one batch.
BATCH_SIZE = 512
#: Prompt tokens of a batch that also decodes: more would hold up the streams,
#: and a CPU gains little from more (128 tokens run at 90 % of the speed of 512).
SHARED_PREFILL = 128
_ALL_LAYERS = 999
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ


class DecodeFailed(Exception):
    """``llama_decode`` returned an error; nothing can be said about the state."""


@dataclass(slots=True)
class _Sequence:
    """One admitted sequence; ``position`` counts its tokens in the KV cache."""

    sequence_id: int
    slot: int
    prompt: Sequence[int]
    sampler: Any
    remaining: int
    validate_logits: bool
    position: int = 0
    token: int = -1


class LlamaBackend:
    """The ``llama`` backend. See ``worker.backends.base.Backend`` for the contract."""

    name = "llama"
    version: str = llama_cpp.__version__

    def __init__(self) -> None:
        self._model: Any = None
        self._context: Any = None
        self._template: ChatTemplate | None = None
        self._no_template = "the model has no chat template; send a plain prompt instead"
        self._free_slots: list[int] = []
        self._decoding: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()

    def load(self, options: Load, report: ReportProgress) -> Loaded:
        path = Path(options.path)
        _check_file(path)
        if not 1 <= options.max_sequences <= _MAX_SEQUENCES:
            raise LoadRefused(
                ErrorCode.INVALID_VALUE,
                f"llama.cpp runs 1 to {_MAX_SEQUENCES} sequences at once",
                param="max_sequences",
            )
        LOG.start()
        llama_cpp.llama_backend_init()
        self._model = _load_model(path, report)
        self._context_length = _context_length(self._model, options.context_length)
        self._context = _create_context(self._model, self._context_length, options)
        if not self._context:
            raise refusal(path, LOG)
        self._memory = llama_cpp.llama_get_memory(self._context)
        if not self._memory or llama_cpp.llama_model_has_encoder(self._model):
            raise not_a_generator(LOG.architecture)
        self._vocabulary = Vocabulary(self._model)
        self._load_template()
        self._batch_size = llama_cpp.llama_n_batch(self._context)
        self._batch = DecodeBatch(self._batch_size)
        self._free_slots = list(reversed(range(options.max_sequences)))
        architecture = LOG.architecture or "unknown"
        LOG.start()  # what a load warns about explains no later failure
        return Loaded(
            architecture=architecture,
            context_length=self._context_length,
            max_sequences=options.max_sequences,
            vocab_size=self._vocabulary.size,
            has_chat_template=self._template is not None,
            weights_bytes=llama_cpp.llama_model_size(self._model),
        )

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        if self._template is None:
            raise PromptRefused(self._no_template, param="messages")
        return self._vocabulary.encode(self._template.render(messages), param="messages")

    def encode_text(self, text: str) -> list[int]:
        return self._vocabulary.encode(text, param="prompt")

    def new_detokenizer(self) -> Detokenizer:
        return ByteDetokenizer(self._vocabulary.piece)

    def admit(self, spec: SequenceSpec) -> None:
        self._waiting.append(
            _Sequence(
                sequence_id=spec.sequence_id,
                slot=self._free_slots.pop(),
                prompt=spec.prompt,
                sampler=create_sampler(spec, self._vocabulary, self._context_length),
                remaining=spec.max_tokens,
                validate_logits=spec.validate_logits,
            )
        )

    def step(self) -> list[StepToken]:
        batch, decoding = self._batch, self._decoding
        batch.clear()
        add = batch.add
        for sequence in decoding:
            add(sequence.token, sequence.position, sequence.slot)
            sequence.position += 1
        # Row i of the batch belongs to the i-th decoding sequence.
        rows = list(enumerate(decoding))
        if self._waiting:
            rows += self._add_prompts()
        if not batch.size:
            return []
        native = batch.native
        native.n_tokens = batch.size
        status = llama_cpp.llama_decode(self._context, native)
        if status != 0:
            raise DecodeFailed(_decode_failure(status))
        if not rows:
            # On a GPU the call only queues the work; progress means it is done.
            llama_cpp.llama_synchronize(self._context)
            return []
        return self._sample(rows)

    def cancel(self, sequence_id: int) -> None:
        for sequences in (self._decoding, self._waiting):
            for sequence in sequences:
                if sequence.sequence_id == sequence_id:
                    sequences.remove(sequence)
                    self._release(sequence)
                    return

    def close(self) -> None:
        for sequence in (*self._decoding, *self._waiting):
            llama_cpp.llama_sampler_free(sequence.sampler)
        self._decoding.clear()
        self._waiting.clear()
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def _add_prompts(self) -> list[tuple[int, _Sequence]]:
        """Fill the batch with prompt tokens; return the rows of the prompts that end in it."""
        batch = self._batch
        room = self._batch_size - batch.size
        if self._decoding:
            room = min(room, SHARED_PREFILL)
        rows = []
        while room and self._waiting:
            sequence = self._waiting[0]
            start = sequence.position
            chunk = sequence.prompt[start : start + room]
            end = start + len(chunk)
            complete = end == len(sequence.prompt)
            batch.add_prompt(chunk, start, sequence.slot, complete=complete)
            sequence.position = end
            room -= len(chunk)
            if complete:
                rows.append((batch.size - 1, sequence))
                self._decoding.append(self._waiting.popleft())
        return rows

    def _sample(self, rows: list[tuple[int, _Sequence]]) -> list[StepToken]:
        context, end_tokens = self._context, self._vocabulary.end_tokens
        sample = llama_cpp.llama_sampler_sample
        tokens = []
        ended = []
        for row, sequence in rows:
            if sequence.validate_logits:
                self._check_logits(row)
            token = sample(sequence.sampler, context, row)
            is_end = token in end_tokens
            tokens.append(StepToken(sequence.sequence_id, token, is_end))
            sequence.token = token
            sequence.remaining -= 1
            if is_end or not sequence.remaining:
                ended.append(sequence)
        for sequence in ended:
            self._decoding.remove(sequence)
            self._release(sequence)
        return tokens

    def _check_logits(self, row: int) -> None:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        values = numpy.ctypeslib.as_array(logits, shape=(self._vocabulary.size,))
        if not numpy.isfinite(values).all():
            raise NonFiniteLogits("the model produced logits that are NaN or infinite")

    def _release(self, sequence: _Sequence) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, sequence.slot, -1, -1)
        llama_cpp.llama_sampler_free(sequence.sampler)
        self._free_slots.append(sequence.slot)

    def _load_template(self) -> None:
        source = llama_cpp.llama_model_chat_template(self._model, None)
        if not source:
            return
        try:
            self._template = ChatTemplate(
                source.decode(errors="replace"),
                self._vocabulary.bos_text,
                self._vocabulary.eos_text,
            )
        except BrokenTemplate as error:
            self._no_template = str(error)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise LoadRefused(ErrorCode.MODEL_NOT_FOUND, f"{path} does not exist")
    if path.is_dir():
        raise LoadRefused(
            ErrorCode.MODEL_UNSUPPORTED_BACKEND,
            f"{path} is a directory; llama.cpp loads GGUF files",
        )


def _load_model(path: Path, report: ReportProgress) -> Any:
    """Load the weights. Raises ``LoadRefused`` with the library's own reason."""

    def on_progress(fraction: float, _user_data: object) -> bool:
        report(fraction)
        return True  # False would abort the load

    callback = llama_cpp.llama_progress_callback(on_progress)
    params = llama_cpp.llama_model_default_params()
    params.progress_callback = callback
    params.n_gpu_layers = _ALL_LAYERS
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    # Before the failure: the library's complaint may be about a missing key.
    try:
        check_generates(LOG.architecture)
    except LoadRefused:
        if model:
            llama_cpp.llama_model_free(model)
        raise
    if not model:
        raise refusal(path, LOG)
    return model


def _context_length(model: Any, requested: int | None) -> int:
    trained = llama_cpp.llama_model_n_ctx_train(model)
    if requested is None:
        return min(trained or DEFAULT_CONTEXT_LENGTH, DEFAULT_CONTEXT_LENGTH)
    if requested < 1 or requested > trained > 0:
        raise LoadRefused(
            ErrorCode.INVALID_VALUE,
            f"context_length {requested} is not between 1 and the {trained} tokens "
            "the model was trained for",
            param="context_length",
        )
    return requested


def _create_context(model: Any, context_length: int, options: Load) -> Any:
    """A context for all sequences, or a null pointer: the reason is in the log."""
    threads = options.threads or default_threads()
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = context_length * options.max_sequences
    params.n_seq_max = options.max_sequences
    params.n_batch = BATCH_SIZE
    params.n_ubatch = BATCH_SIZE
    params.n_threads = threads
    params.n_threads_batch = threads
    params.kv_unified = True
    params.no_perf = True
    return llama_cpp.llama_init_from_model(model, params)


def _decode_failure(status: int) -> str:
    meaning = {
        1: "no room in the KV cache",
        2: "aborted",
        -1: "invalid batch",
        -2: "out of memory",
        -3: "computation failed",
    }.get(status, "unknown error")
    return f"llama_decode returned {status} ({meaning}): {LOG.reason}"
