"""Text to tokens and back with libllama's vocabulary."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import compress, repeat
from typing import Any

import llama_cpp

from worker.backends.base import PromptRefused, TokenTable, is_mark
from worker.backends.llama_text import Alphabet, with_stack_for

_NO_TOKEN = -1  # LLAMA_TOKEN_NULL
_BPE = llama_cpp.LLAMA_VOCAB_TYPE_BPE
_SENTENCE_PIECE = llama_cpp.LLAMA_VOCAB_TYPE_SPM
_BYTE = llama_cpp.LLAMA_TOKEN_ATTR_BYTE
_CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
_USER_DEFINED = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED


class Vocabulary:
    """The tokens of one loaded model; ``model`` must outlive it."""

    def __init__(self, model: Any) -> None:
        vocab = llama_cpp.llama_model_get_vocab(model)
        self._vocab = vocab
        self._pieces: dict[int, bytes] = {}
        #: By markers, what is shown of special tokens.
        self._shown: dict[frozenset[str], dict[int, bytes]] = {}
        self.size = llama_cpp.llama_vocab_n_tokens(vocab)
        ends = map(llama_cpp.llama_vocab_is_eog, repeat(vocab, self.size), range(self.size))
        self.end_tokens = frozenset(compress(range(self.size), ends))
        #: The one to end an answer with.
        self.end_token = self._choose_end(llama_cpp.llama_vocab_eos(vocab))
        self.suppressed_tokens = self._read_suppressed()
        self._bos = llama_cpp.llama_vocab_bos(vocab)
        self._add_bos = llama_cpp.llama_vocab_get_add_bos(vocab) and self._bos != _NO_TOKEN
        self._is_split_first = llama_cpp.llama_vocab_type(vocab) == _BPE
        self._alphabet = self._read_alphabet()
        self.bos_text = self._text(self._bos)
        self.eos_text = self._text(llama_cpp.llama_vocab_eos(vocab))

    def encode(self, text: str, *, param: str, add_bos: bool = True) -> list[int]:
        """Tokenise; special tokens are recognised by their text.

        With ``add_bos`` the beginning-of-sequence token comes first if the vocabulary
        wants one, and once only, should the text bring its own. Raises ``PromptRefused``.
        """
        # Not with the library's own special tokens: it would append EOS as well.
        encoded = self._encode(text, param=param, add_special=False, parse_special=True)
        if add_bos and self._add_bos and (not encoded or encoded[0] != self._bos):
            encoded.insert(0, self._bos)
        return encoded

    def encode_whole(self, text: str, *, param: str) -> list[int]:
        """Tokenise with all that the library adds at both ends. Raises ``PromptRefused``."""
        return self._encode(text, param=param, add_special=True, parse_special=True)

    def encode_pair(self, query: str, document: str) -> list[int]:
        """A query and a document as models were trained to compare them.

        ``[CLS] query [SEP] document [SEP]`` for a BERT; ``<s> query </s></s> document
        </s>`` for those that have an end of text besides. Raises ``PromptRefused``.
        """
        vocab = self._vocab
        separator = llama_cpp.llama_vocab_sep(vocab)
        eos = llama_cpp.llama_vocab_eos(vocab)
        seps = [separator] if llama_cpp.llama_vocab_get_add_sep(vocab) else []
        end = [eos if eos != _NO_TOKEN else separator]
        if not llama_cpp.llama_vocab_get_add_eos(vocab):
            end = []
        between = [token for token in (*end, *seps) if token != _NO_TOKEN]
        after = end or seps
        # Not with special tokens: none of what is compared may end it.
        first = self._encode(query, param="query", add_special=False, parse_special=False)
        second = self._encode(document, param="documents", add_special=False, parse_special=False)
        start = [self._bos] if self._add_bos else []
        return [*start, *first, *between, *second, *(t for t in after if t != _NO_TOKEN)]

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

    def table(self) -> TokenTable:
        """See ``Backend.vocabulary``."""
        return TokenTable(
            pieces=[self._read_piece(token) for token in range(self.size)],
            special={token: text for token in range(self.size) if (text := self._mark(token))},
            end_tokens=self.end_tokens,
            encode=lambda text: self._encode(
                text, param="response_format", add_special=False, parse_special=False
            ),
        )

    def _encode(
        self, text: str, *, param: str, add_special: bool, parse_special: bool
    ) -> list[int]:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise PromptRefused(f"the text is not valid Unicode: {error}", param=param) from error
        if self._alphabet is not None:
            self._alphabet.check(text, parse_special=parse_special, param=param)

        def tokenize() -> list[int] | None:
            return self._tokenize(data, parse_special=parse_special, add_special=add_special)

        if self._is_split_first:
            encoded = with_stack_for(text, tokenize, param=param)
        else:
            encoded = tokenize()
        if encoded is None:
            raise PromptRefused("the text cannot be tokenised", param=param)
        if _NO_TOKEN in encoded:
            raise PromptRefused("the model has no token for a part of the text", param=param)
        return encoded

    def _tokenize(self, data: bytes, *, parse_special: bool, add_special: bool) -> list[int] | None:
        capacity = len(data) + 8
        tokens = (llama_cpp.llama_token * capacity)()
        count = llama_cpp.llama_tokenize(
            self._vocab, data, len(data), tokens, capacity, add_special, parse_special
        )
        return None if count < 0 else tokens[:count]

    def _mark(self, token: int) -> str:
        """The name of a special token, nothing for others."""
        attributes = llama_cpp.llama_vocab_get_attr(self._vocab, token)
        if attributes & _CONTROL:
            return self._text(token)
        if attributes & _USER_DEFINED:
            text = self._text(token)
            return text if is_mark(text) else ""
        return ""

    def _read_piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def _text(self, token: int) -> str:
        if token == _NO_TOKEN:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")

    def _read_alphabet(self) -> Alphabet | None:
        """What can be written, where that is not everything."""
        if llama_cpp.llama_vocab_type(self._vocab) != _SENTENCE_PIECE:
            return None
        kinds: dict[int, list[int]] = {_BYTE: [], _CONTROL: [], _USER_DEFINED: []}
        for token in range(self.size):
            attributes = llama_cpp.llama_vocab_get_attr(self._vocab, token)
            for kind, tokens in kinds.items():
                if attributes & kind:
                    tokens.append(token)
            if len(kinds[_BYTE]) == 256:
                return None
        return Alphabet(
            map(self._text, range(self.size)),
            special=map(self._text, kinds[_USER_DEFINED]),
            control=map(self._text, kinds[_CONTROL]),
        )

    def _choose_end(self, eos: int) -> int:
        return eos if eos in self.end_tokens else min(self.end_tokens, default=0)

    def _read_suppressed(self) -> frozenset[int]:
        count = ctypes.c_int32()
        tokens = llama_cpp.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(count))
        return frozenset(tokens[: count.value] if count.value else ())
