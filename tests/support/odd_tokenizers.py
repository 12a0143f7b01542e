"""Tokenizers for a tiny GGUF with which some text kills llama.cpp."""

from __future__ import annotations

import struct
from collections.abc import Callable

import gguf

from tests.support.tiny_vocab import CONTROL_TOKENS, END_OF_TEXT, TURN_END, TinyVocab

AddTokenizer = Callable[[gguf.GGUFWriter, TinyVocab], None]

#: So much of its table of characters a file has that was cut short: for ASCII.
_UNITS = 128


def add_cut_unigram(writer: gguf.GGUFWriter, vocab: TinyVocab) -> None:
    """A unigram tokenizer whose table for Unicode normalisation was cut short.

    At the first character beyond ASCII the library throws what nobody catches.
    """
    _add_spelled_out(writer, vocab, "t5")
    units = struct.pack(f"<{_UNITS}I", *([0] * _UNITS))
    table = struct.pack("<I", len(units)) + units + b"\0"
    writer.add_precompiled_charsmap(table)


def add_sentencepiece(writer: gguf.GGUFWriter, vocab: TinyVocab) -> None:
    """A SentencePiece tokenizer that can't fall back on bytes, for what is no token."""
    _add_spelled_out(writer, vocab, "llama")


def _add_spelled_out(writer: gguf.GGUFWriter, vocab: TinyVocab, model: str) -> None:
    tokens = [
        token.replace("\u0120", "\N{LOWER ONE EIGHTH BLOCK}").replace("\u010a", "\n")
        for token in vocab.tokens
    ]
    unknown = vocab.id_of(END_OF_TEXT)
    kinds = {vocab.id_of(token): gguf.TokenType.CONTROL for token in CONTROL_TOKENS}
    kinds[unknown] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types(
        [kinds.get(index, gguf.TokenType.NORMAL) for index in range(len(tokens))]
    )
    writer.add_unk_token_id(unknown)
    writer.add_eos_token_id(vocab.id_of(TURN_END))
    writer.add_add_bos_token(False)
