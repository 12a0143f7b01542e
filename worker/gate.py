"""A constraint that holds from a certain text on: what a model thinks before is free."""

from __future__ import annotations

from collections.abc import Callable

from worker.backends.base import TokenMask


class GatedMask:
    """Allows every token until ``closer`` was written, and from then on what ``mask`` does.

    Text that a token has behind ``closer`` is not told to ``mask``: closers are tokens
    of their own in the vocabularies of models that think. See ``base.TokenMask``.
    """

    def __init__(
        self, mask: TokenMask, closer: bytes, token_bytes: Callable[[int], bytes], vocab_size: int
    ) -> None:
        self._mask = mask
        self._closer = closer
        self._token_bytes = token_bytes
        self._everything = b"\xff" * ((vocab_size + 7) // 8)
        self._tail = b""
        self._open = False

    def allowed(self) -> bytes | bytearray | memoryview:
        return self._mask.allowed() if self._open else self._everything

    def accept(self, token: int) -> None:
        if self._open:
            self._mask.accept(token)
            return
        written = self._tail + self._token_bytes(token)
        self._open = self._closer in written
        self._tail = written[-len(self._closer) :]
