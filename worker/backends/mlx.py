"""Model directories on MLX, through mlx-lm.

All calls must come from the thread that loaded the model, as MLX keeps streams
per thread.
"""

from __future__ import annotations

import atexit
from collections.abc import Collection, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, load_model

from protocol.errors import ErrorCode
from protocol.messages import Load, Loaded
from worker.backends.base import (
    Detokenizer,
    Embedder,
    LoadRefused,
    ReportProgress,
    SequenceSpec,
    StepToken,
    TokenTable,
)
from worker.backends.mlx_batch import SequenceBatch
from worker.backends.mlx_draft import DEFAULT_DRAFT_TOKENS, DraftModel
from worker.backends.mlx_files import check_model_directory, trained_context_length, vocab_size
from worker.backends.mlx_prompts import can_always_trim, default_bytes
from worker.backends.mlx_tokenizer import Tokenizer
from worker.chat.conversation import Conversation

#: Bound of the context length when the request names none, in tokens.
DEFAULT_CONTEXT_LENGTH = 8192


class MlxBackend:
    """The ``mlx`` backend. See ``worker.backends.base.Backend`` for the contract."""

    name = "mlx"
    #: mlx-lm and the array library decide together how a model behaves.
    version = f"{package_version('mlx-lm')}+mlx{package_version('mlx')}"

    def __init__(self) -> None:
        self._batch: Any = None  # a SequenceBatch once loaded

    @property
    def prefilled(self) -> int:
        return 0 if self._batch is None else int(self._batch.prefilled)

    def load(self, options: Load, report: ReportProgress) -> Loaded:
        if not mx.metal.is_available():
            # Compiling kernels for the CPU takes a C++ compiler at run time and
            # makes nothing faster.
            mx.disable_compile()
        path = Path(options.path)
        config = check_model_directory(path)
        context_length = _context_length(config, options.context_length)
        try:
            model, config = load_model(path, lazy=True, get_model_classes=_model_classes)
            rows = vocab_size(config) or _embedding_rows(model)
            self._tokenizer = Tokenizer(path, rows, config.get("eos_token_id"))
            _check_batching(model, config)
            draft = None
            models = [model]
            if options.draft_path is not None:
                draft = self._load_draft(Path(options.draft_path), model, rows, context_length)
                models.append(draft.model)
            weights_bytes = _read_weights(models, report)
        except LoadRefused:
            raise
        except Exception as error:
            raise _refusal(path, error) from error
        kept = options.prompt_cache_bytes
        self._batch = SequenceBatch(
            model,
            end_tokens=self._tokenizer.end_tokens,
            vocab_size=rows,
            context_length=context_length,
            max_sequences=options.max_sequences,
            prompt_cache_bytes=default_bytes() if kept is None else kept,
            draft=draft,
            draft_tokens=options.draft_tokens or DEFAULT_DRAFT_TOKENS,
        )
        return Loaded(
            architecture=config["model_type"],
            context_length=context_length,
            max_sequences=options.max_sequences,
            vocab_size=rows,
            has_chat_template=self._tokenizer.chat_template is not None,
            weights_bytes=weights_bytes,
        )

    @property
    def chat_template(self) -> str | None:
        return self._tokenizer.chat_template

    def render_chat(self, conversation: Conversation) -> str:
        return self._tokenizer.render_chat(conversation)

    def encode_rendered(self, text: str) -> list[int]:
        return self._tokenizer.encode_rendered(text)

    def encode_text(self, text: str, *, add_special: bool = True) -> list[int]:
        return self._tokenizer.encode_text(text, add_special=add_special)

    def new_detokenizer(self, markers: Collection[str] = ()) -> Detokenizer:
        return self._tokenizer.new_detokenizer(frozenset(markers))

    def token_bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)

    def vocabulary(self) -> TokenTable | None:
        table: TokenTable | None = self._tokenizer.table()
        return table

    @property
    def embedder(self) -> Embedder | None:
        return None  # mlx-lm has none

    def admit(self, spec: SequenceSpec) -> None:
        self._batch.admit(spec)

    def step(self) -> list[StepToken]:
        tokens: list[StepToken] = self._batch.step()
        return tokens

    def cancel(self, sequence_id: int) -> None:
        self._batch.cancel(sequence_id)

    def computed(self, sequence_id: int) -> int:
        return int(self._batch.computed(sequence_id))

    def close(self) -> None:
        if self._batch is not None:
            self._batch.close()
        self._batch = None
        mx.synchronize()
        # Streams still open at interpreter exit abort the process now and then;
        # without its streams MLX is of no more use, so not before.
        if hasattr(mx, "clear_streams"):
            atexit.unregister(mx.clear_streams)
            atexit.register(mx.clear_streams)

    def _load_draft(self, path: Path, model: Any, rows: int, context_length: int) -> DraftModel:
        """A model that guesses for ``model``. Raises ``LoadRefused`` if it cannot."""
        try:
            config = check_model_directory(path)
            draft, config = load_model(path, lazy=True, get_model_classes=_model_classes)
            draft_rows = vocab_size(config) or _embedding_rows(draft)
            tokenizer = Tokenizer(path, draft_rows, config.get("eos_token_id"))
        except Exception as error:
            raise _no_draft(f"{error}") from error
        if not self._tokenizer.has_same_tokens(tokenizer):
            raise _no_draft(f"{path.name} has another vocabulary than the model")
        for each, whose in ((model, "the model"), (draft, path.name)):
            if not can_always_trim(each, context_length):
                raise _no_draft(f"the KV cache of {whose} cannot be cut back after a wrong guess")
        return DraftModel(draft, draft_rows, rows)


