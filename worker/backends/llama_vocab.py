"""Text to tokens and back with libllama's vocabulary."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp

from worker.backends.base import PromptRefused

_NO_TOKEN = -1  # LLAMA_TOKEN_NULL


class Vocabulary:
    """The tokens of one loaded model; ``model`` must outlive it."""

    def __init__(self, model: Any) -> None:
        vocab = llama_cpp.llama_model_get_vocab(model)
        self._vocab = vocab
        self._pieces: dict[int, bytes] = {}
        #: By markers, what is shown of special tokens.
        self._shown: dict[frozenset[str], dict[int, bytes]] = {}
        self._buffer = ctypes.create_string_buffer(256)
        self.size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.end_tokens = frozenset(
            token for token in range(self.size) if llama_cpp.llama_vocab_is_eog(vocab, token)
        )
        #: The one to end an answer with.
        self.end_token = self._choose_end(llama_cpp.llama_vocab_eos(vocab))
        self.suppressed_tokens = self._read_suppressed()
        self._bos = llama_cpp.llama_vocab_bos(vocab)
        self._add_bos = llama_cpp.llama_vocab_get_add_bos(vocab) and self._bos != _NO_TOKEN
        self.bos_text = self._text(self._bos)
        self.eos_text = self._text(llama_cpp.llama_vocab_eos(vocab))

    def encode(self, text: str, *, param: str) -> list[int]:
        """Tokenise; special tokens are recognised by their text.

        The beginning-of-sequence token comes first if the vocabulary wants one,
        and once only, should the text bring its own. Raises ``PromptRefused``.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise PromptRefused(f"the text is not valid Unicode: {error}", param=param) from error
        capacity = len(data) + 8
        tokens = (llama_cpp.llama_token * capacity)()
        # Not with the library's own special tokens: it would append EOS as well.
        count = llama_cpp.llama_tokenize(
            self._vocab, data, len(data), tokens, capacity, False, True
        )
        if count < 0:
            raise PromptRefused("the text cannot be tokenised", param=param)
        encoded = tokens[:count]
        if self._add_bos and (not encoded or encoded[0] != self._bos):
            encoded.insert(0, self._bos)
        return encoded

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for special tokens."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token)
        return piece

    def special_text(self, token: int) -> bytes:
        """The text by which a special token is written in templates."""
        return self._text(token).encode()

    def piece_function(self, markers: frozenset[str]) -> Callable[[int], bytes]:
        """As ``piece``, but with the text of those special tokens that are in ``markers``."""
        if not markers:
            return self.piece
        shown = self._shown.get(markers)
        if shown is None:
            shown = self._shown[markers] = {
                token: text.encode()
                for token in range(self.size)
                if (text := self._text(token)) in markers and not self.piece(token)
            }
        return lambda token: shown.get(token) or self.piece(token)

    def _read_piece(self, token: int) -> bytes:
        length = self._copy_piece(token)
        if length < 0:
            self._buffer = ctypes.create_string_buffer(-length)
            length = self._copy_piece(token)
        return self._buffer.raw[:length]

    def _copy_piece(self, token: int) -> int:
        buffer = self._buffer
        return int(
            llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        )

    def _text(self, token: int) -> str:
        if token == _NO_TOKEN:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")

    def _choose_end(self, eos: int) -> int:
        return eos if eos in self.end_tokens else min(self.end_tokens, default=0)

    def _read_suppressed(self) -> frozenset[int]:
        count = ctypes.c_int32()
        tokens = llama_cpp.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(count))
        return frozenset(tokens[: count.value] if count.value else ())
