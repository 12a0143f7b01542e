"""Vectors without a model: how often an input has which bytes, so that texts differ."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from protocol.messages import ModelKind
from worker.backends.base import EmbedInput

#: Of a vector.
DIMENSIONS = 8


class Behaviour(Protocol):
    """What an embedder needs of a script."""

    @property
    def kind(self) -> ModelKind: ...

    @property
    def prefill_delay_s(self) -> float: ...


class SimulatedEmbedder:
    """See ``base.Embedder``. ``strike`` causes the faults that are due at an input."""

    batch_tokens = 64
    batch_sequences = 4

    def __init__(self, script: Behaviour, strike: Callable[[str], None]) -> None:
        self._script = script
        self._strike = strike

    @property
    def dimensions(self) -> int:
        return 1 if self._script.kind is ModelKind.RERANK else DIMENSIONS

    def encode_input(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_pair(self, query: str, document: str) -> list[int]:
        return list(f"{query}\n{document}".encode())

    def embed(
        self, inputs: Sequence[EmbedInput], advance: Callable[[], None]
    ) -> list[bytes | None]:
        for wanted in inputs:
            text = bytes(token for token in wanted.tokens if token < 256)
            self._strike(text.decode(errors="replace"))
        time.sleep(self._script.prefill_delay_s)
        advance()
        return [self._vector(wanted) for wanted in inputs]

    def _vector(self, wanted: EmbedInput) -> bytes:
        counts = [1.0] * DIMENSIONS
        for place, token in enumerate(wanted.tokens):
            counts[(token + place) % DIMENSIONS] += token
        if self._script.kind is ModelKind.RERANK:
            return struct.pack("<f", counts[0] / sum(counts))
        counts = counts[: wanted.dimensions]
        length = math.hypot(*counts)
        return struct.pack(f"<{len(counts)}f", *(count / length for count in counts))
