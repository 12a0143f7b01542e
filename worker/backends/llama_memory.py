"""The KV cache of one libllama context, as ``worker.backends.llama_pool`` wants it."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy

from worker.backends.llama_pool import Traits

#: The library's bound of sequences in one context.
MAX_SEQUENCES = 256


_BYTES = ctypes.POINTER(ctypes.c_uint8)


class StateLost(Exception):
    """A sequence could not be copied out of the KV cache; what is in there is not known."""


def read_traits(model: Any) -> Traits:
    """What can be done to a sequence of this model."""
    recurrent = llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model)
    return Traits(window=llama_cpp.llama_model_n_swa(model), divisible=not recurrent)


class NativeMemory:
    """``worker.backends.llama_pool.Memory`` on a context, which must outlive it."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)

    def copy(self, source: int, target: int, length: int) -> None:
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def trim(self, slot: int, length: int) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1))

    def first_position(self, slot: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, slot))

    def size(self, slot: int) -> int:
        return int(llama_cpp.llama_state_seq_get_size(self._context, slot))

    def save(self, slot: int) -> memoryview:
        # Not from ctypes, which would fill it with zeros first.
        data = numpy.empty(self.size(slot), numpy.uint8)
        saved = llama_cpp.llama_state_seq_get_data(
            self._context, data.ctypes.data_as(_BYTES), data.size, slot
        )
        if saved != data.size:
            raise StateLost(f"only {saved} of {data.size} bytes of a sequence could be saved")
        return data.data

    def restore(self, slot: int, data: memoryview) -> bool:
        source = numpy.frombuffer(data, numpy.uint8).ctypes.data_as(_BYTES)
        return bool(
            llama_cpp.llama_state_seq_set_data(self._context, source, len(data), slot) == len(data)
        )
