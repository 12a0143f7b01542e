"""GGUF models on llama.cpp, through the low-level API of llama-cpp-python.

Sequences share one context with a unified KV cache, large enough for one of full
length: see ``worker.backends.llama_scheduler`` for how they get on with it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Read by libgomp when llama_cpp loads it: how long a thread spins for the others at
# a barrier before it sleeps. By default so long that two busy models on the same cores
# hold each other up: on two cores 400 ms a token each with 20,000 spins, 40 with 1,000,
# 23 with 300. A model alone takes 9 ms with any of these, but 11 with 100.
os.environ.setdefault("GOMP_SPINCOUNT", "300")
# Or the library, dying, has gdb look at it where there is one: for seconds, in which
# nobody's answer goes on. Where it was in Python is told all the same.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

import llama_cpp

from protocol.errors import ErrorCode
from protocol.messages import Load, Loaded
from worker.backends.base import (
    Detokenizer,
    Embedder,
    LoadRefused,
    PromptRefused,
    ReportProgress,
    SequenceSpec,
    StepToken,
    TokenTable,
)
from worker.backends.detokenize import ByteDetokenizer
from worker.backends.llama_embedding import (
    LlamaEmbedder,
    Pooling,
    create_embedding_context,
    default_length,
    pooling_of,
)
from worker.backends.llama_library import LOG, not_served, refusal
from worker.backends.llama_memory import MAX_SEQUENCES, NativeMemory, choose_slots, read_traits
from worker.backends.llama_model import (
    check_file,
    choose_context_length,
    create_context,
    load_model,
)
from worker.backends.llama_pool import KvPool
from worker.backends.llama_scheduler import Scheduler
from worker.backends.llama_vocab import Vocabulary
from worker.chat.conversation import Conversation
from worker.chat.template import BrokenTemplate, ChatTemplate


class LlamaBackend:
    """The ``llama`` backend. See ``worker.backends.base.Backend`` for the contract."""

    name = "llama"
    version: str = llama_cpp.__version__

    def __init__(self) -> None:
        self._closing = ExitStack()
        self._template: ChatTemplate | None = None
        self._embedder: LlamaEmbedder | None = None
        self._no_template = "the model has no chat template; send a plain prompt instead"

    @property
    def prefilled(self) -> int:
        return self._scheduler.prefilled

    def load(self, options: Load, report: ReportProgress) -> Loaded:
        path = Path(options.path)
        check_file(path)
        if not 1 <= options.max_sequences <= MAX_SEQUENCES:
            raise LoadRefused(
                ErrorCode.INVALID_VALUE,
                f"llama.cpp runs 1 to {MAX_SEQUENCES} sequences at once",
                param="max_sequences",
            )
        if options.draft_path is not None:
            raise LoadRefused(
                ErrorCode.UNSUPPORTED_PARAMETER,
                "llama.cpp models cannot use a draft model here; draft_tokens guesses without one",
                param="draft_model",
            )
        LOG.start()
        llama_cpp.llama_backend_init()
        model = load_model(path, report)
        self._closing.callback(llama_cpp.llama_model_free, model)
        context_length = choose_context_length(model, options.context_length)
        if (pooling := pooling_of(model, LOG.architecture)) is not None:
            if options.context_length is None:
                context_length = default_length(model, context_length, pooling)
            return self._load_embedder(path, model, context_length, options, pooling)
        traits = read_traits(model)
        slots = choose_slots(options.max_sequences, traits)
        context = create_context(model, context_length, slots, options)
        if not context:
            raise refusal(path, LOG)
        self._closing.callback(llama_cpp.llama_free, context)
        if not llama_cpp.llama_get_memory(context) or llama_cpp.llama_model_has_encoder(model):
            raise not_served(LOG.architecture)
        self._vocabulary = Vocabulary(model)
        self._load_template(model)
        pool = KvPool(
            NativeMemory(context),
            cells=llama_cpp.llama_n_ctx(context),
            sequences=options.max_sequences,
            slots=slots,
            keep_bytes=options.prompt_cache_bytes,
            traits=traits,
        )
        self._scheduler = Scheduler(
            context, pool, self._vocabulary, context_length, options.draft_tokens
        )
        self._closing.callback(self._scheduler.close)
        architecture = LOG.architecture or "unknown"
        LOG.start()  # what a load warns about explains no later failure
        return Loaded(
            architecture=architecture,
            context_length=context_length,
            max_sequences=options.max_sequences,
            vocab_size=self._vocabulary.size,
            has_chat_template=self._template is not None,
            weights_bytes=llama_cpp.llama_model_size(model),
        )

    @property
    def chat_template(self) -> str | None:
        return None if self._template is None else self._template.source

    def render_chat(self, conversation: Conversation) -> str:
        if self._template is None:
            raise PromptRefused(self._no_template, param="messages")
        return self._template.render(conversation)

    def encode_rendered(self, text: str) -> list[int]:
        return self._vocabulary.encode(text, param="messages")

    def encode_text(self, text: str, *, add_special: bool = True) -> list[int]:
        return self._vocabulary.encode(text, param="prompt", add_bos=add_special)

    def new_detokenizer(self, markers: Collection[str] = ()) -> Detokenizer:
        return ByteDetokenizer(self._vocabulary.piece_function(frozenset(markers)))

    def token_bytes(self, token: int) -> bytes:
        return self._vocabulary.piece(token) or self._vocabulary.special_text(token)

    def vocabulary(self) -> TokenTable | None:
        return self._vocabulary.table()

    @property
    def embedder(self) -> Embedder | None:
        return self._embedder

    def admit(self, spec: SequenceSpec) -> None:
        self._scheduler.admit(spec)

    def step(self) -> list[StepToken]:
        return self._scheduler.step()

    def cancel(self, sequence_id: int) -> None:
        self._scheduler.cancel(sequence_id)

    def computed(self, sequence_id: int) -> int:
        return self._scheduler.computed(sequence_id)

    def close(self) -> None:
        self._closing.close()

    def _load_embedder(
        self, path: Path, model: Any, context_length: int, options: Load, pooling: Pooling
    ) -> Loaded:
        context = create_embedding_context(model, context_length, options, pooling)
        if not context:
            raise refusal(path, LOG)
        self._closing.callback(llama_cpp.llama_free, context)
        self._vocabulary = Vocabulary(model)
        self._embedder = LlamaEmbedder(model, context, self._vocabulary, context_length, pooling)
        architecture = LOG.architecture or "unknown"
        LOG.start()
        return Loaded(
            architecture=architecture,
            context_length=context_length,
            max_sequences=options.max_sequences,
            vocab_size=self._vocabulary.size,
            has_chat_template=False,
            weights_bytes=llama_cpp.llama_model_size(model),
            kind=self._embedder.kind,
            dimensions=self._embedder.dimensions,
        )

    def _load_template(self, model: Any) -> None:
        source = llama_cpp.llama_model_chat_template(model, None)
        if not source:
            return
        try:
            self._template = ChatTemplate(
                source.decode(errors="replace"),
                {"bos_token": self._vocabulary.bos_text, "eos_token": self._vocabulary.eos_text},
            )
        except BrokenTemplate as error:
            self._no_template = str(error)
