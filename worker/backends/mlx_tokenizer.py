"""Text to tokens and back with the tokenizer of an mlx-lm model directory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
)
from mlx_lm.utils import load_tokenizer

from protocol.errors import ErrorCode
from worker.backends.base import (
    Detokenizer,
    LoadRefused,
    PromptRefused,
    TokenTable,
    is_mark,
)
from worker.backends.detokenize import ByteDetokenizer
from worker.chat.conversation import Conversation
from worker.chat.template import BrokenTemplate, ChatTemplate, refused_by_template

_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's stand-in for a space


class Tokenizer:
    """A model directory's tokenizer for an embedding of ``size`` rows.

    Reads local files only and never runs code that came with the model. Raises
    ``LoadRefused`` (``model_incomplete``) when tokens have no embedding.
    """

    def __init__(self, path: Path, size: int, eos_token_ids: Any) -> None:
        options = {"trust_remote_code": False, "local_files_only": True}
        load: Any = load_tokenizer  # untyped
        self._wrapper: Any = load(path, options, eos_token_ids=eos_token_ids)
        self._size = size
        # While one thread encodes, another must not: the library may change its settings.
        self._encoding = threading.Lock()
        self._special = _special_tokens(self._wrapper)
        self._special_texts = {
            token: str(self._wrapper.convert_ids_to_tokens(token)) for token in self._special
        }
        _check_vocabulary(self._wrapper, size, self._special)
        self._piece = _piece_function(self._wrapper, self._special)
        self._template: ChatTemplate | None = None
        self._no_template = "the model has no chat template; send a plain prompt instead"
        self._load_template()
        self.end_tokens = frozenset(
            token for token in self._wrapper.eos_token_ids if 0 <= token < size
        )

    def has_same_tokens(self, other: Tokenizer) -> bool:
        """Whether both give each text of their vocabularies the same id."""
        same: bool = self._wrapper.get_vocab() == other._wrapper.get_vocab()
        return same

    def render_chat(self, conversation: Conversation) -> str:
        """Render the chat template up to the answer. Raises ``PromptRefused``."""
        if self._template is not None:
            return self._template.render(conversation)
        if self._coded_template is None:
            raise PromptRefused(self._no_template, param="messages")
        try:
            variables = conversation.variables()
            return str(self._coded_template(variables.pop("messages"), **variables))
        except Exception as error:
            raise refused_by_template(error) from error

    def encode_rendered(self, text: str) -> list[int]:
        """Tokenise a rendered template, which brings its own special tokens."""
        try:
            with self._encoding:
                tokens = self._wrapper.encode(text, add_special_tokens=False)
        except Exception as error:
            raise PromptRefused(
                f"the text cannot be tokenised: {error}", param="messages"
            ) from error
        return self._checked(tokens, param="messages")

    def encode_text(self, text: str, *, add_special: bool = True) -> list[int]:
        """Tokenise, once with the beginning-of-sequence token if the tokenizer adds one."""
        bos = self._wrapper.bos_token
        add_special = add_special and (bos is None or not text.startswith(bos))
        try:
            with self._encoding:
                tokens = self._wrapper.encode(text, add_special_tokens=add_special)
        except Exception as error:
            raise PromptRefused(f"the text cannot be tokenised: {error}", param="prompt") from error
        return self._checked(tokens, param="prompt")

    @property
    def chat_template(self) -> str | None:
        """The template's source; empty for one that mlx-lm wrote in Python."""
        if self._template is not None:
            return self._template.source
        return None if self._coded_template is None else ""

    def _load_template(self) -> None:
        # mlx-lm has templates in Python for models that come without one.
        self._coded_template: Any = self._wrapper._chat_template
        source = self._wrapper.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        if self._coded_template is not None or not isinstance(source, str):
            return
        names = self._wrapper.special_tokens_map
        tokens = {name: text for name, text in names.items() if isinstance(text, str)}
        try:
            self._template = ChatTemplate(source, tokens)
        except BrokenTemplate as error:
            self._no_template = str(error)

    def new_detokenizer(self, markers: frozenset[str] = frozenset()) -> Detokenizer:
        """Shows of special tokens those whose text is in ``markers``."""
        shown = {token: text for token, text in self._special_texts.items() if text in markers}
        piece = self._piece
        if piece is None:
            return _TextDetokenizer(self._wrapper.detokenizer, self._special, shown)
        if not shown:
            return ByteDetokenizer(piece)
        shown_bytes = {token: text.encode() for token, text in shown.items()}
        return ByteDetokenizer(lambda token: shown_bytes.get(token) or piece(token))

    def token_bytes(self, token: int) -> bytes:
        if token in self._special_texts:
            return self._special_texts[token].encode()
        if self._piece is not None:
            return self._piece(token)
        return str(self._wrapper.decode([token])).encode()

    def table(self) -> TokenTable | None:
        """See ``Backend.vocabulary``."""
        if self._piece is None:
            return None
        added = self._wrapper.added_tokens_decoder
        marks = self._special | {token for token, entry in added.items() if is_mark(entry.content)}
        return TokenTable(
            pieces=[self._piece(token) for token in range(self._size)],
            special={
                token: str(self._wrapper.convert_ids_to_tokens(token))
                for token in marks
                if token < self._size
            },
            end_tokens=self.end_tokens,
            encode=self._encode_part,
        )

    def _encode_part(self, text: str) -> list[int]:
        with self._encoding:
            return list(self._wrapper.encode(text, add_special_tokens=False))

    def _checked(self, tokens: Sequence[int], *, param: str) -> list[int]:
        # An id without an embedding would read past the end of the weights.
        for token in tokens:
            if token >= self._size:
                text = self._wrapper.convert_ids_to_tokens(token)
                raise PromptRefused(f"the model has no embedding for {text!r}", param=param)
        return list(tokens)


