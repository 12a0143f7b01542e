"""KV caches of earlier sequences, for prompts that begin as they did.

mlx-lm has such a store, ``LRUPromptCache``. It is not used because its search for
an entry that is longer than the prompt takes quadratic time (seconds, in the thread
that every sequence waits for, where a new conversation shares its system prompt
with a long one), and because a hit does not make an entry recent.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from worker.backends.prefixes import MAX_KEPT, Tokens, common_length, token_array

#: One cache object of mlx-lm per layer.
KVCaches = list[Any]

#: Part of the memory that the kept caches may take unless the load says how much.
DEFAULT_SHARE = 1 / 8


def default_bytes() -> int:
    """``DEFAULT_SHARE`` of what Metal recommends to use, or else of the physical memory."""
    if mx.metal.is_available():
        memory = int(mx.device_info()["max_recommended_working_set_size"])
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(memory * DEFAULT_SHARE)


def can_always_trim(model: Any, context_length: int) -> bool:
    """Whether the model's caches can be cut back to any length, however full they are.

    A sliding window forgets what leaves it, and a recurrent state has no tokens:
    these are of use only where a prompt goes on from their very end.
    """
    return all(
        part.is_trimmable() and getattr(part, "max_size", context_length + 1) > context_length
        for part in _parts(make_prompt_cache(model))
    )


def _parts(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches themselves, where a layer has a list of them."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from _parts(cache.caches)
        else:
            yield cache


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The KV cache after some tokens."""

    tokens: Tokens
    caches: KVCaches
    nbytes: int
    trimmable: bool

    @classmethod
    def of(cls, tokens: list[int], caches: KVCaches) -> Snapshot:
        """``caches``, extracted from a batch, belong to the snapshot from now on."""
        for part in _parts(caches):
            if isinstance(part, ArraysCache):  # else they are copies already
                states: Any = part.cache
                copies: Any = [each if each is None else mx.contiguous(each) for each in states]
                part.cache = copies
        nbytes = sum(cache.nbytes for cache in caches)
        return cls(token_array(tokens), caches, nbytes, can_trim_prompt_cache(caches))

    def usable(self, prompt: Tokens) -> int:
        """How many tokens of a prompt it saves; the last is always left to compute."""
        common = min(common_length(self.tokens, prompt), len(prompt) - 1)
        return common if self.trimmable or common == len(self.tokens) else 0

    def beginning(self, length: int) -> KVCaches:
        """Caches of the first ``length`` tokens, which must be ``usable``.

        Arrays are shared, and copied once they are written to.
        """
        caches = copy.deepcopy(self.caches)
        if length < len(self.tokens):
            trim_prompt_cache(caches, len(self.tokens) - length)
        return caches


class PromptCache:
    """The snapshots used last, within ``max_bytes``."""

    def __init__(self, max_bytes: int, max_entries: int = MAX_KEPT) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._entries: list[Snapshot] = []  # the one used last at the end

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes in the kept arrays."""
        return sum(entry.nbytes for entry in self._entries)

    def keep(self, snapshot: Snapshot) -> None:
        """Keep a snapshot in place of those that it makes superfluous.

        One that is larger than the bound is not kept and drives nothing out.
        """
        if not snapshot.tokens or snapshot.nbytes > self._max_bytes:
            return
        for entry in self._entries:
            if entry.trimmable and _begins(entry.tokens, snapshot.tokens):
                self._touch(entry)
                return
        self._entries = [entry for entry in self._entries if not self._superseded(entry, snapshot)]
        while self._entries and (
            len(self._entries) >= self._max_entries
            or self.nbytes + snapshot.nbytes > self._max_bytes
        ):
            del self._entries[0]
        # Unevaluated, they would keep alive the arrays of the whole batch. The GPU
        # may take its time, though: nothing waits for the result here.
        evaluate: Any = mx.async_eval  # untyped
        evaluate([cache.state for cache in snapshot.caches])
        self._entries.append(snapshot)

    def find(self, prompt: Tokens) -> tuple[Snapshot | None, int]:
        """The snapshot that saves most of a prompt, and how many tokens that is."""
        best, most = None, 0
        for entry in self._entries:
            usable = entry.usable(prompt)
            if usable and usable >= most:
                best, most = entry, usable
        if best is not None:
            self._touch(best)
        return best, most

    def common(self, prompt: Tokens) -> int:
        """The longest beginning that a prompt shares with any entry, usable or not."""
        return max((common_length(entry.tokens, prompt) for entry in self._entries), default=0)

    def clear(self) -> None:
        self._entries.clear()

    def _touch(self, entry: Snapshot) -> None:
        position = next(i for i, each in enumerate(self._entries) if each is entry)
        self._entries.append(self._entries.pop(position))

    @staticmethod
    def _superseded(entry: Snapshot, by: Snapshot) -> bool:
        if by.trimmable:
            return _begins(by.tokens, entry.tokens)
        return entry.tokens == by.tokens


def _begins(tokens: Tokens, beginning: Tokens) -> bool:
    return len(beginning) <= len(tokens) and common_length(tokens, beginning) == len(beginning)
