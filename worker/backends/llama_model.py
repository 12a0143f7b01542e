"""From a GGUF file to a model and a context of libllama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp

from protocol.errors import ErrorCode
from protocol.messages import Load
from worker.backends.base import LoadRefused, ReportProgress
from worker.backends.llama_library import LOG, check_served, default_threads, refusal

#: Bound of the context length when the request names none, in tokens.
DEFAULT_CONTEXT_LENGTH = 8192
#: Tokens of one batch.
BATCH_SIZE = 512
_ALL_LAYERS = 999


def check_file(path: Path) -> None:
    """Raise ``LoadRefused`` for what cannot be a GGUF file."""
    if not path.exists():
        raise LoadRefused(ErrorCode.MODEL_NOT_FOUND, f"{path} does not exist")
    if path.is_dir():
        raise LoadRefused(
            ErrorCode.MODEL_UNSUPPORTED_BACKEND,
            f"{path} is a directory; llama.cpp loads GGUF files",
        )


def load_model(path: Path, report: ReportProgress) -> Any:
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
        check_served(LOG.architecture)
    except LoadRefused:
        if model:
            llama_cpp.llama_model_free(model)
        raise
    if not model:
        raise refusal(path, LOG)
    return model


def choose_context_length(model: Any, requested: int | None) -> int:
    """Tokens of a context. Raises ``LoadRefused`` for more than the model knows."""
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


def create_context(model: Any, context_length: int, slots: int, options: Load) -> Any:
    """A context whose cells all sequences share, or a null pointer: the log has the reason."""
    threads = options.threads or default_threads()
    params = llama_cpp.llama_context_default_params()
    # The library aborts on fewer cells than sequences.
    params.n_ctx = max(context_length, slots)
    params.n_seq_max = slots
    params.n_batch = BATCH_SIZE
    params.n_ubatch = BATCH_SIZE
    params.n_threads = threads
    params.n_threads_batch = threads
    params.kv_unified = True
    params.no_perf = True
    return llama_cpp.llama_init_from_model(model, params)
