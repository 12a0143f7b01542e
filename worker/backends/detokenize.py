"""Incremental detokenising for vocabularies whose tokens stand for bytes."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class ByteDetokenizer:
    """Decodes one answer as UTF-8, whatever way its characters are cut into tokens.

    ``piece`` gives a token's bytes; tokens without text, as the special ones,
    give none. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token: int) -> str:
        return self._decode(self._piece(token))

    def finish(self) -> str:
        return self._decode(b"", final=True)