class _TextDetokenizer:
    """mlx-lm's streaming detokenizer for tokenizers that do not work on bytes."""

    def __init__(self, streaming: Any, special: frozenset[int], shown: Mapping[int, str]) -> None:
        self._streaming = streaming
        self._special = special
        self._shown = shown

    def add(self, token: int) -> str:
        if token in self._special:
            return self._shown.get(token, "")
        self._streaming.add_token(token)
        return str(self._streaming.last_segment)

    def finish(self) -> str:
        self._streaming.finalize()
        return str(self._streaming.last_segment)


def _special_tokens(wrapper: Any) -> frozenset[int]:
    added = wrapper.added_tokens_decoder
    return frozenset(wrapper.all_special_ids) | {
        token for token, entry in added.items() if entry.special
    }


def _check_vocabulary(wrapper: Any, size: int, special: frozenset[int]) -> None:
    # Special tokens may lie outside: text-only checkpoints of multimodal models
    # keep the marks for images, without their embeddings.
    last = max(token for token in wrapper.get_vocab().values() if token not in special)
    if last >= size:
        raise LoadRefused(
            ErrorCode.MODEL_INCOMPLETE,
            f"the tokenizer has token ids up to {last}, the model's embedding {size} rows: "
            "they do not belong together",
        )


def _piece_function(wrapper: Any, special: frozenset[int]) -> Callable[[int], bytes] | None:
    """Token id to bytes, where the tokenizer works on bytes; else None.

    mlx-lm's own detokenizers of these two kinds drop a space at the beginning
    of an answer and show special tokens, so only their choice is used.
    """
    kind = wrapper.detokenizer
    if isinstance(kind, BPEStreamingDetokenizer):
        to_bytes = _byte_level_bytes
    elif isinstance(kind, SPMStreamingDetokenizer):
        to_bytes = _sentencepiece_bytes
    else:
        return None
    added = wrapper.added_tokens_decoder
    pieces: dict[int, bytes] = dict.fromkeys(special, b"")

    def piece(token: int) -> bytes:
        data = pieces.get(token)
        if data is None:
            text = wrapper.convert_ids_to_tokens(token)
            if text is None:  # an embedding row without a token
                data = b""
            elif token in added:
                data = text.encode()
            else:
                data = to_bytes(text)
            pieces[token] = data
        return data

    return piece


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a byte that prints is itself, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(0x100 + index), byte) for index, byte in enumerate(others))
    return alphabet


def _byte_level_bytes(text: str) -> bytes:
    decoder = _byte_alphabet()
    return b"".join(bytes([decoder[char]]) if char in decoder else char.encode() for char in text)


def _sentencepiece_bytes(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace(_SPACE_MARK, " ").encode()
