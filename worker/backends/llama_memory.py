"""The KV cache of one libllama context, as ``worker.backends.llama_keep`` wants it."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy

from worker.backends.llama_keep import Traits

#: The library's bound of sequences in one context is 256; one is for copies.
MAX_SEQUENCES = 255

_FLAGS = (llama_cpp.LLAMA_STATE_SEQ_FLAGS_NONE, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
_BYTES = ctypes.POINTER(ctypes.c_uint8)


class StateLost(Exception):
    """A sequence could not be copied out of the KV cache; what is in there is not known."""


def read_traits(model: Any) -> Traits:
    """What can be done to a sequence of this model."""
    hybrid = llama_cpp.llama_model_is_hybrid(model)
    recurrent = llama_cpp.llama_model_is_recurrent(model)
    return Traits(
        window=llama_cpp.llama_model_n_swa(model),
        divisible=not (recurrent or hybrid),
        takes_cells=hybrid or not recurrent,
    )


def choose_slots(sequences: int, traits: Traits) -> int:
    """Sequences to create a context for, if so many run at once.

    One more each for what has just ended, and one for copies; but not where each takes
    memory for its state.
    """
    return sequences if traits.has_state else min(2 * sequences, MAX_SEQUENCES) + 1


class NativeMemory:
    """``worker.backends.llama_keep.Memory`` on a context, which must outlive it."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)

    def copy(self, source: int, target: int, length: int, start: int = 0) -> None:
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, start, length)

    def trim(self, slot: int, length: int) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1))

    def first_position(self, slot: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, slot))

    def size(self, slot: int, *, partial: bool = False) -> int:
        return int(llama_cpp.llama_state_seq_get_size_ext(self._context, slot, _FLAGS[partial]))

    def save(self, slot: int, *, partial: bool = False) -> memoryview:
        # Not from ctypes, which would fill it with zeros first.
        data = numpy.empty(self.size(slot, partial=partial), numpy.uint8)
        saved = llama_cpp.llama_state_seq_get_data_ext(
            self._context, data.ctypes.data_as(_BYTES), data.size, slot, _FLAGS[partial]
        )
        if saved != data.size:
            raise StateLost(f"only {saved} of {data.size} bytes of a sequence could be saved")
        return data.data

    def restore(self, slot: int, data: memoryview, *, partial: bool = False) -> bool:
        source = numpy.frombuffer(data, numpy.uint8).ctypes.data_as(_BYTES)
        restored = llama_cpp.llama_state_seq_set_data_ext(
            self._context, source, len(data), slot, _FLAGS[partial]
        )
        return bool(restored == len(data))
