"""The input of one ``llama_decode`` call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp


class DecodeBatch:
    """Up to ``capacity`` tokens of any sequences.

    The arrays belong to Python: writing to them directly is several times
    faster than through the pointers of a ``llama_batch_init`` structure.
    """

    def __init__(self, capacity: int) -> None:
        self.size = 0
        self._tokens = (llama_cpp.llama_token * capacity)()
        self._positions = (llama_cpp.llama_pos * capacity)()
        self._sequences = (llama_cpp.llama_seq_id * capacity)()
        self._outputs = (ctypes.c_int8 * capacity)()
        # Each token belongs to one sequence, whose id is read through a pointer.
        self._counts = (ctypes.c_int32 * capacity)(*([1] * capacity))
        pointer = ctypes.POINTER(llama_cpp.llama_seq_id)
        width = ctypes.sizeof(llama_cpp.llama_seq_id)
        base = ctypes.addressof(self._sequences)
        self._sequence_pointers = (pointer * capacity)(
            *(ctypes.cast(base + i * width, pointer) for i in range(capacity))
        )
        self.native = llama_cpp.llama_batch(
            token=self._tokens,
            pos=self._positions,
            n_seq_id=self._counts,
            seq_id=self._sequence_pointers,
            logits=self._outputs,
        )

    def clear(self) -> None:
        self.size = 0

    def add(self, token: int, position: int, sequence: int) -> None:
        """Append a token whose logits are wanted; its row is the size before the call."""
        row = self.size
        self._tokens[row] = token
        self._positions[row] = position
        self._sequences[row] = sequence
        self._outputs[row] = 1
        self.size = row + 1

    def add_pooled(self, tokens: Sequence[int], position: int, sequence: int) -> None:
        """Append part of a sequence that is pooled: all of its tokens are outputs."""
        self.add_prompt(tokens, position, sequence, complete=True)
        self._outputs[self.size - len(tokens) : self.size] = [1] * len(tokens)

    def add_prompt(
        self, tokens: Sequence[int], position: int, sequence: int, *, complete: bool
    ) -> None:
        """Append part of a prompt; logits are wanted for its last token if it is ``complete``."""
        count = len(tokens)
        start, end = self.size, self.size + count
        self._tokens[start:end] = list(tokens)
        self._positions[start:end] = list(range(position, position + count))
        self._sequences[start:end] = [sequence] * count
        self._outputs[start:end] = [0] * count
        self._outputs[end - 1] = complete
        self.size = end