def _model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's classes for a config. Raises ``LoadRefused`` if it has none."""
    try:
        model, arguments = _get_classes(config)
    except (ValueError, AttributeError) as error:
        raise LoadRefused(
            ErrorCode.MODEL_UNSUPPORTED_ARCH,
            f"mlx-lm {package_version('mlx-lm')} does not know the architecture "
            f"{config['model_type']!r}",
        ) from error
    return model, arguments


def _context_length(config: dict[str, Any], requested: int | None) -> int:
    trained = trained_context_length(config)
    if requested is None:
        return min(trained or DEFAULT_CONTEXT_LENGTH, DEFAULT_CONTEXT_LENGTH)
    if requested < 1 or (trained is not None and requested > trained):
        raise LoadRefused(
            ErrorCode.INVALID_VALUE,
            f"context_length {requested} is not between 1 and the {trained} tokens "
            "the model was trained for",
            param="context_length",
        )
    return requested


def _embedding_rows(model: Any) -> int:
    """The embedding's rows, for configs that leave ``vocab_size`` to the class's default."""
    for module in model.modules():
        if type(module).__name__ in ("Embedding", "QuantizedEmbedding"):
            return int(module.weight.shape[0])
    raise LoadRefused(ErrorCode.MODEL_UNSUPPORTED_ARCH, "the model has no token embedding")


def _check_batching(model: Any, config: dict[str, Any]) -> None:
    """Raise ``LoadRefused`` if the batch generator cannot merge the model's caches."""
    for cache in make_prompt_cache(model):
        if not hasattr(cache, "merge"):
            raise LoadRefused(
                ErrorCode.MODEL_UNSUPPORTED_ARCH,
                f"mlx-lm cannot batch {config['model_type']!r}: its {type(cache).__name__} "
                "does not merge",
            )


def _read_weights(models: Sequence[Any], report: ReportProgress) -> int:
    """Bring the lazily loaded weights into memory; return their size in bytes."""
    parameters: list[Any] = [
        entry[1] for model in models for entry in tree_flatten(model.parameters())
    ]
    total: int = sum(array.nbytes for array in parameters)
    done = 0
    for array in parameters:
        mx.eval(array)
        done += array.nbytes
        report(done / max(total, 1))
    return total


def _no_draft(reason: str) -> LoadRefused:
    # Not with a code that says something about the model itself.
    return LoadRefused(ErrorCode.INVALID_VALUE, f"draft model: {reason}", param="draft_model")


def _refusal(path: Path, error: Exception) -> LoadRefused:
    reason = f"{path.name}: {type(error).__name__}: {error}"
    # mlx.nn's words for weights that a checkpoint lacks or that do not fit its config.
    if isinstance(error, ValueError) and str(error).startswith(("Missing ", "Expected shape ")):
        return LoadRefused(ErrorCode.MODEL_INCOMPLETE, reason)
    return LoadRefused(ErrorCode.MODEL_LOADER_CRASHED, reason)
